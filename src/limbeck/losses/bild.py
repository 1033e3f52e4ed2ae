"""Bi-directional logits difference: the pairwise order of the largest logits, led by either side.

BiLD (arXiv 2406.13555) compares the teacher's and the student's softmax over all differences a_i - a_j (i < j) of the top-k
logits; DBiLD (Switch-KD, arXiv 2604.14629, eq. 7-15) chooses k at each position by Kneedle and averages over the student.

No pair is ever materialised. With pair probabilities p_ij = exp(a_i - a_j - Z), the divergence of two such distributions needs
only Z and the row and column sums of p, and these are running log-sum-exps over the k logits: O(k) time and memory a position
in place of O(k^2), exact to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._common import LOG_ZERO, Reduction, check_choice, check_mask, check_same_shape, reduce, select, upcast

Branch = Literal["teacher", "student"]
Divergence = Literal["forward", "reverse"]
KneeCurve = Literal["logits", "probabilities"]
Pairs = Literal["flat", "rows"]


def kneedle(
    logits: Tensor, *, window: int | None = None, k_min: int = 3, k_max: int | None = None, on: KneeCurve = "logits"
) -> Tensor:
    """How many of the largest logits stand out, by Kneedle (Switch-KD, eq. 8-9): an integer k per position.

    The logits are sorted and scaled to the unit square; k is the 1-based rank at which the curve lies furthest below the
    diagonal from first to last. Ties take the first rank; a flat or straight curve has no knee and gives ``k_min``. The knee of
    ``exp(-i / 2)`` over 64 ranks is k = 8, its 0-based index 7.

    logits: [..., V], any float dtype. -inf (vocabulary masked out) is not part of the curve.
    window: how many of the largest logits form the curve; None takes all V.
    k_min, k_max: k is clamped into this range; ``k_max=None`` is the window. Both are capped by V.
    on: the curve of the logits, or of the probabilities (softmax keeps the order; its normaliser drops out of the knee).
    Returns int64 [...], without gradient. Raises ValueError where fewer than ``k_min`` logits can be chosen.
    """
    check_choice("on", on, ("logits", "probabilities"))
    window, k_max = _candidates(logits.shape[-1], window, k_min, k_max)
    return _knee(upcast(logits.detach().topk(window).values), k_min, k_max, on)


def bild(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = 8,
    tau: float = 3.0,
    divergence: Divergence = "forward",
    pairs: Pairs = "flat",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Bi-directional logits difference with a fixed k (BiLD, arXiv 2406.13555): the teacher-led plus the student-led branch.

    student_logits, teacher_logits: [..., V], any float dtype; the arithmetic is float32 (float64 where given). The teacher is
    detached. An id that is -inf on either side takes no part.
    k: 2..V logits a branch. k=2 leaves one pair, whose probability is 1: value and gradient are exactly 0 with flat pairs.
    tau: temperature of the pair softmax, > 0; no tau^2 factor, as in the official code.
    divergence: "forward" is KL(teacher || student), as in the official code; "reverse" is KL(student || teacher).
    pairs: "flat" is one softmax over all pairs i < j; "rows" one over each row of the k x k differences, averaged over the rows.
    mask: [...] bool, True where a position counts; an all-False mask gives 0, not NaN.
    Returns a scalar, or [...] with reduction="none". Raises ValueError on a shape mismatch or a k outside 2..V.
    """
    options = bild_options(student_logits.shape[-1], k=k, tau=tau, divergence=divergence, pairs=pairs)
    return _logits_difference(student_logits, teacher_logits, options, mask, reduction)


