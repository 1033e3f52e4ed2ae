"""What the vision-language methods share: two views, and the positions where an answer token is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.batch import Batch, supervised, teacher_side
from limbeck.errors import BadInput
from limbeck.methods.base import Method
from limbeck.models.vlm import VLM, Reading, check_vocabulary
from limbeck.teachers.frozen import FrozenTeacher


def as_view(model: VLM | nn.Module) -> VLM:
    """The view itself, or a view of a bare transformers model."""
    return model if isinstance(model, VLM) else VLM(model)


@dataclass
class Route:
    """One pass through a model: its reading, and its logits [K, V] where an answer token is predicted."""

    reading: Reading
    logits: Tensor


class VLMMethod(Method):
    """A method over vision-language models: ``view`` is the student's `VLM`, ``teacher_view`` the teacher's (absent without one).

    Batches hold ``batch["student"]`` and, where the teacher reads another prompt or other image tokens, ``batch["teacher"]``.
    """

    view: VLM
    teacher_view: VLM

    def __init__(self, student: VLM | nn.Module, teacher: VLM | nn.Module | None = None, **hyper: Any) -> None:
        super().__init__()
        self.config = self.Config(**hyper)
        self.view = as_view(student)
        self.student = self.view.model
        if teacher is not None:
            self.teacher_view = as_view(teacher)
            self.teacher = FrozenTeacher(self.teacher_view.model)
            self.vocabulary = check_vocabulary(self.view, self.teacher_view)
        elif self.needs_teacher:
            raise BadInput(f"method {self.name!r} needs a teacher, none was given: add `teacher:` to the recipe")

    def units(self, batch: Batch) -> int:
        return int((batch["student"]["labels"][:, 1:] != -100).sum())

    def student_route(self, batch: Batch) -> tuple[Route, Tensor]:
        """The student's ordinary pass, with gradient; and the labels [K] at its logits."""
        inputs = batch["student"]
        positions, labels = supervised(inputs["labels"])
        reading = self.view.read(inputs)
        return Route(reading, self.view.head(reading.hidden[positions])), labels

    @torch.no_grad()
    def teacher_route(self, batch: Batch) -> Route:
        """The teacher's ordinary pass, without gradient."""
        inputs = teacher_side(batch)
        reading = self.teacher_view.read(inputs)
        return Route(reading, self.teacher_view.head(reading.hidden[supervised(inputs["labels"])[0]]))

    def shared(self, logits: Tensor) -> Tensor:
        """The logits [K, V] of the token ids that student and teacher share: rows that only pad a head are dropped."""
        return logits[..., : self.vocabulary]
