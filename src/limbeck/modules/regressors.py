"""The trained parts of losses on maps (``losses/maps.py``): trained with the student, and dropped with the method.

All but SimKD's projector, which stays: its student predicts through it, by the teacher's classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.losses.maps import VARIANCE_FLOOR
from limbeck.modules.projectors import check_maps

VARIANCE = 5.0
"""The variance that `VIDRegressor` starts from, as in the authors' code."""


class VIDRegressor(nn.Module):
    """Predicts a teacher's map from a student's, with a variance for each channel (VID, arXiv 1904.05835).

    Three 1x1 convolutions without bias, ReLU between them; a student's map that is larger than the teacher's is averaged to its
    size first. `variational` takes the prediction and the parameter ``log_scale`` [C'], whose variance starts at 5.
    student_shape, teacher_shape: [B, C, H, W]. Raises `BadInput` where these are not maps.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        check_maps("VIDRegressor", student_shape, teacher_shape)
        channels = teacher_shape[1]
        self.resize = _to_smaller(student_shape, teacher_shape)
        self.predict = nn.Sequential(
            nn.Conv2d(student_shape[1], channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((channels,), math.log(math.expm1(VARIANCE - VARIANCE_FLOOR))))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> the mean [B, C', H', W'], at the lesser height and width of student and teacher."""
        return self.predict(self.resize(features))


class ABF(nn.Module):
    """Attention-based fusion of a student's map with what the deeper layers handed on (ReviewKD, arXiv 2104.09044).

    student_shape, teacher_shape: [B, C, H, W] of the layer.
    channels: of the maps that are fused and handed on.
    fuse: False for the deepest layer, which has nothing to fuse with.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int], *, channels: int, fuse: bool) -> None:
        super().__init__()
        check_maps("ABF", student_shape, teacher_shape)
        squeeze = nn.Conv2d(student_shape[1], channels, kernel_size=1, bias=False)
        project = nn.Conv2d(channels, teacher_shape[1], kernel_size=3, padding=1, bias=False)
        for convolution in (squeeze, project):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.squeeze = nn.Sequential(squeeze, nn.BatchNorm2d(channels))
        self.gate = nn.Conv2d(2 * channels, 2, kernel_size=1) if fuse else None
        self.project = nn.Sequential(project, nn.BatchNorm2d(teacher_shape[1]))
        self.size = tuple(teacher_shape[2:])

    def forward(self, features: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map [B, C', H', W'] to compare with the teacher's, and the fused map [B, channels, H', W'] to hand on.

        features: [B, C, H, W]; residual: [B, channels, any size], handed on by the next deeper layer.
        """
        fused = self.squeeze(features)
        if self.gate is not None:
            assert residual is not None
            residual = F.interpolate(residual, fused.shape[2:], mode="nearest")
            gates = self.gate(torch.cat([fused, residual], dim=1)).sigmoid()  # [B, 2, H, W]
            fused = gates[:, :1] * fused + gates[:, 1:] * residual
        fused = F.interpolate(fused, self.size, mode="nearest")
        return self.project(fused), fused