def dbild(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tau: float = 3.0,
    window: int | None = 100,
    k_min: int = 3,
    k_max: int | None = None,
    divergence: Divergence = "reverse",
    pairs: Pairs = "flat",
    tau_squared: bool = False,
    knee_on: KneeCurve = "logits",
    branches: Sequence[Branch] = ("teacher", "student"),
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Dynamic bi-directional logits difference (Switch-KD, arXiv 2604.14629, eq. 7-15): k is each position's knee.

    student_logits, teacher_logits: [..., V], any float dtype; the arithmetic is float32 (float64 where given). The teacher is
    detached, and the choice of k and of the ids carries no gradient. An id that is -inf on either side takes no part.
    tau: temperature of the pair softmax, > 0. window, k_min, k_max, knee_on: see `kneedle`; k_min >= 2.
    divergence: "reverse" is KL(student || teacher), eq. 14-15; "forward" is KL(teacher || student), as in `bild`.
    pairs: "flat" is one softmax over all pairs i < j; "rows" one over each row of the k x k differences, averaged over the rows
        (all rows of a matrix of differences have the same softmax, that of -a / tau).
    tau_squared: multiply by tau^2, so that the gradient does not shrink with tau; the paper shows no such factor.
    branches: "teacher" ranks by the teacher's logits (eq. 14), "student" by the student's (eq. 15); the loss is their sum.
    mask: [...] bool, True where a position counts; an all-False mask gives 0, not NaN.
    Returns a scalar, or [...] with reduction="none". Raises ValueError on a shape mismatch or an impossible range of k.
    """
    options = dbild_options(
        student_logits.shape[-1], tau=tau, window=window, k_min=k_min, k_max=k_max, divergence=divergence, pairs=pairs,
        tau_squared=tau_squared, knee_on=knee_on, branches=branches,
    )  # fmt: skip
    return _logits_difference(student_logits, teacher_logits, options, mask, reduction)


@dataclass(frozen=True)
class Options:
    """A checked choice of what `bild` and `dbild` compare. choose_k: maps a position's sorted logits to k; scale: of the loss."""

    branches: Sequence[Branch]
    window: int
    choose_k: Callable[[Tensor], Tensor]
    k_max: int
    tau: float
    divergence: Divergence
    pairs: Pairs
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("divergence", self.divergence, ("forward", "reverse"))
        check_choice("pairs", self.pairs, ("flat", "rows"))
        if not self.branches:
            raise ValueError("branches is empty; expected 'teacher', 'student' or both")
        for branch in self.branches:
            check_choice("branches", branch, ("teacher", "student"))
        if not self.tau > 0:
            raise ValueError(f"tau is {self.tau}; expected a temperature > 0")


def bild_options(
    vocabulary: int, *, k: int = 8, tau: float = 3.0, divergence: Divergence = "forward", pairs: Pairs = "flat"
) -> Options:
    """The arguments of `bild`, checked against the number of logits."""
    if not 2 <= k <= vocabulary:
        raise ValueError(f"k is {k}; expected 2 to {vocabulary}, the logits of a position (3 or more carry a signal)")

    def choose_k(led: Tensor) -> Tensor:
        return torch.full(led.shape[:-1], k, device=led.device)

    return Options(("teacher", "student"), k, choose_k, k, tau, divergence, pairs)


def dbild_options(
    vocabulary: int,
    *,
    tau: float = 3.0,
    window: int | None = 100,
    k_min: int = 3,
    k_max: int | None = None,
    divergence: Divergence = "reverse",
    pairs: Pairs = "flat",
    tau_squared: bool = False,
    knee_on: KneeCurve = "logits",
    branches: Sequence[Branch] = ("teacher", "student"),
) -> Options:
    """The arguments of `dbild`, checked against the number of logits."""
    check_choice("knee_on", knee_on, ("logits", "probabilities"))
    if k_min < 2:
        raise ValueError(f"k_min is {k_min}; expected at least 2, as one logit makes no pair (3 or more carry a signal)")
    window, k_max = _candidates(vocabulary, window, k_min, k_max)
    choose_k = partial(_knee, k_min=k_min, k_max=k_max, on=knee_on)
    return Options(branches, window, choose_k, k_max, tau, divergence, pairs, tau**2 if tau_squared else 1.0)


def _candidates(vocabulary: int, window: int | None, k_min: int, k_max: int | None) -> tuple[int, int]:
    """The window and the largest k, capped by the vocabulary."""
    window = vocabulary if window is None else min(window, vocabulary)
    k_max = window if k_max is None else min(k_max, window)
    if not 1 <= k_min <= k_max:
        raise ValueError(f"k_min is {k_min}, but at most {k_max} of {vocabulary} logits can be chosen; lower k_min")
    return window, k_max


def _knee(led: Tensor, k_min: int, k_max: int, on: KneeCurve) -> Tensor:
    """`kneedle` on logits that are sorted already. led: [..., window], largest first. Returns int64 [...]."""
    finite = led != -torch.inf
    count = finite.sum(-1, keepdim=True)
    curve = led if on == "logits" else (led - led[..., :1]).exp()
    first, last = curve[..., :1], curve.gather(-1, (count - 1).clamp_min(0))
    rank = torch.arange(led.shape[-1], device=led.device)
    gap = (1 - rank / (count - 1)) - (curve - last) / (first - last)
    below = finite & (gap > 8 * torch.finfo(gap.dtype).eps)  # not so: 0 / 0 of a flat curve, the rounding of a straight one
    return (gap.where(below, 0).argmax(-1) + 1).clamp(k_min, k_max)


def _logits_difference(
    student_logits: Tensor, teacher_logits: Tensor, options: Options, mask: Tensor | None, reduction: Reduction
) -> Tensor:
    check_same_shape(student_logits, teacher_logits)
    check_mask(student_logits, mask)
    student, teacher = select(student_logits, mask), select(teacher_logits.detach(), mask)
    ids = candidates(student, teacher, options)
    # One gather for all branches: its backward allocates one [..., V], and no half-precision vocabulary is ever upcast.
    values = difference_at(student.gather(-1, ids), teacher.gather(-1, ids), options)
    return reduce(values, mask, reduction)


def candidates(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """Which of the logits [..., V] each branch chooses from, its leader's largest first: ids int64 [..., branches * window]."""
    leaders = {"teacher": teacher.detach(), "student": student.detach()}
    return torch.cat([leaders[branch].topk(options.window).indices for branch in options.branches], dim=-1)


def difference_at(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """The sum over the branches of the divergence between the logits at `candidates`, [..., branches * window]. Returns [...]."""
    s, t = (upcast(side).unflatten(-1, (len(options.branches), options.window)) for side in (student, teacher))
    led = torch.stack(
        [(t if branch == "teacher" else s.detach())[..., i, :] for i, branch in enumerate(options.branches)], dim=-2
    )
    k = options.choose_k(led)  # [..., branches]
    s, t = s[..., : options.k_max] / options.tau, t[..., : options.k_max] / options.tau
    chosen = torch.arange(options.k_max, device=k.device) < k.unsqueeze(-1)
    chosen = chosen & (s != -torch.inf) & (t != -torch.inf)
    p, q = (t, s) if options.divergence == "forward" else (s, t)
    kl = _flat_kl(p, q, chosen) if options.pairs == "flat" else _rows_kl(p, q, chosen)  # [..., branches]
    values = kl.sum(-1)
    return values * options.scale if options.scale != 1 else values


def _flat_kl(p: Tensor, q: Tensor, chosen: Tensor) -> Tensor:
    """KL between the softmaxes of all differences a_i - a_j, i < j, of p and of q. [..., K], bool [..., K] -> [...]."""
    p, q = _centre(p, chosen), _centre(q, chosen)
    rows = _row_sums(p, chosen)
    columns = _row_sums(-p.flip(-1), chosen.flip(-1)).flip(-1)
    p_total = rows.logsumexp(-1, keepdim=True)
    q_total = _row_sums(q, chosen).logsumexp(-1, keepdim=True)
    marginal = (rows - p_total).exp() - (columns - p_total).exp()  # how often an id comes first in a pair, less how often second
    kl = (marginal * (p - q)).sum(-1) - (p_total - q_total).squeeze(-1)
    return kl.clamp_min(0).where(chosen.sum(-1) > 2, 0)  # rounding may leave -1e-7; a lone pair is certain, exactly 0


def _rows_kl(p: Tensor, q: Tensor, chosen: Tensor) -> Tensor:
    """KL between the softmaxes over j of a_i - a_j; that of -a, whatever the row. [..., K], bool [..., K] -> [...]."""
    log_p = (-p).masked_fill(~chosen, LOG_ZERO).log_softmax(-1)
    log_q = (-q).masked_fill(~chosen, LOG_ZERO).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _centre(logits: Tensor, chosen: Tensor) -> Tensor:
    """Logits with their largest at 0, and 0 where not chosen. A constant changes no difference, but costs digits."""
    largest = logits.detach().masked_fill(~chosen, LOG_ZERO).amax(-1, keepdim=True)
    return (logits - largest).masked_fill(~chosen, 0)


def _row_sums(logits: Tensor, chosen: Tensor) -> Tensor:
    """log of the sum over j > i of exp(a_i - a_j), both chosen, for each i. [..., K], bool [..., K] -> [..., K]."""
    first, second = logits.masked_fill(~chosen, LOG_ZERO), (-logits).masked_fill(~chosen, LOG_ZERO)
    later = second[..., 1:].flip(-1).logcumsumexp(-1).flip(-1)
    return first + F.pad(later, (0, 1), value=LOG_ZERO)
