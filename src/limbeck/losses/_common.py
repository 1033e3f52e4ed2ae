"""What every loss does alike: check shapes, choose precision, leave out masked positions, reduce."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]

FULL = (torch.float32, torch.float64)

SMALLEST_NORM = 1e-12
"""A vector that is shorter counts as zero."""

LOG_ZERO = torch.finfo(torch.float32).min / 8
"""The logarithm of nothing. Finite, so that 0 * log 0 is 0, and differences of two of them are 0, in value and in gradient."""


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{argument} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both tensors have one shape."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape; align them first")


def check_mask(tensor: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless the mask, if any, is bool and has the shape of ``tensor`` without its last dimension."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; expected torch.bool, True where a position counts")
    if mask.shape != tensor.shape[:-1]:
        raise ValueError(f"mask {list(mask.shape)} does not match the positions {list(tensor.shape[:-1])}")


def upcast(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor if tensor.dtype in FULL else tensor.float()


def detached(tensor: Tensor) -> Tensor:
    """The tensor without its graph; itself where it has none, as a teacher's: a view of it costs as much as a small operation."""
    return tensor.detach() if tensor.requires_grad else tensor


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """Vectors of norm 1 along ``dim``; a zero vector stays zero and gets no gradient, where F.normalize would give it one of 1e12."""
    square = x.square().sum(dim, keepdim=True)
    positive = square > SMALLEST_NORM**2
    return x * torch.where(positive, torch.where(positive, square, 1).rsqrt(), 0)


def select(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that count, [M, C] out of [..., C]; all of them, in place, without a mask.

    Selecting, rather than multiplying by zero, keeps a NaN at an ignored position out of the gradient.
    """
    return tensor if mask is None else tensor[mask]


def reduce(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce the values of the positions that `select` kept; over no position at all, mean and sum are 0 and keep the graph.

    reduction: "none" gives [...] again, with 0 at the positions left out.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "mean" and values.numel():
        return values.mean()
    if reduction != "none":
        return values.sum()
    return values if mask is None else values.new_zeros(mask.shape).masked_scatter(mask, values)
