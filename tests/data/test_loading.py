"""Users' data: what is read, what is left out and reported, and what is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from limbeck.data import loading
from limbeck.data.loading import load_data, register_source
from limbeck.data.records import LoadedRecords, VQARecord, open_image
from limbeck.data.vlm import VQADataset
from limbeck.errors import BadInput
from limbeck.models.tiny.digit_vlm import build_processor


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path, monkeypatch):
    """Copies that ``datasets`` makes go away with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """0.png .. 9.png: 16x16, each of its own grey."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(10):
        Image.new("RGB", (16, 16), (20 * k,) * 3).save(folder / f"{k}.png")
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    """One JSON line a row; text is written as it is."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def simple(k: int, **changes: Any) -> dict[str, Any]:
    return {"image": f"{k % 10}.png", "question": f"question {k}?", "answer": f"{k}", **changes}


def conversation(*texts: str, **values: Any) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return {"id": "c", "image": "0.png", "conversations": said, **values}


def jsonl(path: Path, pictures: Path, **more: Any) -> dict[str, Any]:
    return {"source": "vqa-jsonl", "path": str(path), "images": str(pictures), **more}


def refused(spec: Mapping[str, Any], split: str = "train") -> str:
    """The message with which a spec is refused."""
    with pytest.raises(BadInput) as raised:
        load_data(spec, split)
    message = str(raised.value)
    assert "\n" not in message
    return message


def grey(record: VQARecord, which: int = 0) -> int:
    return open_image(record.images[which]).getpixel((0, 0))[0]


# What is read


def test_simple_rows(tmp_path, pictures):
    rows = [simple(3), simple(4, id=17), simple(3, answer=2.5), {"question": " no picture? ", "answer": "none"}]
    loaded = load_data(jsonl(write(tmp_path / "a.jsonl", rows), pictures), "train")
    assert [record.id for record in loaded.records] == ["3.png", "17", "3.png#2", "row-4"]
    assert [record.turns for record in loaded.records] == [
        (("question 3?", "3"),), (("question 4?", "4"),), (("question 3?", "2.5"),), (("no picture?", "none"),)
    ]  # fmt: skip
    assert [grey(record) for record in loaded.records[:3]] == [60, 80, 60]
    assert loaded.records[3].images == ()
    assert loaded.skipped == []


def test_of_several_annotators_answers_the_most_frequent_counts(tmp_path, pictures):
    rows = [
        {"image": "0.png", "question": "?", "answers": ["red", "blue", "blue"]},
        {"image": "0.png", "question": "?", "answers": [{"answer": "b"}, {"answer": "a"}]},
        {"image": "0.png", "question": "?", "answers": [0, 0]},
        {"image": "0.png", "question": "?", "answers": [{"answer": 0}]},
        {"image": "0.png", "question": "?", "answers": ["", None, " ", "yes"]},
    ]
    loaded = load_data(jsonl(write(tmp_path / "a.jsonl", rows), pictures), "train")
    assert [record.turns[0][1] for record in loaded.records] == ["blue", "b", "0", "0", "yes"]


