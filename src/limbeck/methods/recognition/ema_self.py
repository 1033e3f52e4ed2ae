"""ema-self: the average of the student's own past teaches it, on pictures with and without labels.

Mean teachers are better role models, NeurIPS 2017, arXiv 1703.01780. Labels teach the student; beside them, its class distribution on one
view of a picture is pulled to that of an exponential moving average of its weights on another view, labelled or not, with a weight that
grows. With the same view for both it is plain self-distillation. Nothing of a larger model is needed.

Differences. The paper averages with momentum 0.99 while the weight grows and 0.999 after; its code with min(1 - 1 / (step + 1), momentum),
which forgets the first weights as well and is followed (``schedule: warmup``). The paper's teacher sees dropout and normalises by the
batch, as its student does; here it is in eval mode with averaged BatchNorm statistics, which is what is shipped. The ramp is a share of the
run; the paper's is 40,000 of 150,000 steps on CIFAR-10, which the default rounds to a quarter. There is no optional second head for the
consistency. ``schedule: cosine`` is DINO's (arXiv 2104.14294).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses._common import upcast
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.teachers.ema import EMATeacher
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class EMASelfConfig:
    """ce: weight of the labels, >= 0. consistency: weight of the agreement after its ramp, >= 0; null: the paper's 100 for mse, 1 for kl.

    loss: between class distributions: mse (mean over classes) or kl, T^2 KL(teacher || student). temperature: T > 0, of kl.
    ramp: share of the run, in [0, 1], over which the weight grows as exp(-5 (1 - t)^2); 0: the whole weight from the start.
    momentum: of the average, in [0, 1]. schedule: warmup: min(1 - 1 / (step + 1), momentum); constant; cosine: from momentum to 1.
    shift, noise: where no two views come with the data, each side sees the picture moved by up to so many pixels, with Gaussian noise of
    this standard deviation on [0, 1]. ship: which network is measured and saved.
    """

    ce: float = 1.0
    consistency: float | None = None
    loss: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0
    ramp: float = 0.25
    momentum: float = 0.999
    schedule: Literal["warmup", "constant", "cosine"] = "warmup"
    shift: int = 0
    noise: float = 0.0
    ship: Literal["ema", "student"] = "ema"

    def __post_init__(self) -> None:
        for name in ("ce", "consistency", "shift", "noise"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise BadInput(f"{name} is {value}; expected a number >= 0")
        for name in ("ramp", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} is {getattr(self, name)}; expected a number from 0 to 1")
        if not self.temperature > 0:
            raise BadInput(f"temperature is {self.temperature}; expected a number > 0")


class EMASelf(Recognition):
    """L = ce * CE(z, y) + consistency * ramp(t) * d(softmax z, softmax z'), z' of the averaged network on another view.

    Batches may hold beside what `Recognition` reads ``views``, two or more [B, C, h, w] of one size, in place of ``pixel_values``, and
    ``unlabelled`` [U, C, H, W]; these, and samples with label -100, count in the second term alone.
    """

    name = "ema-self"
    Config = EMASelfConfig
    unlabelled_beside = True
    needs_teacher = False

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = config = EMASelfConfig(**hyper)
        consistency = config.consistency if config.consistency is not None else {"mse": 100.0, "kl": 1.0}[config.loss]
        self.weights = {"ce": config.ce, "consistency": consistency}
        self.ema = EMATeacher(self.student, momentum=config.momentum, buffers="average")

    def prepare(self, batch: Batch) -> None:
        """Raises `BadInput` where labels are outside the classes, or pictures cannot stand in one batch."""
        self.check_classes(batch)
        if self.config.shift >= min(batch["pixel_values"].shape[2:]):
            raise BadInput(f"shift is {self.config.shift}, and the pictures are no larger; give fewer pixels")
        shapes = {tuple(side.shape[1:]) for pair in self.pairs(batch) for side in pair}
        if len(shapes) > 1:
            found = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
            raise BadInput(
                f"pictures, views and unlabelled pictures are of one size here, and are {found} (channels, height, width); set "
                "data.size and data.views.global_size to one size"
            )

    def forward(self, batch: Batch) -> Losses:
        pairs = self.pairs(batch)
        logits = self.student(torch.cat([ours for ours, _ in pairs]))  # [B + U, K], one batch for BatchNorm
        terms = {"ce": losses.cross_entropy(logits[: len(batch["labels"])], batch["labels"])}
        if self.needs("consistency"):
            targets = self.ema(torch.cat([theirs for _, theirs in pairs]))
            terms["consistency"] = self.ramp() * self.disagreement(logits, targets)
        return self.weigh(**terms)

    def pairs(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """What the student and what its average see, [B, C, H, W] each: the labelled samples first, then the unlabelled ones."""
        views, unlabelled = batch.get("views", ()), batch.get("unlabelled")
        pairs = [(views[0], views[1])] if len(views) > 1 else [self.both(batch["pixel_values"])]
        if unlabelled is not None and self.needs("consistency"):
            pairs.append(self.both(unlabelled))
        return pairs

    def both(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, C, H, W] perturbed twice, each time anew."""
        return self.perturbed(pixel_values), self.perturbed(pixel_values)

    def perturbed(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [0, 1], each moved by up to ``shift`` pixels, and with noise."""
        moved = shifted(pixel_values, self.config.shift) if self.config.shift else pixel_values
        return (moved + self.config.noise * torch.randn_like(moved)).clamp(0, 1) if self.config.noise else moved

    def disagreement(self, logits: Tensor, targets: Tensor) -> Tensor:
        """d of the student's logits and the average's, [N, K] each."""
        if self.config.loss == "kl":
            return losses.kd(logits, targets, temperature=self.config.temperature)
        return losses.hint(upcast(logits).softmax(-1), upcast(targets).softmax(-1))

    def ramp(self) -> float:
        """The share of its weight that the consistency has at this step; all of it where the length of the run is not known."""
        return losses.ramp_up(self.steps_done, self.config.ramp * (self.total_steps or 0))

    def after_step(self, step: int) -> None:
        """Move the average towards the student."""
        momentum, schedule = self.config.momentum, self.config.schedule
        self.ema.momentum = min(1 - 1 / (step + 1), momentum) if schedule == "warmup" else momentum
        self.ema.total = self.total_steps if schedule == "cosine" else None
        self.ema.update(self.student, step)

    def deployable(self) -> nn.Module:
        """The averaged network or the student, as ``ship`` says."""
        return self.ema.module if self.config.ship == "ema" else self.student


def shifted(pictures: Tensor, most: int) -> Tensor:
    """Each of [B, C, H, W] moved by up to ``most`` whole pixels along both sides, mirrored at the edges."""
    count, _, height, width = pictures.shape
    down, across = torch.randint(2 * most + 1, (2, count, 1), device=pictures.device)
    rows = (down + torch.arange(height, device=pictures.device))[:, None, :, None]  # [B, 1, H, 1]
    columns = (across + torch.arange(width, device=pictures.device))[:, None, None, :]
    picture = torch.arange(count, device=pictures.device)[:, None, None, None]
    channel = torch.arange(pictures.shape[1], device=pictures.device)[:, None, None]
    return F.pad(pictures, (most,) * 4, mode="reflect")[picture, channel, rows, columns]
