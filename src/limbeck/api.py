"""Methods by name, for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limbeck.methods.registry import Entry, configure, find, methods

if TYPE_CHECKING:
    from limbeck.methods.base import Method


def list_methods() -> list[Entry]:
    """Every known method: name, what it distils, one line, paper."""
    return sorted(methods().values(), key=lambda entry: entry.name)


def create(name: str, student: Any, teacher: Any = None, **hyper: Any) -> Method:
    """Build a method by name on two loaded models.

    student, teacher: for the vision-language methods a `limbeck.VLM` or a bare transformers model; else any ``nn.Module``.
    hyper: the method's hyper-parameters (``limbeck show NAME``). Raises `BadInput` for an unknown name or hyper-parameter, and where
    the two models do not fit.
    """
    method: Any = find(name).load()
    return method(student, teacher, **vars(configure(method, hyper)))
