"""Losses that tell a pair from others."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.contrastive import crd, info_nce


def draw(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_crd_is_the_official_formula_row_by_row():
    (log_scores, _), n_data, negatives = draw(3, 6), 40, 5
    rows = []
    for scores in log_scores.exp():
        noise = negatives / n_data
        found = torch.log(scores[0] / (scores[0] + noise + 1e-7))
        rejected = sum(torch.log(noise / (score + noise + 1e-7)) for score in scores[1:])
        rows.append(-(found + rejected))
    torch.testing.assert_close(crd(log_scores, n_data=n_data, reduction="none"), torch.stack(rows))
    torch.testing.assert_close(crd(log_scores, n_data=n_data), torch.stack(rows).mean())


def test_crd_of_scores_at_the_noise_is_a_coin_toss_each():
    """o = K / n for the positive and for K negatives: each decision costs log 2."""
    log_scores = torch.full((4, 9), math.log(8 / 1000), dtype=torch.float64)
    assert crd(log_scores, n_data=1000).item() == pytest.approx(9 * math.log(2), abs=1e-4)


def test_crd_vanishes_where_all_is_told_apart_and_stays_finite_where_nothing_is():
    told = torch.tensor([[60.0, -60.0, -60.0]])
    assert crd(told, n_data=100).item() == pytest.approx(0, abs=1e-4)
    confused = (-told * 100).bfloat16().requires_grad_()
    loss = crd(confused, n_data=100)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and confused.grad.isfinite().all()
    assert confused.grad[0, 0] < 0 < confused.grad[0, 1]


def test_crd_of_no_row_and_of_no_negative():
    assert crd(torch.zeros(0, 4, requires_grad=True), n_data=10).item() == 0
    with pytest.raises(ValueError, match=r"\[3, 1\] has no negatives"):
        crd(torch.zeros(3, 1), n_data=10)
    with pytest.raises(ValueError, match="n_data is 0"):
        crd(torch.zeros(3, 2), n_data=0)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_info_nce_of_like_keys_is_a_guess(rows):
    queries = F.normalize(draw(rows, 4)[0], dim=1)
    keys = torch.ones(rows, 4, dtype=torch.float64)
    assert info_nce(queries, keys).item() == pytest.approx(math.log(rows), abs=1e-12)


def test_a_single_pair_costs_nothing():
    queries, keys = draw(1, 5)
    queries.requires_grad_()
    loss = info_nce(queries, keys)
    loss.backward()
    assert loss.item() == 0
    assert not queries.grad.any()


def test_info_nce_of_orthogonal_pairs():
    """Own key at cosine 1, the other N - 1 at 0: log(1 + (N - 1) exp(-1 / T))."""
    pairs = torch.eye(6, dtype=torch.float64)
    assert info_nce(pairs, pairs, temperature=0.5).item() == pytest.approx(math.log(1 + 5 * math.exp(-2)), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.floats(0.05, 2), st.integers(0, 1000))
def test_info_nce_invariances(rows, temperature, seed):
    queries, keys = draw(rows, 3, seed=seed)
    own = {"temperature": temperature}
    loss = info_nce(queries, keys, **own)
    assert loss >= 0
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(info_nce(queries[order], keys[order], **own), loss)
    torch.testing.assert_close(info_nce(3 * queries, 0.2 * keys, **own), loss)
    turn = torch.linalg.qr(draw(3, 3, seed=seed)[0]).Q
    torch.testing.assert_close(info_nce(queries @ turn, keys @ turn, **own), loss)
    # the other direction is the loss over columns; of one set with itself both are the same
    similarity = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    torch.testing.assert_close(info_nce(keys, queries, **own), F.cross_entropy(similarity.T, torch.arange(rows)))
    torch.testing.assert_close(loss, F.cross_entropy(similarity, torch.arange(rows)))


def test_both_sides_and_the_temperature_may_be_trained():
    queries, keys = (side.requires_grad_() for side in draw(4, 3).unbind())
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda q, k, t: info_nce(q, k, temperature=t), (queries, keys, temperature))


def test_masked_pairs_are_neither_query_nor_key():
    queries, keys = draw(5, 3)
    mask = torch.tensor([True, False, True, True, False])
    expected = info_nce(queries[mask], keys[mask], reduction="none")
    queries[~mask] = keys[~mask] = torch.nan
    torch.testing.assert_close(info_nce(queries, keys, mask=mask), expected.mean())
    torch.testing.assert_close(info_nce(queries, keys, mask=mask, reduction="none")[mask], expected)
    assert info_nce(queries, keys, mask=torch.zeros(5, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_info_nce_of_a_zero_row_leaves_it_without_gradient(dtype):
    queries, keys = draw(4, 6).to(dtype)
    queries[0] = 0
    queries.requires_grad_()
    info_nce(queries, keys).backward()
    assert not queries.grad[0].any()
    assert queries.grad.isfinite().all() and queries.grad[1:].any(1).all()


def test_info_nce_in_half_precision_is_finite_and_computed_in_float32():
    queries, keys = draw(8, 4).bfloat16()
    keys[0] = 0
    queries.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(queries * 1e15, keys, temperature=0.01)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and queries.grad.isfinite().all()
    torch.testing.assert_close(loss, info_nce(queries.float(), keys.float(), temperature=0.01), rtol=1e-2, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(info_nce(queries, keys), info_nce(queries.float(), keys.float()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("queries", "keys", "given", "message"),
    [
        ((3, 4), (3, 5), {}, r"\[3, 4\].*\[3, 5\] differ"),
        ((2, 3, 4), (2, 3, 4), {}, r"\[2, 3, 4\]; expected \[N, D\]"),
        ((3, 4), (3, 4), {"temperature": 0.0}, "temperature is 0.0"),
        ((3, 4), (3, 4), {"mask": torch.ones(2, dtype=torch.bool)}, r"mask \[2\]"),
    ],
)
def test_bad_input(queries, keys, given, message):
    with pytest.raises(ValueError, match=message):
        info_nce(torch.zeros(queries), torch.zeros(keys), **given)
