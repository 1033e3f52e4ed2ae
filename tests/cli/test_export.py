"""``limbeck export`` as a user meets it, on finished runs of a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

import limbeck
from limbeck.data.images import load_images
from limbeck.data.views import ImageDataset
from limbeck.engine.export import export, trained
from limbeck.engine.recipe import load_recipe
from limbeck.models.vision import load_classifier

RECIPE = {
    "method": {"name": "compose", "objectives": ["ce"]},
    "student": {"source": "tiny", "name": "cnn", "options": {"widths": [4, 8]}},
    "data": {"source": "digits", "limit": 100},
    "train": {"steps": 5, "batch_size": 16},
}


@pytest.fixture
def exports(command, capfd):
    """``limbeck export``, with what native code prints, too."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return command(capfd, "export", *arguments)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    limbeck.run(RECIPE, out=folder, quiet=True)
    return folder


def test_json_says_what_was_written_and_the_graph_is_the_runs_student(exports, finished, tmp_path):
    out = tmp_path / "exported"
    status, printed, error = exports(finished, "--to", "onnx,safetensors", "--out", out, "--int8", "--samples", 90, "--json")
    assert status == 0
    result = json.loads(printed)
    assert json.loads((out / "export.json").read_text()) == result
    assert result["origin"] == {"run": "first", "method": "compose", "student": "tiny:cnn"}
    assert result["classes"] == [str(digit) for digit in range(10)]
    assert (result["checked"]["split"], result["checked"]["pictures"]) == ("test", 90)
    assert result["checked"]["max_difference"] <= 1e-4
    assert all(f"warning: {text}" in error for text in result["warnings"])
    for path in (finished / "student").iterdir():
        assert (out / "student" / path.name).read_bytes() == path.read_bytes()
    pictures = ImageDataset(load_images({"source": "digits"}, "test"))
    shown = torch.stack([pictures[index]["pixel_values"] for index in range(5)])
    [logits] = onnxruntime.InferenceSession(out / "model.onnx").run(None, {"pixel_values": shown.numpy()})
    with torch.no_grad():
        exact = load_classifier(finished / "student").eval()(shown)
    torch.testing.assert_close(torch.from_numpy(logits), exact, atol=1e-4, rtol=0)


def test_all_held_out_pictures_give_the_accuracy_of_the_run(finished, tmp_path):
    result = export(finished, out=tmp_path / "out", formats=["onnx"], batch=50)
    measured = json.loads((finished / "result.json").read_text())["test"]["accuracy"]
    assert result["accuracy"] == {"torch": pytest.approx(measured), "onnx": pytest.approx(measured)}
    assert result["input"]["shape"] == [50, 1, 8, 8]
    assert not (tmp_path / "out" / "student").exists()


def test_the_default_folder_the_table_and_a_second_time(exports, finished):
    status, printed, error = exports(finished, "--to", "safetensors")
    assert (status, error) == (0, "")
    assert "student/model.safetensors" in printed
    assert f"exported: {finished / 'exported'}" in printed
    status, _, error = exports(finished, "--to", "safetensors")
    assert status == 2
    assert "is not empty: choose another --out" in error
    shutil.rmtree(finished / "exported")


def test_what_cannot_be_exported_is_one_line(exports, finished, tmp_path):
    unfinished, vlm = tmp_path / "unfinished", tmp_path / "vlm"
    for folder in (unfinished, vlm):
        folder.mkdir()
        shutil.copy(finished / "recipe.yaml", folder)
    (vlm / "student").mkdir()
    (vlm / "student" / "config.json").write_text("{}")
    out = ("--out", tmp_path / "out")
    for arguments, says in (
        ((finished, "--to", "onx"), "unknown export format 'onx': did you mean 'onnx'?"),
        ((finished, "--to", "safetensors", "--int8"), "add onnx"),
        ((finished, "--batch", "some"), "batch 'some': expected dynamic"),
        ((finished, "--opset", 11), "opset 11: expected 18 or newer"),
        ((finished, "--samples", 0), "samples 0: expected at least one"),
        ((unfinished,), f"finish it with `limbeck resume {unfinished}`"),
        ((vlm,), f"ship {vlm / 'student'} as it is, AutoModelForImageTextToText.from_pretrained"),
        ((tmp_path / "nothing",), "not a run folder"),
    ):
        status, _, error = exports(*arguments, *out)
        assert status == 2
        assert says in error
        assert error.startswith("limbeck: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_method_that_ships_another_model_than_it_trains(tmp_path):
    recipe = {
        **RECIPE,
        "method": {"name": "compose", "objectives": ["simkd"]},
        "teacher": {"source": "tiny", "name": "cnn", "options": {"widths": [8, 12]}},
    }
    finished = limbeck.run(recipe, out=tmp_path / "run", quiet=True)
    result = export(finished.path, out=tmp_path / "out")
    assert result["accuracy"]["onnx"] == pytest.approx(finished.test["accuracy"])
    assert result["parameters"] == sum(parameter.numel() for parameter in finished.student.parameters())
    assert "load_classifier" not in (tmp_path / "out" / "MODEL_CARD.md").read_text()


def test_a_run_whose_teacher_is_gone_is_exported_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(yaml.safe_dump(RECIPE))
    method = {"name": "compose", "objectives": ["ce", "kd"]}
    run = limbeck.run({**RECIPE, "method": method, "teacher": {"source": "recipe", "name": str(teacher)}}, out=tmp_path / "run")
    teacher.unlink()
    shutil.rmtree(tmp_path / "cache")
    result = export(run.path, out=tmp_path / "out", formats=["safetensors"])
    assert result["files"].keys() == {"student/limbeck.json", "student/model.safetensors"}


def test_without_held_out_pictures_the_training_data_are_compared_on(tmp_path):
    for index in range(12):
        folder = tmp_path / "data" / ("dark", "light")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + index, 12), (20 * index,) * 3).save(folder / f"{index}.png")
    recipe = {**RECIPE, "data": {"source": "imagefolder", "path": str(tmp_path / "data"), "size": 9}}
    recipe["student"] = {**RECIPE["student"], "options": {"widths": [4], "channels": 3}}
    recipe["train"] = {"steps": 2, "batch_size": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    limbeck.run(path, out=tmp_path / "run", quiet=True)
    _, task = trained(tmp_path / "run", load_recipe(tmp_path / "run" / "recipe.yaml"))
    assert not task.held_out
    result = export(tmp_path / "run", out=tmp_path / "out", samples=7)
    assert (result["checked"]["split"], result["checked"]["pictures"]) == ("train", 7)
    assert result["classes"] == ["dark", "light"]
    assert result["input"]["shape"] == ["batch", 3, 9, 9]
    assert result["input"]["resized"] == 9
    assert "shorter side resized to 9" in (tmp_path / "out" / "MODEL_CARD.md").read_text()
