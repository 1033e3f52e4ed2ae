"""``load_data``: the ``data:`` part of a recipe, read into records and checked before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from limbeck.data.embedded.digit_scenes import KINDS, SPLITS, Split, digit_scenes
from limbeck.data.formats import BrokenRow, Columns, ImageFolder, Row, read_arrow, read_json, row_group, row_id, to_record
from limbeck.data.records import ImageSource, LoadedRecords, VQARecord, open_image, read_header
from limbeck.errors import BadInput
from limbeck.naming import nearest
from limbeck.settings import Strict, validated

Source = Callable[[Mapping[str, Any], Split], LoadedRecords]
Check = Literal["decode", "header", "exists"]

SOURCES: dict[str, Source] = {}
"""Source name -> what reads one split of it. A source takes the spec's other keys, and gives no records for a split it lacks."""

_PEEKED = 1000  # rows of a JSON file looked at to learn its columns
_CHECKED = 10_000  # pictures handed to the threads at a time
_CHECKERS = 8  # threads


class Settings(Strict):
    """What every source understands. max_broken: the share of rows that may be unusable before it is an error."""

    max_broken: Annotated[float, Field(ge=0, le=1)] = 0.01


class DigitScenes(Settings):
    """`digit_scenes`. val, test: how many questions to hold out; they are the same whatever the training ``seed``."""

    scenes: int = 600
    digits: int | None = None
    questions: int = 1
    kinds: tuple[str, ...] = KINDS
    layout: str = "pair"
    seed: int = 0
    noise: float = 0.1
    val: Annotated[int, Field(ge=0)] = 1000
    test: Annotated[int, Field(ge=0)] = 2000


class UserData(Settings):
    """Rows that a user brings.

    columns: see `Columns`. images: the folder that image paths are relative to; default the folder of the data.
    check: how far each picture is read beforehand: decoded, its header, or only whether the file is there.
    allow_outside: let image paths leave ``images``. val_fraction: the share of the training rows that is held out to validate, chosen
    by a hash of the picture's path (of the row's id where it has none), so that it stays the same when rows are added and all rows
    about one picture stay on one side.
    """

    path: str
    columns: Columns = Columns()
    images: str | None = None
    check: Check = "decode"
    allow_outside: bool = False
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def shared(self) -> str | None:
        """Where training and validation rows both come from, if they do."""
        return self.path if self.val_fraction else None

    def locator(self, home: Path) -> ImageFolder:
        """Where image paths as written point to; ``home`` is the folder of the data."""
        return ImageFolder(Path(self.images).expanduser() if self.images else home, self.allow_outside)


class Files(UserData):
    """path, val_path, test_path: a file a split."""

    val_path: str | None = None
    test_path: str | None = None

    def of(self, split: Split) -> str | None:
        """The file of a split, where there is one."""
        return {"train": self.path, "val": self.val_path or self.shared, "test": self.test_path}[split]

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.val_path and self.val_fraction:
            raise ValueError("give val_path or val_fraction, not both")
        return self


class Hub(UserData):
    """path: a name on the hub, or a folder that ``save_to_disk`` wrote or ``load_dataset`` reads. config: of the dataset.
    split, val_split, test_split: its names for ours."""

    config: str | None = None
    split: str = "train"
    val_split: str | None = None
    test_split: str | None = None

    @property
    def shared(self) -> str | None:
        return self.split if self.val_fraction else None

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.val_split and self.val_fraction:
            raise ValueError("give val_split or val_fraction, not both")
        return self


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
    chosen = validated(DigitScenes, options, "data source digit-scenes")
    if split == "train":
        given = chosen.model_dump(include={"scenes", "digits", "questions", "kinds", "layout", "seed", "noise"})
        return LoadedRecords(digit_scenes("train", **given))
    held_out = chosen.val if split == "val" else chosen.test
    given = chosen.model_dump(include={"kinds", "layout", "noise"})
    return LoadedRecords(digit_scenes(split, held_out, **given) if held_out else [])


def load_vqa_jsonl(options: Mapping[str, Any], split: Split) -> LoadedRecords:
    """JSON lines, or one JSON list, of simple rows or LLaVA conversations."""
    chosen = validated(Files, options, "data source vqa-jsonl")
    path = chosen.of(split)
    if path is None:
        return LoadedRecords([])
    file = Path(path).expanduser()
    rows = read_json(file)
    peeked = list(islice(rows, _PEEKED))
    present = list(dict.fromkeys(name for row in peeked for name in row.values or ()))
    # Where no row can be read there are no columns to miss: the reason is that of the first row.
    columns = chosen.columns.found_in(present, path) if present else chosen.columns
    return _usable(chain(peeked, rows), columns, chosen.locator(file.parent), chosen, split, path)


def load_parquet(options: Mapping[str, Any], split: Split) -> LoadedRecords:
    """A parquet file, or a folder of them; pictures are paths, encoded bytes, or structs of both as ``datasets`` writes them."""
    chosen = validated(Files, options, "data source parquet")
    path = chosen.of(split)
    if path is None:
        return LoadedRecords([])
    found = Path(path).expanduser()
    files = sorted(found.rglob("*.parquet")) if found.is_dir() else [found]
    if not files or not files[0].is_file():
        raise BadInput(f"there is no parquet file {path}")
    with reported(path):
        dataset = datasets_library().Dataset.from_parquet([str(file) for file in files])
    locate = chosen.locator(found if found.is_dir() else found.parent)
    columns = chosen.columns.found_in(dataset.column_names, path)
    return _usable(read_arrow(dataset, columns, locate), columns, locate, chosen, split, path)


