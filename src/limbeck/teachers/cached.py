"""A teacher that was asked once: its answers in a folder, read while the student trains. No model, no pickle.

``cache.json`` says what the folder holds (`Index`), ``vocabulary.json`` which token has which id, and every ``<stage>-<view>-<chunk>.
safetensors`` holds some samples: their ids and view in its metadata, and for each entry the rows of all samples one after the other
(``<entry>``: packed top-k as uint8 [rows, width], or a tensor [rows, ...]) beside how many belong to each (``<entry>.counts``, int32
[samples]); ``seals``, float64 [samples], tell whether a sample is what the teacher was shown. A shard appears by an atomic rename.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from limbeck.errors import BadInput, StaleCache
from limbeck.losses.top_k import TopK
from limbeck.settings import Strict, validated
from limbeck.teachers.packing import Packing

Taught = dict[str, TopK | Tensor]
"""What the teacher said of a batch, by entry; rows [R, ...] of sample after sample. Batches hold it under ``taught``."""

Positive = Annotated[int, Field(gt=0)]
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Rows:
    """What the teacher says of a batch in one entry. values: [R, k] top-k entries, or a tensor [R, ...]; counts: int [B], rows of each
    sample, R in all."""

    values: TopK | Tensor
    counts: Tensor


class TopKLayout(Strict):
    """An entry of packed top-k distributions (`limbeck.teachers.packing`)."""

    kind: Literal["top-k"] = "top-k"
    k: Positive
    vocabulary: Annotated[int, Field(gt=0, le=2**24)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @property
    def packing(self) -> Packing:
        return Packing(min(self.k, self.vocabulary), self.vocabulary, self.temperature)

    @property
    def row(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.uint8, (self.packing.width,)

    def encode(self, values: TopK | Tensor) -> Tensor:
        assert isinstance(values, TopK)
        if values.log_probs.isnan().any():
            raise BadInput("the teacher's logits hold NaN or infinity: give the teacher `dtype: bfloat16` or float32")
        return torch.from_numpy(self.packing.pack(values))

    def decode(self, rows: Tensor) -> TopK:
        return self.packing.unpack(rows.numpy())


class DenseLayout(Strict):
    """An entry of whole tensors: features, projector outputs, all logits. shape: of a row."""

    kind: Literal["dense"] = "dense"
    dtype: Literal["float16", "bfloat16", "float32"]
    shape: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def row(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return getattr(torch, self.dtype), self.shape

    def encode(self, values: TopK | Tensor) -> Tensor:
        assert isinstance(values, Tensor)
        kept = values.detach().to("cpu", self.row[0]).contiguous()
        if not kept.isfinite().all():
            raise BadInput(f"the teacher's features are not finite in {self.dtype}: give the teacher `dtype: bfloat16`")
        return kept

    def decode(self, rows: Tensor) -> Tensor:
        return rows.float()


Layout = Annotated[TopKLayout | DenseLayout, Field(discriminator="kind")]


class Index(Strict):
    """``cache.json``.

    identity: what the answers depend on, by dotted name (`limbeck.engine.fingerprint`). top_k: what was asked for; an entry has fewer
    where there are fewer ids. views: random draws of each sample. shard: samples of a file. family, head: the teacher's kind and
    number of token ids, "" and 0 for a plain module.
    """

    format: Literal[1] = 1
    identity: dict[str, Scalar]
    entries: Annotated[dict[str, Layout], Field(min_length=1)]
    top_k: Positive
    views: Annotated[int, Field(gt=0, le=2**16)] = 1
    shard: Positive = 1024
    family: str = ""
    head: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Shard:
    """A file and which samples it holds."""

    path: Path
    stage: str
    view: int
    ids: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> Shard:
        """Read a shard's header; `BadInput` where it is none."""
        with _whole(path), safe_open(path, "pt") as file:
            told = file.metadata()
            ids = json.loads(told["ids"])
            if not (isinstance(ids, list) and all(isinstance(name, str) for name in ids)):
                raise ValueError("its ids are no list of names")
            return cls(path, told["stage"], int(told["view"]), tuple(ids))

    def open(self, entries: Mapping[str, TopKLayout | DenseLayout]) -> Opened:
        """Its contents, checked; the rows are mapped from the file and read as they are used."""
        samples = len(self.ids)
        with _whole(self.path), safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            _check("seals", tensors["seals"], torch.float64, (samples,))
            bounds = {}
            for name, layout in entries.items():
                counts = tensors[f"{name}.counts"]
                _check(f"{name}.counts", counts, torch.int32, (samples,))
                if (counts < 0).any():
                    raise ValueError(f"{name}.counts are negative")
                bounds[name] = np.concatenate([[0], counts.numpy().cumsum()])
                dtype, shape = layout.row
                _check(name, tensors[name], dtype, (int(bounds[name][-1]), *shape))
            return Opened(tensors["seals"].numpy(), bounds, {name: tensors[name] for name in entries})


