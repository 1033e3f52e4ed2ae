"""BiLD: bi-directional logits difference with a fixed k, on the answer tokens of a vision-language model.

BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation, 2024, arXiv 2406.13555. The order among the
teacher's and the student's k largest logits moves into the student, as softmaxed pairwise differences.

Differences: the authors' code uses forward KL and adds a KL on prompt tokens; this file takes the loss alone, on the answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from limbeck.losses import linear
from limbeck.methods.base import Batch, Losses
from limbeck.methods.vlm.base import VLMMethod
from limbeck.models.vlm import VLM
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class BiLDConfig:
    """k: entries a side, >= 2 (2 carries no signal). tau: temperature of the pair softmax, > 0. ce, bild: weights."""

    k: int = 8
    tau: float = 3.0
    divergence: Literal["forward", "reverse"] = "forward"
    ce: float = 1.0
    bild: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k must be at least 2, got {self.k}")
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, got {self.tau}")


class BiLD(VLMMethod):
    """L = ce * L_CE + bild * BiLD(z_T, z_S)."""

    name = "bild"
    Config = BiLDConfig
    needs_teacher = True
    uncached = "its student-led pairs need the teacher's logits at ids that only the student ranks high"

    def __init__(self, student: VLM | nn.Module, teacher: VLM | nn.Module | FrozenTeacher, **hyper: Any) -> None:
        super().__init__(student, teacher, **hyper)
        self.weights = {"ce": self.config.ce, "bild": self.config.bild}

    def forward(self, batch: Batch) -> Losses:
        student, labels, teacher = self.both_routes(batch)
        config = self.config
        difference = linear.BiLD(
            student.logits,
            teacher.logits,
            k=config.k,
            tau=config.tau,
            divergence=config.divergence,
            vocabulary=self.vocabulary,
        )
        return self.terms(ce=linear.CrossEntropy(student.logits, labels), bild=difference)
