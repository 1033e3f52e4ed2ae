"""Exported files against the model that they were made of: what they say, what they weigh, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import limbeck
from limbeck.data.images import ImageRecord, LabelledImages
from limbeck.data.views import ImageDataset
from limbeck.engine import export as exporting
from limbeck.engine.export import Answers, ExportConfig, answers, escaped, export_module, int8_warnings
from limbeck.errors import BadInput, LimbeckError
from limbeck.models.classifier import Classifier
from limbeck.models.tiny.classifiers import build
from limbeck.models.vision import load_classifier

NAMES = ("one", "two_b", "<b>three</b>", "four|4")


def classifier() -> Classifier:
    """A grey picture of any size -> three channels of 12x12, normalised -> 4 classes."""
    spec = {"source": "tiny", "name": "cnn", "classes": 4, "options": {"widths": [4, 8], "channels": 3}}
    model = build("cnn", 4, seed=1, widths=(4, 8), channels=3).model
    with torch.no_grad():
        model.head.weight.mul_(20)  # classes that differ by more than rounding
    return Classifier(model, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2), size=12, channels=3, classes=NAMES, spec=spec)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 20, 20, generator=torch.Generator().manual_seed(seed))


def held_out() -> list[dict[str, torch.Tensor]]:
    """Two batches; the last picture has no label."""
    labels = torch.arange(40) % 4
    labels[-1] = -100
    return [
        {"pixel_values": pictures(32), "labels": labels[:32]},
        {"pixel_values": pictures(8, 1), "labels": labels[32:]},
    ]


def asked(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": inputs.numpy()})[0])


@pytest.fixture(scope="module")
def model() -> Classifier:
    return classifier().eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("export") / "deep" / "out"
    result = export_module(model, held_out(), out=out, config=ExportConfig(int8=True), split="test", origin={"run": "a*b"})
    return out, result


def test_the_graph_resizes_repeats_and_normalises_as_the_view_does(exported, model):
    out, result = exported
    for count in (1, 2, 7):
        shown = pictures(count, seed=9)
        with torch.no_grad():
            torch.testing.assert_close(asked(out / "model.onnx", shown), model(shown), atol=1e-4, rtol=0)
    assert result["input"]["shape"] == ["batch", 1, 20, 20]
    assert result["input"]["range"] == [0.0, 1.0]
    assert (result["input"]["mean"], result["input"]["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.25, 0.2])
    assert result["output"]["shape"] == ["batch", 4]
    assert result["classes"] == list(NAMES)


def test_a_graph_is_one_valid_file_that_names_no_folder_of_this_machine(exported):
    out, result = exported
    assert {path.name for path in out.iterdir()} == {"student", "model.onnx", "model.int8.onnx", "export.json", "MODEL_CARD.md"}
    for name in ("model.onnx", "model.int8.onnx"):
        onnx.checker.check_model(out / name, full_check=True)
        written = (out / name).read_bytes()
        assert str(Path(limbeck.__file__).parent).encode() not in written
        assert b"site-packages" not in written
        [opset] = onnx.load(out / name).opset_import
        assert (opset.domain, opset.version) == ("", result["opset"])


def test_the_record_is_true(exported, model):
    out, result = exported
    assert json.loads((out / "export.json").read_text()) == result
    assert "student/model.safetensors" in result["files"]
    for name, entry in result["files"].items():
        written = (out / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(written), hashlib.sha256(written).hexdigest())
    shown = torch.cat([batch["pixel_values"] for batch in held_out()])
    labels = torch.cat([batch["labels"] for batch in held_out()])[:-1]
    with torch.no_grad():
        right = model(shown).argmax(-1)[:-1] == labels
    assert result["accuracy"]["torch"] == pytest.approx(right.double().mean().item())
    assert result["accuracy"]["onnx"] == result["accuracy"]["torch"]
    assert result["checked"]["pictures"] == 40
    assert result["checked"]["batch_sizes"] == [1, 2, 5, 24]
    assert result["checked"]["agreement"] == 1
    assert 0 <= result["checked"]["max_difference"] <= 1e-4
    assert result["latency"]["ms"].keys() == {"torch", "onnx", "int8"}
    assert all(milliseconds > 0 for milliseconds in result["latency"]["ms"].values())


def test_int8_quantises_convolutions_and_matrix_products_to_nearly_the_same(exported, model):
    out, result = exported
    assert result["int8"]["layers"] == {"convolution": 2, "matrix product": 1}
    shown = pictures(8, seed=5)
    with torch.no_grad():
        exact = model(shown)
    difference = (asked(out / "model.int8.onnx", shown) - exact).abs().max()
    assert 0 < difference < 0.05 * exact.abs().max()
    assert 0 < result["int8"]["max_difference"] < 0.05 * exact.abs().max()


def test_the_student_folder_loads_and_the_model_given_is_left_as_it_was(exported, model):
    out, _ = exported
    shown = pictures(3)
    with torch.no_grad():
        assert torch.equal(load_classifier(out / "student").eval()(shown), model(shown))
    training = classifier().train().double()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    export_module(training, held_out(), out=out.with_name("again"), config=ExportConfig(formats=["safetensors"]))
    assert training.training
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())
    assert next(training.parameters()).dtype == torch.float64


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_onnx_snippet(folder: Path, monkeypatch, picture: Image.Image | None = None, **saved: Any) -> dict[str, np.ndarray]:
    """What the model card's code makes of a picture beside it. saved: how it is written."""
    code = next(code for code in snippets((folder / "MODEL_CARD.md").read_text()) if "onnxruntime" in code)
    picture = picture or Image.fromarray((pictures(1, seed=3)[0, 0] * 255).byte().numpy())
    picture.save(folder / "picture.png", **saved)
    monkeypatch.chdir(folder)
    namespace: dict = {}
    exec(compile(code, "MODEL_CARD.md", "exec"), namespace)
    return namespace


