"""Recipes whose student classifies pictures, from YAML to a student that loads again; and compose on two processes."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from limbeck.engine import trainer
from limbeck.engine.bench import as_markdown, bench, bench_all, benchable
from limbeck.engine.cache import cache
from limbeck.engine.recipe import load_recipe
from limbeck.engine.run import evaluate_run, resume, run
from limbeck.engine.task import build_task
from limbeck.errors import BadInput
from limbeck.methods.compose import Compose
from limbeck.models.vision import load_classifier

TEACHER = {"source": "tiny", "name": "cnn", "options": {"widths": [6, 12]}}


def recipe(method=None, **changes):
    return {
        "method": method or {"name": "compose", "objectives": ["ce", {"kd": {"temperature": 2}}, {"at": {"weight": 10}}]},
        "teacher": TEACHER,
        "student": {"source": "tiny", "name": "cnn", "options": {"widths": [4, 8]}},
        "data": {"source": "digits", "limit": 120, "val_fraction": 0.05, "test_fraction": 0.05, "augment": {"pad": 1}},
        "train": {"steps": 6, "batch_size": 16, "lr": 3e-3, "evaluate_every": 3, "checkpoint_every": 2, "log_every": 1},
        **changes,
    }


PARITY = {"even": ["0", "2", "4", "6", "8"], "odd": ["1", "3", "5", "7", "9"]}
FEW = {"source": "digits", "val_fraction": 0.05, "test_fraction": 0.05}
SHIPPED = Path(__file__).parents[2] / "recipes"
VIT = {
    "source": "timm",
    "name": "vit_tiny_patch16_224",
    "options": {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2, "in_chans": 1},
}
RECIPES = {
    "compose": recipe(),
    "simkd": recipe({"name": "compose", "objectives": ["simkd"]}),
    "crd": recipe({"name": "compose", "objectives": ["ce", {"crd": {"negatives": 8}}]}),
    "trg": recipe({"name": "trg", "tokens": 4}),
    "lelp": recipe({"name": "lelp", "subclasses": 3}, data={**FEW, "classes": PARITY, "limit": 120}),
    "dho": recipe({"name": "dho"}, data={**FEW, "shots": 5, "unlabelled": True, "limit": 120}),
    "prockd": recipe({"name": "prockd"}),
    "makd": recipe(
        {"name": "makd", "targets": "shuffled"},
        teacher=None,
        data={"source": "digits", "shots": 5, "answers": str(SHIPPED / "digits-aspects.json")},
    ),
    "dmae": recipe({"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}, teacher=None, student=VIT),
    "cmd": recipe(
        {"name": "cmd", "outputs": 16, "hidden": 16, "bottleneck": 8},
        teacher=None,
        data={**FEW, "limit": 120, "views": {"global_size": 8, "local_size": 4, "local_count": 2}},
    ),
    "ema-self": recipe({"name": "ema-self"}, teacher=None),
}
MIXED = {**RECIPES["compose"]["data"], "augment": {"flip": True, "mixup": 1.0, "cutmix": 1.0}}
RECIPES["mixtures"] = recipe(data=MIXED)
RECIPES["channels-last"] = recipe(train={**RECIPES["compose"]["train"], "channels_last": True})


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_ends_with_a_student_that_answers_as_it_was_measured(name, tmp_path):
    finished = run(RECIPES[name], out=tmp_path / "run", quiet=True)
    assert finished.test["accuracy"] == pytest.approx(evaluate_run(tmp_path / "run")["accuracy"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["student"]["flops"] > 0 and result["student"]["bytes"] > 0
    record = json.loads((tmp_path / "run" / "student" / "limbeck.json").read_text())
    if "source" not in record["spec"]:
        return
    pictures = torch.rand(3, 1, 8, 8)
    ours = finished.student.cpu().eval()
    with torch.no_grad():
        torch.testing.assert_close(load_classifier(tmp_path / "run" / "student").eval()(pictures), ours(pictures))


def test_a_recipe_asks_its_teacher_once_for_all_arms_and_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "kept"))
    spec = recipe(
        {"name": "compose", "objectives": ["ce", "kd"]},
        cache={"views": 2},
        data={"source": "digits", "val_fraction": 0.8, "test_fraction": 0.05, "balance": "class", "augment": {"flip": True}},
        arms=[{"name": "ce", "method": {"name": "compose", "objectives": ["ce"]}}],
    )
    asked = []
    own = Compose.record
    monkeypatch.setattr(Compose, "record", lambda self, batch, top_k: asked.append(1) or own(self, batch, top_k))
    bench(spec, seeds=1, out=tmp_path / "bench", jobs=1, quiet=True)
    once = len(asked)
    [folder] = [path for path in (tmp_path / "kept" / "answers").iterdir() if path.is_dir()]
    assert once > 0 and yaml.safe_load((tmp_path / "bench/compose/seed-0/recipe.yaml").read_text())["cache"] == str(folder)
    assert "cache" in yaml.safe_load((tmp_path / "bench/ce/seed-0/recipe.yaml").read_text())
    run({**spec, "train": {**spec["train"], "seed": 7, "lr": 1e-3}}, out=tmp_path / "again", quiet=True)
    assert len(asked) == once, "another seed and learning rate ask nothing"
    heavier = {"name": "compose", "objectives": [{"ce": {"weight": 0.3}}, "kd"]}
    other = {"source": "tiny", "name": "cnn", "options": {"widths": [3, 5, 7]}}
    run({**spec, "method": heavier, "student": other}, out=tmp_path / "other", quiet=True)
    assert len(asked) == once, "other weights of terms and another student ask nothing"
    run({**spec, "cache": {"views": 1}}, out=tmp_path / "views", quiet=True)
    assert len(asked) > once
    with pytest.raises(BadInput, match="draws the training data anew for each seed"):
        bench({**spec, "data": {"source": "digits", "limit": 50}}, seeds=2, out=tmp_path / "drawn", quiet=True)


@pytest.mark.parametrize(("written_for", "stages"), [([4, 8], 3), ([4, 8, 12], 2)])
def test_a_cache_serves_students_of_any_number_of_stages(written_for, stages, tmp_path):
    """Of a teacher's usual stages, as many as the student has, the deepest: from the cache as from the teacher."""

    def of(widths, **changes):
        return recipe(
            {"name": "compose", "objectives": ["ce", "at"]},
            teacher={"source": "tiny", "name": "cnn", "options": {"widths": [6, 10, 14]}},
            student={"source": "tiny", "name": "cnn", "options": {"widths": widths}},
            **changes,
        )

    cache(of(written_for), out=tmp_path / "cache", quiet=True)
    widths = [4, 8, 12][:stages]
    live, cached = (build_task(load_recipe(of(widths, **given))).method for given in ({}, {"cache": str(tmp_path / "cache")}))
    task = build_task(load_recipe(of(widths, cache=str(tmp_path / "cache"))))
    batch = task.collate([task.data["train"].draw(0, index) for index in range(16)])
    bare = {key: value for key, value in batch.items() if key != "taught"}
    terms = []
    for method, shown in ((live, bare), (cached, batch)):
        method.load_state_dict(live.state_dict(), strict=False)
        method.eval().prepare(shown)
        assert len(method.plan()) == 1 + stages
        terms.append(method(shown)["at"])
    torch.testing.assert_close(*terms, rtol=2e-3, atol=0)


