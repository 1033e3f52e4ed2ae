"""A plan agrees with the models' published sizes, with what autograd and torch's counters see, and with what the trainer would do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from limbeck.engine.estimate import PARTS, Tokens, Tower, Work, flops, frozen_block_bytes, memory, sizes_of, trained_block_bytes
from limbeck.engine.plan import plan, print_plan, skeleton
from limbeck.engine.recipe import ModelSpec, load_recipe
from limbeck.engine.task import build_task
from limbeck.engine.trainer import Trainer
from limbeck.errors import BadInput
from limbeck.models.vlm import VLM

SCALE = "scale/switch-kd-llava"
TINY_STUDENT = {"source": "tiny", "name": "digit-vlm-student"}


@pytest.fixture(scope="module")
def scale() -> dict[str, Any]:
    return plan(SCALE, overrides=["--plan.devices", "32"])


# -- the recipe of the paper's size --------------------------------------------------------------------------------------------------------


def test_the_scale_recipe_has_the_published_sizes(scale: dict[str, Any]) -> None:
    """Parameters as the cards of Qwen2.5-0.5B and Qwen2.5-3B state them; 384 / 14 = 27 patches a side."""
    assert scale["models"]["student"]["parameters"]["language"] == 494_032_768
    assert scale["models"]["teacher"]["parameters"]["language"] == 3_085_938_688
    vision = [scale["models"][side]["parameters"]["vision"] for side in ("student", "teacher")]
    assert vision[0] == vision[1] == pytest.approx(413e6, rel=0.01)
    assert scale["sample"]["student"]["image"] == 27**2


def test_the_scale_recipe_sees_the_published_number_of_samples(scale: dict[str, Any]) -> None:
    pretrain, dft = scale["stages"]
    assert pretrain["samples_seen"] == pytest.approx(558_128, rel=1e-3)
    assert dft["samples_seen"] == pytest.approx(665_298, rel=1e-3)


def test_pretraining_trains_the_projector_without_the_teacher(scale: dict[str, Any]) -> None:
    pretrain, dft = scale["stages"]
    assert list(pretrain["trains"]) == ["projector"]
    assert pretrain["terms"] == {"ce": 1.0}
    assert pretrain["flops"]["teacher"] == pretrain["flops"]["switch"] == 0
    assert set(dft["trains"]) == set(PARTS)
    assert set(dft["terms"]) == {"ce", "align", "switch"}
    assert dft["flops"]["switch"] > dft["flops"]["teacher"] > 0


def test_the_switch_names_both_projectors(scale: dict[str, Any]) -> None:
    rows = [(row["model"], row["module"], row["width"]) for row in scale["taps"]]
    assert rows == [("student", "model.multi_modal_projector", 1152), ("teacher", "model.multi_modal_projector", 1152)]


def test_what_is_assumed_is_said(scale: dict[str, Any]) -> None:
    assert "not on this machine" in scale["notes"][0]
    assert scale["assumptions"]["devices"] == 32
    json.dumps(scale)


def test_nothing_is_allocated() -> None:
    student = skeleton(load_recipe(SCALE).student)
    assert isinstance(student, VLM)
    assert all(parameter.is_meta for parameter in student.model.parameters())


def test_hours_follow_from_the_stated_rate(scale: dict[str, Any]) -> None:
    total = sum(stage["flops"]["total"] for stage in scale["stages"])
    assert scale["hours"] == pytest.approx(total / (32 * 989e12 * 0.4) / 3600)
    slower = plan(SCALE, overrides=["--plan.devices=32"], plan={"flops": 989e11})
    assert slower["hours"] == pytest.approx(10 * scale["hours"])


def test_length_that_depends_on_absent_data_must_be_stated() -> None:
    by_epochs = ["--train.stages=[]", "--train.epochs=2", "--train.batch_size=100"]
    with pytest.raises(BadInput, match=r"--plan\.samples"):
        plan(SCALE, overrides=by_epochs)
    planned = plan(SCALE, overrides=[*by_epochs, "--plan.samples=1000"])
    assert [stage["steps"] for stage in planned["stages"]] == [20, 20]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--plan.device=8"], "did you mean 'devices'"),
        (["--plan.devices=many"], r"plan\.devices"),
        (["--plan.devices=0"], "devices >= 1"),
        (["--plan.devices=64"], "64 devices in micro-batches of 4: choose a multiple of 256"),
        (["--method.tua=1"], "did you mean 'tau'"),
    ],
)
def test_bad_input_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        plan(SCALE, overrides=overrides)


# -- recipes whose data is here ------------------------------------------------------------------------------------------------------------


def test_stages_last_as_long_as_the_trainer_makes_them(recipe: dict[str, Any], tmp_path: Path) -> None:
    train = {**recipe["train"], "stages": [{"name": "pretrain", "epochs": 3, "batch_size": 8}, {"name": "dft", "lr": 1e-4}]}
    recipe = {**recipe, "method": {"name": "switch-kd", "schedule": "pretrain-dft"}, "train": train}
    resolved = load_recipe(recipe)
    task = build_task(resolved)
    trainer = Trainer(task.method, task.data, resolved.train, tmp_path, collate=task.collate, quiet=True)
    keys = ("name", "batch_size", "steps", "lr")
    planned = [tuple(stage[key] for key in keys) for stage in plan(recipe)["stages"]]
    assert planned == [tuple(getattr(stage, key) for key in keys) for stage in trainer.plan]


def test_tokens_are_counted_on_real_samples(recipe: dict[str, Any]) -> None:
    planned = plan(recipe)
    task = build_task(load_recipe(recipe))
    lengths = [len(task.data["train"][index]["student"]["input_ids"]) for index in range(48)]
    sample = planned["sample"]["student"]
    assert sample["image"] == 16
    assert sample["image"] + sample["text"] == pytest.approx(sum(lengths) / 48)
    assert planned["stages"][0]["epochs"] == pytest.approx(12 * 16 / 48)
    [note] = planned["notes"]
    assert re.fullmatch(r"padding is about \d+% of a micro-batch of 16, \d+% with train.group_by_length \(it is off\)", note)


def test_a_teacher_that_a_recipe_trains_is_not_trained(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    planned = plan({**recipe, "teacher": {"source": "recipe", "name": str(load_shipped("digit-scenes-teacher"))}})
    assert planned["models"]["teacher"]["parameters"]["total"] == 161_920
    assert not (tmp_path / "cache").exists()


def test_an_illegal_switch_is_refused_with_both_widths(recipe: dict[str, Any]) -> None:
    narrow = {**TINY_STUDENT, "options": {"vision_width": 32}}
    with pytest.raises(BadInput, match=r"\[32\].*\[48\]"):
        plan({**recipe, "student": narrow})
    with pytest.warns(UserWarning, match="trained linear map"):
        bridged = plan({**recipe, "student": narrow, "method": {"name": "switch-kd", "bridge": "linear"}})
    assert bridged["stages"][0]["trains"]["adapters"] == 32 * 48 + 48


def test_printing_shows_every_stage(
    recipe: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(plan(recipe))
    printed = capsys.readouterr().out
    for word in ("its input is replaced", "48 token ids are shared", "dft", "fsdp2", "TFLOP/s"):
        assert word in printed


def load_shipped(name: str) -> Path:
    from limbeck.engine.recipe import locate

    return locate(name)


# -- any two modules -----------------------------------------------------------------------------------------------------------------------


def small(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))


def points(split: str) -> list[tuple[torch.Tensor, int]] | None:
    return [(torch.zeros(3, 2, 2), 1)] * 10 if split == "train" else None


def test_compose_prints_what_it_taps_and_adapts(capsys: pytest.CaptureFixture[str]) -> None:
    home = "tests.engine.test_plan"
    planned = plan(
        {
            "method": {"name": "compose", "objectives": ["ce", {"hint": {"student": "1", "teacher": "1"}}]},
            "student": {"source": "python", "name": f"{home}:small"},
            "teacher": {"source": "python", "name": f"{home}:small", "options": {"width": 8}},
            "data": {"source": "python", "name": f"{home}:points"},
            "train": {"batch_size": 5, "epochs": 2},
        }
    )
    assert [(row["term"], row["student_shape"], row["teacher_shape"]) for row in planned["objectives"]] == [
        ("ce", (3,), None),
        ("hint", (4,), (8,)),
    ]
    (stage,) = planned["stages"]
    assert stage["steps"] == 4
    forward = {"student": 2 * (12 * 4 + 4 * 3), "teacher": 2 * (12 * 8 + 8 * 3)}
    assert stage["flops"]["student"] == 20 * 3 * forward["student"]
    assert stage["flops"]["teacher"] == 20 * forward["teacher"]
    print_plan(planned)
    assert "hint" in capsys.readouterr().out


def digits(objectives: list[str], **given: Any) -> dict[str, Any]:
    models = {"source": "tiny", "name": "mlp", "options": {"hidden": [8]}}
    return {
        "method": {"name": "compose", "objectives": objectives},
        "student": models,
        "teacher": models,
        "data": {"source": "digits", "limit": 100, "val_fraction": 0.1, "test_fraction": 0.1},
        "train": {"batch_size": 10, "stages": [{"name": "a", "epochs": 5}, {"name": "b", "epochs": 5}]},
        **given,
    }


def teacher_flops(recipe: dict[str, Any]) -> list[float]:
    return [stage["flops"]["teacher"] for stage in plan(recipe)["stages"]]


def test_a_teacher_costs_only_what_it_is_asked() -> None:
    often = plan(digits(["ce", "kd"]))["stages"]
    each = often[0]["flops"]["teacher"] / often[0]["samples_seen"]
    assert each > 0
    assert teacher_flops(digits(["ce", "kd"], cache={"views": 2})) == [pytest.approx(each * 2 * often[0]["samples"]), 0.0]
    assert teacher_flops(digits(["ce"])) == [0.0, 0.0]


def test_a_language_teacher_that_is_asked_once_costs_and_weighs_so(recipe: dict[str, Any]) -> None:
    recipe = {**recipe, "method": {"name": "kd"}, "evaluate": ["vqa-accuracy"]}
    often, once = (plan(values)["stages"][0] for values in (recipe, {**recipe, "cache": {"views": 1}}))
    assert once["flops"]["teacher"] * often["samples_seen"] == pytest.approx(often["flops"]["teacher"] * often["samples"])
    assert often["memory"]["ddp"]["teacher"] > 0
    assert once["memory"]["ddp"]["teacher"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--evaluate", "[nonsense]"], "evaluate: unknown protocol 'nonsense'"),
        (["--data.path", "2024-01-01"], "unknown key 'path'"),
    ],
)
def test_what_the_run_would_refuse_the_plan_refuses(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        plan(digits(["ce"]), overrides=overrides)


# -- the formulas --------------------------------------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts(recipe: dict[str, Any]) -> None:
    """A whole Switch-KD step under FlopCounterMode, attention scores left out as the formula does. Position embeddings and norms are
    parameters that multiply no matrix: at these widths a few per cent."""
    wide = {"vision_width": 64, "text_width": 64, "text_layers": 2}
    recipe = {
        **recipe,
        "student": {**TINY_STUDENT, "options": wide},
        "teacher": {"source": "tiny", "name": "digit-vlm-teacher", "options": {**wide, "text_layers": 4}},
    }
    task = build_task(load_recipe(recipe))
    samples = [task.data["train"][0]] * 4
    batch = task.collate(samples)
    with FlopCounterMode(display=False) as counter:
        task.method(batch).total.backward()
    counted = sum(count for operator, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(operator))
    student, teacher = sizes_of(task.method.view), sizes_of(task.method.teacher_view)
    side = samples[0]["student"]
    answers = int((side["labels"] != -100).sum())
    tokens = Tokens(16, len(side["input_ids"]) - 16, answers)
    work = Work(trained=PARTS, teacher=True, switch=True, checkpointed=False)
    estimated = 4 * sum(flops(student, tokens, work, teacher).values())
    assert estimated == pytest.approx(counted, rel=0.06)


def saved_bytes(model: nn.Module, run: Any) -> int:
    """Bytes that autograd keeps, without parameters and autocast's copies of them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {parameter.numel() * 2 for name, parameter in model.named_parameters() if "layers." in name}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not (storage.nbytes() in sizes and tensor.dim() == 2):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("width", "inner"), [(256, 1024), (512, 1024)])