def test_llava_conversations_as_lines_and_as_a_list(tmp_path, pictures):
    rows = [
        conversation("<image>\nwhat is it?", "a digit", "which?", "seven"),
        conversation("compare <image> and <image>", "same", image=["1.png", "2.png"], id="d"),
        {
            "id": "e",
            "conversations": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "ho"},
            ],
        },
    ]
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps(rows))
    for path in (write(tmp_path / "a.jsonl", rows), listed):
        first, second, third = load_data(jsonl(path, pictures), "train").records
        assert first.turns == (("what is it?", "a digit"), ("which?", "seven"))
        assert second.turns == (("compare  and", "same"),)
        assert [grey(second, which) for which in (0, 1)] == [20, 40]
        assert third == VQARecord("e", (), (("hi", "ho"),))


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n", b" \r\n\t", b"\xef\xbb\xbf\n"])
def test_a_byte_order_mark_or_blanks_may_come_first(tmp_path, pictures, before):
    rows = [simple(0), simple(1)]
    for name, text in (("a.json", json.dumps(rows, indent=1)), ("a.jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_bytes(before + text.encode())
        loaded = load_data(jsonl(tmp_path / name, pictures), "train")
        assert [record.id for record in loaded.records] == ["0.png", "1.png"], name


def test_names_that_are_not_utf_8(tmp_path, pictures):
    name = os.fsdecode(b"gr\xfcn.png")
    (pictures / "5.png").rename(pictures / name)
    spec = jsonl(
        write(tmp_path / "a.jsonl", [simple(0, image=name), simple(0, image=name, id=name)]), pictures, val_fraction=0.99
    )
    records = load_data(spec, "val").records
    assert [record.id for record in records] == [r"gr\udcfcn.png", r"gr\udcfcn.png#2"]
    assert [grey(record) for record in records] == [100, 100]


def test_columns_may_have_other_names(tmp_path, pictures):
    rows = [{"img": "5.png", "q": "what?", "label": "five", "key": "k"}]
    columns = {"image": "img", "question": "q", "answer": "label", "id": "key"}
    (record,) = load_data(jsonl(write(tmp_path / "a.jsonl", rows), pictures, columns=columns), "train").records
    assert (record.id, record.turns, grey(record)) == ("k", (("what?", "five"),), 100)


def test_images_lie_beside_the_data_unless_said_otherwise(pictures):
    spec = {"source": "vqa-jsonl", "path": str(write(pictures / "a.jsonl", [simple(2)]))}
    assert grey(load_data(spec, "train").records[0]) == 40


def test_parquet_with_paths_bytes_and_structs(tmp_path, pictures):
    files = [pictures / f"{k}.png" for k in range(10)]
    rows = {"question": [f"question {k}?" for k in range(10)], "answer": [str(k) for k in range(10)]}
    cells = {
        "paths": [file.name for file in files],
        "bytes": [file.read_bytes() for file in files],
        "structs": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "named": [{"bytes": None, "path": file.name} for file in files],
    }
    for name, column in cells.items():
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict({"image": column, **rows}).to_parquet(str(path))
        loaded = load_data({"source": "parquet", "path": str(path), "images": str(pictures)}, "train")
        assert [grey(record) for record in loaded.records] == [20 * k for k in range(10)], name
        assert [record.turns[0][1] for record in loaded.records] == [str(k) for k in range(10)], name


def test_datasets_folders_with_pictures_lists_of_them_and_none(tmp_path, pictures):
    opened = [Image.open(pictures / f"{k}.png") for k in range(4)]
    one = datasets.Dataset.from_dict(
        {"picture": [*opened[:3], None], "q": list("abcd"), "a": list("wxyz")},
        features=datasets.Features({"picture": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")}),
    )
    many = datasets.Dataset.from_dict(
        {"images": [opened[:2], [], opened[3:]], "question": list("abc"), "answer": list("xyz")},
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
            }
        ),
    )
    datasets.DatasetDict({"train": one, "validation": one.select([2])}).save_to_disk(tmp_path / "one")
    many.save_to_disk(tmp_path / "many")

    columns = {"image": "picture", "question": "q", "answer": "a"}
    spec = {"source": "hf", "path": str(tmp_path / "one"), "columns": columns, "val_split": "validation"}
    records = load_data(spec, "train").records
    assert [len(record.images) for record in records] == [1, 1, 1, 0]
    assert [grey(record) for record in records[:3]] == [0, 20, 40]
    assert [(grey(record), record.turns) for record in load_data(spec, "val").records] == [(40, (("c", "y"),))]
    assert load_data(spec, "test").records == []

    records = load_data({"source": "hf", "path": str(tmp_path / "many")}, "train").records
    assert [[grey(record, k) for k in range(len(record.images))] for record in records] == [[0, 20], [], [60]]


def test_loaded_records_can_be_trained_on(tmp_path, pictures):
    files = [{"bytes": (pictures / f"{k}.png").read_bytes(), "path": None} for k in range(3)]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"image": files, "question": ["is there a 3?"] * 3, "answer": ["no"] * 3}).to_parquet(str(path))
    dataset = VQADataset(load_data({"source": "parquet", "path": str(path)}, "train").records, build_processor())
    shades = [dataset[k]["student"]["pixel_values"].mean().item() for k in range(3)]
    assert shades[0] < shades[1] < shades[2]


