"""ema-self: what the average learns and teaches, and on which pictures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import BadInput
from limbeck.methods.recognition.ema_self import EMASelf, EMASelfConfig, shifted
from limbeck.methods.registry import configure
from limbeck.models.tiny.classifiers import build

CLASSES = 4


def batch(labelled: int = 6, unlabelled: int = 0, views: int = 0, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {
        "pixel_values": torch.rand(labelled, 1, 8, 8, generator=draw),
        "labels": torch.randint(CLASSES, (labelled,), generator=draw),
        "ids": [str(index) for index in range(labelled)],
    }
    if unlabelled:
        made["unlabelled"] = torch.rand(unlabelled, 1, 8, 8, generator=draw)
    if views:
        made["views"] = [torch.rand(labelled, 1, 8, 8, generator=draw) for _ in range(views)]
    return made


def method(name: str = "mlp", data: dict[str, Any] | None = None, **hyper: Any) -> EMASelf:
    made = EMASelf(build(name, CLASSES, 1, widths=(4, 8)), **hyper)
    with torch.no_grad():
        made.eval().prepare(data or batch())
    return made.train()


def scatter(made: EMASelf) -> EMASelf:
    """Take the average away from the student."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.ema.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def test_terms_on_two_views_are_the_papers():
    made, data = scatter(method(ramp=0.0)), batch(views=2)
    terms = made(data)
    student, average = made.student(data["views"][0]), made.ema.module(data["views"][1])
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(student, data["labels"]).item())
    error = sum(
        (p - q) ** 2 for p, q in zip(student.softmax(-1).flatten().tolist(), average.softmax(-1).flatten().tolist(), strict=True)
    )
    assert terms["consistency"].item() == pytest.approx(100 * error / student.numel(), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_to_the_average(temperature):
    made, data = scatter(method(loss="kl", temperature=temperature, ramp=0.0)), batch()
    student, average = made.student(data["pixel_values"]), made.ema.module(data["pixel_values"])
    log_q, p = (student / temperature).log_softmax(-1), (average / temperature).softmax(-1)
    expected = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
    assert made(data)["consistency"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_a_student_that_is_its_average_has_nothing_to_learn_from_one_view(loss):
    made = method(loss=loss, ramp=0.0)
    terms = made(batch(unlabelled=3))
    assert terms["consistency"].item() == pytest.approx(0, abs=1e-6)
    assert scatter(made)(batch(unlabelled=3))["consistency"].item() > 1e-4


def test_unlabelled_pictures_count_in_the_consistency_alone():
    made, data = scatter(method(ramp=0.0)), batch(unlabelled=9)
    without = {key: value for key, value in data.items() if key != "unlabelled"}
    both, alone = made(data), made(without)
    assert both["ce"].item() == pytest.approx(alone["ce"].item(), rel=1e-5)
    only = {**without, "pixel_values": data["unlabelled"], "labels": torch.full((9,), -100)}
    rest = made(only)
    assert rest["ce"].item() == 0
    mean = (6 * alone["consistency"] + 9 * rest["consistency"]) / 15
    assert both["consistency"].item() == pytest.approx(mean.item(), rel=1e-4)


def test_the_average_gets_no_gradient_and_no_optimiser_trains_it():
    made = scatter(method(ramp=0.0))
    made(batch(unlabelled=3, views=2)).total.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in made.ema.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in made.student.parameters())


def test_the_average_is_in_eval_mode_and_keeps_averaged_statistics():
    made = method("cnn", momentum=0.75, schedule="constant")
    assert not any(module.training for module in made.ema.modules()) and made.student.training
    norm, averaged = made.student.model.stages[0][1], made.ema.module.model.stages[0][1]
    before = averaged.running_mean.clone()
    made(batch(unlabelled=3))
    assert torch.equal(averaged.running_mean, before)  # a forward does not move them
    assert not torch.equal(norm.running_mean, before)
    made.after_step(1)
    torch.testing.assert_close(averaged.running_mean, 0.75 * before + 0.25 * norm.running_mean)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("warmup", 1, 0.5),
        ("warmup", 4, 0.8),
        ("warmup", 10_000, 0.9),
        ("constant", 1, 0.9),
        ("cosine", 50, 0.95),
        ("cosine", 100, 1.0),
    ],
)
def test_the_momentum_of_the_average(schedule, step, expected):
    made = method(momentum=0.9, schedule=schedule)
    made.total_steps = 100
    with torch.no_grad():
        for parameter in made.ema.parameters():
            parameter.zero_()
        for parameter in made.student.parameters():
            parameter.fill_(1.0)
    made.after_step(step)
    for parameter in made.ema.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 1 - expected))


