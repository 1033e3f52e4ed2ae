"""DMAE: a masked autoencoder learns from another's tokens while it is pre-trained; and MAE, the same without a teacher.

Masked Autoencoders Enable Efficient Knowledge Distillers, CVPR 2023, arXiv 2208.12256; Masked Autoencoders Are Scalable Vision Learners,
CVPR 2022, arXiv 2111.06377. Without labels: a student ViT sees a few patches of each picture and a decoder paints the others; the tokens
after one of its blocks, through a linear map, are pulled to those after one block of a frozen, MAE-pre-trained teacher that sees the same
patches. The teacher's later blocks do not run. What is shipped is the ViT alone, to be fine-tuned or read by a linear probe.

Differences. The abstract's "four" visible patches of 196 at 98 % are 3 in the code, floor(196 * 0.02), and here; its "ten" at 95 % are 9.
The code runs the whole teacher and its decoder, here the teacher stops, which changes no value. In the code tokens are divided by their
norm before they are compared, and only where there is an adapter; that is followed. ``mlp`` is the code's Linear-GELU-Linear.
A ViT keeps its own library's initialisation, where MAE draws all linear layers anew. Positions are fixed sines and cosines as in MAE;
``positions: own`` keeps the model's, for a student that was trained before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses.masked import masked_pixels, token_distance
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.models.classifier import Classifier
from limbeck.models.vit import VitView
from limbeck.modules.masked_autoencoder import (
    MaskedDecoder,
    Masking,
    patchify,
    random_masking,
    sincos_positions,
    visible,
    visible_count,
)
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class MAEConfig:
    """mask_ratio: share of the patches that are removed, in [0, 1). norm_pix: paint each patch minus its mean, over its deviation.

    decoder_width, decoder_depth, decoder_heads: of the decoder's blocks. positions: of the student: sincos overwrites and freezes them,
    own leaves them as they are. pool: what a probe reads: the mean of the patch tokens, or the class token.
    """

    mask_ratio: float = 0.75
    norm_pix: bool = False
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    positions: Literal["sincos", "own"] = "sincos"
    pool: Literal["mean", "class"] = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise BadInput(f"mask_ratio is {self.mask_ratio}; expected a share of the patches, from 0 to below 1")
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class DMAEConfig(MAEConfig):
    """pixel, distil: weights of the two terms, >= 0, not both 0. student_blocks, teacher_blocks: indices from 0 of the blocks that are
    compared pair by pair; null: the one after three quarters of each network's blocks. adapter: from the student's width to the teacher's;
    none compares the tokens as they are, of one width. distance: between tokens. The others as in `MAEConfig`."""

    pixel: float = 1.0
    distil: float = 1.0
    student_blocks: tuple[int, ...] | None = None
    teacher_blocks: tuple[int, ...] | None = None
    adapter: Literal["linear", "mlp", "none"] = "linear"
    distance: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.pixel, self.distil) < 0 or self.pixel == self.distil == 0:
            raise BadInput(f"the weights pixel and distil are {self.pixel} and {self.distil}; expected numbers >= 0, not both 0")


class MAE(Recognition):
    """L = pixel, the squared error of the removed patches' pixels. Labels are not read."""

    name = "mae"
    Config = MAEConfig
    needs_teacher = False
    config: MAEConfig

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = config = self.Config(**hyper)
        vit = self.vit
        visible_count(vit.patches, config.mask_ratio)
        if config.pool == "class" and not vit.prefix:
            raise BadInput("pool: class needs a class token, and the student has none; set pool: mean")
        if config.positions == "sincos":
            vit.fix_positions(sincos_positions(vit.width, vit.grid))
        self.decoder = MaskedDecoder(
            vit.width,
            vit.grid,
            vit.patch[0] * vit.patch[1] * vit.channels,
            prefix=vit.prefix,
            width=config.decoder_width,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
        )

    @property
    def vit(self) -> VitView:
        """The student, in parts."""
        return VitView.of(self.student)

    def prepare(self, batch: Batch) -> None:
        """Raises `BadInput` where pictures do not fit the student."""
        self.vit.check(self.student.prepared(batch["pixel_values"][:2]), "student")

    def forward(self, batch: Batch) -> Losses:
        pictures = self.student.prepared(batch["pixel_values"])  # [N, C, H, W]
        masking = self.draw(pictures)
        return self.weigh(pixel=self.painted(pictures, self.seen(pictures, masking)[-1], masking))

    def draw(self, pictures: Tensor) -> Masking:
        """Draw which patches of [N, C, H, W] are removed."""
        return random_masking(len(pictures), self.vit.patches, self.config.mask_ratio, device=pictures.device)

    def seen(self, pictures: Tensor, masking: Masking, last: int | None = None) -> list[Tensor]:
        """The student's tokens [N, prefix + V, d] of the visible patches, after each block up to ``last``."""
        vit = self.vit
        return vit.run(visible(vit.embed(pictures), masking.keep, vit.prefix), last)

    def painted(self, pictures: Tensor, tokens: Tensor, masking: Masking) -> Tensor:
        """How far the decoder is from the removed pixels of [N, C, H, W], given the last block's tokens [N, prefix + V, d]."""
        vit = self.vit
        prediction = self.decoder(vit.norm(tokens), masking.restore)  # [N, L, P]
        return masked_pixels(prediction, patchify(pictures, vit.patch), masking.mask, normalise=self.config.norm_pix)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [0, 1], nothing removed -> the feature [B, d] that probes read."""
        vit = self.vit
        tokens = vit.encode(self.student.prepared(pixel_values))
        return tokens[:, 0] if self.config.pool == "class" else tokens[:, vit.prefix :].mean(1)


class DMAE(MAE):
    """L = pixel * L_pix + distil * sum over pairs of blocks of |norm(h(A)) - norm(B)|."""

    name = "dmae"
    Config = DMAEConfig
    needs_teacher = True
    uncached = "what the teacher says depends on the patches that it sees, and these are drawn anew at every step"
    config: DMAEConfig

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None, **hyper: Any) -> None:
        super().__init__(student, teacher, **hyper)
        config, vit, teacher_vit = self.config, self.vit, self.teacher_vit
        self.weights = {"pixel": config.pixel, "distil": config.distil}
        self.student_blocks = chosen_blocks(config.student_blocks, len(vit.blocks), "student")
        self.teacher_blocks = chosen_blocks(config.teacher_blocks, len(teacher_vit.blocks), "teacher")
        if len(self.student_blocks) != len(self.teacher_blocks):
            raise BadInput(
                f"student_blocks {list(self.student_blocks)} and teacher_blocks {list(self.teacher_blocks)} are compared pair by pair; "
                "give as many of one as of the other"
            )
        if vit.grid != teacher_vit.grid:
            ours, theirs = ("x".join(map(str, side.grid)) for side in (vit, teacher_vit))
            raise BadInput(
                f"the student cuts a picture into {ours} patches, the teacher into {theirs}; both must see the same patches: give "
                "them one grid (sizes and patch sizes in proportion)"
            )
        if config.adapter == "none" and vit.width != teacher_vit.width:
            raise BadInput(
                f"adapter: none compares tokens of one width; the student has {vit.width}, the teacher {teacher_vit.width}: use linear"
            )
        self.adapters = nn.ModuleList(adapter(config.adapter, vit.width, teacher_vit.width) for _ in self.student_blocks)

    @property
    def teacher_view(self) -> Classifier:
        """The teacher, and what it wants to see."""
        assert self.teacher is not None
        return Classifier.of(self.teacher.module)

    @property
    def teacher_vit(self) -> VitView:
        """The teacher, in parts."""
        return VitView.of(self.teacher_view)

    def prepare(self, batch: Batch) -> None:
        """Raises `BadInput` where pictures do not fit the student or the teacher."""
        super().prepare(batch)
        self.teacher_vit.check(self.teacher_view.prepared(batch["pixel_values"][:2]), "teacher")

    def forward(self, batch: Batch) -> Losses:
        pictures = self.student.prepared(batch["pixel_values"])  # [N, C, H, W]
        masking = self.draw(pictures)
        maps = self.seen(pictures, masking, None if self.needs("pixel") else max(self.student_blocks))
        terms = {}
        if self.needs("pixel"):
            terms["pixel"] = self.painted(pictures, maps[-1], masking)
        if self.needs("distil"):
            targets = self.targets(batch["pixel_values"], masking)
            terms["distil"] = torch.stack(
                [
                    self.compared(adapt(maps[block]), target)
                    for adapt, block, target in zip(self.adapters, self.student_blocks, targets, strict=True)
                ]
            ).sum()
        return self.weigh(**terms)

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, masking: Masking) -> list[Tensor]:
        """The teacher's tokens [N, prefix + V, D] of the same patches of [N, C, H, W] in [0, 1], after each of its compared blocks."""
        vit = self.teacher_vit
        tokens = visible(vit.embed(self.teacher_view.prepared(pixel_values)), masking.keep, vit.prefix)
        maps = vit.run(tokens, max(self.teacher_blocks))
        return [maps[block] for block in self.teacher_blocks]

    def compared(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The distance of the student's adapted tokens to the teacher's; a class token counts where both have one."""
        count = min(tokens.shape[1], targets.shape[1])
        return token_distance(
            tokens[:, -count:],
            targets[:, -count:],
            distance=self.config.distance,
            normalise=self.config.adapter != "none",
        )


def adapter(kind: Literal["linear", "mlp", "none"], width: int, teacher_width: int) -> nn.Module:
    """What brings the student's tokens to the teacher's width."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, teacher_width)
    return nn.Sequential(nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))


def chosen_blocks(blocks: tuple[int, ...] | None, depth: int, owner: str) -> tuple[int, ...]:
    """The blocks given, or the one after which three quarters of the depth are done: 8 of 12, 17 of 24.

    Raises `BadInput` where there is none, or no such block.
    """
    if blocks is None:
        return (max(depth * 3 // 4 - 1, 0),)
    outside = [block for block in blocks if not 0 <= block < depth]
    if outside or not blocks:
        raise BadInput(f"{owner}_blocks is {list(blocks)}; the {owner} has {depth} blocks: give indices from 0 to {depth - 1}")
    return blocks
