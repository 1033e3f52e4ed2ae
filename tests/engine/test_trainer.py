"""The trainer on small modules: stages, averaging, precision, accumulation, data order, the record, trackers."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import limbeck as lb
from limbeck.engine.batches import StepSampler, derived_seed
from limbeck.engine.config import StageConfig, TrainConfig
from limbeck.engine.trainer import Trainer, match_stages, schedule
from limbeck.errors import BadInput, NonFiniteLoss
from limbeck.methods.base import Stage


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Points(torch.utils.data.Dataset):
    def __init__(self, count: int = 40, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = self.x[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def method(dropout: float = 0.0) -> lb.Method:
    torch.manual_seed(0)
    return lb.compose(Net(16), Net(8, dropout), [lb.CE(), lb.KD(temperature=2.0)])


def train(out, method_=None, **options):
    return lb.distill(
        method_ or method(), Points(), Points(20, 1), out=out, quiet=True, **{"epochs": 2, "batch_size": 8, "lr": 1e-2, **options}
    )


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.student.state_dict().items()}


def test_ten_lines_learn(tmp_path):
    run = train(tmp_path / "run", epochs=20)
    assert run.validation["accuracy"] > 0.7
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_accumulation_is_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.manual_seed(0)
    same = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    whole = train(tmp_path / "whole", lb.compose(None, plain, [lb.CE()]))
    split = train(tmp_path / "split", lb.compose(None, same, [lb.CE()]), micro_batch_size=2)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(split)[name], value, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_resumes_to_the_same_bits_with_dropout(tmp_path):
    whole = train(tmp_path / "whole", method(0.3), checkpoint_every=3, ema=0.9)
    broken = method(0.3)

    def stop(step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt

    broken.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", broken, checkpoint_every=3, ema=0.9)
    resumed = train(tmp_path / "run", method(0.3), checkpoint_every=3, ema=0.9, resume=True)
    for name, value in state(whole).items():
        assert torch.equal(state(resumed)[name], value), name


def test_the_teacher_stays_as_it_was_and_outside_every_checkpoint(tmp_path):
    built = method()
    before = {name: value.clone() for name, value in built.teacher.module.state_dict().items()}
    train(tmp_path / "run", built)
    after = built.teacher.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # BatchNorm statistics among them
    assert not built.teacher.module.training
    from safetensors import safe_open

    for file in (tmp_path / "run").rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not any("teacher" in name for name in tensors.keys()), file  # noqa: SIM118
            assert all(tensors.get_tensor(name).shape[:1] != (16,) for name in tensors.keys()), file  # noqa: SIM118
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_validation_chooses_the_student(tmp_path):
    measured = iter([0.1, 0.9, 0.2, 0.3, 0.0])
    kept = {}

    def evaluate(method, accelerator):
        value = next(measured)
        kept[value] = {name: tensor.clone() for name, tensor in method.student.state_dict().items()}
        return {"accuracy": value}

    run = train(tmp_path / "run", evaluate=evaluate, evaluate_every=3, epochs=2)
    for name, value in state(run).items():
        assert torch.equal(value, kept[0.9][name])


def test_selecting_by_an_unknown_metric_names_the_nearest(tmp_path):
    with pytest.raises(BadInput, match="did you mean 'accuracy'"):
        train(tmp_path / "run", select={"metric": "acuracy"})


def test_ema_is_the_average_that_is_shipped(tmp_path):
    seen = []

    class Watched(type(method())):
        def after_step(self, step: int) -> None:
            seen.append(self.student.head.weight.detach().clone())

    built = method()
    built.__class__ = Watched
    start = built.student.head.weight.detach().clone()
    run = train(tmp_path / "run", built, ema=0.5, evaluate_every=0)
    average = seen[0]  # torch's average starts from the first update
    for value in seen[1:]:
        average = 0.5 * average + 0.5 * value
    assert not torch.equal(start, average)
    torch.testing.assert_close(run.student.head.weight.detach(), average)


def test_stages_train_their_own_parts_with_their_own_weights(tmp_path):
    built = method()
    before = {name: value.clone() for name, value in built.student.state_dict().items()}
    snapshots = {}

    def after(step: int) -> None:
        if step == 5:
            snapshots.update({name: value.clone() for name, value in built.student.state_dict().items()})

    built.after_step = after
    stages = [
        {"name": "head", "trainable": ["student.head.*"], "weights": {"kd": 0.0}, "steps": 5},
        {"name": "all", "steps": 5, "lr": 5e-3},
    ]
    run = train(tmp_path / "run", built, stages=stages, log_every=1, evaluate_every=0)
    assert torch.equal(snapshots["body.0.weight"], before["body.0.weight"])
    assert not torch.equal(snapshots["head.weight"], before["head.weight"])
    assert not torch.equal(run.student.body[0].weight, before["body.0.weight"])
    found = rows(tmp_path / "run")
    assert [row["stage"] for row in found] == ["head"] * 5 + ["all"] * 5
    assert all("kd" not in row["terms"] for row in found[:5])  # a term of weight 0 is not computed
    assert all(row["terms"]["kd"]["weight"] == 1 for row in found[5:])
    assert max(row["lr"] for row in found[5:]) <= 5e-3
    assert all(parameter.requires_grad for parameter in built.student.parameters())


def test_a_stage_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no trainable parameter matches 'student.haed.\*'"):
        train(tmp_path / "run", stages=[{"name": "x", "trainable": ["student.haed.*"]}])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_leaves_float32_weights(tmp_path, precision):
    run = train(tmp_path / "run", precision=precision)
    assert {parameter.dtype for parameter in run.student.parameters()} == {torch.float32}
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run") if "loss" in row)


def test_every_stage_has_the_precision_of_the_run(tmp_path):
    found = []

    class Watched(type(method())):
        def forward(self, batch):
            if self.training:
                found.append(torch.is_autocast_enabled("cpu"))
            return super().forward(batch)

    built = method()
    built.__class__ = Watched
    train(tmp_path / "run", built, precision="bf16", stages=[{"name": name, "steps": 2} for name in "abc"])
    assert found == [True] * 6


def test_terms_are_logged_raw_weighted_and_summed(tmp_path):
    torch.manual_seed(0)
    built = lb.compose(Net(16), Net(8), [lb.CE(weight=2.0), lb.KD(temperature=2.0, weight=0.25)])
    train(tmp_path / "run", built, log_every=1, evaluate_every=0, diagnose_every=5)
    logged = [row for row in rows(tmp_path / "run") if "terms" in row]
    for row in logged:
        for term in row["terms"].values():
            assert term["weighted"] == pytest.approx(term["raw"] * term["weight"])
        assert row["loss"] == pytest.approx(sum(term["weighted"] for term in row["terms"].values()))
    shares = [row["gradient"] for row in rows(tmp_path / "run") if "gradient" in row]
    assert len(shares) == 2
    assert sum(shares[0]["share"].values()) == pytest.approx(1)
    assert -1 <= shares[0]["cosine"]["ce,kd"] <= 1


def test_a_term_without_gradient_is_said_in_words(tmp_path, capsys):
    class Mute(type(method())):
        def forward(self, batch):
            return {**super().forward(batch), "mute": torch.zeros(())}

    built = method()
    built.__class__ = Mute
    train(tmp_path / "run", built, diagnose_every=2)
    assert "'mute' gives the student no gradient" in capsys.readouterr().err


def test_tensorboard_gets_the_terms(tmp_path):
    train(tmp_path / "run", trackers=["tensorboard"])
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(("data", "says"), [([], "is empty"), (iter([1]), "map-style"), ([3, 4], "pass `collate`")])
def test_unusable_data_is_refused_before_anything_is_written(tmp_path, data, says):
    with pytest.raises(BadInput, match=says):
        lb.distill(method(), data, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_unknown_training_options_name_the_nearest(tmp_path):
    with pytest.raises(BadInput, match="did you mean 'epochs'"):
        train(tmp_path / "run", epoch=3)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=50)
@given(sizes, st.integers(0, 5), st.integers(0, 12))
def test_every_split_of_a_batch_sees_the_same_samples(sizes, seed, start):
    micro, world, pieces = sizes
    batch = micro * world * pieces
    length, stop = 2 * batch + 1, 14
    whole = list(StepSampler(length, batch, batch, seed=seed, rank=0, world=1, start=0, stop=stop))
    parts = [
        list(StepSampler(length, batch, micro, seed=seed, rank=rank, world=world, start=start, stop=stop))
        for rank in range(world)
    ]
    for step in range(start, stop):
        mine = slice((step - start) * pieces, (step - start + 1) * pieces)
        seen = [key for part in parts for piece in part[mine] for key in piece]
        assert sorted(seen) == sorted(whole[step])
    first_epoch = [index for step in whole[:2] for _, index in step]
    assert len(set(first_epoch)) == 2 * batch
    assert derived_seed(seed, 0) != derived_seed(seed, 1)


@given(st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 0.5), st.integers(2, 200))
def test_schedules_warm_up_then_fall(name, warmup, steps):
    config = TrainConfig(schedule=name, warmup=warmup)
    values = [schedule(config, step, steps) for step in range(steps)]
    assert all(0 <= value <= 1 for value in values)
    peak = values.index(max(values))
    assert all(a <= b + 1e-9 for a, b in pairwise(values[: peak + 1]))
    assert all(a >= b - 1e-9 for a, b in pairwise(values[peak:]))
    if name != "constant" and steps > 20:
        assert values[-1] < 0.3


def test_workers_change_no_sample(tmp_path):
    alone = train(tmp_path / "alone", evaluate_every=0)
    helped = train(tmp_path / "helped", evaluate_every=0, workers=2)
    for name, value in state(alone).items():
        assert torch.equal(state(helped)[name], value)


def test_a_method_from_outside_needs_nothing_but_forward(tmp_path):
    class Mine(lb.Method):
        name = "mine"

        def __init__(self, student: nn.Module) -> None:
            super().__init__()
            self.student = student

        def forward(self, batch):
            return lb.Losses(fit=nn.functional.cross_entropy(self.student(batch["pixel_values"]), batch["labels"]))

    run = train(tmp_path / "run", Mine(Net()))
    assert run.validation["accuracy"] > 0.2


def test_the_trainer_refuses_a_batch_that_processes_cannot_share(tmp_path):
    trainer = Trainer(method(), Points(), TrainConfig(batch_size=8), tmp_path)
    assert trainer.total_steps == 5


# -- what the record and the checkpoints must not hide -----------------------------------------------------------------------------------


class Few(Points):
    """One of three has a label."""

    def __init__(self) -> None:
        super().__init__()
        self.y = self.labels = self.y.where(torch.arange(len(self.y)) % 3 == 0, -100)


@pytest.mark.parametrize("objectives", [["ce", "kd"], [lb.CE(), lb.DKD(warmup_epochs=0)]])
def test_unlabelled_samples_do_not_weigh_micro_batches(tmp_path, objectives):
    def fit(name: str, **options) -> lb.Run:
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)) for width in (16, 8))
        return lb.distill(
            lb.compose(teacher, student, objectives), Few(), out=tmp_path / name, quiet=True, epochs=2, batch_size=8, **options
        )

    whole, split = fit("whole"), fit("split", micro_batch_size=2)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(split)[name], value, rtol=1e-4, atol=1e-6)


def test_one_batch_on_one_process_is_not_counted(tmp_path):
    built = method()
    built.units = None  # not callable
    train(tmp_path / "run", built)


@pytest.mark.parametrize("values", [[math.nan, 0.1, 0.9, math.nan], [math.nan, 0.9, 0.1, 0.1]])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_metric_that_is_no_number_chooses_nothing(tmp_path, values, mode):
    measured = iter([*values, 0.0])
    train(tmp_path / "run", evaluate=lambda *_: {"accuracy": next(measured)}, evaluate_every=3, epochs=2, select={"mode": mode})
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    position = json.loads((last / "state.json").read_text())["position"]
    assert position["best_value"] == (0.9 if mode == "max" else 0.1)


def test_a_gradient_that_is_no_number_stops_the_run_before_a_checkpoint(tmp_path):
    built = method()
    own = built.forward

    def forward(batch):
        terms = own(batch)
        if built.training and built.steps_done == 4:  # the root's slope at 0 is infinite, its value is not
            terms["root"] = (built.student.head.weight * 0).pow(2).sum().sqrt()
        return terms

    built.forward = forward
    with pytest.raises(NonFiniteLoss, match=r"step 5: the gradient's norm is nan .* the checkpoint of step 4 is intact"):
        train(tmp_path / "run", built, checkpoint_every=1, evaluate_every=0)
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "method.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_the_loss_scale_outlives_a_stage_that_a_run_was_resumed_after(tmp_path, monkeypatch):
    own = Trainer.__init__
    scales = []

    def scaled(self, *arguments, **options):
        own(self, *arguments, **options)
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)

    monkeypatch.setattr(Trainer, "__init__", scaled)
    built = method()

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    built.after_step = stop
    stages = {"stages": [{"name": "a", "steps": 4}, {"name": "b", "steps": 2}], "evaluate_every": 0, "checkpoint_every": 0}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", built, **stages)
    restored = Trainer._restore_stage

    def watched(self, checkpoint, *arguments):
        restored(self, checkpoint, *arguments)
        scales.append((self.accelerator.scaler.get_scale(), checkpoint.state()["scaler"]["scale"]))

    monkeypatch.setattr(Trainer, "_restore_stage", watched)
    train(tmp_path / "run", method(), **stages, resume=True)
    [(now, written)] = scales
    assert now == written != 2.0**20


def test_a_diagnosis_of_a_stage_that_trains_adapters_alone_is_empty(tmp_path):
    torch.manual_seed(0)
    built = lb.compose(Net(16), Net(8), [lb.CE(), lb.Hint("body", "body")])
    stages = [{"name": "adapters", "trainable": ["adapters.*"], "steps": 2}]
    train(tmp_path / "run", built, stages=stages, diagnose_every=1, evaluate_every=0)
    found = [row["gradient"] for row in rows(tmp_path / "run") if "gradient" in row]
    assert found == [{"norm": {}, "share": {}, "cosine": {}}] * 2


def test_a_weight_of_no_term_names_the_nearest(tmp_path):
    with pytest.raises(BadInput, match="stage 'x': no term 'kdd' to weigh; did you mean 'kd'"):
        train(tmp_path / "run", stages=[{"name": "x", "weights": {"kdd": 5.0}}])
    assert not (tmp_path / "run").exists()


def test_a_stage_may_train_all_that_the_method_would_freeze():
    own = [Stage("pretrain", ("student.projector.*",))]
    for said, trainable in (({}, ("student.projector.*",)), ({"trainable": ("*",)}, ("*",))):
        [(stage, _)] = match_stages(own, [StageConfig(name="pretrain", **said)])
        assert stage.trainable == trainable


def test_an_evaluation_does_not_count_as_training_time(tmp_path):
    def slow(method, accelerator) -> dict[str, float]:
        time.sleep(0.5)
        return {"accuracy": 0.5}

    train(tmp_path / "run", evaluate=slow, evaluate_every=2, log_every=1, steps=4)
    rates = [row["samples_per_second"] for row in rows(tmp_path / "run") if "terms" in row]
    assert rates[2] > 8 / 0.4  # the first after an evaluation
