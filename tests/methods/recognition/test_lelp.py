"""LELP: from a teacher's embedding to a student with more outputs than classes, and back to class logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.errors import BadInput
from limbeck.methods.recognition.lelp import LELP, LELPConfig
from limbeck.methods.registry import configure
from limbeck.models.classifier import Classifier
from limbeck.models.loading import load
from limbeck.models.tiny.classifiers import build
from limbeck.models.vision import load_classifier

CLASSES = 2


def batches(count: int = 3, seed: int = 0, size: int = 12) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.rand(size, 1, 8, 8, generator=draw),
            "labels": torch.randint(CLASSES, (size,), generator=draw),
            "ids": [str(index) for index in range(size)],
        }
        for _ in range(count)
    ]


def teacher(name: str = "mlp", width: int = 16) -> Classifier:
    return build(name, CLASSES, 1, hidden=(width,), widths=(4, width))


def method(student: nn.Module | None = None, taught_by: nn.Module | None = None, data: list[dict] | None = None, **hyper) -> LELP:
    torch.manual_seed(0)
    data = batches() if data is None else data
    made = LELP(student or build("mlp", CLASSES, 0, hidden=(6,)), taught_by or teacher(), **{"subclasses": 3, **hyper})
    with torch.no_grad():
        made.eval().prepare(data[0])
        made.survey(iter(data))
    return made.train()


@pytest.mark.parametrize("student", ["cnn", "mlp"])
@pytest.mark.parametrize("taught_by", ["cnn", "mlp"])
def test_any_widths_meet_without_a_projector(student, taught_by):
    made = method(build(student, CLASSES, 0, hidden=(6,), widths=(3, 5)), teacher(taught_by))
    (batch,) = batches(1, seed=5)
    assert made.student(batch["pixel_values"]).shape == (12, 6)
    terms = made(batch)
    assert terms.keys() == {"lelp"}
    terms.total.backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in made.parameters())
    assert all(parameter.grad is None for parameter in made.teacher.module.parameters())
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"student"}


def test_one_subclass_is_plain_distillation():
    made = method(subclasses=1, tau=3.0)
    (batch,) = batches(1, seed=5)
    student, taught = made.student(batch["pixel_values"]), made.taught(batch["pixel_values"]).logits
    torch.testing.assert_close(made(batch)["lelp"], losses.kd(student, taught, temperature=3.0))
    torch.testing.assert_close(made.deployable()(batch["pixel_values"]), student)


def test_the_loss_is_the_divergence_from_the_split_probabilities():
    (batch,) = batches(1, seed=5)
    for options, student_tau, factor in (
        ({}, 2.0, 4.0),
        ({"temper_student": False}, 1.0, 4.0),
        ({"tau_squared": False}, 2.0, 1.0),
    ):
        made = method(tau=2.0, beta=0.5, alpha=0.25, **options)
        seen = made.taught(batch["pixel_values"])
        within = (made.split(seen.pooled) / 0.5).softmax(2)
        target = ((seen.logits / 2).softmax(1)[..., None] * within).flatten(1)
        q = (made.student(batch["pixel_values"]) / student_tau).softmax(1)
        terms = made(batch)
        torch.testing.assert_close(terms["lelp"], 0.75 * factor * (target * (target / q).log()).sum(1).mean())
        by_class = made.student(batch["pixel_values"]).softmax(1).unflatten(1, (CLASSES, 3)).sum(2)
        torch.testing.assert_close(terms["ce"], -0.25 * by_class.gather(1, batch["labels"][:, None]).log().mean())


@pytest.mark.parametrize("null_space", ["rows", "differences", "none"])
def test_directions_are_what_the_teachers_classifier_does_not_read(null_space):
    made = method(null_space=null_space)
    weight = made.teacher.module.head.weight
    read = {"rows": weight, "differences": weight[:1] - weight[1:], "none": weight}[null_space]
    overlap = torch.stack([read @ own for own in made.split.directions]).abs().max()
    assert (overlap > 1e-2) if null_space == "none" else (overlap < 1e-5)


def test_classes_are_by_label_and_by_the_teachers_choice_where_there_is_none():
    data, unlabelled = batches(), batches()
    made = method(data=data)
    for batch in unlabelled:
        batch["labels"][:] = -100
    chosen = [{**batch, "labels": made.taught(batch["pixel_values"]).logits.argmax(1)} for batch in data]
    assert any((batch["labels"] != other["labels"]).any() for batch, other in zip(data, chosen, strict=True))
    for name, expected in method(data=chosen).split.state_dict().items():
        torch.testing.assert_close(method(data=unlabelled).split.state_dict()[name], expected)
    rows = torch.cat([made.taught(batch["pixel_values"]).pooled[batch["labels"] == 1] for batch in data])
    torch.testing.assert_close(made.split.means[1], rows.mean(0))


def test_a_survey_is_repeatable_and_follows_the_seed():
    for directions in ("pca", "random"):
        first, again, other = (method(directions=directions, seed=seed).split.directions for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert (first - other).abs().max() > 0.01


def test_what_is_deployed_gives_the_classes_log_probabilities_summed():
    made = method(
        Classifier(build("cnn", CLASSES, 0, widths=(3, 5)).model, mean=[0.2], std=[0.5], size=8, channels=1, classes=("a", "b"))
    )
    (batch,) = batches(1, seed=5)
    shipped = made.eval().deployable()
    assert (shipped.size, shipped.channels, shipped.classes, shipped.normalises) == (8, 1, ("a", "b"), True)
    subclasses = made.student(batch["pixel_values"]).softmax(1)
    torch.testing.assert_close(shipped(batch["pixel_values"]).softmax(1), subclasses.unflatten(1, (CLASSES, 3)).sum(2))
    assert {id(p) for p in shipped.parameters()} == {id(p) for p in made.student.parameters()}
    nn.init.zeros_(made.student.head.weight)
    torch.testing.assert_close(shipped(batch["pixel_values"])[0], shipped(batch["pixel_values"])[1])
    before = LELP(build("mlp", CLASSES), teacher())
    assert before.deployable() is before.student


def test_what_is_shipped_is_saved_and_loaded_again(tmp_path):
    student = load({"source": "tiny", "name": "mlp", "classes": ["even", "odd"], "options": {"hidden": [6]}})
    shipped = method(student).eval().deployable()
    shipped.save(tmp_path)
    again = load_classifier(tmp_path).eval()
    (batch,) = batches(1, seed=5)
    assert torch.equal(again(batch["pixel_values"]), shipped(batch["pixel_values"]))
    assert again.classes == ("even", "odd")


def test_a_prepared_method_restores_another_without_a_survey():
    first = method()
    second = LELP(build("mlp", CLASSES, 9, hidden=(6,)), teacher(), subclasses=3)
    with torch.no_grad():
        second.prepare(batches(1, seed=3)[0])
        assert second(batches(1)[0])["lelp"].isnan()  # not surveyed: no number that could pass for a loss
        second.load_state_dict(first.state_dict())
        second.prepare(batches(1, seed=3)[0])  # a head that fits is kept
        second.load_state_dict(first.state_dict())
    assert second(batches(1)[0])["lelp"] == first(batches(1)[0])["lelp"]


def test_the_loss_falls_and_the_students_subclasses_become_the_teachers():
    made = method(taught_by=teacher(width=32), beta=0.3)
    data = batches(1, seed=5, size=32)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    first = made(data[0]).total.item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = made(data[0]).total
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    seen = made.taught(data[0]["pixel_values"])
    within = made.student(data[0]["pixel_values"]).unflatten(1, (CLASSES, 3))
    assert (within.argmax(2) == made.split(seen.pooled).argmax(2)).float().mean() > 0.8


def test_a_classifier_that_reads_all_leaves_nothing_out_with_a_warning():
    with pytest.warns(UserWarning, match="reads all 2 directions"):
        made = method(taught_by=teacher(width=2), subclasses=2)
    assert made.basis.shape == (2, 2)


def test_refusals():
    with pytest.raises(BadInput, match=r"subclasses is 15.*14 directions.*null_space: none"):
        method(subclasses=15)
    with pytest.warns(UserWarning, match="15 subclasses share"):
        assert method(subclasses=15, null_space="none").split.directions.shape == (CLASSES, 16, 15)
    with pytest.raises(BadInput, match="2 classes, and the student has 5"):
        method(build("mlp", 5))
    with pytest.raises(BadInput, match="0 samples"):
        method().survey(iter(()))
    with pytest.raises(BadInput, match="needs a teacher"):
        LELP(build("mlp", CLASSES), None)
    for key, value in (("subclasses", 0), ("beta", 0.0), ("tau", -1.0), ("alpha", 1.5), ("directions", "ica")):
        with pytest.raises(BadInput, match=key):
            configure(LELP, {key: value})
    assert configure(LELP, {"beta": 0.5}) == LELPConfig(beta=0.5)


def test_student_and_teacher_stay_what_they_were_but_for_the_head():
    student, taught_by = build("mlp", CLASSES, 0, hidden=(6,)), teacher()
    before, untouched = copy.deepcopy(student.state_dict()), copy.deepcopy(taught_by.state_dict())
    made = method(student, taught_by)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in taught_by.state_dict().items())
    same = [name for name, tensor in made.student.state_dict().items() if _equal(tensor, before.get(name))]
    assert {name for name in before if "head" not in name} == set(same)


def _equal(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.shape == second.shape and torch.equal(first, second)
