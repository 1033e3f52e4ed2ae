"""LELP: directions of the teacher's embedding become subclasses that the student learns beside the classes.

Linear Projections of Teacher Embeddings for Few-Class Distillation, 2024, arXiv 2409.20449. Where a task has two to five classes, a
teacher's probabilities say little. Each class is split softly into subclasses along directions of the teacher's last embedding that its
classifier does not read; the student learns the probabilities of all subclasses, and predicts a class by their sum.

Differences: there is no public code. It is our reading that embeddings are centred by class, coordinates scaled to unit variance, the null
space that of all rows of the classifier, each class has its own rotation, and the student is tempered as well; ``unit_variance``,
``null_space``, ``rotation``, ``temper_student`` and ``tau_squared`` change all but the first. Directions come from unaugmented pictures,
targets from the pictures that the student sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses._common import upcast
from limbeck.losses.logits import IGNORE
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.models.classifier import Classifier
from limbeck.models.loading import load_module
from limbeck.modules.heads import SumSubclasses
from limbeck.modules.subclasses import ClassMoments, Directions, Rotation, SubclassDirections, null_space, subclass_targets
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class LELPConfig:
    """subclasses: S of each class, >= 1 (1 is plain distillation). beta: temperature of the subclasses, tau: of the classes, > 0.

    alpha: share of the labels in the loss, in [0, 1]; the paper's experiments have 0. directions: of most variance, or random.
    null_space: keep to what the classifier does not read: none of its rows, none of their differences, or wherever it may be.
    rotation: turns a class's directions among themselves. unit_variance: scale a class's coordinates to a mean variance of 1.
    temper_student: divide the student's logits by tau. tau_squared: multiply by tau^2. seed: of rotations and random directions.
    """

    subclasses: int = 5
    beta: float = 1.0
    tau: float = 1.0
    alpha: float = 0.0
    directions: Directions = "pca"
    null_space: Literal["rows", "differences", "none"] = "rows"
    rotation: Rotation = "per-class"
    unit_variance: bool = True
    temper_student: bool = True
    tau_squared: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.subclasses < 1:
            raise BadInput(f"subclasses must be at least 1, got {self.subclasses}")
        for name in ("beta", "tau"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"alpha must lie in [0, 1], got {self.alpha}")


class LELP(Recognition):
    """L = alpha * L_CE + (1 - alpha) * tau^2 KL(targets || subclasses).

    The student's head is replaced by one with S outputs a class; what is deployed ends in their sum.
    """

    name = "lelp"
    Config = LELPConfig
    basis: Tensor

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = LELPConfig(**hyper)
        self.classes = self.student.classes
        self.weights = {"ce": self.config.alpha, "lelp": 1 - self.config.alpha}
        self.sum_subclasses = SumSubclasses(self.config.subclasses)
        self.split: SubclassDirections | None = None

    def prepare(self, batch: Batch) -> None:
        """Give the student its head, and the directions their shapes."""
        outputs, classes = self.check_classes(batch, same=False)
        subclasses = classes * self.config.subclasses
        if outputs not in (classes, subclasses):
            raise BadInput(
                f"'lelp' splits the teacher's {classes} classes, and the student has {outputs}; give both the same classes"
            )
        if outputs != subclasses:
            self.student.new_head(subclasses)
        self.basis = self.unread(batch)
        width, room = self.basis.shape
        if room < self.config.subclasses:
            raise BadInput(
                f"subclasses is {self.config.subclasses}, and the teacher's embedding has {room} directions that its classifier does not "
                f"read; give {room} or fewer, or null_space: none"
            )
        self.split = SubclassDirections(classes, width, self.config.subclasses)

    def unread(self, batch: Batch) -> Tensor:
        """An orthonormal basis [D, R] of what the teacher's classifier does not read; of everything where it reads all."""
        assert self.teacher is not None
        view = Classifier.of(self.teacher.module)
        view.anatomy(batch["pixel_values"])
        head: Any = view.head
        weight = head.weight.detach().flatten(1).cpu()  # [C, D]
        everything = torch.eye(weight.shape[1], dtype=torch.float64)
        if self.config.null_space == "none":
            return everything
        unread = null_space(weight if self.config.null_space == "rows" else weight - weight.mean(0))
        if unread.shape[1]:
            return unread
        warnings.warn(
            f"the teacher's classifier reads all {len(everything)} directions of its embedding: all are used", stacklevel=2
        )
        return everything

    def survey(self, batches: Iterable[Batch]) -> None:
        """Fit the directions to the teacher's embeddings of the training data, by label; by the teacher's choice where there is none."""
        assert self.split is not None
        moments = ClassMoments(*self.split.means.shape)
        for batch in batches:
            seen, labels = self.taught(batch["pixel_values"]), batch["labels"]
            moments.add(seen.pooled, torch.where(labels == IGNORE, seen.logits.argmax(1), labels))
        self.split.fit(
            moments,
            self.basis,
            directions=self.config.directions,
            rotation=self.config.rotation,
            unit_variance=self.config.unit_variance,
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def forward(self, batch: Batch) -> Losses:
        assert self.split is not None
        config, pictures, terms = self.config, batch["pixel_values"], {}
        logits = upcast(self.student(pictures))  # [B, C * S]
        if self.needs("ce"):
            terms["ce"] = losses.cross_entropy(self.sum_subclasses(logits), batch["labels"])
        if self.needs("lelp"):
            seen = self.taught(pictures)
            targets = subclass_targets(seen.logits, self.split(seen.pooled), tau=config.tau, beta=config.beta)
            divergence = losses.kl_divergence(logits / config.tau if config.temper_student else logits, targets)
            terms["lelp"] = divergence * config.tau**2 if config.tau_squared else divergence
        return self.weigh(**terms)

    def deployable(self) -> Classifier:
        """The student with the sum of the subclasses at its end: it gives class logits. Its parameters are the student's."""
        if self.split is None:
            return self.student
        view = self.student.around(nn.Sequential(self.student.model, self.sum_subclasses))
        view.classes, view.spec = self.classes, {}
        if "source" in self.student.spec:
            options = {"student": self.student.spec, "subclasses": self.config.subclasses}
            view.spec = {"source": "python", "name": f"{__name__}:{summed.__name__}", "options": options}
        return view


def summed(student: Mapping[str, Any], subclasses: int) -> Classifier:
    """What `LELP.deployable` gives, built again from the spec of its student: how a saved one is loaded."""
    view = Classifier.of(load_module(student))
    return view.around(nn.Sequential(view.model, SumSubclasses(subclasses)))
