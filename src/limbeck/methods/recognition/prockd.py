"""ProC-KD: prototypes of local parts, learned from a teacher of another task, augment the student's own tokens.

Prototype-guided Cross-task Knowledge Distillation for Large-scale Models, 2022, arXiv 2212.13180 (journal version: FITEE 26(6),
2025). A bank of prototypes is learned from the tokens of a frozen teacher's last blocks by NetVLAD-like aggregation. The
student's tokens attend to the prototypes, and this augmented branch, which shares the student's head, guides the plain one.
Nothing depends on the teacher's classes, so teacher and student may name different things.

Differences: the released training loop never runs the teacher and learns from labels alone, and the paper's losses were not
available to us. The modules follow the released model; the losses (labels on the plain and the augmented branch, KL from the
augmented to the plain one, MSE between tokens) and their weights are our reading. The released forward augments the teacher's
tokens in training and the student's in evaluation, while the abstract speaks of the student's: ``branches`` has both by default.
The blocks that are read are not known: the last three of `Classifier.anatomy`. The released 1x1 convolutions have no bias,
perhaps by their library's default (``bias``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck import losses, taps
from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses._common import upcast
from limbeck.losses.maps import pool_to_smaller
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.models.classifier import Classifier
from limbeck.modules.projectors import as_map
from limbeck.modules.prototypes import PrototypeAttention, PrototypeLearning, as_tokens, joined, usage
from limbeck.teachers.frozen import FrozenTeacher

Branch = Literal["teacher", "student"]
BLOCKS = 3  # of the teacher that are read where none are named


@dataclass(frozen=True)
class ProCKDConfig:
    """prototypes: their number K, >= 1 (the released model has 72). layers: the teacher's submodules that give tokens or maps;
    null: the last three of its usual points. branches: whose tokens are augmented in training.

    ce, aug, kd, hint: weights, >= 0, of the labels on the plain branch, of the labels on the augmented ones, of the KL from the
    augmented to the plain branch, and of the MSE between student tokens and augmented teacher tokens. label_smoothing: of both
    label terms, in [0, 1]. bias: of what the paper has as 1x1 convolutions. augmented: ship the student with prototypes and
    augmentation, answering by that branch.
    """

    prototypes: int = 72
    layers: tuple[str, ...] | None = None
    branches: tuple[Branch, ...] = ("teacher", "student")
    ce: float = 1.0
    aug: float = 1.0
    kd: float = 1.0
    hint: float = 0.0
    label_smoothing: float = 0.1
    bias: bool = False
    augmented: bool = False

    def __post_init__(self) -> None:
        if self.prototypes < 1:
            raise BadInput(f"prototypes is {self.prototypes}; expected at least 1")
        if self.layers is not None and not self.layers:
            raise BadInput("layers is empty; name the teacher's submodules that give tokens, or null for its usual points")
        for name in ("ce", "aug", "kd", "hint"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"{name} is {getattr(self, name)}; expected a weight >= 0")
        if not 0 <= self.label_smoothing <= 1:
            raise BadInput(f"label_smoothing is {self.label_smoothing}; expected a number from 0 to 1")
        if not self.branches or not set(self.branches) <= {"teacher", "student"}:
            raise BadInput(f"branches is {list(self.branches)}; expected teacher, student, or both")
        if "teacher" not in self.branches and not self.hint:
            raise BadInput("branches has no teacher and hint is 0, so that the teacher would teach nothing: set one of them")


class AugmentedBranch(nn.Module):
    """A student's second way to its logits: tokens that attended to prototypes, read by its own LayerNorm and head.

    Tokens are the student's last map or tokens, before its LayerNorm where they end in one; where they do not, as in a CNN, the
    branch has a LayerNorm of its own. The head reads the class token where it reads that of the student, else the mean over
    tokens. Raises `BadInput` where the head reads something of another width than the tokens.
    """

    def __init__(self, student: Classifier, pictures: Tensor, prototypes: int, *, bias: bool) -> None:
        super().__init__()
        seen, anatomy = student.read(pictures), student.anatomy(pictures)
        self.features, self.channels_last = anatomy.features, anatomy.features in anatomy.channels_last
        self.own_norm = isinstance(student.model.get_submodule(self.features), nn.LayerNorm)
        self.places = taps.Places({"tokens": (self.features, "input" if self.own_norm else "output")})
        self.class_token = seen.features.dim() == 3 and torch.equal(seen.features[:, 0], seen.pooled)
        width = as_tokens(seen.features).shape[2]
        if seen.pooled.shape[1] != width:
            raise BadInput(
                f"'prockd' lets the student's head read augmented tokens: they are {width} wide, and the head reads "
                f"{seen.pooled.shape[1]}; give a student whose head reads its last map or tokens, pooled"
            )
        self.norm = nn.Identity() if self.own_norm else nn.LayerNorm(width)
        self.attention = PrototypeAttention(width, prototypes, bias=bias)

    def read(self, student: Classifier, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The student's tokens [B, N, C] or map [B, C, H, W], and its plain logits [B, K], of one forward."""
        with self.places.open(student.model) as seen:
            logits = student(pictures)
        features = seen["tokens"]
        return features.movedim(-1, 1) if features.dim() == 4 and self.channels_last else features, logits

    def answer(self, student: Classifier, augmented: Tensor) -> Tensor:
        """The head's logits [B, K] for augmented tokens [B, N, C]."""
        tokens = student.model.get_submodule(self.features)(augmented) if self.own_norm else self.norm(augmented)
        pooled = tokens[:, 0] if self.class_token else tokens.mean(1)
        return student.head(pooled[..., None, None] if isinstance(student.head, nn.Conv2d) else pooled).flatten(1)