def test_unlabelled_pictures_reach_every_method(tmp_path):
    few = {**FEW, "shots": 5, "unlabelled": True, "limit": 120}
    spec = recipe({"name": "compose", "objectives": ["ce", "kd", {"crd": {"negatives": 8}}]}, data=few)
    beside = build_task(load_recipe(spec)).data["train"]
    assert beside.unlabelled is not None and len(beside.labels) == 50
    for method in ({"name": "trg", "tokens": 4}, {"name": "lelp", "subclasses": 2}, {"name": "prockd"}):
        among = build_task(load_recipe(recipe(method, data=few)))
        assert among.data["train"].unlabelled is None and (among.data["train"].labels == -100).sum() == 70
        assert (among.reference.labels == -100).sum() == 70
        run(recipe(method, data=few), out=tmp_path / method["name"], quiet=True)
    finished = run(spec, out=tmp_path / "compose", quiet=True)
    assert finished.method.adapters["crd"].memory.n_data == finished.method.train_size == 50

    mixed = recipe({"name": "compose", "objectives": ["ce", "kd"]}, data={**few, "unlabelled_among": True})
    assert cache(mixed, out=tmp_path / "cache", quiet=True)["samples"] == 120
    cached = run({**mixed, "cache": str(tmp_path / "cache")}, out=tmp_path / "cached", quiet=True)
    live = run(mixed, out=tmp_path / "live", quiet=True)
    for key, value in live.student.state_dict().items():
        torch.testing.assert_close(cached.student.state_dict()[key], value, msg=key, rtol=0, atol=1e-2)


