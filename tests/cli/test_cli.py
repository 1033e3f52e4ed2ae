"""The command line as a user meets it: what it prints, where it stops, with which exit status."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

COMMANDS = ("list", "show", "run", "resume", "cache", "evaluate", "bench", "compare", "probe", "export", "taps", "synth")


@pytest.fixture
def recipe_file(tmp_path: Path, recipe) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def refused(limbeck, tmp_path):
    """Assert that a command is refused: status 2, one line on standard error, no traceback, nothing written."""

    def check(*arguments: object, says: str) -> None:
        out = tmp_path / "must-not-exist"
        status, _, error = limbeck(*arguments, *(("--out", out) if arguments[0] in ("run", "bench") else ()))
        assert status == 2, error
        lines = [line for line in error.splitlines() if line.startswith("limbeck: ")]
        assert len(lines) == 1
        assert says in lines[0]
        assert "Traceback" not in error
        assert not out.exists() or arguments[0] == "bench"

    return check


def test_help_is_quick_and_every_command_shows_an_example(limbeck):
    started = time.process_time()
    subprocess.run([sys.executable, "-m", "limbeck", "--help"], check=True, capture_output=True)
    assert time.process_time() - started < 1  # of this process; the command itself is timed in benchmarks/
    for command in COMMANDS:
        status, out, _ = limbeck(command, "--help")
        assert status == 0
        assert "Example: limbeck" in out


def test_the_command_line_loads_no_torch_for_help():
    code = "import sys; import limbeck.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cache_and_a_run_from_it(limbeck, recipe_file, refused, tmp_path):
    folder, kd = tmp_path / "cache", ("--method", "{name: kd}", "--evaluate", "[vqa-accuracy]")
    status, out, error = limbeck("cache", recipe_file, *kd, "--out", folder, "--top-k", 16, "--quiet")
    assert (status, error) == (0, "")
    assert "covered mass" in out
    assert f"limbeck run RECIPE --cache {folder}" in out
    status, out, _ = limbeck("cache", recipe_file, *kd, "--out", folder, "--json")
    result = json.loads(out)
    assert result["samples"] == 48
    [entry] = result["entries"].values()
    assert entry["bytes"] == entry["rows"] * entry["bytes_a_row"]
    assert 0.3 < entry["covered"]["min"] <= entry["covered"]["p5"] <= entry["covered"]["mean"] < 1
    status, out, _ = limbeck("run", recipe_file, *kd, "--cache", folder, "--out", tmp_path / "run", "--json", "--quiet")
    assert status == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["cache"] == str(folder)
    status, out, _ = limbeck("run", recipe_file, *kd, "--cache", folder, "--dry-run")
    assert f"read from {folder}" in " ".join(out.split())
    refused("run", recipe_file, *kd, "--cache", tmp_path / "nowhere", says="is no teacher cache")
    refused("run", recipe_file, "--cache", folder, says="switch-route needs the teacher")
    refused(
        "run", recipe_file, *kd, "--cache", folder, "--method.temperature", 2, says="method.temperature is 1.0 in the cache, 2"
    )
    refused(
        "bench",
        recipe_file,
        *kd,
        "--arms",
        "[sft]",
        "--cache",
        folder,
        "--seeds",
        2,
        says="bench draws the training data anew for each seed",
    )
    refused(
        "bench",
        recipe_file,
        "--evaluate",
        "[vqa-accuracy]",
        "--cache",
        folder,
        says="method 'switch-kd' cannot learn from a cache",
    )
    status, _, error = limbeck("cache", recipe_file, "--out", tmp_path / "other")
    assert status == 2
    assert "method 'switch-kd' cannot learn from a cache" in error
    assert not (tmp_path / "other").exists()


def test_list_and_show(limbeck):
    status, out, _ = limbeck("list", "--json")
    names = {entry["name"] for entry in json.loads(out)}
    assert status == 0
    assert {"switch-kd", "kd", "bild", "sft", "compose"} <= names
    status, out, _ = limbeck("show", "switch-kd", "--json")
    shown = json.loads(out)
    assert shown["hyper_parameters"]["tau"] == 3.0
    assert "switch-kd" in shown["recipes"]
    assert "2604.14629" in shown["text"]
    assert limbeck("show", "switch-kd")[0] == 0


def test_run_resume_evaluate_compare_probe(limbeck, recipe_file, tmp_path):
    run = tmp_path / "run"
    status, out, _ = limbeck("run", recipe_file, "--out", run, "--train.seed", 3, "--json", "--quiet")
    assert status == 0
    result = json.loads(out)
    assert set(result["test"]) >= {"accuracy", "switch_route_accuracy"}
    assert {path.name for path in run.iterdir()} >= {
        "recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "student", "result.json",
    }  # fmt: skip
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["seed"] == 3

    status, out, _ = limbeck("evaluate", run, "--json")
    assert status == 0
    assert json.loads(out) == pytest.approx(result["test"])

    status, out, _ = limbeck("probe", run, "--split", "test", "--json")
    table = json.loads(out)["accuracy"]
    assert table["student"]["student"] == pytest.approx(result["test"]["accuracy"])
    assert table["student"]["teacher"] == pytest.approx(result["test"]["switch_route_accuracy"])

    other = tmp_path / "other"
    assert limbeck("run", recipe_file, "--out", other, "--method", "{name: sft}", "--quiet")[0] == 0
    status, out, _ = limbeck("compare", run, other, "--json")
    compared = json.loads(out)
    assert compared["metrics"]["accuracy"].keys() == {str(run), str(other)}
    assert compared["differences"]["method/name"] == {str(run): "switch-kd", str(other): "sft"}
    assert limbeck("compare", run, other)[0] == 0
    assert limbeck("probe", run)[0] == 0

    status, _, error = limbeck("run", recipe_file, "--out", run)
    assert status == 2
    assert "holds another run, which is finished" in error
    (run / "result.json").unlink()
    status, _, error = limbeck("run", recipe_file, "--out", run)
    assert status == 2
    assert f"limbeck resume {run}" in error


def test_the_student_loads_in_transformers(limbeck, recipe_file, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for method in ("sft", "kd", "switch-kd"):
        run = tmp_path / method
        assert limbeck("run", recipe_file, "--out", run, "--method", f"{{name: {method}}}", "--quiet")[0] == 0
        model, report = AutoModelForImageTextToText.from_pretrained(run / "student", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        AutoProcessor.from_pretrained(run / "student")
        assert not list((run / "student").glob("*.bin"))
        assert sum(p.numel() for p in model.parameters()) > 10_000


def test_bench_writes_arms_and_pairs_and_goes_on_where_it_stopped(limbeck, recipe_file, tmp_path):
    out, result = tmp_path / "bench", tmp_path / "result.json"
    arguments = ("bench", recipe_file, "--seeds", 2, "--out", out, "--json", result, "--quiet", "--train.steps", 2)
    status, printed, _ = limbeck(*arguments)
    assert status == 0
    table = json.loads(result.read_text())
    assert set(table["arms"]) == {"switch-kd", "sft", "kd"}
    cell = table["arms"]["sft"]["accuracy"]
    assert len(cell["values"]) == 2
    assert cell["mean"] == pytest.approx(sum(cell["values"]) / 2)
    assert set(table["paired"]) == {"sft", "kd"}
    ours, theirs = (table["arms"][name]["accuracy"]["values"] for name in ("switch-kd", "kd"))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    paired = table["paired"]["kd"]["accuracy"]
    assert paired["mean"] == pytest.approx(sum(differences) / 2)
    half = 12.706 * abs(differences[0] - differences[1]) / 2  # t(1) * s / sqrt(2)
    assert paired["high"] - paired["mean"] == pytest.approx(half)
    assert "torch" in table["environment"]["packages"]
    assert "teacher" in printed
    stamp = (out / "kd" / "seed-0" / "result.json").stat().st_mtime_ns
    (out / "sft" / "seed-1" / "result.json").unlink()
    assert limbeck(*arguments)[0] == 0
    assert (out / "kd" / "seed-0" / "result.json").stat().st_mtime_ns == stamp
    assert json.loads(result.read_text())["arms"]["sft"]["accuracy"] == cell
    status, _, error = limbeck("bench", recipe_file, "--seeds", 1, "--out", out, "--train.lr", 1)
    assert status == 2
    assert "another recipe" in error


# -- bad input -----------------------------------------------------------------------------------------------------------------------


def test_unknown_key_method_and_recipe(refused, recipe_file, recipe):
    refused("run", recipe_file, "--train.stepz", 3, says="did you mean 'steps'?")
    refused("run", recipe_file, "--method.name", "switch-k", says="did you mean 'switch-kd'?")
    refused("run", "swich-kd", says="did you mean 'switch-kd'?")
    refused("show", "switchkd", says="did you mean 'switch-kd'?")
    refused("run", recipe_file, "--evaluate", "[vqa-acuracy]", says="did you mean 'vqa-accuracy'?")
    refused("run", recipe_file, "--student.source", "tinny", says="tiny")
    refused("run", recipe_file, "--data.source", "digit-scene", says="digit-scenes")
    refused("run", recipe_file, "--data.scense", 3, says="scenes")


def test_overrides_and_shapes_that_are_none(refused, recipe_file):
    refused("run", recipe_file, "--method", "{name: compose", says="--method '{name: compose': not readable as YAML")
    refused("run", recipe_file, "--train.seed", "-1", says="train.seed")
    refused("run", recipe_file, "--cache", "{viewz: 2}", says="unknown key 'cache.viewz'; did you mean 'views'?")
    refused("run", recipe_file, "--train.stages", "[{name: a, data: {limit: 50}}]", says="'source' is required")
    refused("run", recipe_file, "--train.stages", "[{name: a, weights: {algn: 5}}]", says="did you mean 'align'?")
    refused("run", recipe_file, "--dry-run", "--evaluate", "[nonsense]", says="unknown protocol 'nonsense'")
    refused("taps", "tiny:cnn", "--shape", "a,b", says="--shape 'a,b' is no shape: give numbers, as in 1,3,64,64")


def test_only_the_first_process_prints_what_was_measured(limbeck, monkeypatch):
    monkeypatch.setattr("limbeck.engine.run.evaluate_run", lambda *_, **__: {"accuracy": 0.5})
    assert json.loads(limbeck("evaluate", "run", "--json")[1]) == {"accuracy": 0.5}
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    assert limbeck("evaluate", "run", "--json")[:2] == (0, "")


def test_unreadable_yaml(refused, tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: }")
    refused("run", tmp_path / "broken.yaml", says="not readable as YAML")


def test_vocabulary_width_and_token_count(refused, recipe_file, tmp_path):
    from limbeck.models.tiny import digit_vlm

    model, processor = digit_vlm.build("digit-vlm-teacher")
    model.resize_token_embeddings(300)
    processor.tokenizer.add_tokens([f"extra{index}" for index in range(20)])
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    refused("run", recipe_file, "--teacher.name", tmp_path / "other", says="300")
    refused("run", recipe_file, "--student.options", "{vision_width: 40}", says="bridge: linear")
    refused("run", recipe_file, "--student.options", "{patch_size: 8}", says="16")


def test_answer_longer_than_the_context(refused, recipe_file):
    refused("run", recipe_file, "--data.max_length", 20, says="20")


def rows(folder: Path, *given: dict) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def user_data(recipe_file: Path, path: Path) -> tuple[object, ...]:
    return ("run", recipe_file, "--data", json.dumps({"source": "vqa-jsonl", "path": str(path), "images": str(path.parent)}))


def test_missing_image_empty_data_and_absent_column(refused, recipe_file, tmp_path):
    row = {"image": "gone.png", "question": "which digit is top left?", "answer": "3"}
    refused(*user_data(recipe_file, rows(tmp_path, row)), says="gone.png")
    refused(*user_data(recipe_file, rows(tmp_path)), says="train.jsonl")
    refused(*user_data(recipe_file, rows(tmp_path, {"image": "a.png", "question": "?", "anwser": "3"})), says="answer")
    refused(*user_data(recipe_file, tmp_path / "nothing.jsonl"), says="nothing.jsonl")


def test_a_nan_loss_names_step_terms_and_samples_and_keeps_the_last_checkpoint(limbeck, recipe_file, tmp_path, monkeypatch):
    from limbeck.methods.vlm.switch_kd import SwitchKD

    own, calls = SwitchKD.terms, []

    def poisoned(self, **terms):
        calls.append(None)
        losses = own(self, **terms)
        losses["ce"] = losses["ce"] * (math.nan if len(calls) == 8 else 1)
        return losses

    monkeypatch.setattr(SwitchKD, "terms", poisoned)
    run = tmp_path / "run"
    status, _, error = limbeck("run", recipe_file, "--out", run, "--quiet")
    assert status == 2
    assert "step 8: ce is nan" in error
    assert "digit-scenes/train/" in error
    assert "the checkpoint of step 6 is intact" in error
    assert not (run / "student").exists()
    monkeypatch.setattr(SwitchKD, "terms", own)
    assert limbeck("resume", run, "--quiet")[0] == 0


def test_a_corrupt_checkpoint_falls_back_and_says_so(limbeck, recipe_file, tmp_path):
    run = tmp_path / "run"
    assert limbeck("run", recipe_file, "--out", run, "--quiet")[0] == 0
    (run / "result.json").unlink()
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    before = torch.load  # nothing here may unpickle
    status, _, error = limbeck("resume", run, "--quiet")
    assert status == 0
    assert torch.load is before
    assert "step 12 is corrupt" in error
    assert "falling back to step" in error


def test_pickle_and_remote_code_are_off(refused, recipe_file, tmp_path, teacher_folder):
    import shutil

    from transformers import AutoModelForImageTextToText

    pickled = tmp_path / "pickled"
    shutil.copytree(teacher_folder, pickled)
    model = AutoModelForImageTextToText.from_pretrained(teacher_folder)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    refused("run", recipe_file, "--teacher.name", pickled, says="pickle")
    torch.save({}, tmp_path / "weights.pt")
    refused("run", recipe_file, "--student.weights", tmp_path / "weights.pt", says="pickle checkpoints")

    remote = tmp_path / "remote"
    shutil.copytree(teacher_folder, remote)
    (remote / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    refused("run", recipe_file, "--teacher.name", remote, says="trust_remote_code")
    assert not (tmp_path / "ran").exists()


def test_folders_that_are_no_runs(refused, tmp_path):
    for command in ("resume", "evaluate", "probe", "compare"):
        refused(command, tmp_path / "nothing", says="not a run folder")


def test_no_secret_reaches_a_run_folder(limbeck, recipe_file, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "s3cr3t-token")
    run = tmp_path / "run"
    assert limbeck("run", recipe_file, "--out", run, "--train.steps", 1, "--quiet")[0] == 0
    for path in run.rglob("*"):
        if path.is_file():
            assert b"s3cr3t-token" not in path.read_bytes(), path


def test_what_cannot_be_measured_is_refused_before_training(refused, recipe_file):
    narrow = ("--student.options", "{vision_width: 40}", "--method", "{name: kd}")
    refused(
        "run", recipe_file, *narrow, says="leave it out of `evaluate`"
    )  # the switch route of evaluate, not the method, needs one width
    refused("run", recipe_file, "--train.select.metric", "acuracy", says="did you mean 'accuracy'?")
    refused("run", recipe_file, "--method", "{name: sft}", "--teacher", "null", says="needs a teacher")
    refused("run", recipe_file, "--data.scenes", 10, "--train.micro_batch_size", 16, says="10 samples")
    misnamed = "[{name: eyes, trainable: [student.model.visal*]}]"
    refused("run", recipe_file, "--train.stages", misnamed, says="no trainable parameter matches")
    blind = "[{name: projector, trainable: ['student.model.multi_modal_projector*']}]"
    refused("run", recipe_file, "--train.stages", blind, says="carries no gradient")


def test_rows_without_a_picture_may_come_first(limbeck, recipe_file, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16), "white").save(tmp_path / "a.png")
    ask = {"question": "what is the largest digit?", "answer": "3"}
    path = rows(tmp_path, *([ask] * 3), *([{"image": "a.png", **ask}] * 5))
    arguments = (*user_data(recipe_file, path), "--out", tmp_path / "run", "--evaluate", "[vqa-accuracy]", "--train.steps", 2)
    assert limbeck(*arguments, "--train.evaluate_every", 0, "--quiet")[0] == 0


def test_a_teacher_at_chance_is_said_in_words(limbeck, recipe_file, tmp_path):
    arguments = ("--evaluate", "[vqa-accuracy, teacher-agreement]", "--train.steps", 1, "--quiet")
    status, _, error = limbeck("run", recipe_file, "--out", tmp_path / "run", *arguments)
    assert status == 0
    assert "the teacher is at chance" in error


@pytest.mark.filterwarnings("ignore:the visual switch goes through")
def test_a_bridged_run_is_measured_again_as_it_was(limbeck, recipe_file, tmp_path):
    run = tmp_path / "run"
    narrow = ("--student.options", "{patch_size: 8, vision_width: 40}", "--method", "{name: switch-kd, bridge: linear}")
    status, out, _ = limbeck("run", recipe_file, "--out", run, *narrow, "--json", "--quiet")
    assert status == 0
    status, again, _ = limbeck("evaluate", run, "--json")
    assert status == 0
    assert json.loads(again) == pytest.approx(json.loads(out)["test"])
    assert limbeck("probe", run)[0] == 0
