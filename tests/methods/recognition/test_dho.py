"""DHO: what each head learns from, how the mixture is chosen, and the conflict that two heads avoid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import BadInput
from limbeck.methods.recognition.dho import ALPHAS, BETAS, DHO, DHOConfig, best_mixture, count_right
from limbeck.methods.registry import configure
from limbeck.models.classifier import Seen
from limbeck.models.tiny.classifiers import build
from limbeck.modules.heads import DualHead, log_mixture

CLASSES = 4


def picture_batch(labelled: int = 6, unlabelled: int = 9, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(labelled, 1, 8, 8, generator=draw),
        "labels": torch.randint(CLASSES, (labelled,), generator=draw),
        "unlabelled": torch.rand(unlabelled, 1, 8, 8, generator=draw),
        "ids": [str(index) for index in range(labelled)],
    }


def method(name: str = "mlp", batch: dict | None = None, **hyper) -> DHO:
    torch.manual_seed(0)
    made = DHO(build(name, CLASSES, 1, widths=(4, 8)), build("mlp", CLASSES, 2), **hyper)
    with torch.no_grad():
        made.eval().prepare(batch or picture_batch())
    return made.train()


def gradient(term: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(term, [parameter], retain_graph=True, allow_unused=True)
    return torch.zeros_like(parameter) if found is None else found


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1), st.sampled_from(BETAS), st.integers(0, 1000))
def test_the_mixture_is_the_sum_of_probabilities(alpha, beta, seed):
    draw = torch.Generator().manual_seed(seed)
    a, k = (torch.randn(5, 7, generator=draw, dtype=torch.float64) * 10 for _ in range(2))
    mixed = log_mixture(a, k, torch.tensor(alpha), torch.tensor(beta)).exp()
    slow = torch.tensor(
        [[alpha * p + (1 - alpha) * q for p, q in zip(*rows, strict=True)]
         for rows in zip(a.softmax(-1).tolist(), (k / beta).softmax(-1).tolist(), strict=True)], dtype=torch.float64
    )  # fmt: skip
    torch.testing.assert_close(mixed, slow, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(5, dtype=torch.float64))


def test_the_ends_of_the_mixture_are_one_head_each():
    a, k = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert torch.equal(log_mixture(a, k, one, one), a.log_softmax(-1))
    assert torch.equal(log_mixture(a, k, zero, one), k.log_softmax(-1))
    assert torch.equal(log_mixture(a, k, zero, torch.tensor(4.0)).argmax(-1), k.argmax(-1))  # beta cannot reorder one head
    betas = torch.tensor(BETAS)[:, None, None]
    assert log_mixture(a * 2, k * 2, torch.tensor(0.5), betas).argmax(-1).unique(dim=0).shape[0] > 1  # it can reorder a mixture


def test_a_gradient_through_the_ends_is_finite():
    a, k = torch.randn(2, 5, 7).requires_grad_().unbind()
    for end in (0.0, 1.0):
        parts = torch.autograd.grad(
            log_mixture(a, k, torch.tensor(end), torch.tensor(2.0))[:, 0].sum(), [a, k], retain_graph=True
        )
        assert all(part.isfinite().all() for part in parts)
        assert parts[0 if end == 0 else 1].abs().max() == 0


def test_losses_are_the_papers():
    batch, dual = picture_batch(), method()
    terms, head = dual(batch), dual.student.head
    teacher = dual.teacher.module
    of_l, of_u = (dual.student.read(batch[key]).pooled for key in ("pixel_values", "unlabelled"))
    expected = 0.5 * F.cross_entropy(head.ce(of_l), batch["labels"])
    torch.testing.assert_close(terms["ce"], expected)
    slow = torch.zeros(())
    for pooled, key in ((of_l, "pixel_values"), (of_u, "unlabelled")):
        p, q = (teacher(batch[key]) / 2).softmax(-1), (head.kd(pooled) / 2).softmax(-1)
        slow = slow + sum(4 * (r * (r.log() - s.log())).sum() for r, s in zip(p, q, strict=True)) / len(p)
    torch.testing.assert_close(terms["kd"], 0.5 * slow)
    twice = dual({**batch, "unlabelled": batch["unlabelled"].repeat(2, 1, 1, 1)})
    torch.testing.assert_close(twice["kd"], terms["kd"])  # a mean over each group, not over all


def test_labels_train_one_head_and_the_teacher_the_other():
    batch, dual = picture_batch(), method()
    head, terms = dual.student.head, dual(batch)
    assert gradient(terms["ce"], head.kd.weight).abs().max() == 0
    assert gradient(terms["kd"], head.ce.weight).abs().max() == 0
    assert gradient(terms["ce"], head.ce.weight).abs().max() > 0
    other_labels = dual({**batch, "labels": (batch["labels"] + 1) % CLASSES})
    assert torch.equal(gradient(other_labels.total, head.kd.weight), gradient(terms.total, head.kd.weight))
    other_pictures = dual({**batch, "unlabelled": torch.rand(3, 1, 8, 8)})
    torch.testing.assert_close(gradient(other_pictures.total, head.ce.weight), gradient(terms.total, head.ce.weight))
    terms.total.backward()
    assert all(parameter.grad is None for parameter in dual.teacher.module.parameters())


def test_no_loss_from_a_teacher_that_says_the_same():
    batch, dual = picture_batch(), method()

    def same(pixel_values):
        logits = dual.student.head.kd(dual.student.read(pixel_values).pooled).detach()
        return Seen(logits, logits, logits + torch.arange(len(logits))[:, None])  # a constant a row changes no distribution

    dual.taught = same
    terms = dual(batch)
    assert terms["kd"].abs() < 1e-6
    assert gradient(terms["kd"], dual.student.head.kd.weight).abs().max() < 1e-6


def test_single_head_and_its_ends():
    batch, single = picture_batch(), method(heads="single")
    assert isinstance(single.student.head, torch.nn.Linear)
    assert single.deployable() is single.student
    terms, weight = single(batch), single.student.head.weight
    assert gradient(terms["ce"], weight).abs().max() > 0
    assert gradient(terms["kd"], weight).abs().max() > 0
    assert set(method(heads="single", kd=0)(batch)) == {"ce"}
    teacher_only = method(heads="single", ce=0.0, kd=1.0)
    other = {**batch, "labels": (batch["labels"] + 1) % CLASSES}
    assert torch.equal(teacher_only(batch).total, teacher_only(other).total)


def test_stacked_pictures_share_their_batch_statistics():
    batch = picture_batch()
    together, apart = method("cnn", stacked=True), method("cnn", stacked=False)
    labelled = [own.both([batch["pixel_values"], batch["unlabelled"]])[0][0] for own in (together, apart)]
    alone = apart.both([batch["pixel_values"]])[0][0]
    torch.testing.assert_close(labelled[1], alone)
    assert (labelled[0] - alone).abs().max() > 1e-4
    assert set(together(batch)) == set(together({key: batch[key] for key in ("pixel_values", "labels", "ids")}))


def test_the_scaled_head_reads_the_normalised_feature():
    head = method(scale=100.0, init="copy").student.head
    assert torch.equal(head.kd.weight, head.ce.weight)
    assert head.kd.weight is not head.ce.weight
    pooled = torch.rand(3, 64)
    a, k = head.both(pooled)
    torch.testing.assert_close(k, 100 * (F.normalize(pooled, dim=1) @ head.kd.weight.T + head.kd.bias))
    torch.testing.assert_close(head.both(3 * pooled)[1], k)
    torch.testing.assert_close(a, head.ce(pooled))


def test_the_search_takes_the_first_strictly_better_mixture():
    alike = torch.full((len(BETAS), len(ALPHAS)), 3)
    assert best_mixture(alike) == (3, 0.0, 0.5)
    assert best_mixture(alike * 0) == (0.0, 0.0, 1.0)
    alike[2, 7] = alike[5, 1] = 4
    assert best_mixture(alike) == (4, ALPHAS[7], BETAS[2])


def test_every_mixture_is_counted():
    a, k = torch.randn(2, 30, CLASSES)
    labels = torch.randint(CLASSES, (30,))
    found = count_right(a, k, labels)
    for row, beta in enumerate(BETAS):
        for column, alpha in enumerate(ALPHAS):
            p = alpha * a.softmax(-1) + (1 - alpha) * (k / beta).softmax(-1)
            assert abs(int((p.argmax(-1) == labels).sum()) - int(found[row, column])) <= 1  # of nearly equal probabilities


def test_calibration_keeps_what_is_best_on_validation_data():
    batch, dual = picture_batch(40), method()
    with torch.no_grad():
        pooled = dual.student.read(batch["pixel_values"]).pooled
        right = dual.student.head.ce(pooled).argmax(-1)
        assert (right != dual.student.head.kd(pooled).argmax(-1)).any()
        half = [{"pixel_values": batch["pixel_values"][part], "labels": right[part]} for part in (slice(0, 15), slice(15, 40))]
        half[0]["labels"] = half[0]["labels"].clone()
        half[0]["labels"][3] = -100
        dual.eval().calibrate(iter(half))
    head = dual.student.head
    counts = count_right(*head.both(pooled), right)
    accuracy, alpha, beta = best_mixture(counts)
    assert accuracy == 40
    assert (head.alpha.item(), head.beta.item()) == (pytest.approx(alpha), pytest.approx(beta))
    shipped = dual.deployable()
    assert torch.equal(shipped(batch["pixel_values"]).argmax(-1), right)
    torch.testing.assert_close(shipped(batch["pixel_values"]).exp().sum(-1), torch.ones(40))

    again = method()
    again.load_state_dict(dual.state_dict())
    assert again.student.head.alpha.item() == head.alpha.item()
    assert torch.equal(again.deployable()(batch["pixel_values"]), shipped(batch["pixel_values"]))


def test_fixed_mixtures_stay():
    fixed = method(search=False)
    fixed.calibrate(iter([picture_batch()]))
    assert (fixed.student.head.alpha.item(), fixed.student.head.beta.item()) == (0.5, 0.5)
    searched = method()
    searched.calibrate(iter([]))
    assert searched.student.head.alpha.item() == 0.5


def test_prepare_again_changes_nothing():
    dual, batch = method(), picture_batch()
    before, head = dual.student.head.state_dict(), dual.student.head
    dual.prepare(batch)
    assert dual.student.head is head
    assert all(torch.equal(value, before[name]) for name, value in dual.student.head.state_dict().items())


def test_conflict_is_the_cosine_on_the_backbone():
    batch, dual = picture_batch(), method()
    terms, layer = dual(batch), dual.student.model.hidden0
    ce, kd = (torch.cat([gradient(terms[term], p).flatten() for p in (layer.weight, layer.bias)]) for term in ("ce", "kd"))
    assert dual.conflict(batch) == pytest.approx(F.cosine_similarity(ce, kd, dim=0).item(), abs=1e-5)
    assert all(parameter.grad is None for parameter in dual.parameters())


def test_two_heads_conflict_less_than_one():
    batch = picture_batch(32, 32)
    cosines = {}
    for heads in ("single", "dual"):
        one = method(heads=heads)
        adam = torch.optim.AdamW(one.parameters(), lr=3e-3)
        measured = []
        for _ in range(150):
            measured.append(one.conflict(batch))
            adam.zero_grad()
            one(batch).total.backward()
            adam.step()
        cosines[heads] = sum(measured[50:]) / 100
    assert cosines["single"] < -0.3  # labels at random, and a teacher that knows nothing of them
    assert cosines["dual"] > cosines["single"] + 0.2


def test_bad_input():
    with pytest.raises(BadInput, match="needs a teacher"):
        DHO(build("mlp", CLASSES))
    with pytest.raises(BadInput, match="temperature is 0"):
        configure(DHO, {"temperature": 0})
    with pytest.raises(ValueError, match="alpha is 2"):
        DHOConfig(alpha=2)
    with pytest.raises(BadInput, match="the student has 4, the teacher 5"):
        DHO(build("mlp", CLASSES), build("mlp", 5)).prepare(picture_batch())
    with pytest.raises(BadInput, match="differ in shape"):
        method(batch={**picture_batch(), "unlabelled": torch.rand(2, 1, 9, 9)})
    with pytest.raises(BadInput, match="one maps 3 to 2, the other 4 to 2"):
        DualHead(torch.nn.Linear(3, 2), torch.nn.Linear(4, 2))
    with pytest.raises(BadInput, match="beta > 0"):
        DualHead(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)).mix(0.5, 0)


def test_a_convolution_as_head():
    conv, linear = torch.nn.Conv2d(8, CLASSES, 1), torch.nn.Linear(8, CLASSES)
    head, pooled = DualHead(conv, linear), torch.rand(3, 8)
    a, k = head.both(pooled[..., None, None])
    torch.testing.assert_close(a, pooled @ conv.weight.flatten(1).T + conv.bias)
    torch.testing.assert_close(k, linear(pooled))
    assert torch.equal(head.both(pooled)[0], a)
