"""Checkpoints: a folder a step, complete or absent, in safetensors and JSON, without pickle.

``checkpoints/step-00000300/`` holds ``method.safetensors`` (student and adapters, never the teacher), ``optimizer.safetensors``,
``rng-<process>.safetensors``, ``state.json`` and, written last, ``manifest.json`` with the size and digest of every file. A folder
appears under its name by one atomic rename; what a crash leaves half-written keeps a name that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.errors import BadInput

NAME = re.compile(r"step-(\d+)")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Where the run stood: the contents of ``state.json``."""
        return json.loads((self.path / "state.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``; tied ones share their storage again."""
        tensors = load_file(self.path / f"{name}.safetensors")
        for alias, owner in self.state()["tied"].get(name, {}).items():
            tensors[alias] = tensors[owner]
        return tensors

    def fault(self) -> str | None:
        """Why this checkpoint cannot be used, or None."""
        try:
            manifest = json.loads((self.path / "manifest.json").read_text())
            written = [(name, expected["bytes"], expected["blake2b"]) for name, expected in manifest.items()]
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return "manifest.json is missing or unreadable"
        if "state.json" not in manifest:
            return "manifest.json does not name state.json"
        for name, size, sealed in written:
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            if digest(file) != sealed:
                return f"{name} does not match its digest"
        return None


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Checkpoint]:
        """Every checkpoint that was renamed into place, oldest first."""
        found = ((path, NAME.fullmatch(path.name)) for path in sorted(self.folder.glob("step-*")))
        return [Checkpoint(path, int(name[1])) for path, name in found if name and path.is_dir()]

    def latest(self, warn: Any = None) -> Checkpoint | None:
        """The newest checkpoint that is whole; each newer one that is not is reported through ``warn(text)``."""
        faulty: list[str] = []
        for candidate in reversed(self.all()):
            fault = candidate.fault()
            if fault is None:
                if faulty and warn:
                    warn(f"{'; '.join(faulty)}: falling back to step {candidate.step}")
                return candidate
            faulty.append(f"checkpoint of step {candidate.step} is corrupt ({fault})")
        if faulty:
            raise BadInput(
                f"{self.folder}: {'; '.join(faulty)}, and no earlier one is whole: start the run again in a new folder"
            )
        return None

    def of_step(self, step: int) -> Checkpoint:
        """The checkpoint of that step."""
        return Checkpoint(self.folder / f"step-{step:08d}", step)

    def staging(self, step: int) -> Path:
        """The folder that a checkpoint is written into before it gets its name."""
        return self.folder / f"writing-{step:08d}"

    def commit(self, step: int) -> Checkpoint:
        """Seal what was staged for ``step``: manifest, fsync, rename. Called by one process, after all have written."""
        staged = self.staging(step)
        files = sorted(path for path in staged.iterdir() if path.name != "manifest.json")
        manifest = {path.name: {"bytes": path.stat().st_size, "blake2b": digest(path)} for path in files}
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*files, staged / "manifest.json", staged):
            sync(path)
        final = self.of_step(step)
        if final.path.exists():
            shutil.rmtree(final.path)
        os.replace(staged, final.path)
        sync(self.folder)
        return final

    def prune(self, keep: int, also: int | None) -> None:
        """Remove all but the ``keep`` newest and the one of step ``also``, and what crashes left half-written."""
        for checkpoint in self.all()[:-keep]:
            if checkpoint.step != also:
                shutil.rmtree(checkpoint.path)
        for leftover in self.folder.glob("writing-*"):
            shutil.rmtree(leftover)

    def discard_after(self, step: int) -> None:
        """Remove checkpoints newer than ``step``: corrupt ones that a resumed run will write again."""
        for checkpoint in self.all():
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Write tensors to a safetensors file; returns which names are tied to which written one."""
    owners: dict[tuple[int, torch.Size, torch.device], str] = {}
    written, tied = {}, {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.device)
        if tensor.numel() and key in owners:
            tied[name] = owners[key]
            continue
        owners[key] = name
        written[name] = tensor.detach().to("cpu").contiguous()
    storages: set[int] = set()
    for name, tensor in written.items():
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in storages:
            written[name] = tensor.clone()
        storages.add(pointer)
    save_file(written, path)
    return tied


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file that a user names; pickle files are refused, they can run code."""
    if path.suffix in PICKLES:
        raise BadInput(f"{path}: pickle checkpoints can run code when opened and are refused: convert it to .safetensors first")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from error


def rng_state() -> dict[str, Tensor]:
    """The state of every random generator of this process, as tensors."""
    _version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Undo `rng_state`."""
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if np.isnan(gauss) else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def flatten(nested: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a nested mapping into its tensors by path and the rest as JSON: what `unflatten` undoes.

    Paths are joined by an unprintable separator, since parameter names hold dots.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"__tensor__": path}
        if isinstance(value, Mapping):
            return {key: walk(item, f"{path}{SEPARATOR}{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}{SEPARATOR}{index}") for index, item in enumerate(value)]
        return value

    return tensors, walk(nested, "")


def unflatten(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Undo `flatten`."""
    if isinstance(tree, dict):
        if "__tensor__" in tree:
            return tensors[tree["__tensor__"]]
        return {key: unflatten(tensors, item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [unflatten(tensors, item) for item in tree]
    return tree


SEPARATOR = "\x1f"


def digest(path: Path) -> str:
    """The BLAKE2b digest of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that it is whole or as it was."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    sync(staged)
    os.replace(staged, path)
