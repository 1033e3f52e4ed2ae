"""Packed top-k rows: what goes in comes out, in so many bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.top_k import TopK, top_k, top_k_divergence
from limbeck.teachers.packing import FARTHEST, STEPS, Packing


def by_id(top: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and log-probabilities in the order of the ids."""
    order = top.ids.argsort(-1)
    return top.ids.gather(-1, order), top.log_probs.gather(-1, order)


def assert_kept(top: TopK, packing: Packing) -> TopK:
    """Pack and unpack: the same ids, log-probabilities as close as promised, the likeliest first, masses that add up to one."""
    rows = packing.pack(top)
    assert rows.shape == (len(top.ids), packing.width)
    assert rows.dtype == np.uint8
    back = packing.unpack(rows)
    (ids, ours), (same_ids, theirs) = by_id(top), by_id(back)
    assert torch.equal(ids, same_ids)
    distance = (ours.max(-1, keepdim=True).values - ours).clamp(max=FARTHEST).double()
    farthest = distance.max(-1, keepdim=True).values
    kept = theirs.max(-1, keepdim=True).values - theirs
    promised = (distance * farthest).sqrt() / STEPS + (0.5 / STEPS) ** 2 * farthest + 1e-3 * farthest + 1e-4
    assert ((kept - distance).abs() <= promised).all()
    assert (back.log_probs.diff(dim=-1) <= 0).all()
    total = back.log_probs.double().exp().sum(-1) + back.log_rest.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    np.testing.assert_allclose(packing.covered(rows), back.covered.double().numpy(), atol=1e-6)
    return back


@pytest.mark.parametrize(
    ("vocabulary", "k", "most"), [(151_936, 64, 190), (1000, 64, 132), (1000, 1000, 1504), (49_152, 32, 99), (2, 1, 8)]
)
def test_a_row_takes_so_many_bytes(vocabulary, k, most):
    assert Packing(k, vocabulary, 1.0).width <= most  # budgets: 200 a token of 152k, 400 an image of 1,000 classes


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(1, 700), share=st.floats(0, 1), spread=st.sampled_from([0.0, 1e-3, 1.0, 8.0, 300.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]), seed=st.integers(0, 2**31), rounding=st.booleans(),
)  # fmt: skip
def test_any_distribution_comes_back(vocabulary, share, spread, temperature, seed, rounding):
    logits = spread * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if rounding else logits  # ties
    k = max(1, round(share * vocabulary))
    assert_kept(top_k(logits, k, temperature=temperature), Packing(k, vocabulary, temperature))


def test_the_first_and_the_last_id_and_a_sure_teacher_come_back():
    vocabulary = 151_936
    logits = torch.full((3, vocabulary), -math.inf)
    logits[0, 0] = logits[1, -1] = logits[2, [0, -1]] = 5.0
    for k in (1, 2, 64):
        back = assert_kept(top_k(logits, k), Packing(k, vocabulary, 1.0))
        assert back.ids[0, 0] == 0
        assert back.ids[1, 0] == vocabulary - 1
        assert torch.isfinite(back.log_probs).all() and torch.isfinite(back.log_rest).all()
        torch.testing.assert_close(back.log_probs[:2, 0], torch.zeros(2), rtol=0, atol=1e-6)


def test_no_rows_are_no_rows():
    packing = Packing(4, 10, 1.0)
    assert packing.unpack(packing.pack(top_k(torch.zeros(0, 10), 4))).ids.shape == (0, 4)


def test_the_divergence_from_what_is_kept_is_that_from_what_was_said():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(200, 5000, generator=generator) for _ in range(2))
    teacher[torch.arange(200), torch.randint(5000, (200,), generator=generator)] += 12 * torch.rand(200, generator=generator)
    said = top_k(teacher, 64)
    packing = Packing(64, 5000, 1.0)
    kept = packing.unpack(packing.pack(said))
    one, other = (top_k_divergence(student, entries, reduction="none") for entries in (said, kept))
    torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3)
    between = torch.cat([kept.log_probs, kept.log_rest[:, None]], 1)
    order = said.ids.argsort(-1).gather(1, kept.ids.argsort(-1).argsort(-1))  # said's positions of kept's ids
    own = torch.cat([said.log_probs.gather(1, order), said.log_rest[:, None]], 1)
    assert (own.exp() * (own - between)).sum(-1).abs().max() < 1e-4  # nats that packing itself costs


def test_bytes_that_pack_cannot_have_written_are_refused():
    packing = Packing(8, 100, 1.0)
    rows = packing.pack(top_k(torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), 8))
    with pytest.raises(ValueError, match="take 2"):
        packing.unpack(rows[:, :-1])
    for start in range(0, packing.width, 3):
        broken = rows.copy()
        broken[:, start : start + 3] = 255
        try:
            back = packing.unpack(broken)
        except ValueError:
            continue
        assert (back.ids >= 0).all() and (back.ids < 100).all()  # never an index outside the logits
        assert (back.ids.sort(-1).values.diff(dim=-1) > 0).all()
