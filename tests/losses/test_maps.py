"""Losses on maps."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import hint
from limbeck.losses.maps import (
    attention_transfer,
    cwd,
    fsp,
    hcl,
    margin_from_batch_norm,
    masked_generation,
    nst,
    ofd,
    pool_to_smaller,
    variational,
)

MARGIN = torch.tensor([-0.4, -1.3, -0.2], dtype=torch.float64)
LOG_SCALE = torch.tensor([-2.0, 0.3, 5.0], dtype=torch.float64)
LOSSES = {
    "attention_transfer": attention_transfer,
    "nst": nst,
    "cwd": cwd,
    "cwd over positions": lambda student, teacher: cwd(student, teacher, over="spatial"),
    "fsp": lambda student, teacher: fsp(student, student.sin(), teacher, teacher.sin()),
    "hcl": hcl,
    "variational": lambda student, teacher: variational(student, teacher, LOG_SCALE),
    "ofd": lambda student, teacher: ofd(student, teacher, MARGIN),
    "masked_generation": masked_generation,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
seeds = st.integers(0, 1000)
sides = st.integers(1, 6)


def draw(*shape, seed=0):
    """A student's and a teacher's map."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_loss
def test_equal_maps_cost_nothing(loss):
    features, _ = draw(2, 3, 5, 6)
    if loss is LOSSES["variational"]:
        assert loss(features, features).item() == pytest.approx((F.softplus(LOG_SCALE) + 1e-5).log().mean().item() / 2)
    else:
        assert loss(features, features).item() == pytest.approx(0, abs=1e-12)


@every_loss
def test_gradients_reach_the_student_alone(loss):
    student, teacher = draw(2, 3, 5, 6)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


@every_loss
def test_the_gradient_is_that_of_the_value(loss):
    student, teacher = draw(2, 3, 3, 3)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_finite_and_computed_in_float32(loss, scale, autocast):
    student, teacher = (scale * draw(2, 3, 5, 6)).bfloat16()
    if loss is LOSSES["fsp"]:  # its sines are taken outside of the loss
        expected = loss(student, teacher)
    else:
        expected = loss(student.float(), teacher.float())
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(student, teacher)
    value.backward()
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=0)
    assert value.isfinite()
    assert student.grad.isfinite().all()


@every_loss
def test_a_silent_sample_or_channel_is_finite(loss):
    student, teacher = draw(3, 3, 5, 6)
    student[0], teacher[1] = 0, 0
    student[2, 0], teacher[2, 1] = 0, 0
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@every_loss
def test_no_sample_at_all_costs_nothing(loss):
    student, teacher = draw(0, 3, 5, 6)
    assert loss(student.requires_grad_(), teacher).item() == 0


@every_loss
def test_maps_of_one_batch_are_expected(loss):
    with pytest.raises(ValueError, match=r"\[2, 3, 4\].*\[2, 3, 4\].*\[B, C, H, W\]"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*\[4, 3, 4, 4\].*one batch"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(4, 3, 4, 4))


@pytest.mark.parametrize("name", ["cwd", "hcl", "ofd", "masked_generation"])
def test_one_shape_is_expected(name):
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*\[2, 3, 8, 8\].*align"):
        LOSSES[name](torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


def test_channels_must_match_where_they_are_compared():
    narrow, wide = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"student \[2, 3, 4, 4\] and teacher \[2, 5, 4, 4\] differ in channels"):
        fsp(narrow, narrow, narrow, wide)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*\[2, 5, 4, 4\]"):
        variational(narrow, wide, torch.zeros(3))
    with pytest.raises(ValueError, match=r"log_scale \[5\].*3 channels"):
        variational(narrow, narrow, torch.zeros(5))
    with pytest.raises(ValueError, match=r"margin \[5\].*3 channels"):
        ofd(narrow, narrow, torch.zeros(5))


def test_values_out_of_range():
    features = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"p is 0.5"):
        attention_transfer(features, features, p=0.5)
    with pytest.raises(ValueError, match="temperature is 0"):
        cwd(features, features, temperature=0)
    with pytest.raises(ValueError, match="over is 'positions'"):
        cwd(features, features, over="positions")
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        ofd(features, features, torch.zeros(3), reduction="mean")


# ---- attention transfer and neuron selectivity transfer


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, 4), st.integers(1, 4), sides, sides, st.sampled_from([1, 2, 3, 4]))
def test_attention_transfer_by_a_loop(seed, student_channels, teacher_channels, height, width, p):
    student, _ = draw(2, student_channels, height, width, seed=seed)
    _, teacher = draw(2, teacher_channels, height, width, seed=seed)
    squares = []
    for s, t in zip(student, teacher, strict=True):
        attention = [sum(channel.abs() ** p for channel in features) / len(features) for features in (s, t)]
        a, b = (positions / positions.square().sum().sqrt() for positions in attention)
        squares += [(x - y) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)]
    torch.testing.assert_close(attention_transfer(student, teacher, p=p), torch.stack(squares).mean())


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, 3), st.integers(1, 3), sides, sides)
def test_nst_by_a_loop(seed, student_channels, teacher_channels, height, width):
    student, _ = draw(2, student_channels, height, width, seed=seed)
    _, teacher = draw(2, teacher_channels, height, width, seed=seed)

    def kernel(first, second):
        pairs = [(a / a.norm(), b / b.norm()) for x, y in zip(first, second, strict=True) for a in x for b in y]
        return torch.stack([(a * b).sum() ** 2 for a, b in pairs]).mean()

    expected = kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher)
    torch.testing.assert_close(nst(student, teacher), expected)


