"""Losses on the relations between samples."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import relations
from limbeck.losses.relations import cc, pkt, rkd, rkd_angle, rkd_distance, sp

product = partial(cc, kernel="product")
LOSSES = [rkd, rkd_distance, rkd_angle, sp, pkt, cc, product]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=0):
    return torch.linalg.qr(draw(width, width, seed=seed + 100)).Q


def smooth_l1(a, b):
    gap = abs(a - b)
    return gap**2 / 2 if gap < 1 else gap - 0.5


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0


def distances(x):
    rows = [[float((a - b).norm()) for b in x] for a in x]
    mean = sum(map(sum, rows)) / (len(x) * (len(x) - 1))
    return [[d / mean for d in row] for row in rows]


def angles(x):
    return [[[cosine(a - i, b - i) for a in x] for b in x] for i in x]


def similarities(x):
    rows = [torch.stack([a @ b for b in x]) for a in x]
    return [[float(s) for s in row / row.norm()] for row in rows]


def conditional(x):
    kernel = [[0.0 if i == j else (1 + cosine(a, b)) / 2 for j, b in enumerate(x)] for i, a in enumerate(x)]
    return [[k / sum(row) for k in row] for row in kernel]


def taylor(x, gamma=0.4, order=2):
    def kernel(a, b):
        return math.exp(-2 * gamma) * sum((2 * gamma * cosine(a, b)) ** p / math.factorial(p) for p in range(order + 1))

    return [[kernel(a, b) for b in x] for a in x]


def flat(nested):
    return [value for item in nested for value in flat(item)] if isinstance(nested, list) else [nested]


def averaged(relation, gap):
    """The loss that averages ``gap`` over the values of ``relation`` on both sides."""

    def loss(student, teacher):
        pairs = list(zip(flat(relation(student)), flat(relation(teacher)), strict=True))
        return sum(gap(s, t) for s, t in pairs) / len(pairs)

    return loss


def square(a, b):
    return (a - b) ** 2


def pkt_loop(student, teacher):
    pairs = zip(flat(conditional(student)), flat(conditional(teacher)), strict=True)
    return sum(p * math.log((p + 1e-7) / (q + 1e-7)) for q, p in pairs) / len(student)


def rkd_loop(student, teacher):
    distance, angle = averaged(distances, smooth_l1), averaged(angles, smooth_l1)
    return 25 * distance(student, teacher) + 50 * angle(student, teacher)


LOOPS = [
    (rkd_distance, averaged(distances, smooth_l1)),
    (rkd_angle, averaged(angles, smooth_l1)),
    (rkd, rkd_loop),
    (sp, averaged(similarities, square)),
    (pkt, pkt_loop),
    (cc, averaged(taylor, square)),
    (partial(cc, gamma=1.5, order=4), averaged(partial(taylor, gamma=1.5, order=4), square)),
    (product, averaged(lambda x: [[cosine(a, b) for b in x] for a in x], square)),
]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(LOOPS), st.integers(2, 5), st.integers(2, 6), st.integers(2, 6), st.integers(0, 10_000))
def test_values_are_those_of_a_loop(losses, samples, student_width, teacher_width, seed):
    loss, loop = losses
    student, teacher = draw(samples, student_width, seed=seed), draw(samples, teacher_width, seed=seed + 1)
    torch.testing.assert_close(loss(student, teacher), student.new_tensor(loop(student, teacher)), rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(LOSSES), st.floats(0.01, 100), st.integers(0, 1000))
def test_rotations_and_scales_change_nothing(loss, scale, seed):
    student, teacher = draw(5, 4, seed=seed), draw(5, 6, seed=seed + 1)
    expected = loss(student, teacher)
    assert expected > 1e-4
    torch.testing.assert_close(loss(scale * student @ rotation(4, seed), teacher @ rotation(6, seed) / scale), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_rkd_is_blind_to_a_translation(loss):
    student, teacher = draw(5, 4), draw(5, 6, seed=1)
    moved = torch.isclose(loss(student + draw(4, seed=2), teacher), loss(student, teacher))
    assert moved.item() is (loss in (rkd, rkd_distance, rkd_angle))


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_relations_are_at_a_minimum_of_zero(loss):
    features = draw(6, 5)
    student = (3 * features @ rotation(5)).requires_grad_()
    value = loss(student, features)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("loss", LOSSES)
def test_maps_are_flattened_and_widths_may_differ(loss):
    student, teacher = draw(4, 3, 2, 2), draw(4, 5, 3, 3, seed=1)
    torch.testing.assert_close(loss(student, teacher), loss(student.reshape(4, 12), teacher.reshape(4, 45)))


@pytest.mark.parametrize("loss", [*LOSSES, partial(rkd_distance, squared=True)])
def test_gradcheck(loss):
    student, teacher = draw(4, 3).requires_grad_(), draw(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_and_autocast_compute_in_float32(loss):
    student, teacher = draw(6, 8).bfloat16().requires_grad_(), draw(6, 5, seed=1).bfloat16()
    expected = loss(student.float(), teacher.float())
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_and_zero_samples_have_moderate_gradients(loss, dtype):
    """Dead features are common at the start of a training: normalising them must not blow up its first step."""
    student, teacher = draw(6, 8).to(dtype), draw(6, 5, seed=1).to(dtype)
    student[0] = student[1] = 0
    student[2] = student[3]
    teacher[3] = teacher[4]
    for rows in (student, torch.zeros_like(student), torch.ones_like(student)):
        rows.requires_grad_()
        value = loss(rows, teacher)
        (gradient,) = torch.autograd.grad(value, rows)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e3


@pytest.mark.parametrize("loss", LOSSES)
def test_one_sample_has_no_relations_and_none_is_zero_on_the_graph(loss):
    student, teacher = draw(4, 3).requires_grad_(), draw(4, 5, seed=1)
    for count in (0, 1):
        value = loss(student[:count], teacher[:count])
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == pytest.approx(0, abs=1e-15)
        assert gradient.abs().max() < 1e-12


def test_distances_of_equal_samples_are_exact_in_float32():
    """By way of products, two equal samples far from the origin would seem apart."""
    student = (draw(4, 3) + 1000).float()
    student[1] = student[0]
    student.requires_grad_()
    loss = rkd_distance(student, draw(4, 3, seed=1).float())
    expected = rkd_distance(student.detach().double(), draw(4, 3, seed=1).float())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1e12])
@pytest.mark.parametrize("loss", [sp, pkt, cc, product])
def test_the_scale_of_features_neither_under_nor_overflows(loss, scale):
    student, teacher = draw(4, 3).float(), draw(4, 5, seed=1).float()
    torch.testing.assert_close(loss(scale * student, teacher / scale), loss(student, teacher))


def test_squared_distances_are_compared_relative_to_their_mean():
    student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [2.0], [3.0]])
    # squared: 1, 9, 4 over 14 / 3, and 4, 9, 1 over 14 / 3
    expected = 2 * 2 * smooth_l1(3 / 14, 12 / 14) / 9
    assert rkd_distance(student, teacher, squared=True).item() == pytest.approx(expected)
    assert rkd(student, teacher, squared=True, angle_weight=0).item() == pytest.approx(25 * expected)


def test_a_right_angle_and_a_straight_one():
    right, straight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [1.0], [-1.0]])
    half = math.sqrt(0.5)
    # at the corner 0 against -1, at both ends 1 / sqrt 2 against 1, each for two orders of the other samples
    expected = 2 * (smooth_l1(0, -1) + 2 * smooth_l1(half, 1)) / 27
    assert rkd_angle(right, straight).item() == pytest.approx(expected)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_angles_in_parts_are_the_same_angles(monkeypatch, at_once):
    student, teacher = draw(7, 3).requires_grad_(), draw(7, 4, seed=1)
    whole = rkd_angle(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    parts = []

    cosines_at = relations._cosines_at

    def spy(x, anchors):
        parts.append(len(x[anchors]))
        return cosines_at(x, anchors)

    monkeypatch.setattr(relations, "COSINES", at_once * 49)
    monkeypatch.setattr(relations, "_cosines_at", spy)
    value = rkd_angle(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(gradient, expected)
    assert max(parts) == at_once


def test_the_expansion_tends_to_the_gaussian():
    student, teacher = F.normalize(draw(5, 3)), F.normalize(draw(5, 6, seed=1))
    gaussians = [torch.exp(-0.4 * torch.cdist(x, x).square()) for x in (student, teacher)]
    torch.testing.assert_close(cc(student, teacher, order=20), (gaussians[0] - gaussians[1]).square().mean())
    first = math.exp(-0.8) * 0.8  # of order 1 nothing is left but the product
    torch.testing.assert_close(cc(student, teacher, order=1), first**2 * product(student, teacher))


def test_pkt_of_opposite_and_orthogonal_peers():
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    student = torch.eye(3)
    # the first two are certain of each other, the third, opposite to both, has no kernel left; the student halves all odds
    assert pkt(student, teacher).item() == pytest.approx(2 * math.log(2) / 3, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_sides_must_hold_the_same_samples(loss):
    with pytest.raises(ValueError, match=r"student \[2, 5\] and teacher \[3, 5\]; expected \[B, \.\.\.\]"):
        loss(torch.zeros(2, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"student \[5\] and teacher \[5, 3\]"):
        loss(torch.zeros(5), torch.zeros(5, 3))


def test_refusals():
    with pytest.raises(ValueError, match="'linear'; expected one of 'gaussian', 'product'"):
        cc(torch.zeros(2, 5), torch.zeros(2, 5), kernel="linear")
    with pytest.raises(ValueError, match="order is 0"):
        cc(torch.zeros(2, 5), torch.zeros(2, 5), order=0)