def test_the_model_card_shows_code_that_runs_and_escapes_names(exported, model, monkeypatch, capsys):
    out, _ = exported
    card = (out / "MODEL_CARD.md").read_text()
    assert card.startswith("# a\\*b\n")
    assert "1: two\\_b, 2: &lt;b&gt;three&lt;/b&gt;, 3: four\\|4" in card
    logits = run_onnx_snippet(out, monkeypatch)["logits"]
    seen = (pictures(1, seed=3) * 255).byte() / 255
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(seen), atol=1e-4, rtol=0)
    assert capsys.readouterr().out == f"[{logits.argmax()}]\n"


def test_without_preprocessing_the_graph_takes_what_the_model_is_shown(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "bare"
    result = export_module(
        model, held_out(), out=out, config=ExportConfig(formats=["onnx"], preprocessing=False, batch=3, opset=18)
    )
    assert result["input"]["shape"] == [3, 3, 12, 12]
    assert (result["input"]["range"], result["input"]["preprocessing"]) == (None, "by the caller")
    assert (result["opset"], result["checked"]["batch_sizes"]) == (18, [3])
    assert result["accuracy"]["onnx"] == result["accuracy"]["torch"]
    shown = pictures(3, seed=7)
    with torch.no_grad():
        prepared = model.prepared(shown)
        torch.testing.assert_close(asked(out / "model.onnx", prepared), model(shown), atol=1e-4, rtol=0)
    with pytest.raises(Exception, match=r"(?i)invalid dimensions"):
        asked(out / "model.onnx", prepared[:2])
    assert not any("Resize" in node.op_type for node in onnx.load(out / "model.onnx").graph.node)
    assert "mean [0.1, 0.2, 0.3], std [0.5, 0.25, 0.2]" in (out / "MODEL_CARD.md").read_text()
    assert run_onnx_snippet(out, monkeypatch)["logits"].shape == (3, 4)


@pytest.mark.parametrize("preprocessing", [True, False])
@pytest.mark.parametrize("kind", ["turned", "16 bits"])
def test_the_model_cards_code_shows_a_file_as_training_does(kind, preprocessing, model, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (80, 120)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x112] = 6 if kind == "turned" else 1
    picture = Image.fromarray(noise.astype(np.uint8) if kind == "turned" else noise * 257)
    picture.save(tmp_path / "a.png", exif=exif)
    data = ImageDataset(LabelledImages([ImageRecord("a", tmp_path / "a.png", 0)], NAMES), size=20)
    shown = data[0]["pixel_values"][None]
    config = ExportConfig(formats=["onnx"], preprocessing=preprocessing)
    export_module(model, [{"pixel_values": shown}], out=tmp_path / "out", config=config, resized=20)
    given = torch.from_numpy(run_onnx_snippet(tmp_path / "out", monkeypatch, picture, exif=exif)["pixel_values"])
    expected = shown if preprocessing else model.prepared(shown)
    inside = (..., slice(1, -1), slice(1, -1))  # where a picture is cut, what is beside the cut counts only in one of them
    torch.testing.assert_close(given[inside], expected[inside], atol=0.02, rtol=0)


def test_pictures_of_one_size_are_resized_for_a_bare_graph_as_in_training(model, tmp_path, monkeypatch):
    picture = Image.fromarray((pictures(1, seed=3)[0, 0, :, :10] * 255).byte().numpy())
    shown = (pictures(1, seed=3)[..., :10] * 255).byte() / 255
    config = ExportConfig(formats=["onnx"], preprocessing=False)
    export_module(model, [{"pixel_values": shown}], out=tmp_path / "out", config=config)
    given = run_onnx_snippet(tmp_path / "out", monkeypatch, picture)["pixel_values"]
    torch.testing.assert_close(torch.from_numpy(given), model.prepared(shown), atol=0.02, rtol=0)


def test_an_empty_current_folder_is_written_into(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_module(model, held_out(), out=".", config=ExportConfig(formats=["safetensors"]))
    assert {path.name for path in Path(".").iterdir()} == {"student", "export.json", "MODEL_CARD.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_a_graph_that_says_something_else_gets_no_name(model, tmp_path, monkeypatch, error):
    monkeypatch.setattr(exporting, "write_onnx", lambda *arguments: 20)
    monkeypatch.setattr(exporting, "_session", lambda path: lambda inputs: model(inputs) + error)
    with pytest.raises(LimbeckError, match=r"differs from the PyTorch model by up to (0\.0002|nan) on 40 held-out pictures"):
        export_module(model, held_out(), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Undecided(nn.Module):
    """Control flow that depends on the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(400, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        flat = pixel_values.flatten(1)
        return self.head(flat * 2 if flat.sum() > 0 else flat)


def test_what_the_exporter_cannot_follow_is_said_in_its_words_and_quietly(tmp_path, capfd):
    with pytest.raises(BadInput, match="Undecided cannot be written as ONNX: Could not guard on data-dependent") as refusal:
        export_module(Undecided(), held_out(), out=tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert "--batch 1" in str(refusal.value)
    assert not list(tmp_path.iterdir())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_opset_that_the_exporter_does_not_know(model, tmp_path):
    with pytest.raises(BadInput, match=r"opset 90.*leave"):
        export_module(model, held_out(), out=tmp_path / "out", config=ExportConfig(formats=["onnx"], opset=90))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"formats": ["onx"]}, "unknown export format 'onx': did you mean 'onnx'?"),
        ({"formats": []}, "no export format"),
        ({"formats": ["safetensors"], "int8": True}, "add onnx"),
        ({"opset": 17}, "opset 17: expected 18 or newer"),
        ({"batch": 0}, "batch 0: expected dynamic, or a number"),
        ({"batch": "many"}, "batch 'many': expected dynamic"),
    ],
)
def test_arguments_that_do_not_fit(given, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        ExportConfig(**given)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(BadInput, match=re.escape("needs onnxruntime: pip install 'limbeck[export]'")):
        ExportConfig()
    assert not ExportConfig(formats=["safetensors"]).onnx


def test_a_folder_in_use_and_batches_without_pictures_are_refused(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty"):
        export_module(model, held_out(), out=tmp_path)
    for batches in ([], [{"labels": torch.zeros(2)}], [{"pixel_values": torch.zeros(2, 5)}]):
        with pytest.raises(BadInput, match="no `pixel_values`"):
            export_module(model, batches, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_answers_compare_every_picture_once():
    def doubled(inputs: torch.Tensor) -> torch.Tensor:
        assert len(inputs) == 4
        return inputs.flatten(1)[:, :3] * 2

    shown = pictures(10)
    batches = [{"pixel_values": shown[:7]}, {"pixel_values": shown[7:]}]
    found = answers({"torch": doubled}, batches, torch.Tensor.contiguous, 4)
    assert torch.equal(found.logits["torch"], shown.flatten(1)[:, :3] * 2)
    assert found.batch_sizes == [4]
    assert found.accuracy("torch") is None


def test_difference_agreement_and_accuracy():
    logits = torch.eye(4)
    other = logits.clone()
    other[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = Answers({"torch": logits, "onnx": other}, torch.tensor([0, 1, -100, 0]))
    assert found.difference("onnx") == 1
    assert found.agreement("onnx") == 0.75
    assert found.accuracy("torch") == pytest.approx(2 / 3)
    assert found.accuracy("onnx") == pytest.approx(1 / 3)


def quantised(wrong: int, labels: torch.Tensor) -> Answers:
    """1000 pictures that float32 gets right, and int8 but for some."""
    right = torch.eye(2)[torch.arange(1000) % 2]
    int8 = right.clone()
    int8[:wrong] = int8[:wrong].flip(1)
    return Answers({"torch": right, "onnx": right, "int8": int8}, labels)


@pytest.mark.parametrize(("wrong", "warned"), [(9, False), (11, True)])
def test_more_than_a_point_of_accuracy_lost_to_int8_is_said_in_words(tmp_path, wrong, warned):
    (tmp_path / "model.onnx").write_bytes(bytes(10))
    (tmp_path / "model.int8.onnx").write_bytes(bytes(5))
    fast = {"onnx": 2.0, "int8": 1.0}
    kept = {"convolution": 0, "matrix product": 1}
    said = int8_warnings(quantised(wrong, torch.arange(1000) % 2), fast, tmp_path, kept, "test")
    assert bool(said) is warned
    if warned:
        assert "98.9% of the test pictures, float32 100.0%" in said[0]
    said = int8_warnings(quantised(wrong, torch.full((1000,), -100)), fast, tmp_path, kept, "test")
    assert bool(said) is warned
    if warned:
        assert "another class than float32 on 1.1%" in said[0]


def test_int8_that_is_neither_faster_nor_smaller_is_said_in_words(tmp_path):
    for name in ("model.onnx", "model.int8.onnx"):
        (tmp_path / name).write_bytes(bytes(10))
    slow = {"onnx": 1.0, "int8": 4.0}
    kept = {"convolution": 3, "matrix product": 1}
    faster, smaller = int8_warnings(quantised(0, torch.arange(1000) % 2), slow, tmp_path, kept, "test")
    assert "not faster on this machine (4 ms, float32 1 ms): onnxruntime's 8-bit convolutions" in faster
    assert "not smaller (10 bytes, float32 10)" in smaller


def test_escaped_text_is_one_line_without_markup():
    assert escaped("a\n# b <script> [x](y) `c` \u202ed") == "a \\# b &lt;script&gt; \\[x\\](y) \\`c\\` d"
