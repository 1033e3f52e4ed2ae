"""Adapters that bring a student's feature to the shape of a teacher's; trained with the student, dropped with the method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import BadInput


def infer_adapter(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """The smallest module that maps a student feature to a teacher feature's shape.

    Shapes, batch first: vectors [B, D], tokens [B, N, D] (ViT), maps [B, C, H, W] (CNN). Batch sizes must agree, and are not part
    of the adapter. Equal shapes of any rank give ``nn.Identity``; else channels go through one linear layer where their number
    differs, and positions are averaged where the teacher has fewer and interpolated where it has more (`FeatureAdapter`).
    Raises `BadInput`, naming both shapes, where no such map exists.
    """
    student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
    if student_shape == teacher_shape:
        return nn.Identity()
    impossible = f"no adapter from the student's {list(student_shape)} to the teacher's {list(teacher_shape)}"
    if not {len(student_shape), len(teacher_shape)} <= {2, 3, 4}:
        raise BadInput(f"{impossible}; tap features of shape [B, D], [B, N, D] or [B, C, H, W]")
    if student_shape[0] != teacher_shape[0]:
        raise BadInput(f"{impossible}: their batch sizes differ")
    student, teacher = Layout.of(student_shape), Layout.of(teacher_shape)
    if student.rank == teacher.rank == 3 and (student.is_sequence or teacher.is_sequence):
        student, teacher = Layout.sequence(student_shape), Layout.sequence(teacher_shape)
    if student.positions == 1 and teacher.positions > 1:
        raise BadInput(f"{impossible}: one vector has no positions; tap a layer before the student's pooling")
    if student.is_sequence != teacher.is_sequence and teacher.positions > 1:
        raise BadInput(f"{impossible}: tokens have a grid only where their number is a square, or a square and a class token")
    if student.rank == teacher.rank < 4 and student_shape[:-1] == teacher_shape[:-1]:
        return nn.Linear(student.channels, teacher.channels)
    if student.rank == teacher.rank == 4 and student_shape[2:] == teacher_shape[2:]:
        return nn.Conv2d(student.channels, teacher.channels, kernel_size=1)
    return FeatureAdapter(student, teacher)


@dataclass(frozen=True)
class Layout:
    """A feature's shape, read as a map of ``channels`` x ``height`` x ``width`` and perhaps a class token before it.

    A vector is a map of one position. Tokens are a square map if their number is a square; a class token and a square map if it
    is one more; else a sequence, a map of width 1.
    """

    rank: int
    channels: int
    height: int
    width: int
    class_token: bool = False

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """The layout of [B, D], [B, N, D] or [B, C, H, W]."""
        if len(shape) == 2:
            return cls(2, shape[1], 1, 1)
        if len(shape) == 4:
            return cls(4, shape[1], shape[2], shape[3])
        _, tokens, channels = shape
        for class_tokens in (0, 1):
            side = math.isqrt(tokens - class_tokens)
            if side**2 == tokens - class_tokens:
                return cls(3, channels, side, side, class_token=bool(class_tokens))
        return cls.sequence(shape)

    @classmethod
    def sequence(cls, shape: Sequence[int]) -> Layout:
        """The layout of [B, N, D] whose tokens stand in a line, whatever their number."""
        return cls(3, shape[2], shape[1], 1)

    @property
    def positions(self) -> int:
        """How many positions there are, besides the class token."""
        return self.height * self.width

    @property
    def is_sequence(self) -> bool:
        """Whether the positions stand in a line and not on a grid."""
        return self.rank == 3 and self.width == 1 < self.height

    def __str__(self) -> str:
        if self.rank == 2:
            return f"vector of {self.channels}"
        if self.rank == 4:
            return f"{self.height}x{self.width} map of {self.channels}"
        grid = f"{self.height}" if self.is_sequence else f"{self.height}x{self.width}"
        return f"{'class token + ' if self.class_token else ''}{grid} tokens of {self.channels}"


def as_map(features: Tensor) -> Tensor:
    """A feature as a map [B, C, H, W]: maps as they are, tokens [B, N, C] on their grid, without a class token; a vector [B, C] is 1x1.

    Raises `BadInput` for tokens whose number is no square, nor a square and a class token.
    """
    if features.dim() == 4:
        return features
    if features.dim() not in (2, 3):
        raise BadInput(f"a feature {list(features.shape)} is no map; tap [B, C, H, W], [B, N, D] or [B, D]")
    layout = Layout.of(features.shape)
    if layout.is_sequence:
        raise BadInput(
            f"{features.shape[1]} tokens have no grid: their number is neither a square nor a square and a class token"
        )
    tokens = features.unsqueeze(1) if features.dim() == 2 else features[:, layout.class_token :]
    return tokens.transpose(1, 2).unflatten(2, (layout.height, layout.width))


def check_maps(name: str, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
    """Raise `BadInput` unless both are shapes of maps."""
    if len(student_shape) != 4 or len(teacher_shape) != 4:
        raise BadInput(
            f"{name} cannot map the student's {list(student_shape)} to the teacher's {list(teacher_shape)}; "
            "tap maps of shape [B, C, H, W]"
        )


class FeatureAdapter(nn.Module):
    """A linear layer over channels and a change of resolution, between any two `Layout` that `infer_adapter` allows.

    Fewer positions are averages (adaptive pooling), more are interpolated (bilinear). A class token goes to the class token;
    where only the student has one it is dropped, and where only the teacher has one the mean over positions stands for it.
    """

    def __init__(self, student: Layout, teacher: Layout) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        same_width = student.channels == teacher.channels
        self.mix = nn.Identity() if same_width else nn.Linear(student.channels, teacher.channels)

    def forward(self, features: Tensor) -> Tensor:
        """Student feature [B, D], [B, N, D] or [B, C, H, W] -> the teacher's shape."""
        tokens = self._as_tokens(features)  # [B, N, C]
        # Both steps are linear and commute: the layer works where there are fewer positions.
        if self.student.positions < self.teacher.positions:
            tokens = self._resize(self.mix(tokens))
        else:
            tokens = self.mix(self._resize(tokens))
        if self.teacher.rank == 2:
            return tokens.squeeze(1)
        if self.teacher.rank == 4:
            return tokens.transpose(1, 2).unflatten(2, (self.teacher.height, self.teacher.width))
        return tokens

    def _as_tokens(self, features: Tensor) -> Tensor:
        if self.student.rank == 2:
            return features.unsqueeze(1)
        return features.flatten(2).transpose(1, 2) if self.student.rank == 4 else features

    def _resize(self, tokens: Tensor) -> Tensor:
        class_token, positions = tokens.split([tokens.shape[1] - self.student.positions, self.student.positions], dim=1)
        grid = positions.transpose(1, 2).unflatten(2, (self.student.height, self.student.width))
        size = (self.teacher.height, self.teacher.width)
        if self.student.height >= self.teacher.height and self.student.width >= self.teacher.width:
            grid = F.adaptive_avg_pool2d(grid, size)
        else:
            grid = F.interpolate(grid, size, mode="bilinear")
        resized = grid.flatten(2).transpose(1, 2)
        if not self.teacher.class_token:
            return resized
        return torch.cat([class_token if self.student.class_token else positions.mean(1, keepdim=True), resized], dim=1)

    def __repr__(self) -> str:
        return f"FeatureAdapter({self.student} -> {self.teacher})"


