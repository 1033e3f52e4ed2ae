"""MaKD: a classifier that also learns how a multimodal language model answers questions about each picture.

Multi-aspect Knowledge Distillation with Large Language Model, 2025, arXiv 2501.13341. A language model writes Q yes/no questions about
aspects that tell a dataset's classes apart, a multimodal one answers them for every training picture, once (`limbeck synth`); its
probabilities of yes move into Q further outputs of the student, so that the features they share carry the aspects. There is no teacher
while training, and none of it is left when the student ships.

Differences. The paper widens the last layer to C + Q. Here the Q rows are a layer of their own on the same pooled feature, which is the
same function with the same initialisation and gradient, and leaves the student as it was: there is nothing to cut off. The authors'
evaluation takes the best of all C + Q columns, so that an aspect that wins counts as an error; here it sees classes only, which is the
paper's intent. Their configuration has a temperature that nothing reads; this has none. A reviewer reports that random targets helped
somewhat: ``targets: shuffled`` and ``random`` are these controls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses.aspects import aspect_bce
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class MaKDConfig:
    """ce, alpha: weights of the labels and of the answers, >= 0. targets: asked, the teacher's answers; shuffled, each sample gets
    another one's; random, numbers from 0 to 1. Both controls depend on the samples' ids alone."""

    ce: float = 1.0
    alpha: float = 4.0
    targets: Literal["asked", "shuffled", "random"] = "asked"

    def __post_init__(self) -> None:
        if self.ce < 0 or self.alpha < 0:
            raise ValueError(f"the weights ce and alpha are {self.ce} and {self.alpha}; expected numbers >= 0")


class MaKD(Recognition):
    """L = ce * CE(z, y) + alpha * BCE(a, q), z [B, C] and a [B, Q] from one pooled feature.

    Batches hold beside what `Recognition` reads ``aspects`` [B, Q], the answers q in [0, 1] that ``data.answers`` names.
    """

    name = "makd"
    Config = MaKDConfig
    needs_teacher = False

    aspects: nn.Linear

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = MaKDConfig(**hyper)
        self.weights = {"ce": self.config.ce, "aspects": self.config.alpha}
        self.of_others: dict[str, Tensor] = {}  # id -> the answers about another sample

    def prepare(self, batch: Batch) -> None:
        """Make the outputs for the questions. Raises `BadInput` for data without answers, and for answers that are no probabilities."""
        self.check_classes(batch)
        if "aspects" not in batch:
            raise BadInput("method 'makd' needs answers about every training picture: name their file as data.answers")
        answers = batch["aspects"]
        if answers.dim() != 2 or not answers.shape[1] or len(answers) != len(batch["labels"]):
            raise BadInput(
                f"aspects are {list(answers.shape)}; expected [{len(batch['labels'])}, questions], at least one question"
            )
        if not bool(((answers >= 0) & (answers <= 1)).all()):
            raise BadInput("an answer in data.answers is outside 0..1; expected the probability of yes")
        like: Any = self.student.head
        self.aspects = nn.Linear(self.student.width, answers.shape[1], device=like.weight.device, dtype=like.weight.dtype)

    def survey(self, batches: Iterable[Batch]) -> None:
        """For shuffled targets: give every sample the answers of the next one in the order of the ids' hashes."""
        if self.config.targets != "shuffled":
            return
        answers: dict[str, Tensor] = {}
        for batch in batches:
            if "aspects" not in batch:
                raise BadInput("shuffled targets need the answers about all training data, and what is surveyed has none")
            answers.update(zip(map(str, batch["ids"]), batch["aspects"], strict=True))
        order = sorted(answers, key=number_of)
        self.of_others = {name: answers[other] for name, other in zip(order, [*order[1:], *order[:1]], strict=True)}

    def forward(self, batch: Batch) -> Losses:
        seen = self.student.read(batch["pixel_values"])
        answers = aspect_bce(self.aspects(seen.pooled), self.targets(batch))
        return self.weigh(ce=losses.cross_entropy(seen.logits, batch["labels"]), aspects=answers)

    def targets(self, batch: Batch) -> Tensor:
        """What the aspect outputs learn, [B, Q]: the teacher's answers, or a control's."""
        asked: Tensor = batch["aspects"]
        if self.config.targets == "asked":
            return asked
        if self.config.targets == "random":
            return torch.stack([random_answers(str(name), asked.shape[1]) for name in batch["ids"]]).to(asked)
        missing = [name for name in batch["ids"] if str(name) not in self.of_others]
        if missing:
            raise BadInput(f"shuffled targets: {missing[0]!r} was not among the training data when they were surveyed")
        return torch.stack([self.of_others[str(name)] for name in batch["ids"]]).to(asked)


def number_of(name: str) -> int:
    """A 63-bit number that depends on a sample's id alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def random_answers(name: str, questions: int) -> Tensor:
    """Numbers [questions], evenly from 0 to 1, that depend on a sample's id alone."""
    return torch.rand(questions, generator=torch.Generator().manual_seed(number_of(name)))
