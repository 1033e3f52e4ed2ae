"""The student's own past as a teacher: an exponential moving average of its weights."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import BadInput


class EMATeacher(nn.Module):
    """An average of a module's weights over training (Mean Teacher, arXiv 1703.01780; BYOL, arXiv 2006.07733; DINO, 2104.14294).

    Starts as a copy of the student; ``teacher <- m * teacher + (1 - m) * student`` with each `update`. No parameter requires
    gradient, so no optimiser trains it, and calling it runs without. Unlike a `FrozenTeacher` it is a submodule: nothing but the
    checkpoint can bring it back.

    momentum: m, from 0 to 1. total: steps over which m rises from ``momentum`` to 1 along a cosine (DINO); None keeps it.
    mode: "eval" keeps it in eval mode whatever its owner is in; "train" lets it follow its owner (DINO's BatchNorm).
    buffers: in mode "eval", floating-point ones (BatchNorm statistics) are taken over from the student ("copy") or averaged like
        weights ("average"), integer ones taken over. In mode "train" its own forwards keep them.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        momentum: float = 0.996,
        total: int | None = None,
        mode: Literal["eval", "train"] = "eval",
        buffers: Literal["copy", "average"] = "copy",
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise BadInput(f"momentum is {momentum}; expected a number from 0 to 1")
        if total is not None and total < 1:
            raise BadInput(f"total is {total}; expected the number of steps, at least 1, or None for a constant momentum")
        if mode not in ("eval", "train"):
            raise BadInput(f"mode is {mode!r}; expected 'eval' or 'train'")
        if buffers not in ("copy", "average"):
            raise BadInput(f"buffers is {buffers!r}; expected 'copy' or 'average'")
        self.momentum, self.total, self.mode, self.buffer_rule = momentum, total, mode, buffers
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.train(student.training)

    def train(self, mode: bool = True) -> EMATeacher:
        """Train mode only where ``mode`` of the constructor is "train"; returns self."""
        super().train(mode and self.mode == "train")
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's output, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def momentum_at(self, step: int) -> float:
        """m after ``step`` optimiser steps: ``momentum`` at 0, 1 from ``total`` on."""
        if self.total is None:
            return self.momentum
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * min(step / self.total, 1))) / 2

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Move towards the student; call it after optimiser step number ``step`` (`Method.after_step`).

        student: the module that was copied, also inside a wrapper (DDP, ``torch.compile``). Raises `BadInput` where its parameters or
        buffers are not those of the copy.
        """
        pairs = matched("parameter", dict(self.module.named_parameters()), dict(student.named_parameters()))
        buffers = matched("buffer", dict(self.module.named_buffers()), dict(student.named_buffers()))
        for own, other in buffers if self.mode == "eval" else ():
            if self.buffer_rule == "average" and own.is_floating_point():
                pairs.append((own, other))
            else:
                own.copy_(other)
        if pairs:
            averages, current = [own for own, _ in pairs], [other.to(own) for own, other in pairs]
            torch._foreach_lerp_(averages, current, 1 - self.momentum_at(step))


def matched(kind: str, own: dict[str, Tensor], other: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of one name and shape; what stands before all names of ``other``, a wrapper's prefix, is left out."""
    prefix = next(iter(other), "").removesuffix(next(iter(own), ""))
    unmatched = sorted({prefix + name for name in own} ^ other.keys())
    if unmatched:
        raise BadInput(f"the EMA teacher and the student differ in {kind} {unmatched[0]!r}; average the module that was copied")
    pairs = [(tensor, other[prefix + name]) for name, tensor in own.items()]
    for name, (tensor, new) in zip(own, pairs, strict=True):
        if tensor.shape != new.shape:
            raise BadInput(f"{kind} {name!r} is {list(tensor.shape)} in the EMA teacher and {list(new.shape)} in the student")
    return pairs
