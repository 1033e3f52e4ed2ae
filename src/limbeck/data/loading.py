"""``load_data``: the ``data:`` part of a recipe, read into records and checked before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from limbeck.data.embedded.digit_scenes import DEFAULT_KINDS, SPLITS, Split, digit_scenes
from limbeck.data.formats import BrokenRow, Columns, ImageFolder, Row, read_arrow, read_json, row_id, to_record
from limbeck.data.records import ImageSource, LoadedRecords, VQARecord, open_image
from limbeck.errors import BadInput
from limbeck.naming import nearest

Source = Callable[[Mapping[str, Any], Split], LoadedRecords]
Check = Literal["decode", "header", "exists"]

SOURCES: dict[str, Source] = {}
"""Source name -> what reads one split of it. A source takes the spec's other keys, and gives no records for a split it lacks."""

_PEEKED = 1000  # rows of a JSON file looked at to learn its columns
_CHECKERS = 8  # threads


class Settings(BaseModel):
    """What every source understands. max_broken: the share of rows that may be unusable before it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    max_broken: Annotated[float, Field(ge=0, le=1)] = 0.01


class DigitScenes(Settings):
    """`digit_scenes`. val, test: how many questions to hold out; they are the same whatever the training ``seed``."""

    scenes: int = 600
    digits: int | None = None
    questions: int = 1
    kinds: tuple[str, ...] = DEFAULT_KINDS
    seed: int = 0
    noise: float = 0.25
    val: Annotated[int, Field(ge=0)] = 1000
    test: Annotated[int, Field(ge=0)] = 2000


class UserData(Settings):
    """Rows that a user brings.

    columns: see `Columns`. images: the folder that image paths are relative to; default the folder of the data.
    check: how far each picture is read beforehand: decoded, its header, or only whether the file is there.
    allow_outside: let image paths leave ``images``. val_fraction: the share of the training rows that is held out to validate, chosen
    by a hash, so that it stays the same when rows are added; rows about one picture stay on one side.
    """

    path: str
    columns: Columns = Columns()
    images: str | None = None
    check: Check = "decode"
    allow_outside: bool = False
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Files(UserData):
    """path, val_path, test_path: a file a split."""

    val_path: str | None = None
    test_path: str | None = None


class Hub(UserData):
    """path: a name on the hub, or a folder that ``save_to_disk`` wrote or ``load_dataset`` reads. config: of the dataset.
    split, val_split, test_split: its names for ours."""

    config: str | None = None
    split: str = "train"
    val_split: str | None = None
    test_split: str | None = None


def register_source(name: str, read: Source) -> None:
    """Make ``source: name`` known; ``read(options, split)`` gives one split's records, none where it lacks the split."""
    SOURCES[name] = read


def load_data(spec: Mapping[str, Any], split: Split) -> LoadedRecords:
    """One split of the data that a spec describes.

    spec: ``source`` (a key of `SOURCES`) and that source's own keys, e.g. ``{source: vqa-jsonl, path: data/train.jsonl}``.
    Unusable rows (unreadable, without answer, picture missing or broken) are left out and listed in ``skipped``. A split that the spec
    does not provide has no records.
    Raises `BadInput`, in one line, for an unknown source, key or split, a missing file or column, no rows, and more unusable rows than
    ``max_broken`` allows.
    """
    options = dict(spec)
    source = str(options.pop("source", ""))
    if source not in SOURCES:
        raise BadInput(f"unknown data source {source!r}: {nearest(source, SOURCES)}")
    if split not in SPLITS:
        raise BadInput(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    return SOURCES[source](options, split)


def load_digit_scenes(options: Mapping[str, Any], split: Split) -> LoadedRecords:
    """The embedded task: see `digit_scenes` and `DigitScenes`."""
    chosen = _settings(DigitScenes, options, "digit-scenes")
    if split == "train":
        given = chosen.model_dump(include={"scenes", "digits", "questions", "kinds", "seed", "noise"})
        return LoadedRecords(digit_scenes("train", **given))
    held_out = chosen.val if split == "val" else chosen.test
    return LoadedRecords(digit_scenes(split, held_out, kinds=chosen.kinds, noise=chosen.noise) if held_out else [])


def load_vqa_jsonl(options: Mapping[str, Any], split: Split) -> LoadedRecords:
    """JSON lines, or one JSON list, of simple rows or LLaVA conversations."""
    chosen = _settings(Files, options, "vqa-jsonl")
    found = _file_of(chosen, split)
    if found is None:
        return LoadedRecords([])
    rows = read_json(found)
    peeked = list(islice(rows, _PEEKED))
    columns = _columns(chosen, list(dict.fromkeys(name for row in peeked for name in row.values or ())), str(found), peeked)
    return _usable(chain(peeked, rows), columns, chosen, split, found, found.parent)


def load_parquet(options: Mapping[str, Any], split: Split) -> LoadedRecords:
    """A parquet file, or a folder of them; pictures are paths, encoded bytes, or structs of both as ``datasets`` writes them."""
    chosen = _settings(Files, options, "parquet")
    found = _file_of(chosen, split)
    if found is None:
        return LoadedRecords([])
    files = sorted(found.rglob("*.parquet")) if found.is_dir() else [found]
    if not files or not files[0].is_file():
        raise BadInput(f"there is no parquet file {found}")
    datasets = _datasets()
    with _one_line(str(found)):
        table = datasets.Dataset.from_parquet([str(file) for file in files])
    return _from_arrow(table, chosen, split, found, files[0].parent)


def load_hf(options: Mapping[str, Any], split: Split) -> LoadedRecords:
    """Anything that ``datasets`` loads: a hub name, or a folder."""
    chosen = _settings(Hub, options, "hf")
    names = {"train": chosen.split, "val": chosen.val_split or (chosen.split if chosen.val_fraction else None), "test": chosen.test_split}
    name = names[split]
    if name is None:
        return LoadedRecords([])
    datasets = _datasets()
    folder = Path(chosen.path).expanduser()
    with _one_line(chosen.path):
        if (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(folder))
        elif (folder / "state.json").is_file():
            found = datasets.DatasetDict({chosen.split: datasets.load_from_disk(str(folder))})
        else:
            found = datasets.load_dataset(chosen.path, chosen.config)
    if name not in found:
        raise BadInput(f"{chosen.path} has no split {name!r}: {nearest(name, found)}")
    return _from_arrow(found[name], chosen, split, Path(chosen.path), folder if folder.is_dir() else Path.cwd())


for _name, _read in {
    "digit-scenes": load_digit_scenes,
    "vqa-jsonl": load_vqa_jsonl,
    "parquet": load_parquet,
    "hf": load_hf,
}.items():
    register_source(_name, _read)