def test_a_teacher_is_asked_about_mixtures(tmp_path):
    """What a cache keeps is what the teacher says of the very mixture that the student sees, with the shares of its labels."""
    spec = recipe({"name": "compose", "objectives": ["ce", "kd"]}, data=MIXED)
    cache(spec, out=tmp_path / "cache", views=2, quiet=True)
    live, cached = (build_task(load_recipe(values)) for values in (spec, {**spec, "cache": str(tmp_path / "cache")}))
    items = [cached.data["train"].draw(view, index) for view in (0, 1) for index in range(8)]
    batch = cached.collate(items)
    assert len(batch["mixed_share"].unique()) > 8, "every view mixes anew"
    with torch.no_grad():
        said = live.method.teacher(batch["pixel_values"])
    torch.testing.assert_close(batch["taught"]["kd"].log_probs.exp().sum(-1), torch.ones(16), rtol=0, atol=1e-3)
    assert torch.equal(batch["taught"]["kd"].ids[:, 0], said.argmax(-1))
    with pytest.raises(BadInput, match=r"'trg' learns from whole pictures, and data.augment mixes two"):
        build_task(load_recipe(recipe({"name": "trg", "tokens": 4}, data=MIXED)))


@pytest.mark.parametrize("where", ["batch", "pairs"])
def test_what_no_cache_can_hold_is_refused(where, tmp_path):
    data = {"batch": {"source": "digits", "augment": {"flip": True, "where": "batch"}}, "pairs": RECIPES["dho"]["data"]}[where]
    spec = recipe({"name": "compose", "objectives": ["ce", "kd"]}, data=data)
    wanted = {"batch": "where: worker", "pairs": "data.unlabelled_among: true"}[where]
    with pytest.raises(BadInput, match=f"a cache keeps answers to single pictures.*{wanted}"):
        cache(spec, out=tmp_path / "cache", quiet=True)


@pytest.mark.parametrize("name", ["compose", "crd", "dho", "ema-self", "mixtures", "channels-last"])
def test_an_interrupted_run_ends_as_the_one_that_was_not(name, tmp_path, monkeypatch):
    whole = run(RECIPES[name], out=tmp_path / "whole", quiet=True)
    own = trainer.Trainer._save

    def interrupted(self, model, optimizer):
        own(self, model, optimizer)
        if self.position.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(RECIPES[name], out=tmp_path / "cut", quiet=True)
    resumed = resume(tmp_path / "cut", quiet=True)
    for key, value in whole.method.state_dict().items():
        torch.testing.assert_close(resumed.method.state_dict()[key], value, msg=key, rtol=0, atol=1e-6)


def test_channels_last_trains_the_same_student(tmp_path):
    plain, other = (run(RECIPES[name], out=tmp_path / name, quiet=True) for name in ("compose", "channels-last"))
    for model in (other.student, other.method.teacher.module):
        kernels = [weight for weight in model.parameters() if weight.dim() == 4 and weight.shape[1] > 1 and weight.shape[-1] > 1]
        assert kernels and all(weight.stride(1) == 1 for weight in kernels)
    for key, value in plain.method.state_dict().items():
        torch.testing.assert_close(other.method.state_dict()[key], value, msg=key, rtol=1e-3, atol=1e-4)


def test_training_moves_nothing_of_the_teacher(tmp_path):
    task = build_task(load_recipe(RECIPES["compose"]))
    before = copy.deepcopy(task.teacher.state_dict())
    finished = run(RECIPES["compose"], out=tmp_path / "run", quiet=True, teacher=task.teacher)
    after = finished.method.teacher.module.state_dict()
    assert any("running_mean" in key for key in before)
    for key, value in before.items():
        assert torch.equal(after[key].cpu(), value), key


