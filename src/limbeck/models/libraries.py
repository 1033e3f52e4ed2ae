"""What it takes to use the libraries that models come from: that they are there, can be imported, and complain in one line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from limbeck.errors import BadInput

_KEPT_ALIVE: list[torch.library.Library] = []  # an operator schema goes when its Library does


def require(package: str, install: str) -> None:
    """`BadInput` where a package is not installed, with what to install; torchvision is made importable.

    install: what pip takes, e.g. ``'limbeck[vision]'``.
    """
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"{package} is not installed: pip install {install}")
    ensure_torchvision()


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work beside a torch that its compiled library cannot be loaded into (e.g. a CPU torch).

    torchvision refuses to be imported without its operators ``nms`` and ``qnms``. Where its library cannot be loaded their
    schemas are declared here; transforms and models then work, and only a call of a compiled operator fails. Call it before the
    first import of torchvision, timm or a transformers model; where torchvision is imported or not installed, it does nothing.
    """
    spec = None if "torchvision" in sys.modules or _KEPT_ALIVE else importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(library)
            return
    except OSError:
        pass
    schemas = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT_ALIVE.append(schemas)


@contextmanager
def quiet_bars(quiet: bool = True) -> Iterator[None]:
    """Keep transformers' own progress bars off while reading and writing local folders: a run shows one bar, its own."""
    from transformers.utils import logging

    shown = quiet and logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turn what a library raises for wrong input into one line."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, TypeError, AssertionError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is not run unless you read it and set `trust_remote_code: true`"
        raise BadInput(f"cannot load {name}: {reason}") from error


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``"bfloat16"`` -> torch.bfloat16. Raises `BadInput` for what is no dtype."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    resolved = getattr(torch, dtype, None)
    if isinstance(resolved, torch.dtype):
        return resolved
    raise BadInput(f"unknown dtype {dtype!r}: write float32, bfloat16 or float16")