def load_hf(options: Mapping[str, Any], split: Split) -> LoadedRecords:
    """Anything that ``datasets`` loads: a hub name, or a folder."""
    chosen = validated(Hub, options, "data source hf")
    name = {"train": chosen.split, "val": chosen.val_split or chosen.shared, "test": chosen.test_split}[split]
    if name is None:
        return LoadedRecords([])
    folder = Path(chosen.path).expanduser()
    with reported(chosen.path):
        if (folder / "dataset_dict.json").is_file():
            splits = datasets_library().load_from_disk(str(folder))
        elif (folder / "state.json").is_file():
            splits = {chosen.split: datasets_library().load_from_disk(str(folder))}
        else:
            splits = datasets_library().load_dataset(chosen.path, chosen.config)
    if name not in splits:
        raise BadInput(f"{chosen.path} has no split {name!r}: {nearest(name, splits)}")
    dataset, home = splits[name], folder if folder.is_dir() else Path.cwd()
    columns = chosen.columns.found_in(dataset.column_names, chosen.path)
    rows = read_arrow(dataset, columns, ImageFolder(home, allow_outside=True))  # pictures that datasets itself put somewhere
    return _usable(rows, columns, chosen.locator(home), chosen, split, chosen.path)


SOURCES |= {"digit-scenes": load_digit_scenes, "vqa-jsonl": load_vqa_jsonl, "parquet": load_parquet, "hf": load_hf}


def _usable(
    rows: Iterable[Row], columns: Columns, locate: Callable[[str], Path], chosen: UserData, split: Split, where: str
) -> LoadedRecords:
    """The records of the rows that belong to this split and whose pictures can be read; the others in ``skipped``."""
    # With val_fraction both come from one place, and the hash says which row is whose.
    shares = bool(chosen.shared) and split != "test"
    mine = (row for row in rows if not shares or (hashed(row_group(row, columns)) < chosen.val_fraction) == (split == "val"))
    records: list[tuple[int, VQARecord]] = []
    skipped: list[dict[str, str | int]] = []
    times_seen: Counter[str] = Counter()
    for row in mine:
        try:
            record = to_record(row, columns, locate)
        except BrokenRow as error:
            skipped.append({"row": row.number, "id": row_id(row, columns), "reason": str(error)})
            continue
        times_seen[record.id] += 1
        if times_seen[record.id] > 1:  # ids name samples in caches and reports
            record = replace(record, id=f"{record.id}#{times_seen[record.id]}")
        records.append((row.number, record))

    faults = faulty({image for _, record in records for image in record.images}, chosen.check)
    usable = []
    for number, record in records:
        fault = next((faults[image] for image in record.images if image in faults), None)
        if fault is None:
            usable.append(record)
        else:
            skipped.append({"row": number, "id": record.id, "reason": fault})
    skipped.sort(key=lambda entry: entry["row"])

    total = len(usable) + len(skipped)
    if total == 0:
        share = f" of the {chosen.val_fraction:.1%} that val_fraction sets aside" if shares and split == "val" else ""
        raise BadInput(f"{where} holds no rows{share}: nothing for the {split} split")
    if len(skipped) > chosen.max_broken * total:
        first = skipped[0]
        raise BadInput(
            f"{where}: {len(skipped)} of {total} rows are unusable ({len(skipped) / total:.1%}; max_broken allows "
            f"{chosen.max_broken:.1%}); the first, row {first['row']} ({first['id']}): {first['reason']}"
        )
    return LoadedRecords(usable, skipped)


def faulty(images: Iterable[ImageSource], check: Check) -> dict[ImageSource, str]:
    """What is wrong with those pictures that cannot be read; each is looked at once."""
    waiting, faults = iter(images), {}
    with ThreadPoolExecutor(_CHECKERS) as pool:
        while some := list(islice(waiting, _CHECKED)):
            found = zip(some, pool.map(lambda image: _fault(image, check), some), strict=True)
            faults.update({image: fault for image, fault in found if fault})
    return faults


def _fault(image: ImageSource, check: Check) -> str:
    """Why a picture cannot be read, "" where it can."""
    name = image.name if isinstance(image, Path) else "stored in the row"
    try:
        if isinstance(image, Path) and not image.is_file():
            return f"image missing: {image}"
        if check == "decode":
            open_image(image)
        elif check == "header":
            read_header(image).close()
    except Exception as error:  # decoders raise all kinds for damaged files
        return f"image broken: {name}: {' '.join(str(error).split())}"
    return ""


def hashed(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def datasets_library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise BadInput("reading parquet files and datasets needs `datasets`: pip install 'limbeck[data]'") from error
    return datasets


@contextmanager
def reported(where: str) -> Iterator[None]:
    """What ``datasets`` raises for input it cannot read (all kinds), as one line."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"cannot load {where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
