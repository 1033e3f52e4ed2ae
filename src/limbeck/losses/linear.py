"""From hidden states and head weights straight to the loss: the logits of all positions never exist at once.

A head over a large vocabulary is where a distillation step meets its memory: [tokens, V] for student and teacher, and as much again for
each softmax, its gradient and the copies between them. Here the positions are taken a chunk at a time. The gradient with respect to
the logits has a closed form for every term, is written over the chunk's own logits, and leaves as two matrix products: into the hidden
states and, where the head trains, into its weights. What stays is a chunk of logits a side and the gradients themselves. Nothing is
approximated::

    student = LinearLogits(student_hidden, Head(student.lm_head.weight))
    teacher = LinearLogits(teacher_hidden, Head(teacher.lm_head.weight))
    terms = losses({"ce": CrossEntropy(student, labels), "kd": Divergence(student, teacher, temperature=2.0)}, weights={"kd": 0.5})
    sum(terms.values()).backward()

Terms that share a side share its logits: one pass for all of them. Terms that look at few logits a position (`BiLD`, `DBiLD`) send back
a sparse gradient: no matrix product with the vocabulary at all.

The gradient is taken in the forward pass, for the sum of the weighted terms. Backward multiplies it by the gradient of that sum; only
where the terms arrive there with different gradients (one of them alone, or weighed again outside) are the logits computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.losses._common import LOG_ZERO, check_choice, check_mask
from limbeck.losses.bild import Branch, KneeCurve, Options, Pairs, bild_options, candidates, dbild_options, difference_at
from limbeck.losses.bild import Divergence as Direction
from limbeck.losses.logits import IGNORE, check_divergence, divergence_of_log_probs, log_probabilities
from limbeck.losses.logits import Divergence as Kind
from limbeck.losses.top_k import TopK, teacher_buckets

NOTHING = -1e30  # the logit of an id at -inf: finite, also divided by a temperature
CHUNK_ROWS = 192
"""Positions of a chunk: with fewer, the matrix products wait for the weights."""
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}
"""Bytes of one side's chunk of logits, where they hold more than `CHUNK_ROWS`."""
BLOCK_BYTES = {"cpu": 2**20, "cuda": 32 * 2**20}
"""Elementwise work goes through a chunk in blocks of this size: on a CPU they stay in the cache of a core."""
BLOCKS = 6  # that a term holds at once
FLOAT16_LIFT = 2**12  # the most that gradients of an average are multiplied by before products in float16
FLOAT16_ROWS = 2**10  # positions that may add up in one with gradients of 1: that leaves a factor of 64 to the hidden states
DENSE_BELOW = 8  # so many times K ids: matrix products with all of them are quicker than picking K a position


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head: ``z = scale * (hidden @ weight.T + bias)`` and, where there is a softcap, ``softcap * tanh(z / softcap)``.

    weight: [V, D]; bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits [..., V] that are not computed: hidden states [..., D] and the head that would. Raises ValueError where these do not fit."""

    hidden: Tensor
    head: Head

    def __post_init__(self) -> None:
        if self.hidden.shape[-1] != self.head.weight.shape[-1]:
            raise ValueError(
                f"hidden states {list(self.hidden.shape)} do not fit a head of weight {list(self.head.weight.shape)} ([V, D])"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.weight.shape[0]))


Logits = LinearLogits | Tensor
"""Logits to come, or those of a head that is not linear: a tensor [..., V], which is taken through in chunks, too."""


@dataclass(frozen=True, eq=False)
class Term:
    """What is compared: a term of `losses`. The teacher's side gets no gradient."""

    student: Logits

    @property
    def sides(self) -> tuple[Logits, ...]:
        """Whose logits it reads, the student's first."""
        return (self.student,)

    def count(self, mask: Tensor | None) -> int | Tensor:
        """Over how many positions its mean is taken; at least 1."""
        positions = self.student.shape[:-1].numel() if mask is None else mask.sum()
        return max(positions, 1) if isinstance(positions, int) else positions.clamp_min(1)

    def rows(self, mask: Tensor | None) -> tuple[Tensor, ...]:
        """What it knows of each position that counts, besides the logits: tensors [M, ...]."""
        return ()