def test_a_language_block_keeps_what_the_formula_says(width: int, inner: int) -> None:
    from transformers import Qwen2Config, Qwen2Model

    tokens, kept = 500, {}
    for frozen in (False, True):
        for layers in (1, 3):
            config = Qwen2Config(
                vocab_size=8, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=1,
            )  # fmt: skip
            model = Qwen2Model(config).requires_grad_(not frozen).to(torch.bfloat16 if frozen else torch.float32)
            given = torch.randn(1, tokens, width, dtype=model.dtype, requires_grad=True)
            kept[frozen, layers] = saved_bytes(
                model, lambda model=model, given=given: model(inputs_embeds=given, use_cache=False)
            )
    block = {frozen: (kept[frozen, 3] - kept[frozen, 1]) / 2 / tokens for frozen in (False, True)}
    tower = Tower(0, 1, width, inner)
    assert trained_block_bytes(tower, gated=True, mixed=True) == pytest.approx(block[False], rel=0.1)
    assert frozen_block_bytes(tower, half=True) == pytest.approx(block[True], rel=0.1)


def test_a_vision_block_keeps_what_the_formula_says() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    kept = []
    for layers in (1, 3):
        config = SiglipVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4, image_size=60, patch_size=4,
            vision_use_head=False,
        )  # fmt: skip
        model = SiglipVisionModel(config)
        pixels = torch.randn(1, 3, 60, 60)
        kept.append(saved_bytes(model, lambda model=model, pixels=pixels: model(pixel_values=pixels)))
    tower = Tower(0, 1, 256, 1024)
    assert trained_block_bytes(tower, gated=False, mixed=True) == pytest.approx((kept[1] - kept[0]) / 2 / 225, rel=0.1)


