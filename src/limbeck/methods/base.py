"""What every method is: an ``nn.Module`` whose ``forward(batch)`` returns named losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.losses.logits import IGNORE
from limbeck.teachers.cached import Rows
from limbeck.teachers.frozen import FrozenTeacher

LABEL_TERMS = ("ce", "aug", "dkd")
"""Names of terms that count samples with a label alone."""


class Losses(dict[str, Tensor]):
    """Weighted loss terms by name; each a scalar that carries gradient."""

    @property
    def total(self) -> Tensor:
        """The sum of the terms: what is backpropagated. Every term gets one and the same upstream gradient."""
        return reduce(add, map(Tensor.float, self.values()))


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own trainable parameters and weights of the terms.

    trainable: shell patterns over ``method.named_parameters()`` names; the default trains everything that requires gradient.
    weights: weights of terms that differ from the method's own during this stage.
    """

    name: str = "train"
    trainable: tuple[str, ...] = ("*",)
    weights: Mapping[str, float] = field(default_factory=dict)


class Method(nn.Module):
    """A distillation method: owns the student, the teachers and the adapters between them.

    Subclasses name themselves (``name``), declare a dataclass of hyper-parameters (``Config``), set ``student`` (an ``nn.Module``),
    may set ``teacher`` (a `FrozenTeacher`, which is not a submodule, so that it is in no checkpoint, optimiser or DDP bucket) and
    ``weights`` (term name -> float), and write ``forward``.

    unlabelled_beside: where a part of the training pictures is labelled, batches hold labelled ones and, beside them, as many others as
    ``unlabelled``; else all stand among each other, those without label under -100. reads_mixtures: whether it knows what to make of
    pictures that are mixed of two (``mixed_labels``, ``mixed_share``).
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type]
    needs_teacher: ClassVar[bool] = True
    unlabelled_beside: ClassVar[bool] = False
    reads_mixtures: ClassVar[bool] = False
    uncached: ClassVar[str] = "it does not say what to keep of its teacher (Method.record)"

    student: nn.Module
    teacher: FrozenTeacher | None = None
    weights: dict[str, float]

    # Set by the engine; None: not known yet. For schedules: optimiser steps taken so far, of the whole run, and of an epoch.
    steps_done: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    # For memories: number of training samples, and their labels [n].
    train_size: int | None = None
    train_labels: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.weights = {}

    @classmethod
    def learns_from_teacher(cls, hyper: Mapping[str, Any]) -> bool:
        """Whether it needs a teacher with these hyper-parameters."""
        return cls.needs_teacher

    def stages(self) -> Sequence[Stage]:
        """The stages in order. Default: one stage over everything trainable."""
        return (Stage(),)

    def prepare(self, batch: Batch) -> None:
        """Look at one batch before training: check shapes, build adapters. Called once, on the final device, under no_grad.

        Raises `BadInput` where student, teacher and data do not fit.
        """

    def survey(self, batches: Iterable[Batch]) -> None:
        """Look at the whole training data once, before training: fit what is fitted and not trained (directions, banks).

        Called after `prepare`, on the device, under no_grad, by every process with all of the data, unaugmented and in order; also when a
        run is resumed, so that it must depend on nothing else. The default needs no look, and none is taken.
        """

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Choose on validation data what is chosen and not trained (a mixture of heads); called before a student is measured there.

        On the device, under no_grad, in eval mode. What is chosen belongs into buffers, so that it is kept with the student.
        """

    def forward(self, batch: Batch) -> Losses:
        """The weighted loss terms of one batch."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(batch) -> Losses")

    def units(self, batch: Batch) -> int | Mapping[str, int]:
        """Over how many things this batch's losses are means (samples, answer tokens): the engine weighs micro-batches and processes
        by it, so that however a batch is split, its gradient is that of the whole. Where terms are means over different things: by term,
        the same ones for every batch; a term that is not named is a mean over samples.

        The default: those of `LABEL_TERMS` are means over the labels other than -100."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return len(batch["ids"])
        return dict.fromkeys(LABEL_TERMS, int(np.count_nonzero(labels.numpy(force=True) != IGNORE)))

    @classmethod
    def recorded(cls, hyper: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of its hyper-parameters (JSON values) that `record` depends on: a cache that was written under others is refused."""
        return {}

    def record(self, batch: Batch, top_k: int) -> dict[str, Rows]:
        """What a teacher cache keeps of the teacher for this batch, by entry; called on the device, under no_grad.

        top_k: ids kept of a distribution. A method that defines it finds the same entries, joined to a batch, in ``batch["taught"]``
        when it trains from a cache, is given a `CachedTeacher` as teacher, and calls none. One that does not is refused with ``uncached``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define record(batch, top_k) to learn from a cache")

    def after_step(self, step: int) -> None:
        """Called after optimiser step number ``step`` (from 1): EMA, queues, memory banks, schedules of weights."""

    def deployable(self) -> nn.Module:
        """The student alone, adapters dropped."""
        return self.student

    def teachers(self) -> Iterable[FrozenTeacher]:
        """Every teacher this method owns: the engine places them on the device."""
        return () if self.teacher is None else (self.teacher,)

    def weigh(self, **terms: Tensor) -> Losses:
        """Multiply raw terms by ``self.weights``; a name without a weight counts once."""
        for name, weight in self.weights.items():
            if weight != 1 and name in terms:
                terms[name] = terms[name] * weight
        return Losses(terms)

    def needs(self, term: str) -> bool:
        """Whether a term's weight is not zero: a route whose weight is zero need not run."""
        return self.weights.get(term, 1.0) != 0
