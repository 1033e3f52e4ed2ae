"""Facts about the losses between crops: closed forms, bounds, what gets gradient, and what may be permuted."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.self_distillation import (
    best_match,
    centred,
    crop_pairs,
    importance,
    inter_level_loss,
    log_bag,
    region_loss,
    self_cross_entropy,
    teacher_temperature,
)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(-1)


def test_the_teacher_is_centred_then_sharpened():
    logits, center = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([1.0, 1.0, 2.0])
    shifted = [math.exp(value / 0.5) for value in (0, 1, 2)]
    torch.testing.assert_close(centred(logits, center, 0.5)[0], torch.tensor([value / sum(shifted) for value in shifted]))
    torch.testing.assert_close(centred(logits + 7, center, 0.5), centred(logits, center, 0.5))
    assert not centred(logits.requires_grad_(), center.requires_grad_(), 0.5).requires_grad


def test_the_view_loss_is_the_slow_sum():
    z, a = torch.randn(3, 5), torch.randn(3, 5).softmax(-1)
    q = (z / 0.1).softmax(-1)
    slow = [-sum(a[i, k] * math.log(q[i, k]) for k in range(5)) for i in range(3)]
    each = self_cross_entropy(z, a, reduction="none")
    torch.testing.assert_close(each, torch.tensor(slow))
    torch.testing.assert_close(self_cross_entropy(z, a), each.mean())
    assert self_cross_entropy(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5)) == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.02, 2))
def test_crops_and_regions_cost_at_least_the_teachers_entropy(seed, temperature):
    draw = torch.Generator().manual_seed(seed)
    a, r = torch.randn(2, 7, generator=draw).softmax(-1), torch.randn(2, 4, 7, generator=draw).softmax(-1)
    z, regions = torch.randn(2, 7, generator=draw), torch.randn(2, 3, 7, generator=draw)
    match = torch.randint(4, (2, 3), generator=draw)
    chosen = torch.stack([r[i, match[i]] for i in range(2)])
    assert self_cross_entropy(z, a, temperature=temperature) >= entropy(a).mean() - 1e-5
    assert region_loss(regions, r, match, temperature=temperature) >= entropy(chosen).mean() - 1e-5
    equal = region_loss(chosen.log() * temperature, r, match, temperature=temperature)
    torch.testing.assert_close(equal, entropy(chosen).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        self_cross_entropy(a.log() * temperature, a, temperature=temperature), entropy(a).mean(), rtol=1e-4, atol=1e-5
    )


def test_regions_match_by_cosine_whatever_their_length():
    teacher = torch.eye(3)[None] * torch.tensor([100.0, 1.0, 0.01])[:, None]
    student = torch.tensor([[[0.1, 0.0, 5.0], [3.0, 0.2, 0.0]]], requires_grad=True)
    assert best_match(student, teacher).tolist() == [[2, 0]]
    assert not best_match(student, teacher).requires_grad


def test_only_the_students_logits_get_gradient():
    names = ("z", "z_regions", "f", "t", "t_regions", "t_f", "c")
    shapes = ((2, 5), (2, 3, 5), (2, 3, 4), (2, 5), (2, 6, 5), (2, 6, 4), (5,))
    given_ = {name: torch.randn(shape, requires_grad=True) for name, shape in zip(names, shapes, strict=True)}
    image, regions = centred(given_["t"], given_["c"], 0.04), centred(given_["t_regions"], given_["c"], 0.04)
    match = best_match(given_["f"], given_["t_f"])
    total = (
        self_cross_entropy(given_["z"], image)
        + region_loss(given_["z_regions"], regions, match)
        + inter_level_loss(given_["z_regions"], given_["z"].softmax(-1), aggregation="attention")
    )
    total.backward()
    with_gradient = {name for name, tensor in given_.items() if tensor.grad is not None}
    assert with_gradient == {"z", "z_regions"}
    only = torch.randn(2, 5, requires_grad=True)
    inter_level_loss(torch.randn(2, 3, 5, requires_grad=True), only.softmax(-1)).backward()
    assert only.grad is None  # the crop leads, the bag follows


@pytest.mark.parametrize("aggregation", ["mean", "attention"])
def test_where_regions_stand_does_not_matter(aggregation):
    z, f, t, g = torch.randn(2, 4, 5), torch.randn(2, 4, 3), torch.randn(2, 6, 5).softmax(-1), torch.randn(2, 6, 3)
    a, own, other = torch.randn(2, 5).softmax(-1), torch.randperm(4), torch.randperm(6)
    plain = region_loss(z, t, best_match(f, g))
    torch.testing.assert_close(region_loss(z[:, own], t, best_match(f[:, own], g)), plain)
    torch.testing.assert_close(region_loss(z, t[:, other], best_match(f, g[:, other])), plain)
    torch.testing.assert_close(
        inter_level_loss(z[:, own], a, aggregation=aggregation), inter_level_loss(z, a, aggregation=aggregation)
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["mean", "attention"]), st.floats(0, 1e4))
def test_bag_against_crop_is_a_divergence(seed, aggregation, scale):
    draw = torch.Generator().manual_seed(seed)
    z = (torch.randn(2, 3, 6, generator=draw) * scale).requires_grad_()
    a = (torch.randn(2, 6, generator=draw) * 5).softmax(-1)
    value = inter_level_loss(z, a, aggregation=aggregation)
    value.backward()
    assert value.isfinite() and value >= -1e-6
    assert z.grad.isfinite().all()
    alike = (a.log() * 0.1).unsqueeze(1).expand(-1, 3, -1)
    assert inter_level_loss(alike, a, aggregation=aggregation).abs() < 1e-5


def test_the_bag_is_the_mean_of_its_regions_distributions():
    z = torch.randn(2, 3, 5)
    regions = (z / 0.1).softmax(-1)
    torch.testing.assert_close(log_bag(z).exp(), regions.mean(1))
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(log_bag(z, weights).exp(), (weights.unsqueeze(-1) * regions).sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["mean", "attention"])
def test_a_bag_of_one_region_is_that_region(aggregation):
    z, a = torch.randn(4, 1, 5), torch.randn(4, 5).softmax(-1)
    q = (z[:, 0] / 0.1).log_softmax(-1)
    torch.testing.assert_close(inter_level_loss(z, a, aggregation=aggregation), (a * (a.log() - q)).sum(-1).mean())


def test_the_region_that_says_what_the_picture_says_is_important():
    a = torch.tensor([[0.98, 0.01, 0.01]])
    z = torch.tensor([[[0.0, 0.3, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    weights = importance(a, z)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1))
    assert weights.argmax() == 1
    nearer = inter_level_loss(z, a, aggregation="attention")
    assert nearer < inter_level_loss(z, a)


def test_no_crop_is_compared_with_itself():
    assert crop_pairs(2, 2) == [(0, 1), (1, 0)]
    for crops in range(2, 9):
        pairs = crop_pairs(2, crops)
        assert len(pairs) == 2 * crops - 2 == len(set(pairs))
        assert all(q != v for q, v in pairs)


def test_the_temperature_warms_up():
    assert teacher_temperature(0) == 0.04
    assert [teacher_temperature(epoch) for epoch in (29, 30, 300)] == [pytest.approx(0.07)] * 3
    rising = [teacher_temperature(epoch) for epoch in range(30)]
    assert all(later - earlier == pytest.approx(0.03 / 29) for earlier, later in pairwise(rising))
    assert teacher_temperature(0, warmup_epochs=0) == 0.07


def test_half_precision_is_computed_in_float32():
    z, a = torch.randn(2, 3, 8) * 50, torch.randn(2, 8).softmax(-1)
    half = inter_level_loss(z.bfloat16(), a.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, inter_level_loss(z.bfloat16().float(), a.bfloat16().float()))
    assert inter_level_loss(z.double(), a.double()).dtype == torch.float64


def test_bad_input():
    with pytest.raises(ValueError, match=r"center \[4\] does not fit logits \[2, 5\]"):
        centred(torch.zeros(2, 5), torch.zeros(4), 0.04)
    with pytest.raises(ValueError, match="temperature is 0"):
        centred(torch.zeros(2, 5), torch.zeros(5), 0)
    with pytest.raises(ValueError, match="cannot be matched"):
        best_match(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="one a region"):
        region_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \[B, N, K\] and \[B, K\]"):
        inter_level_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="expected one of 'mean', 'attention'"):
        inter_level_loss(torch.zeros(2, 3, 5), torch.zeros(2, 5), aggregation="sum")
