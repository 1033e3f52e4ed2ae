"""What the vision-language methods share: two views, and the positions where an answer token is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.batch import Batch, supervised, teacher_side
from limbeck.errors import BadInput
from limbeck.losses import linear
from limbeck.losses.linear import Logits
from limbeck.losses.top_k import TopK, top_k
from limbeck.methods.base import Losses, Method
from limbeck.models.vlm import VLM, Reading, check_vocabulary
from limbeck.teachers.cached import CachedTeacher, Rows
from limbeck.teachers.frozen import FrozenTeacher

TOP_K_ROWS = 256  # positions whose logits exist at once when a cache is written


def as_view(model: VLM | nn.Module | FrozenTeacher) -> VLM:
    """The view itself, or a view of a bare transformers model, which may be frozen."""
    model = model.module if isinstance(model, FrozenTeacher) else model
    return model if isinstance(model, VLM) else VLM(model)


@dataclass
class Route:
    """One pass through a model: its reading, and its logits [K, V], not computed yet, where an answer token is predicted."""

    reading: Reading
    logits: Logits


class VLMMethod(Method):
    """A method over vision-language models: ``view`` is the student's `VLM`, ``teacher_view`` the teacher's (absent without one).

    Batches hold ``batch["student"]`` and, where the teacher reads another prompt or other image tokens, ``batch["teacher"]``.
    """

    view: VLM
    teacher_view: VLM

    def __init__(
        self, student: VLM | nn.Module, teacher: VLM | nn.Module | FrozenTeacher | CachedTeacher | None = None, **hyper: Any
    ) -> None:
        super().__init__()
        self.config = self.Config(**hyper)
        self.view = as_view(student)
        self.student = self.view.model
        if isinstance(teacher, CachedTeacher):
            self.vocabulary = check_vocabulary(self.view, teacher)
            teacher.check_ids(self.vocabulary)
        elif teacher is not None:
            self.teacher_view = as_view(teacher)
            self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(self.teacher_view.model)
            self.vocabulary = check_vocabulary(self.view, self.teacher_view)
        elif self.needs_teacher:
            raise BadInput(f"method {self.name!r} needs a teacher, none was given: add `teacher:` to the recipe")

    def units(self, batch: Batch) -> int:
        return len(supervised(batch["student"])[1])

    def student_route(self, batch: Batch) -> tuple[Route, Tensor]:
        """The student's ordinary pass, with gradient; and the labels [K] at its logits."""
        inputs = batch["student"]
        positions, labels = supervised(inputs)
        reading = self.view.read(inputs)
        return Route(reading, self.view.logits(reading.hidden[positions])), labels

    @torch.no_grad()
    def teacher_route(self, batch: Batch) -> Route:
        """The teacher's ordinary pass, without gradient."""
        inputs = teacher_side(batch)
        reading = self.teacher_view.read(inputs)
        return Route(reading, self.teacher_view.logits(reading.hidden[supervised(inputs)[0]]))

    def both_routes(self, batch: Batch) -> tuple[Route, Tensor, Route]:
        """`student_route` and `teacher_route`: the student's route, the labels, the teacher's route. On a GPU they may overlap."""
        assert self.teacher is not None
        with self.teacher.aside():
            teacher = self.teacher_route(batch)
        student, labels = self.student_route(batch)
        self.teacher.join()
        return student, labels, teacher

    @torch.no_grad()
    def teacher_top_k(self, batch: Batch, k: int, temperature: float) -> Rows:
        """The k likeliest shared ids of the teacher at the answer positions, for a cache."""
        inputs = teacher_side(batch)
        positions = supervised(inputs)[0]
        hidden = self.teacher_view.read(inputs).hidden[positions]
        top = [
            top_k(self.teacher_view.head(rows)[..., : self.vocabulary], k, temperature=temperature)
            for rows in hidden.split(TOP_K_ROWS)
        ]
        return Rows(TopK.joined(top), positions[0].bincount(minlength=len(inputs["labels"])))

    def terms(self, **terms: linear.Term) -> Losses:
        """The weighted terms over logits that are not computed yet, in one pass over them (`limbeck.losses.linear`).

        Where nothing that trains had a part in them (words alone, while the projector trains), the gradient of all that trains is 0.
        """
        losses = Losses(linear.losses(terms, weights=self.weights))
        if torch.is_grad_enabled() and not any(value.requires_grad for value in losses.values()):
            name, value = next(iter(losses.items()))
            untouched = (parameter.flatten()[:0].sum() for parameter in self.parameters() if parameter.requires_grad)
            losses[name] = sum(untouched, value).to(value.dtype)
        return losses
