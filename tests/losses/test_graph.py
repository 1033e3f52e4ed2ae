"""Graphs over tokens: exactly k edges a column, what the losses are blind to, and where their gradient goes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.contrastive import info_nce
from limbeck.losses.graph import inner_graph, knn_graph, local_graph, token_attention

SIGMAS = [0.7, "median", "mean"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(width, seed=0):
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


def slow_graph(tokens, k, sigma):
    """Entry by entry, as the formula reads."""
    count = len(tokens)
    squared = [[((a - b) ** 2).sum().item() for b in tokens] for a in tokens]
    off = torch.tensor([squared[i][j] for i in range(count) for j in range(count) if i != j], dtype=torch.float64)
    bandwidth = {"median": off.median(), "mean": off.mean()}.get(sigma, sigma)
    graph = torch.zeros(count, count, dtype=torch.float64)
    for j in range(count):
        others = sorted((i for i in range(count) if i != j), key=lambda i: squared[i][j])
        for i in others[:k]:
            graph[i, j] = math.exp(-squared[i][j] / (2 * bandwidth))
    return graph


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("k", [1, 3, 6, 50])
def test_the_graph_is_that_of_a_loop(k, sigma):
    tokens = draw(7, 4) + 100  # far from the origin
    graph = knn_graph(tokens, k=k, sigma=sigma)
    torch.testing.assert_close(graph, slow_graph(tokens, k, sigma), rtol=1e-9, atol=1e-12)
    assert ((graph > 0).sum(0) == min(k, 6)).all()
    assert graph.max() <= 1
    assert not graph.diagonal().any()


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 14), st.floats(0.1, 10), st.integers(0, 100))
def test_what_the_local_loss_is_blind_to(count, width, k, scale, seed):
    student, teacher = draw(count, width, seed=seed), draw(count, width + 2, seed=seed + 1)
    turned = scale * student @ orthogonal(width, seed) + draw(width, seed=seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    value = local_graph(student, teacher, k=k)
    torch.testing.assert_close(local_graph(turned, teacher, k=k), value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(local_graph(student[order], teacher[order], k=k), value, rtol=1e-6, atol=1e-9)
    assert value >= 0
    assert local_graph(student, student, k=k).abs() < 1e-12


def test_a_given_bandwidth_sees_the_scale():
    student, teacher = draw(9, 4), draw(9, 4, seed=1)
    turned = student @ orthogonal(4)
    torch.testing.assert_close(local_graph(turned, teacher, sigma=2.0), local_graph(student, teacher, sigma=2.0))
    assert (local_graph(2 * student, teacher, sigma=2.0) - local_graph(student, teacher, sigma=2.0)).abs() > 1e-4


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_the_local_loss_is_a_kl_between_rows(kind):
    student, teacher = draw(6, 3), draw(6, 5, seed=1)
    q = (slow_graph(student, 2, 1.5) / 0.1).softmax(1)
    p = (slow_graph(teacher, 2, 1.5) / 0.1).softmax(1)
    first, second = (q, p) if kind == "reverse" else (p, q)
    expected = (first * (first / second).log()).sum(1)
    each = local_graph(student, teacher, k=2, sigma=1.5, temperature=0.1, kind=kind, reduction="none")
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(local_graph(student, teacher, k=2, sigma=1.5, temperature=0.1, kind=kind), expected.mean())


def test_attention_within_a_picture_is_that_of_a_loop():
    tokens = draw(2, 5, 3)
    attention = token_attention(tokens)
    for picture, matrix in zip(tokens, attention, strict=True):
        expected = torch.stack([F.softmax(torch.stack([a @ b for b in picture]) / 3**0.5, 0) for a in picture])
        torch.testing.assert_close(matrix, expected)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_what_the_inner_loss_sees():
    student, teacher = draw(3, 6, 4), draw(3, 6, 7, seed=1)
    value = inner_graph(student, teacher)
    torch.testing.assert_close(value, F.mse_loss(token_attention(student), token_attention(teacher)))
    torch.testing.assert_close(inner_graph(student @ orthogonal(4), teacher), value)
    assert (inner_graph(2 * student, teacher) - value).abs() > 1e-3
    assert inner_graph(student, student) == 0
    assert inner_graph(student[:, :1], teacher[:, :1]) == 0  # one patch looks at itself


def test_the_global_loss_tells_tokens_apart():
    """`info_nce` as TRG uses it: least, and above 0, at equality; blind to each token's scale; not to which token is which."""
    tokens = draw(8, 5)
    least = info_nce(tokens, tokens, temperature=0.1)
    assert 0 < least < info_nce(draw(8, 5, seed=1), tokens, temperature=0.1)
    torch.testing.assert_close(info_nce(tokens * draw(8, 1).abs(), tokens, temperature=0.1), least)
    assert info_nce(tokens.flip(0), tokens, temperature=0.1) > least + 0.1
    torch.testing.assert_close(info_nce(tokens.flip(0), tokens.flip(0), temperature=0.1), least)
    assert info_nce(tokens[:1], tokens[1:2], temperature=0.1) == 0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_gradient_is_that_of_the_value_and_reaches_the_student_alone(sigma):
    student, teacher = draw(6, 3).requires_grad_(), draw(6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda tokens: local_graph(tokens, teacher.detach(), k=2, sigma=sigma), student)
    batch, taught = draw(2, 4, 3).requires_grad_(), draw(2, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda tokens: inner_graph(tokens, taught.detach()), batch)
    (local_graph(student, teacher, sigma=sigma) + inner_graph(batch, taught)).backward()
    assert student.grad.any() and batch.grad.any()
    assert teacher.grad is None and taught.grad is None


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_no_tokens_one_token_and_equal_tokens_are_finite(count, sigma):
    for student in (torch.zeros(count, 3), torch.randn(count, 3).relu(), torch.full((count, 3), 1e4)):
        student = student.requires_grad_()
        value = local_graph(student, torch.randn(count, 4), sigma=sigma)
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()
        assert value == 0 or count > 1
    assert inner_graph(torch.zeros(0, 4, 3), torch.zeros(0, 4, 5)) == 0


def test_one_flat_background_keeps_a_bandwidth():
    """Where most patches are equal, the median distance is 0 and would leave no edge to the others."""
    tokens = torch.zeros(12, 3, dtype=torch.float64)
    tokens[:3] = draw(3, 3)
    graph = knn_graph(tokens, k=11)
    assert (graph[:3, 3:] > 0).all()


def test_half_precision_computes_in_float32():
    student, teacher = draw(8, 4).bfloat16(), draw(8, 5, seed=1).bfloat16()
    expected = local_graph(student.float(), teacher.float(), k=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(local_graph(student, teacher, k=3), expected, rtol=0, atol=0)
        torch.testing.assert_close(token_attention(student[None]), token_attention(student[None].float()), rtol=0, atol=0)


def test_refusals():
    tokens = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"\[2, 4, 3\].*\[N, D\]"):
        knn_graph(tokens.expand(2, 4, 3), k=2)
    with pytest.raises(ValueError, match="k is 0"):
        knn_graph(tokens, k=0)
    with pytest.raises(ValueError, match="sigma is 0"):
        knn_graph(tokens, k=1, sigma=0.0)
    with pytest.raises(ValueError, match="'mode'"):
        knn_graph(tokens, k=1, sigma="mode")
    with pytest.raises(ValueError, match=r"\[4, 3\].*\[5, 3\]"):
        local_graph(tokens, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one grid"):
        inner_graph(torch.zeros(2, 4, 3), torch.zeros(2, 9, 3))
