"""What methods between two image classifiers share: both as views that see a picture as they were trained to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.methods.base import Method
from limbeck.models.classifier import Classifier, Seen
from limbeck.teachers.frozen import FrozenTeacher


class Recognition(Method):
    """A student `Classifier` and, where the method needs one, a frozen teacher `Classifier`; plain modules are wrapped.

    Batches are {"pixel_values": [B, C, H, W] in [0, 1], "labels": [B] int64 (-100 = unlabelled), "ids"}, and what a method asks for beside.
    Raises `BadInput` where a needed teacher is missing, or the two models share parameters.
    """

    student: Classifier

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None) -> None:
        super().__init__()
        self.student = Classifier.of(student)
        if teacher is None:
            if self.needs_teacher:
                raise BadInput(f"method {self.name!r} needs a teacher: add `teacher:` to the recipe")
            return
        frozen = FrozenTeacher.of(teacher)
        self.teacher = frozen if isinstance(frozen.module, Classifier) else FrozenTeacher(Classifier.of(frozen.module))
        shared = {id(p) for p in self.teacher.module.parameters()} & {id(p) for p in self.student.parameters()}
        if shared:
            raise BadInput("teacher and student share parameters, and a teacher's are frozen: give each its own (copy.deepcopy)")

    def taught(self, pixel_values: Tensor) -> Seen:
        """What the teacher makes of pictures [B, C, H, W], without gradient."""
        assert self.teacher is not None
        with torch.no_grad():
            return Classifier.of(self.teacher.module).read(pixel_values)

    def check_classes(self, batch: Batch, *, same: bool = True) -> tuple[int, int]:
        """Numbers of classes of student and teacher by one dry forward, so that both know their heads.

        Raises `BadInput` where a label is outside the student's classes, or, with ``same``, where the two numbers differ.
        """
        pictures, labels = batch["pixel_values"][:2], batch["labels"]
        student = self.student.read(pictures).logits.shape[1]
        teacher = self.taught(pictures).logits.shape[1] if self.teacher is not None else student
        outside = labels[(labels != -100) & ((labels < 0) | (labels >= student))]
        if outside.numel():
            raise BadInput(f"the student has {student} classes, and a label is {outside[0].item()}; expected 0 to {student - 1}")
        if same and student != teacher:
            raise BadInput(
                f"method {self.name!r} compares classes one by one: the student has {student}, the teacher {teacher}; give both the "
                "same classes, or choose a method that crosses tasks (prockd)"
            )
        return student, teacher
