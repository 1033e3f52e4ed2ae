"""Classes and colours across splits, stages, students and teachers: whatever says them, a label is a place among the data's classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics import MeanMetric

from limbeck.engine.export import export
from limbeck.engine.pictures import Pictures
from limbeck.engine.recipe import DataSpec, load_recipe
from limbeck.engine.run import evaluate_run, run
from limbeck.engine.task import build_task, few, labelled_first
from limbeck.errors import BadInput
from limbeck.evaluate import measure
from limbeck.models.tiny.classifiers import build

CNN = {"source": "tiny", "name": "cnn", "options": {"widths": [4, 8]}}
THREE = {"source": "digits", "classes": ["3", "5", "8"], "limit": 60}


def recipe(data, student=None, **changes):
    return {
        "method": {"name": "compose", "objectives": ["ce"]},
        "student": student or CNN,
        "data": data,
        "train": {"steps": 2, "batch_size": 8, "lr": 1e-3, **changes.pop("train", {})},
        **changes,
    }


def folder(root, pictures, grey=()):
    """An image folder of noise. pictures: split -> class -> how many; grey: paths in it of pictures without colour."""
    rng = np.random.default_rng(0)
    for split, classes in pictures.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                path = f"{split}/{name}/{number}.png"
                picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                picture.convert("L" if path in grey else "RGB").save(root / path)
    return {"source": "imagefolder", "path": str(root)}


def refused(spec, teacher=None):
    with pytest.raises(BadInput) as raised:
        build_task(load_recipe(spec), teacher)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Colours


def test_every_split_and_stage_has_the_colours_of_the_training_data(tmp_path):
    classes = {"a": 2, "b": 2}
    data = folder(tmp_path / "base", {"train": classes, "val": classes, "test": classes}, grey=("val/a/0.png", "test/a/0.png"))
    other = folder(tmp_path / "stage", {"train": classes}, grey=("train/a/0.png",))
    shown = Pictures.of({"train": DataSpec(**data), "late": DataSpec(**other)})
    datasets = [*shown.data.values(), *shown.held_out.values(), shown.reference]
    assert [dataset.channels for dataset in datasets] == [3] * 5
    coloured = shown.held_out["val"][1]["pixel_values"]
    assert not torch.equal(coloured[0], coloured[1])
    grey = Pictures.of({"train": DataSpec(**data, channels=1), "late": DataSpec(**other, channels=3)})
    assert [grey.held_out["val"].channels, grey.data["late"].channels] == [1, 3]


def test_a_grey_picture_first_does_not_turn_an_exported_model_grey(tmp_path):
    data = folder(tmp_path / "base", {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}}, grey=("test/a/0.png",))
    student = {**CNN, "options": {"widths": [4], "channels": 3}}
    finished = run(recipe(data, student), out=tmp_path / "run", quiet=True)
    assert export(finished.path, out=tmp_path / "out", formats=["safetensors"])["input"]["colours"] == "RGB"


# Stages


def test_the_classes_of_a_stage_are_those_of_the_data(tmp_path):
    base = DataSpec(**folder(tmp_path / "base", {"train": {"ant": 1, "bee": 1, "cat": 1}}))
    other = folder(tmp_path / "other", {"train": {"bee": 1, "cat": 1, "dog": 1}})
    with pytest.raises(BadInput, match=r"'late': its data's classes \(bee, cat, dog\) are not those of `data` \(ant, bee, cat\)"):
        Pictures.of({"train": base, "late": DataSpec(**other)})
    (tmp_path / "table.csv").write_text("image\nother/train/dog/0.png\n")
    unlabelled = DataSpec(source="csv", path=str(tmp_path / "table.csv"), columns={"label": "-"})
    assert Pictures.of({"train": base, "early": unlabelled}).data["early"].labels.tolist() == [-100]


# The student


def test_a_student_takes_the_names_of_the_classes_that_it_learns(tmp_path):
    first = run(recipe({**THREE, "classes": ["8", "3", "5"]}), out=tmp_path / "first", quiet=True)
    assert first.student.classes == ("8", "3", "5")
    again = {"source": "tiny", "name": str(tmp_path / "first" / "student")}
    finished = run(recipe(THREE, again), out=tmp_path / "run", quiet=True)
    assert finished.student.classes == ("3", "5", "8")
    record = json.loads((tmp_path / "run" / "student" / "limbeck.json").read_text())
    assert record["classes"] == ["3", "5", "8"]
    measured = evaluate_run(tmp_path / "run")
    assert {name for name in measured if name.startswith("accuracy/")} == {"accuracy/3", "accuracy/5", "accuracy/8"}


def test_a_checkpoint_of_a_library_names_its_outputs_by_the_data(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1}
    config = transformers.ResNetConfig(**sizes, id2label={0: "8", 1: "5", 2: "3"}, label2id={"8": 0, "5": 1, "3": 2})
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "hf")
    run(recipe(THREE, {"source": "transformers", "name": str(tmp_path / "hf")}), out=tmp_path / "run", quiet=True)
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "student")
    assert [saved.id2label[index] for index in range(3)] == ["3", "5", "8"]


def test_names_that_a_recipe_gives_are_kept_where_they_do_not_contradict_the_data():
    named = build_task(load_recipe(recipe(THREE, {**CNN, "classes": ["three", "five", "eight"]})))
    assert named.method.student.classes == ("three", "five", "eight")
    more = build_task(load_recipe(recipe(THREE, {**CNN, "classes": 5}))).method.student
    assert more.classes == ("3", "5", "8") and more.model.head.out_features == 5


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["5", "3", "8"], "classes of the data in another order: 5 is class 0 of the student, 1 of the data; leave it out"),
        (["3", "5"], "student.classes names 2 and the data have 3 classes"),
        (["3", "5", "8", "9"], "student.classes names 4 and the data have 3 classes"),
        (2, "student.classes is 2 and the data have 3 classes: leave it out, or give at least 3"),
    ],
)
def test_classes_of_a_student_that_contradict_the_data_are_refused(classes, says):
    assert says in refused(recipe(THREE, {**CNN, "classes": classes}))


# The teacher


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ("5", "8", "9"),
            "some of the same classes in another order: 5 is class 0 of the teacher, 1 of the data; take a teacher",
        ),
        (("3", "8", "5"), "the same classes in another order: 8 is class 1 of the teacher, 2 of the data; list the teacher's"),
        (("three", "5", "eight"), ""),
        (("8", "5"), ""),
        ((), ""),
    ],
)
def test_a_teacher_of_as_many_classes_does_not_call_another_one_by_a_shared_name(names, says):
    teacher = build("cnn", 3, widths=(4,))
    teacher.classes = names
    spec = recipe(THREE, method={"name": "compose", "objectives": ["ce", "kd"]}, teacher={**CNN, "classes": 3})
    if says:
        assert says in refused(spec, teacher)
    else:
        build_task(load_recipe(spec), teacher)


# What is rehearsed


@pytest.mark.parametrize("metric", ["auroc", "accuracy/b"])
def test_what_needs_every_class_is_measured_on_sorted_pictures(metric, tmp_path):
    data = folder(tmp_path / "data", {"train": {"a": 4, "b": 4}, "val": {"a": 3, "b": 3}})
    student = {**CNN, "options": {"widths": [4], "channels": 3}}
    finished = run(recipe(data, student, train={"select": {"metric": metric}}), out=tmp_path / "run", quiet=True)
    assert metric in finished.metrics


def test_unlabelled_pictures_may_stand_first(tmp_path):
    folder(tmp_path, {"pictures": {"a": 4, "b": 4}})
    rows = [f"pictures/{name}/{number}.png,{name if number > 1 else ''}" for number in range(4) for name in "ab"]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *rows]))
    data = {"source": "csv", "path": str(tmp_path / "table.csv"), "val_path": str(tmp_path / "table.csv")}
    student = {**CNN, "options": {"widths": [4], "channels": 3}}
    assert "accuracy" in run(recipe(data, student), out=tmp_path / "run", quiet=True).metrics


def test_a_probe_learns_from_the_labelled_pictures_wherever_they_stand(tmp_path):
    data = {"source": "digits", "classes": ["3", "5"], "shots": 1, "unlabelled": True, "unlabelled_among": True, "seed": 0}
    spec = recipe(data, evaluate=["classification", "linear-probe"])
    reference = build_task(load_recipe(spec)).reference
    assert (reference.labels[:64] < 0).all(), "the case that is tested"
    assert "linear_probe_accuracy" in run(spec, out=tmp_path / "run", quiet=True).metrics


def test_few_samples_stand_for_all():
    class Labelled(list):
        def __init__(self, *labels):
            super().__init__(labels)
            self.labels = torch.tensor(labels)

    assert few(Labelled(-100, 1, 1, 0, 2)) == [3, 1, 4]
    assert few(Labelled(-100, 5, 5)) == [1, 2]
    assert few(Labelled(-100, -100, -100)) == [0, 1]
    assert labelled_first(Labelled(-100, 1, -100, 0)) == [1, 3, 0, 2]
    assert few(["a", "b", "c"]) == [0, 1] and few(["a"]) == [0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_process_without_a_batch_keeps_its_means_where_the_others_do(monkeypatch):
    """NCCL gathers from GPUs alone."""
    monkeypatch.setattr(measure, "gathered", lambda mine: [mine, {"accuracy": "cuda"}])
    asked = []
    monkeypatch.setattr(measure, "mean_metric", lambda device: asked.append(device) or MeanMetric())
    assert measure.Means().compute().keys() == {"accuracy"}
    assert asked == ["cuda"]
