"""Pixels of removed patches and normalised tokens, against the obvious loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.masked import masked_pixels, standard_patches, token_distance


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[True, False, True, True], [False, False, True, False]])


@pytest.mark.parametrize("normalise", [False, True])
def test_pixels_against_a_loop(normalise):
    prediction, pixels = draw(2, 4, 6), draw(2, 4, 6, seed=1)
    errors = []
    for n in range(2):
        for patch in range(4):
            target = pixels[n, patch]
            if normalise:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            if MASK[n, patch]:
                errors.append(sum((p - t) ** 2 for p, t in zip(prediction[n, patch].tolist(), target.tolist(), strict=True)) / 6)
    assert masked_pixels(prediction, pixels, MASK, normalise=normalise).item() == pytest.approx(sum(errors) / len(errors))
    assert masked_pixels(prediction, pixels, MASK, normalise=normalise, reduction="sum").item() == pytest.approx(sum(errors))
    each = masked_pixels(prediction, pixels, MASK, normalise=normalise, reduction="none")
    assert each[MASK].tolist() == pytest.approx(errors) and each[~MASK].abs().max() == 0


def test_visible_patches_do_not_count():
    prediction, pixels = draw(2, 4, 6).requires_grad_(), draw(2, 4, 6, seed=1)
    loss = masked_pixels(prediction, pixels, MASK)
    (gradient,) = torch.autograd.grad(loss, [prediction])
    assert gradient[~MASK].abs().max() == 0 and (gradient[MASK] != 0).all()
    changed = prediction.detach() + 100 * (~MASK)[..., None]
    assert masked_pixels(changed, pixels, MASK).item() == loss.item()
    broken = prediction.detach().masked_fill(~MASK[..., None], math.nan).requires_grad_()
    masked_pixels(broken, pixels, MASK).backward()
    torch.testing.assert_close(broken.grad, gradient)


def test_over_no_patch_the_pixel_loss_is_zero():
    prediction = draw(2, 4, 6).requires_grad_()
    loss = masked_pixels(prediction, draw(2, 4, 6, seed=1), torch.zeros(2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and prediction.grad.abs().max() == 0


def test_standard_patches():
    assert standard_patches(torch.full((1, 3, 8), 0.7)).abs().max() < 1e-4
    assert standard_patches(torch.rand(2, 3, 1)).abs().max() == 0
    done = standard_patches(draw(5, 16) * 3 + 2)
    torch.testing.assert_close(done.mean(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(done.var(-1), torch.ones(5, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("normalise", [False, True])
def test_tokens_against_a_loop(distance, normalise):
    student, teacher = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    values = []
    for a, b in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        if normalise:
            a, b = a / math.sqrt(sum(x * x for x in a.tolist())), b / math.sqrt(sum(x * x for x in b.tolist()))
        values += [abs(x - y) if distance == "l1" else (x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    found = token_distance(student, teacher, distance=distance, normalise=normalise)
    assert found.item() == pytest.approx(sum(values) / len(values))
    each = token_distance(student, teacher, distance=distance, normalise=normalise, reduction="none")
    assert each.flatten().tolist() == pytest.approx([sum(values[i : i + 5]) / 5 for i in range(0, 30, 5)])
    mask = torch.tensor([[True, False, False], [False, True, True]])
    some = token_distance(student, teacher, distance=distance, normalise=normalise, mask=mask)
    assert some.item() == pytest.approx(each[mask].mean().item())
    assert token_distance(student, teacher, distance=distance, mask=torch.zeros_like(mask)).item() == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_normalised_tokens_have_no_scale_and_a_bound(width, scale, other, seed):
    student, teacher = draw(3, 4, width, seed=seed), draw(3, 4, width, seed=seed + 1)
    scales = torch.linspace(1, 2, 4, dtype=torch.float64)[:, None]
    loss = token_distance(student, teacher)
    torch.testing.assert_close(token_distance(student * scale * scales, teacher * other), loss)
    assert 0 <= loss.item() <= 2 / math.sqrt(width) + 1e-12
    assert token_distance(student, student * scale).item() == pytest.approx(0, abs=1e-12)
    if width == 1:
        return
    assert token_distance(student * scale, student, normalise=False).item() == pytest.approx(
        abs(scale - 1) * student.abs().mean().item()
    )


def test_opposite_tokens_of_equal_entries_reach_the_bound():
    student = torch.ones(2, 9)
    assert token_distance(student, -student).item() == pytest.approx(2 / 3)


def test_the_teacher_and_the_pixels_get_no_gradient():
    student, teacher = draw(2, 4, 6).requires_grad_(), draw(2, 4, 6, seed=1).requires_grad_()
    (token_distance(student, teacher) + masked_pixels(student, teacher, MASK, normalise=True)).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


def test_half_precision_is_computed_in_float32():
    student, teacher = draw(2, 4, 64).bfloat16().requires_grad_(), draw(2, 4, 64, seed=1).bfloat16()
    for loss in (token_distance, lambda a, b: masked_pixels(a, b, MASK, normalise=True)):
        value = loss(student, teacher)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        zero = torch.zeros(1, 3, 8, dtype=dtype, requires_grad=True)
        token_distance(zero, torch.ones_like(zero).detach()).backward()
        assert not zero.grad.any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 4, 6\] and teacher \[2, 4, 5\]"):
        masked_pixels(draw(2, 4, 6), draw(2, 4, 5), MASK)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        masked_pixels(draw(2, 4, 6), draw(2, 4, 6), MASK.float())
    with pytest.raises(ValueError, match=r"mask \[2, 3\]"):
        masked_pixels(draw(2, 4, 6), draw(2, 4, 6), MASK[:, :3])
    with pytest.raises(ValueError, match="'l1', 'l2'"):
        token_distance(draw(2, 3), draw(2, 3), distance="cosine")
