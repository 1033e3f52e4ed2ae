"""Hinton's knowledge distillation on the answer tokens of a vision-language model.

Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; the divergences beyond forward KL after GKD (arXiv 2306.13649).
The teacher's token distribution moves into the student's, at the positions where an answer token is predicted.

Differences: the paper multiplies by temperature^2 and so does this file. The paper's forward KL is the default; ``beta`` is the
weight of the teacher in the mixture of the generalised JSD, as in GKD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from limbeck.losses.linear import CrossEntropy, Divergence, TopKDivergence
from limbeck.methods.base import Batch, Losses
from limbeck.methods.vlm.base import VLMMethod
from limbeck.models.vlm import VLM
from limbeck.teachers.cached import CachedTeacher, Rows
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class KDConfig:
    """temperature: > 0. divergence: forward = KL(teacher || student). beta: in [0, 1], used by jsd only. ce, kd: weights."""

    temperature: float = 1.0
    divergence: Literal["forward", "reverse", "jeffreys", "jsd"] = "forward"
    beta: float = 0.5
    ce: float = 1.0
    kd: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")


class KD(VLMMethod):
    """L = ce * L_CE + kd * T^2 D(teacher, student)."""

    name = "kd"
    Config = KDConfig
    needs_teacher = True

    def __init__(self, student: VLM | nn.Module, teacher: VLM | nn.Module | FrozenTeacher | CachedTeacher, **hyper: Any) -> None:
        super().__init__(student, teacher, **hyper)
        self.weights = {"ce": self.config.ce, "kd": self.config.kd}

    @classmethod
    def recorded(cls, hyper: Mapping[str, Any]) -> dict[str, Any]:
        return {"temperature": hyper["temperature"]}

    def record(self, batch: Batch, top_k: int) -> dict[str, Rows]:
        return {"kd": self.teacher_top_k(batch, top_k, self.config.temperature)}

    def forward(self, batch: Batch) -> Losses:
        config = self.config
        if "taught" in batch:
            student, labels = self.student_route(batch)
            kept = TopKDivergence(student.logits, batch["taught"]["kd"], kind=config.divergence, beta=config.beta)
            return self.terms(ce=CrossEntropy(student.logits, labels), kd=kept)
        student, labels, teacher = self.both_routes(batch)
        divergence = Divergence(
            student.logits,
            teacher.logits,
            temperature=config.temperature,
            kind=config.divergence,
            beta=config.beta,
            vocabulary=self.vocabulary,
        )
        return self.terms(ce=CrossEntropy(student.logits, labels), kd=divergence)
