"""Settings that users write, checked by pydantic; what is wrong becomes one line that says what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck.errors import BadInput
from limbeck.naming import nearest

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Refuses unknown keys; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Validate; the first fault becomes one line: an unknown key with the nearest known one, a wrong value with what is right."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise BadInput(f"{where}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path, inner = _located(model, first["loc"])
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}; {nearest(path[-1], inner.model_fields)}"
    if first["type"] == "missing":
        return f"{dotted!r} is required"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{dotted}: {reason} (given {first['input']!r})" if dotted else reason


def _located(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], type[BaseModel]]:
    """A fault's place as a user writes it, without the names that pydantic gives the members of a union, and the innermost model."""
    path: list[str] = []
    members: list[Any] = []
    for part in loc:
        if any(part == getattr(member, "__name__", None) for member in members):
            continue
        path.append(str(part))
        if isinstance(part, str):
            members = _members(model.model_fields[part].annotation) if part in model.model_fields else []
            model = next((item for item in members if isinstance(item, type) and issubclass(item, BaseModel)), model)
    return path, model


def _members(annotation: Any) -> list[Any]:
    """A type and all that it is made of."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _members(part))]
