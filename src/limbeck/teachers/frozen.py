"""A module as a teacher: frozen, in eval mode, and outside the student's checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FrozenTeacher:
    """Owns a teacher module and guarantees that training never touches it.

    Not an ``nn.Module`` on purpose: assigned to a method it is no submodule, so ``method.train()`` cannot take it out of eval
    mode (BatchNorm statistics never move), ``method.state_dict()`` never holds it, DDP never broadcasts it and no optimiser
    sees it. Calling it runs without gradient. A route that needs gradient *through* the teacher (the visual switch) uses
    ``teacher.module`` directly: its parameters still require none.

    dtype: cast the weights (e.g. ``torch.bfloat16``); None keeps them. spec: how to rebuild it, kept in the run folder.
    """

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None = None, spec: dict[str, Any] | None = None) -> None:
        if isinstance(module, FrozenTeacher):
            raise TypeError("this teacher is frozen already: pass the FrozenTeacher itself, or its .module")
        self.module = module.eval().requires_grad_(False)
        if dtype is not None:
            self.module.to(dtype)
        self.spec = spec or {}

    @classmethod
    def of(cls, teacher: nn.Module | FrozenTeacher) -> FrozenTeacher:
        """The teacher itself if it is frozen already, else a new one around the module."""
        return teacher if isinstance(teacher, FrozenTeacher) else cls(teacher)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def to(self, device: torch.device | str) -> FrozenTeacher:
        """Move the weights; returns self."""
        self.module.to(device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return f"FrozenTeacher({type(self.module).__name__}, {count:,} parameters, {self.dtype})"
