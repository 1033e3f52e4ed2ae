"""A module as a teacher: frozen, in eval mode, and outside the student's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

IN_ORDER = nullcontext()


class FrozenTeacher:
    """Owns a teacher module and guarantees that training never touches it.

    Not an ``nn.Module`` on purpose: assigned to a method it is no submodule, so ``method.train()`` cannot take it out of eval
    mode (BatchNorm statistics never move), ``method.state_dict()`` never holds it, DDP never broadcasts it and no optimiser
    sees it. Calling it runs without gradient. A route that needs gradient *through* the teacher (the visual switch) uses
    ``teacher.module`` directly: its parameters still require none.

    dtype: cast the weights, see `cast_weights` (e.g. ``torch.bfloat16``); None keeps them. overlap: on a GPU, `aside` lets the teacher's
    work run beside the student's.
    """

    overlap = False

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        if isinstance(module, FrozenTeacher):
            raise TypeError("this teacher is frozen already: pass the FrozenTeacher itself, or its .module")
        self.module = module.eval().requires_grad_(False)
        if dtype is not None:
            cast_weights(self.module, dtype)
        self._stream: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, teacher: nn.Module | FrozenTeacher) -> FrozenTeacher:
        """The teacher itself if it is frozen already, else a new one around the module."""
        return teacher if isinstance(teacher, FrozenTeacher) else cls(teacher)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def aside(self) -> AbstractContextManager[None]:
        """What is queued inside runs beside what the caller queues afterwards, on a stream of the teacher's own; `join` before any of it
        is read. Nothing else than ordinary order where ``overlap`` is off, or off a GPU.

        The stream starts only when all that was queued before is done. So memory that one step's teacher gave back is not written by
        the next step's before every reader of it is through.
        """
        return self._beside() if self.overlap and self.device.type == "cuda" else IN_ORDER

    @contextmanager
    def _beside(self) -> Iterator[None]:
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """From here on, the caller's stream has waited for what was queued `aside`."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stream": None}

    def to(self, device: torch.device | str) -> FrozenTeacher:
        """Move the weights; returns self."""
        self.module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where its first tensor stands; the CPU for a module without any."""
        return next((tensor.device for tensor in chain(self.module.parameters(), self.module.buffers())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return f"FrozenTeacher({type(self.module).__name__}, {count:,} parameters, {self.dtype})"


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """``module.to(dtype)``, but for the frequencies of rotary positions (buffers named ``inv_freq``): rounded ones turn the words of a
    long prompt to where others stand."""
    frequencies = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    module.to(dtype)
    for owner, name, buffer in frequencies:
        setattr(owner, name, buffer)