def test_digit_scenes_hold_out_the_same_whatever_the_training_seed():
    spec = {"source": "digit-scenes", "scenes": 12, "questions": 3, "digits": 50, "val": 6, "test": 8, "max_broken": 0.01}
    for split, size in (("train", 12), ("val", 6), ("test", 8)):
        assert len(load_data(spec, split).records) == size
    for split, alike in (("train", False), ("val", True), ("test", True)):
        one, other = (load_data({**spec, "seed": seed}, split).records for seed in (1, 2))
        assert ([r.images[0].tobytes() for r in one] == [r.images[0].tobytes() for r in other]) is alike
    assert load_data({**spec, "val": 0}, "val").records == []


def test_another_package_may_add_a_source(monkeypatch):
    monkeypatch.setattr(loading, "SOURCES", dict(loading.SOURCES))
    mine = LoadedRecords([VQARecord("mine", (), (("q", "a"),))])
    register_source("mine", lambda options, split: mine if options == {"path": "here"} else LoadedRecords([]))
    assert load_data({"source": "mine", "path": "here"}, "train") is mine


# What is held out


def test_a_share_held_out_is_stable_and_keeps_a_picture_on_one_side(tmp_path, pictures):
    rows = [{"id": f"q{k}", "image": f"{k % 10}.png", "question": "?", "answer": "a"} for k in range(400)]
    spec = jsonl(write(tmp_path / "a.jsonl", rows), pictures, val_fraction=0.3)
    sides = [{str(record.images[0]) for record in load_data(spec, split).records} for split in ("train", "val")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 10
    assert load_data(spec, "test").records == []

    rows = [{"id": f"q{k}", "question": "?", "answer": "a"} for k in range(2000)]
    before, after = (
        {record.id for record in load_data(jsonl(write(tmp_path / "b.jsonl", part), pictures, val_fraction=0.1), "val").records}
        for part in (rows[:1000], rows[::-1])
    )
    assert before == {name for name in after if int(name[1:]) < 1000}
    assert len(after) == pytest.approx(200, abs=40)


def test_validation_and_test_files_of_their_own(tmp_path, pictures):
    paths = {key: str(write(tmp_path / f"{key}.jsonl", [simple(k)])) for k, key in enumerate(("train", "val_path", "test_path"))}
    spec = jsonl(Path(paths.pop("train")), pictures, **paths)
    assert [load_data(spec, split).records[0].turns[0][1] for split in ("train", "val", "test")] == ["0", "1", "2"]
    assert "not both" in refused({**spec, "val_fraction": 0.1})
    assert load_data(jsonl(Path(spec["path"]), pictures), "val").records == []


def test_a_share_that_leaves_nothing_is_refused(tmp_path, pictures):
    spec = jsonl(write(tmp_path / "a.jsonl", [simple(0)]), pictures, val_fraction=0.001)
    assert "0.1% that val_fraction sets aside" in refused(spec, "val")


# What is left out


def test_broken_rows_are_left_out_counted_and_explained(tmp_path, pictures):
    (pictures / "cut.png").write_bytes((pictures / "1.png").read_bytes()[:60])
    (pictures / "text.png").write_text("no picture")
    broken = {
        "unreadable JSON": '{"image": "0.png", "questi',
        "not a JSON object but list": "[1, 2]",
        "empty question": simple(0, question="  "),
        "empty answer": simple(0, answer=None),
        "answer is neither text nor number": simple(0, answer={"a": 1}),
        "image missing": simple(0, image="absent.png"),
        "image broken: cut.png": simple(0, image="cut.png"),
        "image broken: text.png": simple(0, image="text.png"),
        "image is neither a path nor a list of paths": simple(0, image=7),
        "image path leaves the images folder": simple(0, image="../pictures/0.png"),
        "image path leaves the images folder: /": simple(0, image=str(pictures / "0.png")),
        "image path leaves the images folder: a/../../": simple(0, image="a/../../pictures/0.png"),
        "does not take turns": conversation("hello"),
        "take turns of human and gpt: ['gpt', 'human']": conversation("", "", conversations=[{"from": "gpt"}, {"from": "human"}]),
        "take turns of human and gpt: []": conversation(),
        "text speaks of 2 images, the row has 1": conversation("<image><image>?", "x"),
        "a message without text": conversation("hello", None),
        "not a list of messages": conversation(conversations="hello"),
        "image missing: ": simple(0, image="nul\0.png"),
    }
    loaded = load_data(
        jsonl(write(tmp_path / "a.jsonl", [simple(1), *broken.values(), simple(2)]), pictures, max_broken=1.0), "train"
    )
    assert [record.turns[0][1] for record in loaded.records] == ["1", "2"]
    assert [entry["row"] for entry in loaded.skipped] == list(range(2, len(broken) + 2))
    for reason, entry in zip(broken, loaded.skipped, strict=True):
        assert reason in entry["reason"]
        assert "\n" not in entry["reason"]


def test_too_large_a_share_of_broken_rows_is_refused(tmp_path, pictures):
    path = write(
        tmp_path / "a.jsonl", [*(simple(k) for k in range(97)), simple(97, answer=""), simple(98, image="absent.png"), "{"]
    )
    message = refused(jsonl(path, pictures))
    assert "3 of 100 rows are unusable (3.0%; max_broken allows 1.0%); the first, row 98 (7.png): empty answer" in message
    assert len(load_data(jsonl(path, pictures, max_broken=0.03), "train").skipped) == 3


def test_pictures_are_checked_as_closely_as_asked(tmp_path, pictures):
    whole = (pictures / "1.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[:-30])
    (pictures / "text.png").write_text("no picture")
    path = write(
        tmp_path / "a.jsonl", [simple(0), simple(1, image="cut.png"), simple(2, image="text.png"), simple(3, image="gone.png")]
    )
    for check, expected in (("decode", [2, 3, 4]), ("header", [3, 4]), ("exists", [4])):
        loaded = load_data(jsonl(path, pictures, check=check, max_broken=1.0), "train")
        assert [entry["row"] for entry in loaded.skipped] == expected, check


def test_broken_pictures_inside_a_parquet_file_are_found(tmp_path, pictures):
    cells = [(pictures / "1.png").read_bytes(), b"no picture"]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"image": cells, "question": ["?"] * 2, "answer": ["a"] * 2}).to_parquet(str(path))
    loaded = load_data({"source": "parquet", "path": str(path), "max_broken": 0.5}, "train")
    assert [entry["row"] for entry in loaded.skipped] == [2]