class AugmentedStudent(nn.Module):
    """A student that answers by its augmented branch: pictures [B, C, H, W] in [0, 1] -> logits [B, K]. No teacher."""

    def __init__(self, student: Classifier, branch: AugmentedBranch) -> None:
        super().__init__()
        self.student, self.branch, self.classes = student, branch, student.classes

    def forward(self, pixel_values: Tensor) -> Tensor:
        features, _ = self.branch.read(self.student, pixel_values)
        return self.branch.answer(self.student, self.branch.attention(as_tokens(features)))


class ProCKD(Recognition):
    """L = ce * CE(z, y) + aug * CE(z_aug, y) + kd * KL(z_aug || z) + hint * MSE(x, aug(Y)); means over ``branches``."""

    name = "prockd"
    Config = ProCKDConfig

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = config = ProCKDConfig(**hyper)
        self.weights = {name: getattr(config, name) for name in ("ce", "aug", "kd", "hint")}
        self.branch: AugmentedBranch | None = None
        self.learning: PrototypeLearning | None = None
        self.channels_last = False
        self.points = taps.Places({})

    def prepare(self, batch: Batch) -> None:
        """Find the teacher's blocks and the student's tokens, and make the prototypes and what learns them."""
        pictures, labels = batch["pixel_values"][:2], batch["labels"]
        classes = self.student.read(pictures).logits.shape[1]
        outside = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
        if outside.numel():
            raise BadInput(f"the student has {classes} classes, and a label is {outside[0].item()}; expected 0 to {classes - 1}")
        like = next(self.student.parameters())
        self.branch = AugmentedBranch(self.student, pictures, self.config.prototypes, bias=self.config.bias).to(like)
        blocks, self.channels_last = self.blocks(pictures)
        self.points = taps.Places({name: name for name in blocks})
        taught, width = self.taught_features(pictures), self.branch.attention.encode.in_features
        widths = [as_tokens(one).shape[2] for one in taught]
        self.learning = PrototypeLearning(widths, width, self.config.prototypes, bias=self.config.bias).to(like)

    def blocks(self, pictures: Tensor) -> tuple[tuple[str, ...], bool]:
        """The names of the teacher's submodules that are read, and whether its maps are [B, H, W, C]."""
        assert self.teacher is not None
        try:
            anatomy = Classifier.of(self.teacher.module).anatomy(pictures)
        except BadInput:
            if self.config.layers is None:
                raise
            return self.config.layers, False  # a backbone without a head: nothing says where its usual points are
        names = self.config.layers or anatomy.stages[-BLOCKS:]
        if not names:
            raise BadInput("'prockd' finds no blocks in the teacher: name submodules that give tokens or maps (layers)")
        return names, bool(anatomy.channels_last)

    def taught_features(self, pictures: Tensor) -> list[Tensor]:
        """What the teacher's blocks give for pictures, [B, N, C] or [B, C, H, W] each, without gradient."""
        assert self.teacher is not None
        view = Classifier.of(self.teacher.module)
        with torch.no_grad(), self.points.open(view.model) as seen:
            view.model(view.prepared(pictures))
        features = []
        for name in self.points.targets:
            one = seen[name]
            if not isinstance(one, Tensor) or one.dim() not in (3, 4):
                given = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
                raise BadInput(
                    f"layers: the teacher's {name!r} gives {given}; name submodules that give [B, N, C] or [B, C, H, W]"
                )
            features.append(one.movedim(-1, 1) if one.dim() == 4 and self.channels_last else one)
        return features

    def forward(self, batch: Batch) -> Losses:
        assert self.branch is not None and self.learning is not None
        config, labels, attention = self.config, batch["labels"], self.branch.attention
        features, logits = self.branch.read(self.student, batch["pixel_values"])
        augmented: dict[str, Tensor] = {}
        if "teacher" in config.branches or self.needs("hint"):
            taught = upcast(joined(self.taught_features(batch["pixel_values"])))
            augmented["teacher"] = attention(self.learning(taught, attention.prototypes))
        if "student" in config.branches:
            augmented["student"] = attention(as_tokens(features))
        answers = [self.branch.answer(self.student, augmented[branch]) for branch in config.branches]

        terms = {"ce": losses.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)}
        smoothed = [losses.cross_entropy(answer, labels, label_smoothing=config.label_smoothing) for answer in answers]
        terms["aug"] = torch.stack(smoothed).mean()
        if self.needs("kd"):
            terms["kd"] = torch.stack([losses.kl_divergence(logits, answer) for answer in answers]).mean()
        if self.needs("hint"):
            terms["hint"] = losses.hint(*pool_to_smaller(as_map(features), as_map(augmented["teacher"])))
        return self.weigh(**terms)

    @torch.no_grad()
    def usage(self, batch: Batch) -> float:
        """How evenly prototypes are used for a batch's teacher tokens: entropy of the mean assignment over log K, 0 to 1."""
        assert self.branch is not None and self.learning is not None
        merged = self.learning.merged(upcast(joined(self.taught_features(batch["pixel_values"]))))
        return usage(self.learning.vlad(merged, self.branch.attention.prototypes).assignment).item()

    def deployable(self) -> nn.Module:
        """The student with its plain head; with ``augmented``, the student and the branch that it then answers by."""
        if not self.config.augmented or self.branch is None:
            return self.student
        return AugmentedStudent(self.student, self.branch)
