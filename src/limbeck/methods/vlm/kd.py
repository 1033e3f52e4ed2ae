"""Hinton's knowledge distillation on the answer tokens of a vision-language model.

Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; the divergences beyond forward KL after GKD (arXiv 2306.13649).
The teacher's token distribution moves into the student's, at the positions where an answer token is predicted.

Differences: the paper multiplies by temperature^2 and so does this file. The paper's forward KL is the default; ``beta`` is the
weight of the teacher in the mixture of the generalised JSD, as in GKD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from limbeck.losses.logits import cross_entropy, kl_divergence
from limbeck.methods.base import Batch, Losses
from limbeck.methods.vlm.base import VLMMethod
from limbeck.models.vlm import VLM


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

    def __init__(self, student: VLM | nn.Module, teacher: VLM | nn.Module, **hyper: Any) -> None:
        super().__init__(student, teacher, **hyper)
        self.weights = {"ce": self.config.ce, "kd": self.config.kd}

    def forward(self, batch: Batch) -> Losses:
        teacher = self.teacher_route(batch)
        student, labels = self.student_route(batch)
        divergence = kl_divergence(
            self.shared(student.logits),
            self.shared(teacher.logits),
            temperature=self.config.temperature,
            kind=self.config.divergence,
            beta=self.config.beta,
        )
        return self.weigh(ce=cross_entropy(student.logits, labels), kd=divergence)