def test_the_weight_of_the_consistency_grows():
    made = scatter(method(ramp=0.5, consistency=2.0))
    made.total_steps = 100
    values = {}
    for made.steps_done in (0, 25, 50, 99):
        values[made.steps_done] = made(batch())["consistency"].item()
    assert values[0] == pytest.approx(math.exp(-5) * values[99], rel=1e-4)
    assert values[25] == pytest.approx(math.exp(-5 / 4) * values[99], rel=1e-4)
    assert values[50] == values[99]
    made.total_steps = None
    made.steps_done = 0
    assert made(batch())["consistency"].item() == pytest.approx(values[99])


def test_where_its_weight_is_zero_the_average_does_not_run():
    made, ran = method(consistency=0.0), []
    made.ema.register_forward_hook(lambda *_: ran.append("average"))
    data = batch(unlabelled=3)
    assert set(made(data)) == {"ce"} and not ran
    assert made(data)["ce"].item() == pytest.approx(F.cross_entropy(made.student(data["pixel_values"]), data["labels"]).item())


def test_each_side_sees_a_picture_of_its_own():
    made, data = method(shift=2, noise=0.1), batch(unlabelled=3)
    for ours, theirs in made.pairs(data):
        assert not torch.equal(ours, theirs) and ours.min() >= 0 and ours.max() <= 1
    for ours, theirs in method().pairs(data):
        assert torch.equal(ours, theirs)


def test_pictures_move_by_whole_pixels_each_on_its_own():
    torch.manual_seed(0)
    pictures = torch.rand(64, 2, 6, 7)
    done, seen = shifted(pictures, 1), set()
    padded = F.pad(pictures, (1, 1, 1, 1), mode="reflect")
    for index, picture in enumerate(done):
        fits = {(y, x) for y in range(3) for x in range(3) if torch.equal(padded[index, :, y : y + 6, x : x + 7], picture)}
        assert len(fits) == 1
        seen |= fits
    assert len(seen) == 9


def test_what_is_shipped():
    made = method(ship="ema")
    assert made.deployable() is made.ema.module
    assert method(ship="student").deployable().training
    state = scatter(made).state_dict()
    fresh = method()
    fresh.load_state_dict(state)
    pictures = batch()["pixel_values"]
    assert torch.equal(fresh.deployable()(pictures), made.deployable()(pictures))
    assert not torch.equal(made.student(pictures), made.deployable()(pictures))


def test_what_does_not_fit_is_refused():
    data = batch(unlabelled=3)
    data["unlabelled"] = torch.rand(3, 1, 12, 12)
    with pytest.raises(BadInput, match="1x8x8, 1x12x12"):
        method("cnn", data)
    with pytest.raises(BadInput, match="a label is 4; expected 0 to 3"):
        method(data={**batch(), "labels": torch.full((6,), CLASSES)})
    with pytest.raises(BadInput, match="shift is 8"):
        method(shift=8)
    for values, message in [
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"ramp": -0.1}, "ramp is -0.1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"consistency": -1}, "consistency is -1"),
        ({"loss": "cosine"}, "'mse' or 'kl'"),
    ]:
        with pytest.raises(BadInput, match=message):
            configure(EMASelf, values)
    assert (
        EMASelfConfig().loss == "mse" and method().weights["consistency"] == 100 and method(loss="kl").weights["consistency"] == 1
    )
