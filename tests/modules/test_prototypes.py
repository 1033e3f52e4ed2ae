"""Facts about prototypes: what they aggregate, what tokens read of them, and what is blind to order and scale."""

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import BadInput
from limbeck.modules.prototypes import VLAD, PrototypeAttention, PrototypeLearning, joined, residuals, usage

B, N, C, K = 2, 6, 5, 4


def modules(bias: bool = False) -> tuple[PrototypeLearning, PrototypeAttention]:
    torch.manual_seed(0)
    return PrototypeLearning([3, 4], C, K, bias=bias), PrototypeAttention(C, K, bias=bias)


def test_residuals_are_the_slow_sum():
    tokens, prototypes, a = torch.randn(B, N, C), torch.randn(K, C), torch.randn(B, N, K).softmax(-1)
    slow = torch.zeros(B, K, C)
    for b in range(B):
        for n in range(N):
            for k in range(K):
                slow[b, k] += a[b, n, k] * (tokens[b, n] - prototypes[k])
    torch.testing.assert_close(residuals(tokens, a, prototypes), slow)


@pytest.mark.parametrize("bias", [False, True])
def test_the_vector_is_normalised_by_prototype_and_as_a_whole(bias):
    torch.manual_seed(0)
    vlad, prototypes, tokens = VLAD(C, K, bias=bias), torch.rand(K, C), torch.rand(B, N, C)
    vector, assignment = vlad(tokens, prototypes)
    torch.testing.assert_close(vector.norm(dim=-1), torch.ones(B))
    torch.testing.assert_close(vector.view(B, K, C).norm(dim=-1), torch.full((B, K), 1 / math.sqrt(K)))
    torch.testing.assert_close(assignment.sum(-1), torch.ones(B, N))
    assert (assignment.sum(1) - 1).abs().max() > 0.1  # over prototypes, not over tokens
    left = residuals(F.normalize(tokens, dim=-1), assignment, prototypes)
    torch.testing.assert_close(F.normalize(left, dim=-1).flatten(1) / math.sqrt(K), vector)


def test_tokens_count_by_direction():
    vlad, prototypes, tokens = VLAD(C, K), torch.rand(K, C), torch.rand(B, N, C)
    scaled = tokens * torch.rand(B, N, 1).mul(9).add(0.1)
    for one, other in zip(vlad(tokens, prototypes), vlad(scaled, prototypes), strict=True):
        torch.testing.assert_close(one, other)


def test_order_moves_with_the_tokens_and_changes_no_vector():
    learning, attention = modules()
    tokens, order = torch.randn(B, N, 7), torch.randperm(N)
    merged = learning.merged(tokens)
    torch.testing.assert_close(
        learning.vlad(merged[:, order], attention.prototypes).vector, learning.vlad(merged, attention.prototypes).vector
    )
    out = learning(tokens, attention.prototypes)
    torch.testing.assert_close(learning(tokens[:, order], attention.prototypes), out[:, order])
    torch.testing.assert_close(attention(out[:, order]), attention(out)[:, order])


def test_what_is_learned_is_the_papers_chain():
    learning, attention = modules()
    tokens, prototypes = torch.randn(B, N, 7), attention.prototypes
    x = (tokens @ learning.merge.weight.T + learning.merge.bias).clamp_min(0)
    v = learning.compress(learning.vlad(x, prototypes).vector)
    first, second = learning.transform[0].weight, learning.transform[2].weight
    for b in range(B):
        for n in range(N):
            y = (second @ (first @ torch.cat([x[b, n], v[b]])).clamp_min(0)).clamp_min(0)
            torch.testing.assert_close(learning(tokens, prototypes)[b, n], y)


def test_what_is_augmented_is_the_papers_chain():
    _, attention = modules()
    z, e, p = torch.randn(B, N, C), attention.encode.weight, attention.prototypes
    first, second = attention.augment[0].weight, attention.augment[2].weight
    out = attention(z)
    assert out.min() >= 0
    for b in range(B):
        for n in range(N):
            q = e @ z[b, n]
            s = torch.stack([(e @ p[k]) @ q for k in range(K)]).softmax(0)
            r = sum(s[k] * (e @ p[k]) for k in range(K))
            slow = ((second @ (first @ torch.cat([q, r])).clamp_min(0)).clamp_min(0) + z[b, n]).clamp_min(0)
            torch.testing.assert_close(out[b, n], slow)


def test_a_single_prototype_is_read_by_every_token():
    attention = PrototypeAttention(C, 1)
    queries, scores = attention.attend(torch.randn(B, N, C))
    assert torch.equal(scores, torch.ones(B, N, 1))
    read = scores @ attention.encode(attention.prototypes)
    torch.testing.assert_close(read, attention.encode(attention.prototypes).expand(B, N, C))
    assert queries.shape == (B, N, C)


def test_prototypes_get_gradient_from_aggregation_and_from_attention_alone():
    learning, attention = modules()
    tokens = torch.randn(B, N, 7, requires_grad=True)
    learning(tokens.detach(), attention.prototypes).sum().backward()
    assert attention.prototypes.grad.abs().max() > 0
    assert tokens.grad is None
    attention.prototypes.grad = None
    attention(torch.randn(B, 3, C)).sum().backward()  # another number of tokens, and no teacher
    assert attention.prototypes.grad.abs().max() > 0


def test_blocks_are_joined_on_the_least_grid_with_the_class_token_first():
    vit, small, large = torch.randn(B, 5, 3), torch.randn(B, 2, 2, 2), torch.randn(B, 1, 4, 4)
    out = joined([vit, small, large])
    assert out.shape == (B, 1 + 4, 3 + 2 + 1)
    torch.testing.assert_close(out[:, 0], torch.cat([vit[:, 0], small.mean((2, 3)), large.mean((2, 3))], -1))
    torch.testing.assert_close(out[:, 1:, :3], vit[:, 1:])
    torch.testing.assert_close(out[:, 2, 3:5], small[:, :, 0, 1])
    torch.testing.assert_close(out[:, 4, 5], large[:, 0, 2:, 2:].mean((1, 2)))
    assert torch.equal(joined([vit, vit]), torch.cat([vit, vit], -1))
    patches = torch.randn(B, 4, 3)
    torch.testing.assert_close(joined([patches])[:, 0], patches.mean(1))
    registers = torch.randn(B, 3, 3)  # neither a square, nor a square and one more: the first is taken as it stands
    assert torch.equal(joined([registers]), registers)


def test_usage_is_one_where_all_are_used_alike_and_zero_where_one_is():
    assert usage(torch.full((B, N, K), 1 / K)) == pytest.approx(1)
    assert usage(F.one_hot(torch.zeros(B, N, dtype=torch.int64), K)) == pytest.approx(0)
    assert usage(F.one_hot(torch.arange(B * K).view(B, K) % K, K)) == pytest.approx(1)
    assert usage(torch.ones(B, N, 1)) == 1


def test_bad_input():
    learning, attention = modules()
    with pytest.raises(BadInput, match=rf"expected \[B, N, {C}\]"):
        attention(torch.zeros(B, N, C + 1))
    with pytest.raises(BadInput, match=r"tokens are \[2, 6, 8\]; expected \[B, N, 7\]"):
        learning(torch.zeros(B, N, 8), attention.prototypes)
    with pytest.raises(BadInput, match="have no grid"):
        joined([torch.zeros(B, 7, C), torch.zeros(B, C, 2, 2)])
