"""Cross-entropy and the divergences from a teacher."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import cross_entropy, kd, kl_divergence

KINDS = ["forward", "reverse", "jeffreys", "jsd"]


def draw(*shape, seed=0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)


def kl_loop(p, q):
    """Sum of p log(p / q), where 0 log 0 is 0."""
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def divergence_loop(student, teacher, temperature, kind, beta):
    values = []
    for s, t in zip(student, teacher, strict=True):
        q, p = (s / temperature).softmax(0), (t / temperature).softmax(0)
        m = beta * p + (1 - beta) * q
        values.append({
            "forward": lambda p=p, q=q: kl_loop(p, q),
            "reverse": lambda p=p, q=q: kl_loop(q, p),
            "jeffreys": lambda p=p, q=q: kl_loop(p, q) + kl_loop(q, p),
            "jsd": lambda p=p, q=q, m=m: beta * kl_loop(p, m) + (1 - beta) * kl_loop(q, m),
        }[kind]())  # fmt: skip
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.floats(0.3, 20), st.floats(0.05, 0.95), st.booleans(), st.integers(0, 10_000))
def test_divergences_are_those_of_a_loop(kind, temperature, beta, padded, seed):
    student, teacher = draw(4, 7, seed=seed)
    if padded:
        student[:, 3] = teacher[:, 3] = -torch.inf
    arguments = {"temperature": temperature, "kind": kind, "beta": beta}
    ours = kl_divergence(student, teacher, scale_by_t2=False, reduction="none", **arguments)
    expected = divergence_loop(student, teacher, **arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    scaled = kl_divergence(student, teacher, **arguments)
    torch.testing.assert_close(scaled, temperature**2 * expected.mean(), rtol=1e-9, atol=1e-12)
    same = kl_divergence(teacher, teacher, **arguments)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    student, teacher = draw(3, 6)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s, teacher, temperature=2.0, kind=kind, beta=0.3), student)


def test_generalised_jsd_has_the_two_kls_as_limits():
    student, teacher = draw(5, 8, scale=1.0)
    forward, reverse = (kl_divergence(student, teacher, kind=kind) for kind in ("forward", "reverse"))
    assert torch.equal(kl_divergence(student, teacher, kind="jsd", beta=0), forward)
    assert torch.equal(kl_divergence(student, teacher, kind="jsd", beta=1), reverse)
    near = 1e-6
    torch.testing.assert_close(kl_divergence(student, teacher, kind="jsd", beta=near) / near, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(kl_divergence(student, teacher, kind="jsd", beta=1 - near) / near, reverse, rtol=1e-4, atol=0)


def test_jsd_is_bounded_by_log_2():
    student, teacher = torch.tensor([[80.0, -80.0]]), torch.tensor([[-80.0, 80.0]])
    torch.testing.assert_close(kl_divergence(student, teacher, kind="jsd"), torch.tensor(math.log(2)))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KINDS), st.integers(0, 10_000))
def test_a_constant_a_position_changes_nothing(kind, seed):
    student, teacher = draw(4, 7, seed=seed)
    shift = draw(4, 1, seed=seed + 1)
    shifted = kl_divergence(student + shift[0], teacher + shift[1], kind=kind)
    torch.testing.assert_close(shifted, kl_divergence(student, teacher, kind=kind))


def test_a_hot_temperature_matches_centred_logits():
    student, teacher = draw(5, 8)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd(student, teacher, temperature=1e5), student)
    difference = student - teacher
    expected = (difference - difference.mean(-1, keepdim=True)) / difference.numel()
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_vocabulary_gets_no_gradient_and_none_of_the_loss(kind):
    student, teacher = draw(4, 7, dtype=torch.float32)
    plain = kl_divergence(student[:, :5], teacher[:, :5], kind=kind)
    student[:, 5:] = teacher[:, 5:] = -torch.inf
    student.requires_grad_()
    loss = kl_divergence(student, teacher, kind=kind)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert torch.isfinite(student.grad).all()
    assert not student.grad[:, 5:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_student_gets_gradient_and_masked_positions_contribute_nothing(kind):
    student, teacher = draw(2, 3, 7)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = kl_divergence(student[mask], teacher[mask], kind=kind)
    student[~mask] = teacher[~mask] = torch.nan
    student.requires_grad_()
    teacher.requires_grad_()
    loss = kl_divergence(student, teacher, kind=kind, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert teacher.grad is None
    assert not student.grad[~mask].any()
    assert student.grad[mask].any()
    assert not kl_divergence(student.detach(), teacher, kind=kind, mask=mask).requires_grad
    by_position = kl_divergence(student, teacher, kind=kind, mask=mask, reduction="none")
    assert not by_position[~mask].any()
    torch.testing.assert_close(by_position.sum(), kl_divergence(student, teacher, kind=kind, mask=mask, reduction="sum"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_position_at_all_is_zero_on_the_graph(reduction):
    student, teacher = draw(4, 7)
    student.requires_grad_()
    nothing = torch.zeros(4, dtype=torch.bool)
    ignored = torch.full((4,), -100)
    for loss in (
        kl_divergence(student, teacher, mask=nothing, reduction=reduction),
        kl_divergence(student[:0], teacher[:0], reduction=reduction),
        cross_entropy(student, ignored, reduction=reduction),
        cross_entropy(student, torch.zeros(4, dtype=torch.long), mask=nothing, reduction=reduction),
        cross_entropy(student[:0], ignored[:0], reduction=reduction),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    student, teacher = draw(6, 40).to(dtype)
    labels = torch.arange(6)
    losses = (kd, lambda s, _: cross_entropy(s, labels))
    for loss in losses:
        expected = loss(student.float(), teacher.float())
        assert expected.dtype == torch.float32
        torch.testing.assert_close(loss(student, teacher), expected, rtol=0, atol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(loss(student, teacher), expected, rtol=0, atol=0)


def test_cross_entropy_ignores_minus_100_and_the_mask():
    logits = draw(2, 3, 7)[0]
    labels = torch.tensor([[1, -100, 6], [0, 2, -100]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    kept = torch.stack([logits[0, 0], logits[0, 2], logits[1, 1]])
    expected = F.cross_entropy(kept, torch.tensor([1, 6, 2]), reduction="none")
    torch.testing.assert_close(cross_entropy(logits, labels, mask=mask), expected.mean())
    torch.testing.assert_close(cross_entropy(logits, labels, mask=mask, reduction="sum"), expected.sum())
    by_position = cross_entropy(logits, labels, mask=mask, reduction="none")
    torch.testing.assert_close(by_position[[0, 0, 1], [0, 2, 1]], expected)
    assert by_position.count_nonzero() == 3


def test_smoothed_cross_entropy_of_uniform_logits_is_log_v():
    loss = cross_entropy(torch.zeros(3, 8), torch.arange(3), label_smoothing=0.2)
    torch.testing.assert_close(loss, torch.tensor(math.log(8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kind": "symmetric"}, "'symmetric'; expected one of 'forward'"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"mask": torch.ones(2, 10, dtype=torch.bool)}, r"mask \[2, 10\]"),
        ({"reduction": "batchmean"}, "'batchmean'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        kl_divergence(torch.zeros(2, 10), torch.zeros(2, 10), **arguments)


def test_shape_mismatch_names_both_shapes():
    with pytest.raises(ValueError, match=r"\[2, 10\].*\[2, 12\]"):
        kd(torch.zeros(2, 10), torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"labels \[3\].*\[2, 10\]"):
        cross_entropy(torch.zeros(2, 10), torch.zeros(3, dtype=torch.long))


def test_the_gradient_of_a_divergence_cannot_be_differentiated_again():
    student = torch.randn(3, 5, requires_grad=True)
    factor = torch.tensor(2.0, requires_grad=True)
    loss = kl_divergence(student, torch.randn(3, 5)) * factor
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