def test_what_a_device_holds() -> None:
    """float32 weights, gradients and two Adam states are 16 bytes a parameter, DDP's buckets 4; FSDP2 divides all but what is gathered."""
    student = sizes_of(skeleton(ModelSpec(**TINY_STUDENT)))
    work = Work(trained=PARTS, teacher=False, switch=False, checkpointed=False)
    given = {"micro": 2, "devices": 8, "mixed": False, "states": 2}
    replicated = memory(student, Tokens(16, 20, 4), work, sharded=False, **given)
    sharded = memory(student, Tokens(16, 20, 4), work, sharded=True, **given)
    persistent = ("weights", "gradients", "optimizer")
    assert sum(replicated[kind] for kind in persistent) == 16 * student.total
    assert replicated["buckets"] == 4 * student.total
    assert sum(sharded[kind] for kind in persistent) == 16 * student.total / 8
    assert sharded["activations"] == replicated["activations"]


def test_checkpointing_trades_activations_for_a_forward() -> None:
    student = sizes_of(skeleton(load_recipe(SCALE).student))
    tokens, given = Tokens(729, 128, 64), {"micro": 4, "devices": 1, "sharded": False, "mixed": True, "states": 2}
    kept, recomputed = (Work(trained=PARTS, teacher=False, switch=False, checkpointed=on) for on in (False, True))
    assert (
        memory(student, tokens, recomputed, **given)["activations"] < 0.2 * memory(student, tokens, kept, **given)["activations"]
    )
    assert flops(student, tokens, recomputed)["student"] == pytest.approx(4 / 3 * flops(student, tokens, kept)["student"])