def test_a_path_inside_a_parquet_struct_may_not_leave_the_images_folder(tmp_path, pictures):
    path = tmp_path / "a.parquet"
    cells = [{"bytes": None, "path": str(pictures / "1.png")}]
    datasets.Dataset.from_dict({"image": cells, "question": ["?"], "answer": ["a"]}).to_parquet(str(path))
    assert "leaves the images folder" in refused({"source": "parquet", "path": str(path)})


def test_outside_images_are_read_where_allowed(tmp_path, pictures):
    (tmp_path / "other").mkdir()
    rows = [simple(0, image="../pictures/4.png"), simple(0, image=str(pictures / "5.png"))]
    spec = jsonl(write(tmp_path / "a.jsonl", rows), tmp_path / "other", allow_outside=True)
    assert [grey(record) for record in load_data(spec, "train").records] == [80, 100]


# What is refused


def test_wrong_specs_are_refused_in_one_line(tmp_path, pictures):
    path = write(tmp_path / "a.jsonl", [simple(0)])
    good = jsonl(path, pictures)
    assert "did you mean 'vqa-jsonl'" in refused({"source": "vqa-json", "path": "x"})
    assert "unknown data source ''" in refused({})
    assert "unknown split 'dev'" in refused(good, "dev")
    assert "unknown key 'imags'; did you mean 'images'" in refused({**good, "imags": "x"})
    assert "unknown key 'columns.anser'; did you mean 'answer'?" in refused({**good, "columns": {"anser": "x"}})
    assert "vqa-jsonl: 'path' is required" in refused({"source": "vqa-jsonl"})
    assert "vqa-jsonl: check: Input should be" in refused({**good, "check": "all"})
    assert "vqa-jsonl: max_broken: Input should be" in refused({**good, "max_broken": 2})
    assert "digit-scenes: unknown key 'scene'; did you mean 'scenes'?" in refused({"source": "digit-scenes", "scene": 5})
    assert "digit-scenes: scenes: Input should be" in refused({"source": "digit-scenes", "scenes": "many"})