class DenseTerm(Term):
    """A term whose gradient reaches every logit."""

    def dense(self, logits: list[Tensor], learns: bool, *rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a block of positions: values [r] and, where the student ``learns``, their gradient with respect to its logits, [r, V] or
        the first of them.

        logits: [r, V] a side, not to be written to. rows: see `rows`.
        """
        raise NotImplementedError


class SparseTerm(Term):
    """A term whose gradient reaches a few logits of each position."""

    def candidates(self, logits: list[Tensor]) -> Tensor:
        """Of a chunk of positions: the ids [n, K] that are compared. logits: [n, V] a side."""
        raise NotImplementedError

    def sparse(self, logits: list[Tensor], learns: bool) -> tuple[Tensor, Tensor | None]:
        """Values [M] from the logits [M, K] of each side at `candidates` and, where the student ``learns``, their gradient [M, K]."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class CrossEntropy(DenseTerm):
    """`losses.cross_entropy`. labels: int64 [...], -100 where ignored; the mean is over the others."""

    labels: Tensor

    def __post_init__(self) -> None:
        if self.labels.shape != self.student.shape[:-1]:
            raise ValueError(f"labels {list(self.labels.shape)} do not match the positions of {list(self.student.shape)}")

    def count(self, mask: Tensor | None) -> Tensor:
        return (_flat(self.labels, mask, 0) != IGNORE).sum().clamp_min(1)

    def rows(self, mask: Tensor | None) -> tuple[Tensor, ...]:
        return (_flat(self.labels, mask, 0),)

    def dense(self, logits: list[Tensor], learns: bool, *rows: Tensor) -> tuple[Tensor, Tensor | None]:
        [z], [labels] = logits, rows
        q, normaliser = _softmax(z)
        counted = labels != IGNORE
        labels = labels.where(counted, 0).unsqueeze(-1)
        values = (normaliser - z.gather(-1, labels).squeeze(-1)).where(counted, 0)
        if not learns:
            return values, None
        q.scatter_add_(-1, labels, q.new_full((), -1).expand_as(labels))
        return values, q.masked_fill_(~counted.unsqueeze(-1), 0)


@dataclass(frozen=True, eq=False)
class Divergence(DenseTerm):
    """`losses.kl_divergence`, with its arguments. Ids that only one side's head has are left out (-inf), not taken for logits of 0.

    vocabulary: the first ids of each head that count; None is all that both have.
    """

    teacher: Logits
    temperature: float = 1.0
    kind: Kind = "forward"
    beta: float = 0.5
    scale_by_t2: bool = True
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        check_divergence(self.temperature, self.kind, self.beta)
        _check_pair(self.student, self.teacher, self.vocabulary)

    @property
    def sides(self) -> tuple[Logits, ...]:
        return self.student, self.teacher

    def dense(self, logits: list[Tensor], learns: bool, *rows: Tensor) -> tuple[Tensor, Tensor | None]:
        a, b = _shared(logits, self.vocabulary)
        if self.temperature != 1:
            a, b = a / self.temperature, b / self.temperature
        (q, of_a), (p, of_b) = _softmax(a), _softmax(b)  # of the student, of the teacher
        kind = {0.0: "forward", 1.0: "reverse"}.get(self.beta, "jsd") if self.kind == "jsd" else self.kind
        if kind == "forward":  # d KL(p || q) / da = q - p
            values = (b - a).mul_(p).sum(-1) - (of_b - of_a)
            gradient = q.sub_(p)
        elif kind == "jsd":  # d/da = (1 - beta) q (log q/m - KL(q || m))
            log_m = (q * (1 - self.beta)).add_(p, alpha=self.beta).clamp_min_(torch.finfo(q.dtype).tiny).log_()
            of_p = (b - of_b.unsqueeze(-1)).sub_(log_m).mul_(p).sum(-1)
            ratio = (a - of_a.unsqueeze(-1)).sub_(log_m)
            of_q = (ratio * q).sum(-1)
            values = self.beta * of_p + (1 - self.beta) * of_q
            gradient = ratio.sub_(of_q.unsqueeze(-1)).mul_(q).mul_(1 - self.beta)
        else:  # d KL(q || p) / da = q (log q/p - KL(q || p))
            ratio = (a - b).sub_((of_a - of_b).unsqueeze(-1))
            values = (ratio * q).sum(-1)
            if kind == "jeffreys":
                gradient = (ratio - values.unsqueeze(-1)).mul_(q).add_(q).sub_(p)
                values = values - ratio.mul_(p).sum(-1)
            else:
                gradient = ratio.sub_(values.unsqueeze(-1)).mul_(q)
        factor = self.temperature**2 if self.scale_by_t2 else 1.0
        return (values * factor if factor != 1 else values), _times(gradient, factor / self.temperature)


@dataclass(frozen=True, eq=False)
class TopKDivergence(DenseTerm):
    """`losses.top_k_divergence`: from the teacher's k likeliest ids and the mass of the rest. Ids that only the student's head has are
    left out."""

    teacher: TopK
    kind: Kind = "forward"
    beta: float = 0.5
    scale_by_t2: bool = True

    def __post_init__(self) -> None:
        check_divergence(self.teacher.temperature, self.kind, self.beta)
        if self.teacher.vocabulary > self.student.shape[-1]:
            raise ValueError(f"the teacher chose among {self.teacher.vocabulary} ids, the student has {self.student.shape[-1]}")
        if self.teacher.ids.shape[:-1] != self.student.shape[:-1]:
            raise ValueError(
                f"teacher entries {list(self.teacher.ids.shape)} do not match the positions of {list(self.student.shape)}"
            )

    def rows(self, mask: Tensor | None) -> tuple[Tensor, ...]:
        return _flat(self.teacher.ids, mask, 1), _flat(teacher_buckets(self.teacher), mask, 1)

    def dense(self, logits: list[Tensor], learns: bool, *rows: Tensor) -> tuple[Tensor, Tensor | None]:
        ids, log_p = rows
        tau = self.teacher.temperature
        a = logits[0][..., : self.teacher.vocabulary] / tau
        chosen = a.gather(-1, ids)
        within_rest, rest = _softmax(a.scatter_(-1, ids, LOG_ZERO))
        # A distribution over k + 1 outcomes, as if the rest were one id whose logit is its log-sum-exp.
        buckets = torch.cat([chosen, rest.unsqueeze(-1)], dim=-1).requires_grad_(learns)
        with torch.set_grad_enabled(learns):
            values = divergence_of_log_probs(
                log_probabilities(buckets, 1.0),
                log_p.to(buckets.dtype),
                kind=self.kind,
                beta=self.beta,
                scale=tau**2 if self.scale_by_t2 else 1.0,
                mask=None,
                reduction="none",
            )
        if not learns:
            return values, None
        gradient = torch.autograd.grad(values, buckets, torch.ones_like(values))[0] / tau
        return values.detach(), within_rest.mul_(gradient[..., -1:]).scatter_(-1, ids, gradient[..., :-1])


@dataclass(frozen=True, eq=False)
class _Difference(SparseTerm):
    teacher: Logits
    vocabulary: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.options(_check_pair(self.student, self.teacher, self.vocabulary))

    @property
    def sides(self) -> tuple[Logits, ...]:
        return self.student, self.teacher

    def options(self, vocabulary: int) -> Options:
        raise NotImplementedError

    def candidates(self, logits: list[Tensor]) -> Tensor:
        student, teacher = _shared(logits, self.vocabulary)
        return candidates(student, teacher, self.options(student.shape[-1]))

    def sparse(self, logits: list[Tensor], learns: bool) -> tuple[Tensor, Tensor | None]:
        options = self.options(_check_pair(self.student, self.teacher, self.vocabulary))
        student, teacher = logits
        student = student.requires_grad_(learns)
        with torch.set_grad_enabled(learns):
            values = difference_at(student, teacher, options)
        if not learns:
            return values, None
        return values.detach(), torch.autograd.grad(values, student, torch.ones_like(values))[0]


@dataclass(frozen=True, eq=False)
class BiLD(_Difference):
    """`losses.bild`, with its arguments; vocabulary as in `Divergence`."""

    k: int = 8
    tau: float = 3.0
    divergence: Direction = "forward"
    pairs: Pairs = "flat"

    def options(self, vocabulary: int) -> Options:
        return bild_options(vocabulary, k=self.k, tau=self.tau, divergence=self.divergence, pairs=self.pairs)


@dataclass(frozen=True, eq=False)
class DBiLD(_Difference):
    """`losses.dbild`, with its arguments; vocabulary as in `Divergence`."""

    tau: float = 3.0
    window: int | None = 100
    k_min: int = 3
    k_max: int | None = None
    divergence: Direction = "reverse"
    pairs: Pairs = "flat"
    tau_squared: bool = False
    knee_on: KneeCurve = "logits"
    branches: Sequence[Branch] = ("teacher", "student")

    def options(self, vocabulary: int) -> Options:
        return dbild_options(
            vocabulary, tau=self.tau, window=self.window, k_min=self.k_min, k_max=self.k_max, divergence=self.divergence,
            pairs=self.pairs, tau_squared=self.tau_squared, knee_on=self.knee_on, branches=self.branches,
        )  # fmt: skip


def losses(
    terms: Mapping[str, Term],
    *,
    weights: Mapping[str, float] | None = None,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Weighted terms over the same positions, as scalars in float32 (float64 where given); their sum is to be backpropagated.

    weights: of the terms, 1 where not given. They belong here rather than outside, so that one gradient serves the whole sum.
    mask: [...] bool, True where a position counts; an all-False mask gives 0, not NaN. reduction: over the positions that count.
    chunk_bytes: of one side's chunk of logits; default `CHUNK_BYTES` of the device.
    Gradient reaches the students' hidden states, weights and biases that require it, and nothing else is computed or allocated: a
    frozen head costs no weight gradient. Under autocast the matrix products run in its dtype; sums are in float32.
    Raises ValueError on a shape mismatch or a value out of range.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    if not terms:
        raise ValueError("terms is empty; expected at least one")
    first = next(iter(terms.values())).student
    check_mask(first if isinstance(first, Tensor) else first.hidden, mask)
    job = _Job.of(terms, weights or {}, mask, reduction, chunk_bytes)
    return dict(zip(terms, _Chunked.apply(job, torch.is_grad_enabled(), *job.given), strict=True))


@dataclass
class _Side:
    """One side's logits: which of the given tensors they are made of, and how."""

    hidden: int
    weight: int | None = None
    bias: int | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        self.made_of = [index for index in (self.hidden, self.weight, self.bias) if index is not None]


@dataclass
class _Job:
    """The terms with their sides resolved. given: every tensor that is read, once, [M, ...] where it is of positions; those that no
    student is made of are detached.

    peak: about the largest gradient that a position can have with respect to a logit, before any average. dtype: of the sums; half: of the
    matrix products, autocast's where it is on."""

    terms: list[Term]
    sides: list[_Side]
    sides_of: list[list[int]]
    rows: list[tuple[Tensor, ...]]
    factors: list[float | Tensor]
    averaged: bool
    peak: float
    given: list[Tensor]
    dtype: torch.dtype
    half: torch.dtype | None
    chunk_bytes: int | None

    @classmethod
    def of(
        cls, terms: Mapping[str, Term], weights: Mapping[str, float], mask: Tensor | None, reduction: str, chunk_bytes: int | None
    ) -> _Job:
        given: list[Tensor] = []
        places: dict[int, int] = {}

        def place(tensor: Tensor, of_positions: bool = False) -> int:
            if id(tensor) not in places:
                places[id(tensor)] = len(given)
                given.append(_flat(tensor, mask, 1) if of_positions else tensor)
            return places[id(tensor)]

        sides: dict[int, _Side] = {}
        for term in terms.values():
            if term.student.shape[:-1] != next(iter(terms.values())).student.shape[:-1]:
                raise ValueError("the terms are over different positions; call `losses` once for each kind of positions")
            for logits in term.sides:
                if id(logits) in sides:
                    continue
                if isinstance(logits, Tensor):
                    sides[id(logits)] = _Side(place(logits, True))
                    continue
                head = logits.head
                bias = None if head.bias is None else place(head.bias)
                sides[id(logits)] = _Side(place(logits.hidden, True), place(head.weight), bias, head.scale, head.softcap)
        order, device = list(sides), given[0].device.type
        learning = {index for term in terms.values() for index in sides[id(term.student)].made_of}
        given = [t.detach() if t.requires_grad and index not in learning else t for index, t in enumerate(given)]
        weighted = [weights.get(name, 1.0) for name in terms]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in given), torch.float32)
        counts = [term.count(mask) if reduction == "mean" else 1 for term in terms.values()]
        counts = [count.to(dtype) if isinstance(count, Tensor) else count for count in counts]
        return cls(
            terms=list(terms.values()),
            sides=list(sides.values()),
            sides_of=[[order.index(id(logits)) for logits in term.sides] for term in terms.values()],
            rows=[term.rows(mask) for term in terms.values()],
            factors=[weight / count for weight, count in zip(weighted, counts, strict=True)],
            averaged=reduction == "mean",
            peak=sum(abs(weight) for weight in weighted),
            given=given,
            dtype=dtype,
            half=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            chunk_bytes=chunk_bytes,
        )

    @property
    def in_float16(self) -> bool:
        """Whether any matrix product may be in float16."""
        return torch.float16 in (self.half, *(tensor.dtype for tensor in self.given))