@dataclass(frozen=True)
class Opened:
    """A shard's contents. seals: [samples]; of each entry, bounds: [samples + 1], where the rows of a sample begin and end."""

    seals: NDArray[np.float64]
    bounds: dict[str, NDArray[np.int64]]
    rows: dict[str, Tensor]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one line that says what to do."""
    try:
        yield
    except BadInput:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path} is damaged ({reason}): delete it and run `limbeck cache` again") from error


class Words:
    """A tokenizer reduced to its vocabulary."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


class CachedTeacher:
    """What `limbeck cache` wrote into a folder, in the teacher's place; it has no weights and cannot be called.

    family, vocab_size, processor: what `limbeck.models.vlm.check_vocabulary` compares. Raises `BadInput`, in one line, for a folder
    that is no cache or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.family, self.vocab_size = self.index.family, self.index.head
        self._opened: dict[int, Opened] = {}

    @cached_property
    def processor(self) -> Words | None:
        path = self.folder / "vocabulary.json"
        return Words(_json(path)) if path.exists() else None

    def check_ids(self, shared: int) -> None:
        """`BadInput` where an entry is over more token ids than the ``shared`` first ones that the student has, too."""
        widest = max((e.vocabulary for e in self.index.entries.values() if isinstance(e, TopKLayout)), default=0)
        if widest > shared:
            raise BadInput(
                f"{self.folder} is over {widest:,} token ids, this student shares {shared:,} of them: write a cache for it"
            )

    @cached_property
    def shards(self) -> list[Shard]:
        """Every shard of the folder, in the order of their names."""
        return [Shard.of(path) for path in sorted(self.folder.glob("*.safetensors"))]

    def places(self, stage: str, ids: Sequence[str]) -> NDArray[np.int32]:
        """Where each sample is: [views, samples, 2], the shard and the position in it. Raises `BadInput` where any is missing."""
        positions = {name: position for position, name in enumerate(ids)}
        found = np.full((self.index.views, len(ids), 2), -1, dtype=np.int32)
        for number, shard in enumerate(self.shards):
            if shard.stage != stage or shard.view >= self.index.views:
                continue
            for row, name in enumerate(shard.ids):
                if name in positions:
                    found[shard.view, positions[name]] = number, row
        missing = (found[..., 0] < 0).any(axis=0)
        if missing.any():
            example = ids[int(missing.argmax())]
            raise StaleCache(
                f"{self.folder} lacks {missing.sum():,} of {len(ids):,} samples of the stage {stage!r} ({example!r}, ...): "
                "run `limbeck cache` again with the same --out, it adds what is missing"
            )
        return found

    def opened(self, shard: int) -> Opened:
        """The contents of a shard; opened once in each process."""
        if shard not in self._opened:
            self._opened[shard] = self.shards[shard].open(self.index.entries)
        return self._opened[shard]

    def rows(self, shard: int, position: int) -> dict[str, Tensor]:
        """A sample's encoded rows by entry."""
        opened = self.opened(shard)
        return {name: rows[slice(*opened.bounds[name][position : position + 2])] for name, rows in opened.rows.items()}

    def decode(self, samples: Sequence[tuple[int, dict[str, Tensor]]]) -> Taught:
        """What the teacher said of (shard, encoded rows) samples, one after the other."""
        taught: Taught = {}
        for name, layout in self.index.entries.items():
            try:
                taught[name] = layout.decode(torch.cat([rows[name] for _, rows in samples]))
            except ValueError:
                for shard, rows in samples:
                    with _whole(self.shards[shard].path):
                        layout.decode(rows[name])
                raise
        return taught

    def covered(self, name: str, shards: Iterable[int]) -> NDArray[np.float64]:
        """The mass of the k ids at every row of a top-k entry in some shards."""
        layout = self.index.entries[name]
        assert isinstance(layout, TopKLayout)
        return np.concatenate([layout.packing.covered(self.opened(shard).rows[name].numpy()) for shard in shards])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # a worker maps the files itself

    def __repr__(self) -> str:
        return f"CachedTeacher({self.folder}, {', '.join(self.index.entries)})"


def read_index(folder: Path) -> Index:
    """``cache.json``; `BadInput` where the folder is no cache."""
    path = folder / "cache.json"
    if not path.is_file():
        raise StaleCache(
            f"{folder} is no teacher cache, it has no cache.json: write one with `limbeck cache RECIPE --out {folder}`"
        )
    return validated(Index, _json(path), str(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is unreadable ({error}): delete the folder and run `limbeck cache` again") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds no mapping: delete the folder and run `limbeck cache` again")
    return values
