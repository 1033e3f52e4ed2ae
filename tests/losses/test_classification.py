"""Losses on the logits of a classifier."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import kd
from limbeck.losses.classification import (
    dist,
    dist_parts,
    dkd,
    dkd_parts,
    dml,
    ensemble,
    logit_standardised_kd,
    one_kd,
    ramp_up,
    standardise,
    takd,
)


def draw(*shape, seed=0, scale=3.0, sides=2):
    return scale * torch.randn(sides, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(student, **_):
    return torch.arange(student[..., 0].numel()).view(student.shape[:-1]) % student.shape[-1]


def dkd_by_index(student, teacher, *, mask=None, **arguments):
    """`dkd` with the labels 0, 1, 2, ...; out of range where the mask leaves a sample out."""
    labels = labels_of(student)
    if mask is not None:
        labels = labels.masked_fill(mask == 0, -100)
    return dkd(student, teacher, labels, mask=mask, **arguments)


def two_branches(student, teacher, **arguments):
    """`one_kd` of the student and of its mirror image."""
    return one_kd(torch.stack([student, -student], dim=-2), teacher, **arguments)


SAMPLEWISE = [dkd_by_index, logit_standardised_kd, takd, dml, two_branches]
ALL = [*SAMPLEWISE, dist]


def entropy_gap(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(row, temperature=1.0):
    return (row / temperature).softmax(0).tolist()


def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm() + 1e-8))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 7), st.floats(0.5, 10), st.integers(0, 10_000))
def test_dkd_is_that_of_a_loop_and_makes_up_kd(classes, temperature, seed):
    student, teacher = draw(4, classes, seed=seed)
    labels = torch.randint(classes, (4,), generator=torch.Generator().manual_seed(seed))
    targets, others, whole = [], [], []
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        q_y, p_y = q.pop(y), p.pop(y)
        targets.append(entropy_gap([p_y, sum(p)], [q_y, sum(q)]))
        others.append(entropy_gap([a / sum(p) for a in p], [a / sum(q) for a in q]))
        whole.append(targets[-1] + sum(p) * others[-1])
    close = {"rtol": 1e-7, "atol": 1e-10}
    target, other = dkd_parts(student, teacher, labels, temperature=temperature, reduction="none")
    torch.testing.assert_close(target, temperature**2 * target.new_tensor(targets), **close)
    torch.testing.assert_close(other, temperature**2 * other.new_tensor(others), **close)
    torch.testing.assert_close(
        kd(student, teacher, temperature=temperature, reduction="none"), temperature**2 * other.new_tensor(whole), **close
    )
    loss = dkd(student, teacher, labels, alpha=0.5, beta=3.0, temperature=temperature)
    torch.testing.assert_close(loss, (0.5 * target + 3 * other).mean())


def test_two_classes_leave_nothing_but_the_target():
    student, teacher = draw(5, 2)
    student.requires_grad_()
    target, others = dkd_parts(student, teacher, labels_of(student))
    (gradient,) = torch.autograd.grad(others, student, retain_graph=True)
    assert others.item() == 0
    assert not gradient.any()
    torch.testing.assert_close(target, kd(student, teacher, temperature=4.0))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(2, 7), st.floats(0.5, 5), st.integers(0, 10_000))
def test_dist_is_that_of_a_loop(samples, classes, tau, seed):
    student, teacher = draw(samples, classes, seed=seed)
    q, p = (torch.tensor([softmax(row, tau) for row in side], dtype=torch.float64) for side in (student, teacher))
    inter = tau**2 * (1 - sum(pearson(a, b) for a, b in zip(q, p, strict=True)) / samples)
    intra = tau**2 * (1 - sum(pearson(a, b) for a, b in zip(q.T, p.T, strict=True)) / classes)
    ours = dist_parts(student, teacher, tau=tau)
    torch.testing.assert_close(torch.stack(ours), q.new_tensor([inter, intra]))
    loss = dist(student, teacher, beta=2.0, gamma=0.5, tau=tau)
    torch.testing.assert_close(loss, q.new_tensor(2 * inter + 0.5 * intra))


def test_dist_sees_probabilities_up_to_an_affine_map():
    (logits, _) = draw(5, 6)
    p = logits.softmax(-1)
    share = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64).unsqueeze(1)
    of_each_row = (share * p + (1 - share) / 6).log()
    inter, intra = dist_parts(of_each_row, logits)
    assert inter.item() == pytest.approx(0, abs=1e-6)
    assert intra.item() > 1e-3
    of_all = (0.4 * p + 0.6 / 6).log()
    assert dist(of_all, logits).item() == pytest.approx(0, abs=1e-5)


def test_a_single_sample_has_no_spread_within_a_class():
    student, teacher = draw(1, 5)
    student.requires_grad_()
    _, intra = dist_parts(student, teacher, tau=2.0)
    (gradient,) = torch.autograd.grad(intra, student)
    assert intra.item() == 4
    assert not gradient.any()


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 7), st.integers(0, 10_000))
def test_standardised_logits_have_mean_0_and_unbiased_std_1(classes, seed):
    (logits, other) = draw(4, classes, seed=seed)
    ours = standardise(logits)
    torch.testing.assert_close(ours.sum(-1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(ours.square().sum(-1), torch.full((4,), classes - 1.0, dtype=torch.float64), rtol=1e-4, atol=0)
    scale, shift = torch.rand(4, 1, dtype=torch.float64) + 0.5, torch.randn(4, 1, dtype=torch.float64)
    torch.testing.assert_close(
        logit_standardised_kd(scale * logits + shift, other), logit_standardised_kd(logits, other), rtol=1e-4, atol=1e-5
    )


def test_no_gradient_flows_along_the_scale_and_the_shift_of_standardised_logits():
    student, teacher = draw(4, 6)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(logit_standardised_kd(student, teacher), student)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close((gradient * student).sum(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SAMPLEWISE[:4]), st.integers(0, 1000))
def test_a_constant_a_sample_changes_nothing(loss, seed):
    student, teacher = draw(4, 7, seed=seed)
    shift = draw(4, 1, seed=seed + 1)
    torch.testing.assert_close(loss(student + shift[0], teacher + shift[1]), loss(student, teacher))


def test_takd_is_hintons_loss_over_the_number_of_classes():
    student, teacher = draw(5, 8)
    student.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            takd(student, teacher, temperature=3.0, reduction=reduction) * 8,
            kd(student, teacher, temperature=3.0, reduction=reduction),
        )
    (gradient,) = torch.autograd.grad(takd(student, teacher, temperature=1e5), student)
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(-1, keepdim=True)) / (5 * 8 * 8)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_dml_and_one_are_those_of_a_loop(seed):
    student, teacher = draw(3, 6, seed=seed)
    mutual = [
        sum(p * math.log(1e-8 + p / (q + 1e-8)) for p, q in zip(softmax(t), softmax(s), strict=True))
        for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(dml(student, teacher, reduction="none"), student.new_tensor(mutual))
    branched = []
    for s, t in zip(student, teacher, strict=True):
        target = [p + 1e-7 for p in softmax(t, 3.0)]
        branched.append(9 * sum(entropy_gap(target, softmax(branch, 3.0)) for branch in (s, -s)))
    torch.testing.assert_close(two_branches(student, teacher, reduction="none"), student.new_tensor(branched))


def test_an_ensemble_weighs_its_branches_and_lets_gradient_through():
    branches = draw(4, 5, sides=3).movedim(0, 1).requires_grad_()
    gate = draw(4, 3)[0].softmax(-1).requires_grad_()
    one_hot = torch.eye(3, dtype=torch.float64)[[2, 0, 1, 2]]
    torch.testing.assert_close(ensemble(branches, one_hot), branches[torch.arange(4), [2, 0, 1, 2]])
    torch.testing.assert_close(ensemble(branches, torch.full((4, 3), 1 / 3, dtype=torch.float64)), branches.mean(1))
    gated = ensemble(branches, gate)
    gated.sum().backward()
    assert branches.grad.all()
    torch.testing.assert_close(gate.grad, branches.sum(-1).detach())


def test_one_teaches_every_branch_and_not_the_ensemble():
    branches = draw(4, 5, sides=3).movedim(0, 1).requires_grad_()
    combined = ensemble(branches, torch.full((4, 3), 1 / 3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(one_kd(branches, combined), branches)
    (alone,) = torch.autograd.grad(one_kd(branches, combined.detach()), branches)
    assert gradient.all()
    assert torch.equal(gradient, alone)


def test_the_ramp_goes_from_exp_minus_5_to_1():
    assert ramp_up(0) == pytest.approx(math.exp(-5))
    assert ramp_up(40) == pytest.approx(math.exp(-1.25))
    assert ramp_up(80) == ramp_up(500) == 1
    assert ramp_up(5, 10) == ramp_up(40)
    assert ramp_up(0, 0) == 1
    with pytest.raises(ValueError, match="epochs is -1"):
        ramp_up(0, -1)


@pytest.mark.parametrize(
    ("loss", "tolerance"), [(dkd_by_index, 1e-12), (logit_standardised_kd, 1e-12), (takd, 1e-12), (dist, 1e-5), (dml, 1e-6)]
)
def test_equal_sides_are_at_a_minimum_of_zero(loss, tolerance):
    (logits, other) = draw(6, 5)
    logits.requires_grad_()
    value = loss(logits, logits.detach().clone())
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(0, abs=tolerance)
    assert gradient.abs().max() < 1e-5
    assert loss(logits, other).item() > 0.01


def test_a_branch_that_equals_the_ensemble_has_no_loss():
    (logits, _) = draw(6, 5)
    assert one_kd(logits.unsqueeze(1), logits).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", ALL)
def test_gradcheck(loss):
    student, teacher = draw(3, 5, scale=1.0)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("loss", ALL)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = draw(4, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", SAMPLEWISE)
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_masked_samples_contribute_nothing(loss, shape):
    student, teacher = draw(*shape, 7)
    mask = torch.tensor([True, True, False, True, False, False]).view(shape)
    by_sample = loss(student, teacher, reduction="none")
    assert by_sample.shape == shape
    torch.testing.assert_close(loss(student, teacher), by_sample.mean())
    student[~mask] = teacher[~mask] = torch.nan
    student.requires_grad_()
    value = loss(student, teacher, mask=mask)
    value.backward()
    torch.testing.assert_close(value, by_sample[mask].mean())
    assert not student.grad[~mask].any()
    assert student.grad[mask].any()
    torch.testing.assert_close(loss(student, teacher, mask=mask, reduction="sum"), by_sample[mask].sum())
    torch.testing.assert_close(loss(student, teacher, mask=mask, reduction="none"), by_sample.where(mask, 0))


@pytest.mark.parametrize("loss", ALL)
def test_no_sample_at_all_is_zero_on_the_graph(loss):
    student, teacher = draw(4, 5)
    student.requires_grad_()
    values = [loss(student[:0], teacher[:0])]
    if loss is not dist:
        values.append(loss(student, teacher, mask=torch.zeros(4, dtype=torch.bool)))
    for value in values:
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("loss", ALL)
def test_half_precision_and_autocast_compute_in_float32(loss):
    student, teacher = draw(6, 40).bfloat16()
    student.requires_grad_()
    expected = loss(student.float(), teacher.float())
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_and_constant_logits_have_finite_gradients(loss, dtype):
    student, teacher = draw(6, 5, scale=1e4).to(dtype)
    student[0] = teacher[1] = 0
    student[2] = teacher[2] = 3
    for rows in (student, torch.zeros_like(student)):
        rows.requires_grad_()
        value = loss(rows, teacher)
        (gradient,) = torch.autograd.grad(value, rows)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [dkd_by_index, takd, dml, dist])
def test_a_class_masked_out_on_both_sides_gets_no_gradient(loss):
    student, teacher = draw(3, 5)
    student[:, 3:] = teacher[:, 3:] = -torch.inf
    student.requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, 3:].any()


@pytest.mark.parametrize("loss", ALL)
def test_shape_mismatch_names_both_shapes(loss):
    with pytest.raises(ValueError, match=r"\[2, (2, )?10\].*\[2, 12\]"):
        loss(torch.zeros(2, 10), torch.zeros(2, 12))


@pytest.mark.parametrize("loss", SAMPLEWISE)
def test_mask_and_reduction_are_checked(loss):
    logits = torch.zeros(2, 10)
    with pytest.raises(ValueError, match="'batchmean'"):
        loss(logits, logits, reduction="batchmean")
    with pytest.raises(ValueError, match=r"torch\.float32; expected torch\.bool"):
        loss(logits, logits, mask=torch.ones(2))


def test_refusals():
    logits, labels = torch.zeros(2, 10), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"mask \[3\]"):
        dkd(logits, logits, labels, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"labels \[3\].*\[2, 10\]"):
        dkd(logits, logits, torch.zeros(3, dtype=torch.long))
    for call in (
        lambda: dkd(logits, logits, labels, temperature=0.0),
        lambda: logit_standardised_kd(logits, logits, temperature=0.0),
        lambda: takd(logits, logits, temperature=0.0),
        lambda: one_kd(logits.unsqueeze(1), logits, temperature=0.0),
    ):
        with pytest.raises(ValueError, match=r"temperature is 0\.0"):
            call()
    with pytest.raises(ValueError, match=r"tau is 0\.0"):
        dist(logits, logits, tau=0.0)
    with pytest.raises(ValueError, match=r"\[2, 10, 4\]; expected \[B, C\]"):
        dist(torch.zeros(2, 10, 4), torch.zeros(2, 10, 4))
    with pytest.raises(ValueError, match="1 classes"):
        standardise(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"gate \[2, 3\].*\[2, 4, 10\]"):
        ensemble(torch.zeros(2, 4, 10), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"branches \[2, 10\].*\[2, 10\]"):
        one_kd(logits, logits)