class ReviewFusion(nn.Module):
    """ReviewKD's stack (arXiv 2104.09044): each layer of the student reviews those deeper than it.

    student_shapes, teacher_shapes: one [B, C, H, W] a layer, in the order of the network, shallow to deep; the fusion goes from
    deep to shallow. The maps that are fused have as many channels as the student's deepest, and at most 512.
    Raises `BadInput` where the lists differ in length or hold none, or these are not maps.
    """

    def __init__(self, student_shapes: Sequence[Sequence[int]], teacher_shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if not student_shapes or len(student_shapes) != len(teacher_shapes):
            raise BadInput(
                f"ReviewFusion got {len(student_shapes)} maps of the student and {len(teacher_shapes)} of the teacher; "
                "expected as many of each, at least one"
            )
        for student_shape, teacher_shape in zip(student_shapes, teacher_shapes, strict=True):
            check_maps("ReviewFusion", student_shape, teacher_shape)
        *shallow, deepest = zip(student_shapes, teacher_shapes, strict=True)
        channels = min(512, student_shapes[-1][1])
        self.shallow = nn.ModuleList(ABF(*shapes, channels=channels, fuse=True) for shapes in shallow)
        self.deepest = ABF(*deepest, channels=channels, fuse=False)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps [B, C, H, W] -> maps of the teacher's shapes; both shallow to deep."""
        *shallow, deepest = features
        fused, residual = self.deepest(deepest)
        results = [fused]
        for block, layer in zip(reversed(self.shallow), reversed(shallow), strict=True):
            fused, residual = block(layer, residual)
            results.insert(0, fused)
        return results


class OFDConnector(nn.Sequential):
    """Maps a student's map before its ReLU to the teacher's channels (OFD, arXiv 1904.01866): 1x1 convolution, BatchNorm.

    student_shape, teacher_shape: [B, C, H, W]. Raises `BadInput` where the sizes differ: tap layers of one resolution.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        _check_same_size("OFDConnector", student_shape, teacher_shape)
        convolution = nn.Conv2d(student_shape[1], teacher_shape[1], kernel_size=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        super().__init__(convolution, nn.BatchNorm2d(teacher_shape[1]))


class Generation(nn.Module):
    """Restores the teacher's map from a student's, part of which is masked (MGD, arXiv 2205.01529).

    A 1x1 convolution where the channels differ, the mask, then 3x3 convolution, ReLU, 3x3 convolution.
    student_shape, teacher_shape: [B, C, H, W].
    mask: "pixel" drops positions, with all their channels; "channel" drops channels, with all their positions.
    drop: how likely each is dropped. The authors' code takes 0.65 of the pixels for detection, 0.75 for segmentation, and 0.15 of
        the channels for classification.
    Raises `BadInput` where the sizes differ or a value is out of range.
    """

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        mask: Literal["pixel", "channel"] = "pixel",
        drop: float = 0.65,
    ) -> None:
        super().__init__()
        _check_same_size("Generation", student_shape, teacher_shape)
        if mask not in ("pixel", "channel"):
            raise BadInput(f"mask is {mask!r}; expected 'pixel' or 'channel'")
        if not 0 <= drop < 1:
            raise BadInput(f"drop is {drop}; expected a probability from 0 to less than 1")
        _, channels, *_ = teacher_shape
        same_width = student_shape[1] == channels
        self.mask, self.drop = mask, drop
        self.align = nn.Identity() if same_width else nn.Conv2d(student_shape[1], channels, kernel_size=1)
        self.generate = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def draw_mask(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A mask for maps [B, C, H, W] of the teacher's channels: bool [B, 1, H, W] or [B, C, 1, 1], True where they are kept.

        generator: of the maps' device; None draws from torch's global one.
        """
        batch, channels, height, width = features.shape
        shape = (batch, 1, height, width) if self.mask == "pixel" else (batch, channels, 1, 1)
        return torch.rand(shape, generator=generator, device=features.device) >= self.drop

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]. mask: as `draw_mask` gives it; None draws one. What is kept is not rescaled."""
        aligned = self.align(features)
        return self.generate(aligned * (self.draw_mask(aligned) if mask is None else mask))


class SimKDProjector(nn.Module):
    """Projects a student's last map to the teacher's, whose classifier then serves both (SimKD, arXiv 2203.14001).

    A bottleneck of 1x1, 3x3 and 1x1 convolutions without bias, each with BatchNorm and ReLU; a student's map that is larger than
    the teacher's is averaged to its size first. After the ReLU, negative targets cannot be matched.
    student_shape, teacher_shape: [B, C, H, W].
    factor: how many times narrower than the teacher's map the bottleneck is.
    Raises `BadInput` where these are not maps, or the bottleneck would have no channel.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int], *, factor: int = 2) -> None:
        super().__init__()
        check_maps("SimKDProjector", student_shape, teacher_shape)
        channels = teacher_shape[1]
        if not 1 <= factor <= channels:
            raise BadInput(f"factor is {factor}; expected one from 1 to the teacher's {channels} channels")
        width = channels // factor
        self.resize = _to_smaller(student_shape, teacher_shape)
        self.project = nn.Sequential(
            nn.Conv2d(student_shape[1], width, kernel_size=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W'], at the lesser height and width of student and teacher."""
        return self.project(self.resize(features))


def _check_same_size(name: str, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
    """Raise `BadInput` unless both are shapes of maps of one height and width."""
    check_maps(name, student_shape, teacher_shape)
    if tuple(student_shape[2:]) != tuple(teacher_shape[2:]):
        raise BadInput(
            f"{name} cannot map the student's {list(student_shape)} to the teacher's {list(teacher_shape)}: "
            "it keeps the height and width; tap layers of one resolution"
        )


def _to_smaller(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """Averages a student's map to the lesser height and width of the two; nothing where it has them already."""
    size = (min(student_shape[2], teacher_shape[2]), min(student_shape[3], teacher_shape[3]))
    return nn.Identity() if tuple(student_shape[2:]) == size else nn.AdaptiveAvgPool2d(size)
