"""Losses on features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import cosine, hint

SHAPES = [(4, 6), (3, 5, 6), (2, 6, 3, 4)]


def draw(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels(tensor):
    """[positions, channels], whatever the layout."""
    return tensor.movedim(1, -1).flatten(0, -2) if tensor.dim() == 4 else tensor.flatten(0, -2)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_a_loop_over_positions(shape):
    student, teacher = draw(*shape)
    rows = list(zip(channels(student), channels(teacher), strict=True))
    squared = torch.stack([((s - t) ** 2).mean() for s, t in rows])
    angles = torch.stack([1 - (s @ t) / (s.norm() * t.norm()) for s, t in rows])
    torch.testing.assert_close(hint(student, teacher), squared.mean())
    torch.testing.assert_close(hint(student, teacher, reduction="none").flatten(), squared)
    torch.testing.assert_close(cosine(student, teacher), angles.mean())
    torch.testing.assert_close(cosine(student, teacher, reduction="sum"), angles.sum())


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SHAPES), st.floats(0.01, 100), st.integers(0, 1000))
def test_cosine_is_blind_to_scale_and_hint_is_quadratic_in_it(shape, scale, seed):
    student, teacher = draw(*shape, seed=seed)
    torch.testing.assert_close(cosine(scale * student, teacher), cosine(student, teacher))
    torch.testing.assert_close(hint(scale * student, scale * teacher), scale**2 * hint(student, teacher))


def test_extremes():
    (features, _) = draw(3, 5)
    assert hint(features, features).item() == 0
    assert cosine(features, features).item() == pytest.approx(0)
    assert cosine(features, -features).item() == pytest.approx(2)


@pytest.mark.parametrize("loss", [hint, cosine])
def test_gradients_reach_the_student_alone_and_not_masked_positions(loss):
    student, teacher = draw(2, 6, 3, 4)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = loss(student.movedim(1, -1)[mask], teacher.movedim(1, -1)[mask])
    student.movedim(1, -1)[~mask] = torch.nan
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher, mask=mask)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert teacher.grad is None
    gradient = student.grad.movedim(1, -1)
    assert not gradient[~mask].any()
    assert gradient[mask].all()


@pytest.mark.parametrize("loss", [hint, cosine])
def test_a_zero_vector_and_no_position_at_all_are_finite(loss):
    student, teacher = draw(4, 6)
    student[0] = 0
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher[1:]), student[1:].detach().requires_grad_())
    nothing = torch.zeros(4, dtype=torch.bool)
    for value in (loss(student, teacher), loss(student, teacher, mask=nothing), loss(student[:0], teacher[:0])):
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
    assert value.item() == 0


@pytest.mark.parametrize("loss", [hint, cosine])
def test_half_precision_and_autocast_compute_in_float32(loss):
    student, teacher = draw(4, 6).bfloat16()
    expected = loss(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_zero_vector_is_at_right_angles_to_all_and_gets_no_gradient(dtype):
    student, teacher = draw(3, 6).to(dtype)
    student[0] = 0
    student.requires_grad_()
    values = cosine(student, teacher, reduction="none")
    values.sum().backward()
    assert values[0] == 1
    assert not student.grad[0].any()
    assert student.grad.isfinite().all() and student.grad[1:].all()


def test_channel_dim_may_be_given():
    student, teacher = draw(2, 6, 5)
    torch.testing.assert_close(cosine(student, teacher, channel_dim=1), cosine(student.transpose(1, 2), teacher.transpose(1, 2)))


@pytest.mark.parametrize("loss", [hint, cosine])
def test_refusals(loss):
    with pytest.raises(ValueError, match=r"\[2, 5\].*\[2, 6\]"):
        loss(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"mask \[2, 5\]"):
        loss(torch.zeros(2, 5, 4, 4), torch.zeros(2, 5, 4, 4), mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="'max'"):
        loss(torch.zeros(2, 5), torch.zeros(2, 5), reduction="max")
