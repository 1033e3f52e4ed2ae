"""What a teacher's answers depend on, as far as it can be told without loading a model: what a cache is known by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from limbeck import __version__
from limbeck.engine.checkpoint import digest
from limbeck.engine.recipe import PATH_KEYS, DataSpec, ModelSpec, Recipe, load_recipe, option_overrides
from limbeck.errors import BadInput
from limbeck.methods.registry import configure, find
from limbeck.teachers.cached import Scalar

READ = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what from_pretrained reads of a folder
WHOLE = 2**28  # bytes up to which a file is digested whole
PIECE = 4096  # bytes read at the beginning, the middle and the end of each tensor of a larger one
NOT_ANSWERS = {
    *PATH_KEYS,
    "cache",
    "max_broken",
    "max_length",
    "check",
    "allow_outside",
    "val",
    "test",
}  # keys of data that change no sample


def recorded(recipe: Recipe) -> Mapping[str, Any]:
    """The hyper-parameters of a recipe's method that its teacher's answers depend on."""
    method = find(recipe.method.name).load()
    return method.recorded(vars(configure(method, recipe.method.hyper)))


def identity(recipe: Recipe, specs: Mapping[str, DataSpec], classes: Sequence[str] = ()) -> dict[str, Scalar]:
    """Teacher, method, data and the names of its classes by dotted name. Files are known by their content, not by where they lie: those
    of the teacher that are not on this machine are left out. Samples are known by their ids and seals: the data's paths are left out."""
    teacher = {} if recipe.teacher is None else _teacher(recipe.teacher)
    data = {
        stage: {key: value for key, value in spec.model_dump(mode="json").items() if key not in NOT_ANSWERS}
        for stage, spec in specs.items()
    }
    named = {"classes": hashlib.blake2b("\n".join(classes).encode(), digest_size=16).hexdigest()} if classes else {}
    return _flat({"teacher": teacher, "method": {"name": recipe.method.name, **recorded(recipe)}, "data": data, **named})


def difference(written: Mapping[str, Scalar], ours: Mapping[str, Scalar]) -> str | None:
    """The first thing in which a cache and a recipe differ, in words; None where what can be compared agrees."""
    for name in sorted({*written, *ours}, key=lambda name: (not name.startswith("teacher."), name)):
        there, here = written.get(name), ours.get(name)
        if there == here or (name.startswith("teacher.") and _unknown(name, written, ours)):
            continue
        if name == "classes":
            return "the data's classes are others, or in another order"
        if name.startswith("teacher.files.") or name in ("teacher.weights", "teacher.recipe"):
            which = name.removeprefix("teacher.").removeprefix("files.")
            return f"the content of the teacher's {which} differs"
        return f"{name} is {_said(there)} in the cache, {_said(here)} in the recipe"
    return None


def _unknown(name: str, written: Mapping[str, Scalar], ours: Mapping[str, Scalar]) -> bool:
    """Whether something of the teacher cannot be compared: the recipe names none, or its files are not all on this machine."""
    if "teacher.source" not in ours or (name not in ours and name in ("teacher.recipe", "teacher.weights")):
        return True
    if name.startswith("teacher.files."):
        return name not in ours or (name not in written and not name.endswith(".safetensors"))
    return name == "teacher.name" and (name not in ours or name not in written)


def _teacher(spec: ModelSpec) -> dict[str, Any]:
    told = spec.model_dump(exclude={"name", "weights", "trust_remote_code"})
    if spec.source == "recipe":
        with suppress(BadInput):  # not on this machine
            told["recipe"] = _anywhere(load_recipe(spec.name, option_overrides(spec)))
    elif spec.source == "transformers" and (folder := _folder(spec.name)):
        told["files"] = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.suffix in READ}
    else:
        told["name"] = spec.name
    if spec.weights is None or Path(spec.weights).is_file():
        told["weights"] = spec.weights and _digest(Path(spec.weights))
    return told


def _anywhere(recipe: Recipe) -> str:
    """A digest of a recipe that is the same wherever its folder lies."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for data in (values["data"], *(stage.get("data") or {} for stage in values.get("train", {}).get("stages", ()))):
        for key in PATH_KEYS & data.keys():
            del data[key]
    if recipe.teacher is not None and recipe.teacher.source == "recipe":
        values["teacher"]["name"] = _anywhere(load_recipe(recipe.teacher.name))
    return hashlib.blake2b(json.dumps([__version__, values], sort_keys=True).encode(), digest_size=8).hexdigest()


def _folder(name: str) -> Path | None:
    """Where the files of a model lie: the folder itself, or the hub's local copy of the commit that is current here."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _digest(path: Path) -> str:
    """The content of a file; of a large safetensors file, its header and pieces of every tensor."""
    size = path.stat().st_size
    if size <= WHOLE or path.suffix != ".safetensors":
        return digest(path)
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        found.update(header)
        for name, tensor in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            start, stop = tensor["data_offsets"]
            for offset in (start, (start + stop) // 2, max(start, stop - PIECE)):
                file.seek(8 + length + offset)
                found.update(file.read(min(PIECE, stop - offset)))
    return found.hexdigest()


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, Scalar) and not (isinstance(value, float) and not math.isfinite(value))
            flat[f"{prefix}{key}"] = value if plain else json.dumps(value)
    return flat


def _said(value: Scalar) -> str:
    return "not given" if value is None else str(value)
