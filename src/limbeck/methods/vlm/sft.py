"""Supervised fine-tuning: labels only, no teacher.

The control of every vision-language method here: what the same budget gives without distillation.
"""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.losses.linear import CrossEntropy
from limbeck.methods.base import Batch, Losses
from limbeck.methods.vlm.base import VLMMethod


@dataclass(frozen=True)
class SFTConfig:
    """No hyper-parameters."""


class SFT(VLMMethod):
    """Next-token cross-entropy on the answer tokens."""

    name = "sft"
    Config = SFTConfig
    needs_teacher = False

    def forward(self, batch: Batch) -> Losses:
        student, labels = self.student_route(batch)
        return self.terms(ce=CrossEntropy(student.logits, labels))
