"""MaKD: what labels and answers each train, and the controls whose answers are of another picture or of none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import BadInput
from limbeck.losses.aspects import aspect_bce
from limbeck.methods.recognition.makd import MaKD, random_answers
from limbeck.methods.registry import configure
from limbeck.models.tiny.classifiers import build

CLASSES, QUESTIONS = 4, 5


def answered(size: int = 6, seed: int = 0, start: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(size, 1, 8, 8, generator=draw),
        "labels": torch.randint(CLASSES, (size,), generator=draw),
        "aspects": torch.rand(size, QUESTIONS, generator=draw),
        "ids": [f"picture/{start + index}" for index in range(size)],
    }


def method(batch: dict | None = None, **hyper) -> MaKD:
    torch.manual_seed(0)
    made = MaKD(build("mlp", CLASSES, 1), **hyper)
    with torch.no_grad():
        made.prepare(answered() if batch is None else batch)
    return made


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000), st.floats(0.1, 300))
def test_the_loss_is_the_slow_loop(rows, questions, seed, spread):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, questions, generator=draw, dtype=torch.float64) * spread
    answers = torch.rand(rows, questions, generator=draw, dtype=torch.float64)
    softplus = [max(a, 0) + math.log1p(math.exp(-abs(a))) for a in logits.flatten().tolist()]
    slow = sum(s - q * a for s, q, a in zip(softplus, answers.flatten().tolist(), logits.flatten().tolist(), strict=True))
    assert aspect_bce(logits, answers).item() == pytest.approx(slow / (rows * questions), rel=1e-9)


def test_the_loss_at_its_best_is_the_entropy_without_gradient():
    answers = torch.rand(3, QUESTIONS, dtype=torch.float64)
    logits = answers.logit().requires_grad_()
    loss = aspect_bce(logits, answers)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.special.entr(torch.stack([answers, 1 - answers])).sum(0).mean())
    assert logits.grad.abs().max() < 1e-12
    assert aspect_bce(torch.full((2, 3), 200.0), torch.ones(2, 3)) == 0


def test_the_loss_takes_extremes_half_precision_and_masks():
    hard = torch.tensor([[0.0, 1.0]])
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.tensor([[1e4, -1e4]], dtype=dtype, requires_grad=True)
        loss = aspect_bce(logits, hard)
        loss.backward()
        assert loss.dtype == torch.float32
        assert torch.isfinite(logits.grad).all() and torch.isfinite(loss)
    logits, answers = torch.randn(3, 2), torch.rand(3, 2)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(aspect_bce(logits, answers, mask=mask), aspect_bce(logits[mask], answers[mask]))
    assert aspect_bce(logits, answers, mask=torch.zeros(3, dtype=torch.bool)) == 0
    each = aspect_bce(logits, answers, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), aspect_bce(logits, answers))


def test_the_loss_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="outside"):
        aspect_bce(torch.zeros(1, 2), torch.tensor([[0.5, 1.5]]))
    with pytest.raises(ValueError, match="outside"):
        aspect_bce(torch.zeros(1, 2), torch.tensor([[0.5, float("nan")]]))
    with pytest.raises(ValueError, match="differ in shape"):
        aspect_bce(torch.zeros(1, 2), torch.zeros(1, 3))


def test_gradients_are_those_of_the_paper():
    batch, makd = answered(), method()
    seen = makd.student.read(batch["pixel_values"])
    a = makd.aspects(seen.pooled)
    terms = makd(batch)
    bias = torch.autograd.grad(terms.total, [makd.student.head.bias, makd.aspects.bias], retain_graph=True)
    ce = torch.autograd.grad(F.cross_entropy(seen.logits, batch["labels"]), makd.student.head.bias)[0]
    torch.testing.assert_close(bias[0], ce)  # labels alone move the class outputs
    torch.testing.assert_close(bias[1], 4 * (a.sigmoid() - batch["aspects"]).sum(0) / a.numel())
    trunk = makd.student.model.hidden0.weight
    of_answers = torch.autograd.grad(terms["aspects"], [trunk, makd.student.head.weight], allow_unused=True, retain_graph=True)
    assert of_answers[0].abs().max() > 0
    assert of_answers[1] is None


def test_the_order_of_the_questions_does_not_count():
    batch, makd = answered(), method()
    before = makd(batch).total
    order = torch.randperm(QUESTIONS)
    with torch.no_grad():
        makd.aspects.weight.copy_(makd.aspects.weight[order].clone())
        makd.aspects.bias.copy_(makd.aspects.bias[order].clone())
    torch.testing.assert_close(makd({**batch, "aspects": batch["aspects"][:, order]}).total, before)


def test_without_weight_it_trains_as_labels_alone_do():
    batch, students = answered(), []
    for with_answers in (True, False):
        makd = method(alpha=0.0)
        sgd = torch.optim.SGD(makd.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            sgd.zero_grad()
            loss = makd(batch).total if with_answers else F.cross_entropy(makd.student(batch["pixel_values"]), batch["labels"])
            loss.backward()
            sgd.step()
        students.append(makd.student)
    assert all(torch.equal(one, other) for one, other in zip(*(student.parameters() for student in students), strict=True))


def test_what_ships_is_the_ordinary_student():
    makd, plain = method(), build("mlp", CLASSES, 1)
    shipped = makd.deployable()
    assert [name for name, _ in shipped.named_parameters()] == [name for name, _ in plain.named_parameters()]
    pictures = answered()["pixel_values"]
    before = shipped(pictures)
    assert before.shape[1] == CLASSES
    with torch.no_grad():
        makd.aspects.bias.fill_(1e6)
    assert torch.equal(shipped(pictures), before)


def test_shuffled_answers_are_anothers_and_depend_on_ids_alone():
    data = [answered(8, seed=1), answered(5, seed=2, start=8)]
    asked = {name: row for batch in data for name, row in zip(batch["ids"], batch["aspects"], strict=True)}
    makd = method(targets="shuffled")
    makd.survey(iter(data))
    shuffled = torch.cat([makd.targets(batch) for batch in data])
    assert sorted(map(tuple, shuffled.tolist())) == sorted(tuple(row.tolist()) for row in asked.values())
    assert not any(torch.equal(row, own) for row, own in zip(shuffled, asked.values(), strict=True))
    again = method(targets="shuffled")
    again.survey(reversed(data))
    assert torch.equal(again.targets(data[0]), shuffled[:8])
    first, second = makd(data[0])["aspects"], makd({**data[0], "aspects": torch.rand(8, QUESTIONS)})["aspects"]
    assert torch.equal(first, second)
    with pytest.raises(BadInput, match="'picture/99' was not among"):
        makd(answered(1, start=99))


def test_random_answers_depend_on_ids_alone():
    makd, batch = method(targets="random"), answered(200)
    targets = makd.targets(batch)
    backwards = {**batch, "ids": batch["ids"][::-1], "aspects": batch["aspects"] * 0}
    assert torch.equal(makd.targets(backwards), targets.flip(0))
    assert torch.equal(targets[3], random_answers("picture/3", QUESTIONS))
    assert targets.min() >= 0 and targets.max() <= 1 and abs(targets.mean() - 0.5) < 0.05


def test_only_shuffling_looks_at_the_data():
    def never():
        raise AssertionError("nothing is to be read")
        yield

    for targets in ("asked", "random"):
        method(targets=targets).survey(never())


def test_bad_input():
    batch = answered()
    with pytest.raises(BadInput, match=r"data\.answers"):
        method({key: value for key, value in batch.items() if key != "aspects"})
    with pytest.raises(BadInput, match=r"expected \[6, questions\]"):
        method({**batch, "aspects": torch.rand(6)})
    with pytest.raises(BadInput, match=r"outside 0\.\.1"):
        method({**batch, "aspects": batch["aspects"] + 1})
    with pytest.raises(BadInput, match="what is surveyed has none"):
        method(targets="shuffled").survey([{"ids": ["a"]}])
    with pytest.raises(BadInput, match="alpha"):
        configure(MaKD, {"alpha": -1})
    with pytest.raises(BadInput, match="targets"):
        configure(MaKD, {"targets": "asks"})
    with pytest.raises(ValueError, match="differ in shape"):
        method()({**batch, "aspects": torch.rand(6, QUESTIONS + 1)})