def test_seeds_draw_other_shots_and_the_same_held_out_pictures():
    first, other = (build_task(load_recipe(RECIPES["dho"]).with_seed(seed)) for seed in (0, 1))
    assert first.data["train"].images.records != other.data["train"].images.records
    assert first.held_out["test"].ids == other.held_out["test"].ids
    pinned = load_recipe({**RECIPES["dho"], "data": {**RECIPES["dho"]["data"], "seed": 5}})
    drawn = [build_task(pinned.with_seed(seed)).data["train"].images.records for seed in (0, 1)]
    assert drawn[0] == drawn[1] and pinned.with_seed(1).train.seed == 1
    assert drawn[0] not in (first.data["train"].images.records, other.data["train"].images.records)


def test_classes_of_the_data_size_the_student_and_order_is_checked(tmp_path):
    task = build_task(load_recipe(RECIPES["lelp"]))
    assert task.method.student.model.head.out_features == 2 and task.method.student.classes == ("even", "odd")
    teacher = task.teacher
    teacher.classes = ("odd", "even")
    with pytest.raises(BadInput, match="same classes in another order"):
        build_task(load_recipe(RECIPES["lelp"]), teacher)


def test_a_teacher_of_another_task_is_refused_by_what_compares_classes(tmp_path):
    spec = recipe(teacher={**TEACHER, "classes": 7})
    with pytest.raises(BadInput, match="the student has 10, the teacher 7"):
        run(spec, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_bench_compares_arms_of_pictures_and_the_scoreboard_is_a_table(tmp_path):
    spec = recipe(arms=[{"name": "ce", "method": {"name": "compose", "objectives": ["ce"]}}])
    table = bench(spec, seeds=2, out=tmp_path / "bench", jobs=1, quiet=True)
    assert table["paired"]["ce"]["accuracy"]["low"] <= table["paired"]["ce"]["accuracy"]["mean"]
    assert set(table["latency_ms"]) == {"teacher", "compose", "ce"}
    row = {
        "method": "trg", "control": "ce", "metric": "accuracy", "method_mean": 0.9, "control_mean": 0.8, "gain": 0.1, "low": 0.05,
        "high": 0.15, "seeds": 5, "seconds": 12.0,
    }  # fmt: skip
    assert "| trg | ce | accuracy | 0.900 | 0.800 | **+0.100** | [+0.050, +0.150] | 5 | 12 |" in as_markdown([row])
    assert "**" not in as_markdown([{**row, "low": -0.01}])


def test_every_system_is_on_the_scoreboard():
    assert {"switch-kd", "trg", "lelp", "prockd", "cmd", "dmae", "makd", "dho", "ema-self", "solar-cells"} <= set(benchable())
    assert "own-pair" not in benchable()
    with pytest.raises(BadInput, match="no recipe 'trgg' to bench"):
        bench_all(out="unused", names=["trgg"])


def test_two_processes_train_what_one_trains(tmp_path):
    spec = {**RECIPES["compose"], "data": {"source": "digits", "limit": 120, "val_fraction": 0.05, "test_fraction": 0.05}}
    # BatchNorm sees the samples of its process alone, in any framework: a network without it is compared.
    spec |= {"student": {"source": "tiny", "name": "mlp", "options": {"hidden": [16]}}}
    spec |= {"teacher": {"source": "tiny", "name": "mlp", "options": {"hidden": [24]}}}
    spec |= {"method": {"name": "compose", "objectives": ["ce", "kd", {"hint": {"student": "relu0", "teacher": "relu0"}}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(spec))
    run(spec, out=tmp_path / "alone", quiet=True)
    worker = str(Path(__file__).with_name("two_processes.py"))
    rendezvous = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, worker, "ddp", str(tmp_path / "recipe.yaml"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    alone = load_file(tmp_path / "alone" / "student" / "model.safetensors")
    for folder in ("whole", "resumed"):
        together = load_file(tmp_path / folder / "student" / "model.safetensors")
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    adapters = [load_file(tmp_path / folder / "adapters.safetensors") for folder in ("alone", "whole")]
    torch.testing.assert_close(*adapters, rtol=0, atol=1e-4)