@settings(deadline=None, max_examples=25)
@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_a_positive_scale_is_not_seen(seed, of_student, of_teacher):
    student, teacher = draw(2, 3, 4, 5, seed=seed)
    scaled = of_student * student, of_teacher * teacher
    torch.testing.assert_close(attention_transfer(*scaled), attention_transfer(student, teacher))
    per_channel = torch.tensor([of_student, of_teacher, 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(nst(per_channel * student, teacher / per_channel), nst(student, teacher))


@pytest.mark.parametrize("loss", [attention_transfer, nst])
def test_attention_does_not_see_the_order_or_sign_of_channels(loss):
    student, teacher = draw(2, 4, 5, 5)
    torch.testing.assert_close(loss(-student[:, [2, 0, 3, 1]], teacher), loss(student, teacher))
    assert loss(-student[:, [2, 0, 3, 1]], student).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [attention_transfer, nst])
@pytest.mark.parametrize(("student_size", "teacher_size"), [((8, 6), (4, 3)), ((2, 3), (4, 6)), ((4, 6), (8, 3))])
def test_the_larger_map_is_averaged_in_each_dimension(loss, student_size, teacher_size):
    student, _ = draw(2, 3, *student_size)
    _, teacher = draw(2, 5, *teacher_size)
    size = [min(side) for side in zip(student_size, teacher_size, strict=True)]
    pooled = [F.avg_pool2d(maps, [a // b for a, b in zip(maps.shape[2:], size, strict=True)]) for maps in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher), loss(*pooled))
    for ours, expected in zip(pool_to_smaller(student, teacher), pooled, strict=True):
        torch.testing.assert_close(ours, expected)


# ---- channel-wise distillation


@settings(deadline=None, max_examples=25)
@given(seeds, sides, sides, st.floats(0.5, 8))
def test_cwd_by_a_loop(seed, height, width, temperature):
    student, teacher = draw(2, 3, height, width, seed=seed)

    def divergence(s, t):
        p, q = (z.flatten().div(temperature).exp() / z.flatten().div(temperature).exp().sum() for z in (t, s))
        return temperature**2 * (p * (p / q).log()).sum()

    channels = [divergence(student[b, c], teacher[b, c]) for b in range(2) for c in range(3)]
    positions = [
        divergence(student[b, :, h, w], teacher[b, :, h, w]) for b in range(2) for h in range(height) for w in range(width)
    ]
    torch.testing.assert_close(cwd(student, teacher, temperature=temperature), torch.stack(channels).mean())
    torch.testing.assert_close(cwd(student, teacher, temperature=temperature, over="spatial"), torch.stack(positions).mean())


def test_cwd_does_not_see_a_constant_of_each_distribution():
    student, teacher = draw(2, 3, 4, 5)
    of_channels, of_positions = student.sum((2, 3), keepdim=True), student.sum(1, keepdim=True)
    torch.testing.assert_close(cwd(student + of_channels, teacher), cwd(student, teacher))
    torch.testing.assert_close(cwd(student + of_positions, teacher, over="spatial"), cwd(student, teacher, over="spatial"))


# ---- flow of the solution procedure


@settings(deadline=None, max_examples=25)
@given(seeds, sides, sides)
def test_fsp_by_a_loop(seed, height, width):
    student_first, teacher_first = draw(2, 3, height, width, seed=seed)
    student_last, teacher_last = draw(2, 4, height, width, seed=seed + 1)

    def flow(first, last, b, i, j):
        return sum(first[b, i, h, w] * last[b, j, h, w] for h in range(height) for w in range(width)) / (height * width)

    squares = [
        (flow(student_first, student_last, b, i, j) - flow(teacher_first, teacher_last, b, i, j)) ** 2
        for b in range(2)
        for i in range(3)
        for j in range(4)
    ]
    torch.testing.assert_close(fsp(student_first, student_last, teacher_first, teacher_last), torch.stack(squares).mean())


def test_fsp_averages_the_larger_layer_and_student_and_teacher_may_differ_in_size():
    (student_first, _), (student_last, _) = draw(2, 3, 8, 6), draw(2, 4, 4, 3, seed=1)
    (_, teacher_first), (_, teacher_last) = draw(2, 3, 5, 5), draw(2, 4, 5, 5, seed=1)
    pooled = fsp(F.avg_pool2d(student_first, 2), student_last, teacher_first, teacher_last)
    torch.testing.assert_close(fsp(student_first, student_last, teacher_first, teacher_last), pooled)
    turned = fsp(student_first.flip(2), student_last.flip(2), teacher_first.mT, teacher_last.mT)
    torch.testing.assert_close(turned, pooled)


# ---- hierarchical context loss


@pytest.mark.parametrize(("side", "levels"), [(1, []), (2, [1]), (3, [2, 1]), (4, [2, 1]), (5, [4, 2, 1])])
def test_hcl_weighs_each_resolution_below_the_height_by_half_of_the_last(side, levels):
    student, teacher = draw(2, 3, side, 8)
    error = [hint(student, teacher)] + [hint(*(F.adaptive_avg_pool2d(x, level) for x in (student, teacher))) for level in levels]
    weights = [0.5**level for level in range(len(error))]
    expected = sum(w * e for w, e in zip(weights, error, strict=True)) / sum(weights)
    torch.testing.assert_close(hcl(student, teacher), expected)


def test_hcl_of_a_constant_and_of_a_checkerboard():
    teacher, _ = draw(2, 3, 8, 8)
    assert hcl(teacher + 3, teacher).item() == pytest.approx(9)
    checkerboard = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))  # averages to nothing at every lower resolution
    assert hcl(teacher + checkerboard, teacher).item() == pytest.approx(1 / 1.875)


# ---- variational information distillation


def test_variational_is_the_gaussian_log_likelihood():
    mean, teacher = draw(2, 3, 4, 5)
    deviation = (F.softplus(LOG_SCALE) + 1e-5).sqrt()[:, None, None]
    expected = -torch.distributions.Normal(mean, deviation).log_prob(teacher).mean() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(variational(mean, teacher, LOG_SCALE), expected)


def test_the_best_variance_is_the_squared_error():
    mean, teacher = draw(2, 3, 4, 5)
    squared_error = (mean - teacher).square().mean((0, 2, 3))
    log_scale = (squared_error - 1e-5).expm1().log().requires_grad_()
    variational(mean, teacher, log_scale).backward()
    torch.testing.assert_close(log_scale.grad, torch.zeros_like(log_scale))


def test_variational_averages_a_larger_teacher():
    (mean, _), (_, teacher) = draw(2, 3, 4, 3), draw(2, 3, 8, 6)
    expected = variational(mean, F.avg_pool2d(teacher, 2), LOG_SCALE)
    torch.testing.assert_close(variational(mean, teacher, LOG_SCALE), expected)


# ---- overhaul of feature distillation


@settings(deadline=None, max_examples=25)
@given(seeds, sides, sides)
def test_ofd_by_a_loop(seed, height, width):
    student, teacher = draw(2, 3, height, width, seed=seed)
    total = torch.zeros((), dtype=torch.float64)
    for b, c, h, w in torch.cartesian_prod(*map(torch.arange, student.shape)).tolist():
        s, target = student[b, c, h, w], max(teacher[b, c, h, w], MARGIN[c])
        if target > 0 or s > target:
            total += (s - target) ** 2
    torch.testing.assert_close(ofd(student, teacher, MARGIN, reduction="sum"), total)
    torch.testing.assert_close(ofd(student, teacher, MARGIN), total / 2)


def test_a_student_far_below_negative_targets_is_right():
    student, teacher = draw(2, 3, 4, 5)
    student = (student - 100).requires_grad_()
    loss = ofd(student, -teacher.abs(), MARGIN)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@settings(deadline=None, max_examples=25)
@given(st.floats(-3, 3), st.floats(0.2, 3), st.sampled_from([-1, 1]))
def test_the_margin_is_the_mean_of_the_negative_part(beta, deviation, sign):
    x = torch.linspace(beta - 12 * deviation, 0, 200_001, dtype=torch.float64).clamp_max(0)
    density = torch.exp(-(((x - beta) / deviation) ** 2) / 2)
    expected = (x * density).sum() / density.sum()
    silent = 0.5 * math.erfc(beta / deviation / math.sqrt(2))
    if silent <= 0.001:
        expected = torch.tensor(-3 * deviation, dtype=torch.float64)
    gamma = torch.tensor([sign * deviation], dtype=torch.float64)
    margin = margin_from_batch_norm(gamma, torch.tensor([beta], dtype=torch.float64))
    torch.testing.assert_close(margin[0], expected, rtol=1e-3, atol=1e-3)
    assert margin < 0


def test_the_margin_of_known_channels():
    gamma = torch.nn.Parameter(torch.tensor([1.0, -2.0, 1.0, 0.0, 0.0, 0.0]))
    margin = margin_from_batch_norm(gamma, torch.tensor([0.0, 0.0, 10.0, -0.5, 0.0, 0.5]))
    half_normal = math.sqrt(2 / math.pi)
    torch.testing.assert_close(margin, torch.tensor([-half_normal, -2 * half_normal, -3.0, -0.5, 0.0, 0.0]))
    assert not margin.requires_grad


# ---- masked generative distillation


def test_masked_generation_is_the_squared_error_of_a_sample_and_linear_in_alpha():
    generated, teacher = draw(4, 3, 4, 5)
    expected = torch.stack([(g - t).square().sum() for g, t in zip(generated, teacher, strict=True)]).mean()
    torch.testing.assert_close(masked_generation(generated, teacher, alpha=1), expected)
    torch.testing.assert_close(masked_generation(generated, teacher, alpha=0.3), 0.3 * expected)
