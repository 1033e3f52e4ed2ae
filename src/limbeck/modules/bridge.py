"""A map between two vision encoders' outputs, where one's cannot enter the other's projector."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import BadInput


class VisualBridge(nn.Module):
    """One linear map a projector input, from the student's width to the teacher's; identity where the widths agree.

    Where the token counts differ and both are square grids, the grid is resized bilinearly. Switch-KD itself has no bridge: a warning
    says so when a map is trained.
    """

    def __init__(self, widths: tuple[int, ...], teacher_widths: tuple[int, ...]) -> None:
        super().__init__()
        if len(widths) != len(teacher_widths):
            raise BadInput(
                f"the student's vision feeds {len(widths)} projector inputs, the teacher's {len(teacher_widths)} (deepstack levels): "
                "no bridge spans that; choose a teacher of the student's family"
            )
        self.maps = nn.ModuleList(
            nn.Identity() if width == wanted else nn.Linear(width, wanted)
            for width, wanted in zip(widths, teacher_widths, strict=True)
        )
        self.tokens: tuple[int, ...] | None = None
        if any(isinstance(layer, nn.Linear) for layer in self.maps):
            warnings.warn(
                f"the visual switch goes through a trained linear map {widths} -> {teacher_widths}: the Switch-KD paper has none",
                stacklevel=2,
            )

    def fit(self, visual: tuple[Tensor, ...], teacher_visual: tuple[Tensor, ...]) -> None:
        """Learn the teacher's token count from one example of both; `BadInput` where the grids cannot be resized."""
        counts = tuple(tensor.shape[-2] for tensor in visual)
        wanted = tuple(tensor.shape[-2] for tensor in teacher_visual)
        if counts == wanted:
            return
        if any(tensor.dim() != 3 or math.isqrt(tensor.shape[1]) ** 2 != tensor.shape[1] for tensor in (*visual, *teacher_visual)):
            raise BadInput(
                f"the student's vision gives {counts} tokens, the teacher's projector takes {wanted}, and not both are square grids: "
                "set the image sizes so that the token counts agree"
            )
        self.tokens = wanted

    def forward(self, visual: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """visual: tensors [..., N, D_student]; returns tensors [..., M, D_teacher]."""
        mapped = tuple(layer(tensor) for layer, tensor in zip(self.maps, visual, strict=True))
        if self.tokens is None:
            return mapped
        return tuple(resize(tensor, count) for tensor, count in zip(mapped, self.tokens, strict=True))


def resize(tokens: Tensor, count: int) -> Tensor:
    """Resize a square grid of tokens bilinearly: [B, N, D] -> [B, count, D]."""
    side, wanted = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=False)
    return torch.flatten(grid, 2).transpose(1, 2)