class ConvReg(nn.Module):
    """FitNet's regressor between maps (arXiv 1412.6550, as in mdistiller's ``ConvReg``): convolution, BatchNorm, ReLU.

    student_shape, teacher_shape: [B, C, H, W]. The kernel follows from the sizes: stride 2 where the student's map is twice the
    teacher's, a transposed convolution where it is half, else a kernel without padding that crops to size. After the ReLU,
    negative targets cannot be matched. Raises `BadInput` where these are not maps, or no such kernel exists.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        check_maps("ConvReg", student_shape, teacher_shape)
        _, student_channels, *student_size = student_shape
        _, teacher_channels, *teacher_size = teacher_shape
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        if student_size == [2 * side for side in teacher_size]:
            self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=3, stride=2, padding=1)
        elif [2 * side for side in student_size] == teacher_size:
            self.conv = nn.ConvTranspose2d(student_channels, teacher_channels, kernel_size=4, stride=2, padding=1)
        elif all(s >= t for s, t in zip(student_size, teacher_size, strict=True)):
            kernel = [1 + s - t for s, t in zip(student_size, teacher_size, strict=True)]
            self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=(kernel[0], kernel[1]))
        else:
            raise BadInput(
                f"ConvReg cannot map the student's {list(student_shape)} to the teacher's {list(teacher_shape)}: "
                "the student's map must be half as large, as large, or larger"
            )
        self.norm = nn.BatchNorm2d(teacher_channels)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.norm(self.conv(features)).relu()