class _Chunked(torch.autograd.Function):
    """`_run` under autograd; see the module's docstring for what is computed when."""

    @staticmethod
    def forward(ctx: Any, job: _Job, graph: bool, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.job = job
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        needed = [graph and tensor.requires_grad for tensor in given]
        values, ctx.gradients = _run(job, given, job.factors, needed)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given, job, gradients, ctx.gradients = ctx.saved_tensors, ctx.job, ctx.gradients, None
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            del ctx.job  # its terms hold hidden states and labels, and the loss may be kept for long
        needed = ctx.needs_input_grad[2:]
        common = _common(upstream)
        if gradients is None or common is None:
            common = _largest(upstream) if job.in_float16 else None  # a scaler's factor would not fit into the products
            upstream = upstream if common is None else tuple(None if grad is None else grad / common for grad in upstream)
            factors = [None if grad is None else grad * own for grad, own in zip(upstream, job.factors, strict=True)]
            _, gradients = _run(job, given, factors, needed)
        if common is not None and (common.device.type != "cpu" or common != 1):
            gradients = [None if gradient is None else gradient.mul_(common) for gradient in gradients]
        return (None, None, *(None if g is None else g.to(t.dtype) for g, t in zip(gradients, given, strict=True)))


def _common(upstream: tuple[Tensor | None, ...]) -> Tensor | None:
    """The gradient that every term was given, or None where they differ, or where it cannot be told without waiting for the device."""
    first, *others = upstream
    if first is None or any(other is None for other in others):
        return None
    if all(other is first or other.data_ptr() == first.data_ptr() for other in others if other is not None):
        return first
    if first.device.type == "cpu" and all(bool(other == first) for other in others):
        return first
    return None


def _largest(upstream: tuple[Tensor | None, ...]) -> Tensor:
    """Of the gradients that terms were given, by size and without sign; never 0."""
    return torch.stack([grad.abs() for grad in upstream if grad is not None]).amax().clamp_min(torch.finfo(torch.float32).tiny)


def _run(
    job: _Job, given: Sequence[Tensor], factors: Sequence[float | Tensor | None], needed: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The value of every term times its factor in ``job``, and the gradient, for what is needed, of the sum of the values times
    ``factors``; a term whose factor is None is left out."""
    with torch.no_grad(), torch.autocast(given[0].device.type, enabled=False):
        run = _Pass(job, given, factors, needed)
        for start in range(0, run.length, run.chunk):
            run.add(slice(start, start + run.chunk))
        run.add_sparse()
        values = [value * factor for value, factor in zip(run.values, job.factors, strict=True)]
        return values, [run.gradient(index) if wanted else None for index, wanted in enumerate(needed)]


class _Pass:
    """One pass over the positions, a chunk at a time."""

    def __init__(
        self, job: _Job, given: Sequence[Tensor], factors: Sequence[float | Tensor | None], needed: Sequence[bool]
    ) -> None:
        self.job, self.needed = job, needed
        first = given[job.sides[0].hidden]
        self.length, self.device = len(first), first.device
        self.given = given if job.half is None else self._cast(given, job.half)
        self.dtype = job.dtype
        self.gradients: dict[int, Tensor] = {}
        # Of each sparse term and chunk: ids and each side's logits [n, K].
        self.compared: dict[int, list[tuple[Tensor, ...]]] = {}
        self.values = [torch.zeros((), dtype=self.dtype, device=self.device) for _ in job.terms]
        row = max(self._width(side) for side in job.sides) * self.dtype.itemsize
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        most = max(1, job.chunk_bytes // row) if job.chunk_bytes else max(CHUNK_ROWS, CHUNK_BYTES[kind] // row)
        self.chunk = max(1, _equal(self.length, most))
        self.block_bytes = BLOCK_BYTES[kind]
        self.block = max(1, self.block_bytes // row)
        self.buffers = [torch.empty(self.chunk, self._width(side), dtype=self.dtype, device=self.device) for side in job.sides]
        self.learning = [any(needed[index] for index in side.made_of) for side in job.sides]
        self.lifts = [self._lift(side) for side in job.sides]
        lifts = (self.lifts[read[0]] for read in job.sides_of)
        self.factors = [f if f is None or lift == 1 else f * lift for f, lift in zip(factors, lifts, strict=True)]

    def _cast(self, given: Sequence[Tensor], half: torch.dtype) -> list[Tensor]:
        """What enters a matrix product to autocast's dtype, as autocast would."""
        multiplied = {index for side in self.job.sides if side.weight is not None for index in side.made_of}
        return [t.to(half) if index in multiplied and t.dtype != torch.float64 else t for index, t in enumerate(given)]

    def _lift(self, side: _Side) -> float:
        """What the gradient of a side's logits is multiplied by before its matrix products, and these are divided by: an average over
        thousands of positions would vanish in float16. A power of two; 1 where no product is in float16."""
        if side.weight is None or self.given[side.weight].dtype != torch.float16:
            return 1.0
        positions = min(max(1, self.length), FLOAT16_LIFT) if self.job.averaged else 1
        return 2.0 ** math.floor(math.log2(positions * min(1.0, FLOAT16_ROWS / self.chunk) / (self.job.peak or 1.0)))

    def _width(self, side: _Side) -> int:
        return self.given[side.hidden].shape[-1] if side.weight is None else len(self.given[side.weight])

    def add(self, rows: slice) -> None:
        """Add the dense terms of a chunk, and note what the sparse ones compare."""
        job = self.job
        logits = [self._logits(side, buffer, rows) for side, buffer in zip(job.sides, self.buffers, strict=True)]
        for index, term in enumerate(job.terms):
            if isinstance(term, SparseTerm) and self.factors[index] is not None:
                read = [logits[side] for side in job.sides_of[index]]
                ids = term.candidates(read)
                self.compared.setdefault(index, []).append((ids, *(z.gather(-1, ids) for z in read)))
        for side in self._write_dense(logits, rows):
            self._backward_dense(side, logits[side], rows)

    def add_sparse(self) -> None:
        """Add the sparse terms, of many positions at once: they look at a few logits of each. No chunk of logits is needed any more."""
        self.buffers = []
        for index, noted in self.compared.items():
            term, factor, number = self.job.terms[index], self.factors[index], self.job.sides_of[index][0]
            assert isinstance(term, SparseTerm) and factor is not None
            ids, *logits = (torch.cat(parts) for parts in zip(*noted, strict=True))
            side = self.job.sides[number]
            pieces = -(-ids.numel() * self.dtype.itemsize * 4 // self.block_bytes)  # a term holds dozens of [r, K] at once
            step = -(-self.length // pieces)
            for start in range(0, self.length, step):
                rows = slice(start, start + step)
                values, gradient = term.sparse([z[rows] for z in logits], self.learning[number])
                self.values[index] += values.sum()
                if gradient is not None:
                    gradient = _through_softcap(side, logits[0][rows].detach(), gradient * factor)
                    self._backward_sparse(number, ids[rows], gradient, rows)

    def _logits(self, side: _Side, buffer: Tensor, rows: slice) -> Tensor:
        """[n, V], in the buffer."""
        hidden = self.given[side.hidden][rows]
        logits = buffer[: len(hidden)]
        if side.weight is None:
            return logits.copy_(hidden)
        weight = self.given[side.weight]
        if hidden.dtype == weight.dtype == logits.dtype:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            logits.copy_(torch.mm(hidden, weight.t()))
        if side.bias is not None:
            logits += self.given[side.bias]
        if side.scale != 1:
            logits *= side.scale
        if side.softcap is not None:
            logits.div_(side.softcap).tanh_().mul_(side.softcap)
        return logits

    def _write_dense(self, logits: list[Tensor], rows: slice) -> set[int]:
        """Add the values of the dense terms, and write their gradient over the logits of the sides that learn by them; returns these."""
        job = self.job
        terms = [index for index, term in enumerate(job.terms) if isinstance(term, DenseTerm) and self.factors[index] is not None]
        written = {job.sides_of[index][0] for index in terms if self.learning[job.sides_of[index][0]]}
        for side, place in zip(job.sides, logits, strict=True):
            if terms and (side.weight is None or side.bias is not None):
                place.clamp_min_(NOTHING)
        known = {index: [tensor[rows] for tensor in job.rows[index]] for index in terms}
        for start in range(0, len(logits[0]) if terms else 0, self.block):
            block = slice(start, start + self.block)
            gradients: dict[int, Tensor] = {}
            for index in terms:
                read, factor, term = job.sides_of[index], self.factors[index], job.terms[index]
                assert isinstance(term, DenseTerm) and factor is not None
                own = (tensor[block] for tensor in known[index])
                values, gradient = term.dense([logits[side][block] for side in read], self.learning[read[0]], *own)
                self.values[index] += values.sum()
                if gradient is not None:
                    gradients[read[0]] = _sum(gradients.get(read[0]), gradient.mul_(factor), logits[read[0]].shape[-1])
            for number, gradient in gradients.items():
                place = logits[number][block]
                place.copy_(_through_softcap(job.sides[number], place, gradient))
        return written

    def _backward_dense(self, number: int, gradient: Tensor, rows: slice) -> None:
        """From the gradient [n, V] of a chunk of a side's logits to what they are made of."""
        side = self.job.sides[number]
        if side.weight is None:
            self.gradient(side.hidden)[rows] += gradient
            return
        hidden, weight, alpha = self.given[side.hidden][rows], self.given[side.weight], side.scale / self.lifts[number]
        if side.bias is not None and self.needed[side.bias]:
            self.gradient(side.bias).add_(gradient.sum(0), alpha=alpha)
        gradient = gradient.to(weight.dtype)
        if self.needed[side.hidden]:
            self.gradient(side.hidden)[rows].add_(torch.mm(gradient, weight), alpha=alpha)
        if not self.needed[side.weight]:
            return
        first = side.weight not in self.gradients
        total = self.gradient(side.weight, empty=True)
        if total.dtype == weight.dtype:
            total.addmm_(gradient.t(), hidden, beta=0 if first else 1, alpha=alpha)
            return
        if first:
            total.zero_()
        step = max(1, 4 * self.block_bytes // (hidden.shape[1] * hidden.dtype.itemsize))
        for start in range(0, len(total), step):
            # Within a chunk the matrix product itself sums in float32, and rounds; over the chunks the sum is in float32.
            ids = slice(start, start + step)
            total[ids].add_(torch.mm(gradient[:, ids].t(), hidden), alpha=alpha)

    def _backward_sparse(self, number: int, ids: Tensor, gradient: Tensor, rows: slice) -> None:
        """As `_backward_dense`, from the gradient [r, K] at ids [r, K] of some positions."""
        side = self.job.sides[number]
        if side.weight is None:
            self.gradient(side.hidden)[rows].scatter_add_(-1, ids, gradient)
            return
        hidden, weight, alpha = self.given[side.hidden][rows], self.given[side.weight], side.scale / self.lifts[number]
        if len(weight) <= DENSE_BELOW * ids.shape[1]:
            self._backward_dense(number, gradient.new_zeros(len(ids), len(weight)).scatter_add_(-1, ids, gradient), rows)
            return
        if side.bias is not None and self.needed[side.bias]:
            self.gradient(side.bias).index_add_(0, ids.flatten(), gradient.flatten(), alpha=alpha)
        if self.needed[side.hidden]:
            picked = torch.nn.functional.embedding_bag(ids, weight, per_sample_weights=gradient.to(weight.dtype), mode="sum")
            self.gradient(side.hidden)[rows].add_(picked, alpha=alpha)
        if self.needed[side.weight]:
            total = self.gradient(side.weight)
            step = max(1, 4 * self.block_bytes // (ids.shape[1] * hidden.shape[1] * self.dtype.itemsize))
            for start in range(0, len(ids), step):
                block = slice(start, start + step)
                outer = gradient[block].unsqueeze(-1) * hidden[block].unsqueeze(1)  # [r, K, D]
                total.index_add_(0, ids[block].flatten(), outer.flatten(0, 1), alpha=alpha)

    def gradient(self, index: int, *, empty: bool = False) -> Tensor:
        """The sum so far for a given tensor; ``empty``: it is overwritten next where it is new."""
        if index not in self.gradients:
            make = torch.empty if empty else torch.zeros
            self.gradients[index] = make(self.given[index].shape, dtype=self.dtype, device=self.device)
        return self.gradients[index]


def workspace_bytes(rows: int, vocabularies: Sequence[int]) -> int:
    """Bytes that `losses` holds on a GPU beside its results: a chunk of float32 logits and its half-precision copy for every head that is
    read, and the blocks of elementwise work."""
    row = 4 * max(vocabularies)
    chunk = _equal(rows, max(CHUNK_ROWS, CHUNK_BYTES["cuda"] // row))
    return sum(6 * chunk * size for size in vocabularies) + BLOCKS * min(BLOCK_BYTES["cuda"], chunk * row)


def _equal(positions: int, most: int) -> int:
    """Positions of a chunk, where all are to be of one size, ``most`` at the most: a small last one would take as long as a large one."""
    chunks = max(1, -(-positions // most))
    return -(-positions // chunks)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [r, V] and log-sum-exps [r]: the likeliest id has at least 1/V, from which the normaliser follows without a
    second pass of exponentials."""
    probabilities = logits.softmax(-1)
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()


def _through_softcap(side: _Side, logits: Tensor, gradient: Tensor) -> Tensor:
    """The gradient before the softcap, from that after it and the capped logits."""
    return gradient if side.softcap is None else gradient * (1 - (logits / side.softcap).square())


def _sum(total: Tensor | None, part: Tensor, width: int) -> Tensor:
    """total [r, width] and a part of it, which may end earlier."""
    if total is None:
        return torch.nn.functional.pad(part, (0, width - part.shape[-1])) if part.shape[-1] < width else part
    total[..., : part.shape[-1]] += part
    return total


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor.mul_(factor) if factor != 1 else tensor


def _shared(logits: list[Tensor], vocabulary: int | None) -> list[Tensor]:
    """The logits of the ids that count on both sides."""
    width = min(z.shape[-1] for z in logits) if vocabulary is None else vocabulary
    return [z[..., :width] for z in logits]


def _flat(tensor: Tensor, mask: Tensor | None, trailing: int) -> Tensor:
    """The positions that count, [M, ...]; the last ``trailing`` dimensions are no positions, and without others there is one."""
    if mask is not None:
        return tensor[mask]
    positions = tensor.dim() - trailing
    return tensor if positions == 1 else tensor.flatten(0, positions - 1) if positions else tensor.unsqueeze(0)


def _check_pair(student: Logits, teacher: Logits, vocabulary: int | None) -> int:
    """How many ids are compared; ValueError where the positions differ, or a head has fewer ids."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in positions; align them first")
    both = min(student.shape[-1], teacher.shape[-1])
    if vocabulary is not None and not 1 <= vocabulary <= both:
        raise ValueError(f"vocabulary is {vocabulary}; expected 1 to {both}, the ids that both heads have")
    return vocabulary or both
