"""Settings that users write, checked by pydantic; what is wrong becomes one line that says what is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

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
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}; {nearest(path[-1], _fields_at(model, path[:-1]))}"
    if first["type"] == "missing":
        return f"{dotted!r} is required"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{dotted}: {reason} (given {first['input']!r})" if dotted else reason


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The field names of the model nested at ``path``; numbers are list positions."""
    for part in path:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), model)
    return list(model.model_fields)