def test_missing_and_empty_data_are_refused(tmp_path, pictures):
    assert f"no file {tmp_path / 'gone.jsonl'}" in refused(jsonl(tmp_path / "gone.jsonl", pictures))
    assert "no parquet file" in refused({"source": "parquet", "path": str(tmp_path / "gone.parquet")})
    assert "no parquet file" in refused({"source": "parquet", "path": str(pictures)})
    assert "holds no rows" in refused(jsonl(write(tmp_path / "empty.jsonl", []), pictures))
    assert "begins like a JSON list but is none" in refused(jsonl(write(tmp_path / "cut.json", ["[{"]), pictures))
    (tmp_path / "no.parquet").write_text("no parquet")
    assert "cannot load" in refused({"source": "parquet", "path": str(tmp_path / "no.parquet")})
    assert "cannot load" in refused({"source": "hf", "path": str(tmp_path / "gone")})


def test_a_missing_column_is_named_with_those_present(tmp_path, pictures):
    row = {"image": "0.png", "question": "?", "anwser": "a"}
    path = write(tmp_path / "a.jsonl", [row])
    message = refused(jsonl(path, pictures))
    assert "no column 'answer'; it has image, question, anwser; did you mean 'anwser'? set data.columns.answer" in message
    assert "no column 'label'" in refused(jsonl(path, pictures, columns={"answer": "label"}))
    frame = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({key: [value] for key, value in row.items()}).to_parquet(str(frame))
    assert "no column 'answer'; it has image, question, anwser" in refused({"source": "parquet", "path": str(frame)})


def test_a_picture_column_under_another_name_is_not_overlooked(tmp_path, pictures):
    path = write(tmp_path / "a.jsonl", [{"image_path": "0.png", "question": "?", "answer": "a"}])
    assert "no column 'image', but 'image_path': set data.columns.image" in refused(jsonl(path, pictures))
    (record,) = load_data(jsonl(path, pictures, columns={"image": "-"}), "train").records
    assert record.images == ()


def test_a_split_that_a_dataset_lacks_is_named_with_the_nearest(tmp_path, pictures):
    dataset = datasets.Dataset.from_dict({"question": ["?"], "answer": ["a"]})
    datasets.DatasetDict({"train": dataset, "validation": dataset}).save_to_disk(tmp_path / "d")
    assert "no split 'valid': did you mean 'validation'" in refused(
        {"source": "hf", "path": str(tmp_path / "d"), "val_split": "valid"}, "val"
    )
