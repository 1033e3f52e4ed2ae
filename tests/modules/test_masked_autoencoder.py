"""Masking, patches and the decoder: what is kept, where it goes back, and what the decoder can see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import BadInput
from limbeck.modules.masked_autoencoder import (
    MaskedDecoder,
    in_place,
    patchify,
    random_masking,
    sincos_positions,
    unpatchify,
    visible,
    visible_count,
)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(0, 99))
def test_a_masking_keeps_distinct_patches_and_puts_each_back(pictures, patches, percent):
    ratio = percent / 100
    if patches * (100 - percent) < 100:
        with pytest.raises(BadInput, match="none of"):
            visible_count(patches, ratio)
        return
    count = patches * (100 - percent) // 100  # in whole numbers
    masking = random_masking(pictures, patches, ratio)
    assert masking.keep.shape == (pictures, count)
    assert masking.mask.sum(1).tolist() == [patches - count] * pictures
    assert all(len(set(row)) == count for row in masking.keep.tolist())
    assert not masking.mask.gather(1, masking.keep).any()
    tokens = torch.arange(1.0, patches + 1).view(1, -1, 1).expand(pictures, -1, 2)
    back = in_place(visible(tokens, masking.keep), torch.zeros(1, 1, 2), masking.restore)
    assert torch.equal(back, tokens * ~masking.mask[..., None])  # token l stands at position l again


def test_as_many_patches_as_the_paper_and_its_code():
    assert visible_count(196, 0.75) == 49
    assert visible_count(196, 0.95) == 9
    assert visible_count(196, 0.98) == 3
    assert visible_count(100, 0.9) == 10  # floating point says 9.999999999999998


def test_a_ratio_that_leaves_nothing_is_refused():
    with pytest.raises(BadInput, match=r"leaves none of 49 patches visible; give 0\.9796 or less"):
        visible_count(49, 0.99)
    for ratio in (1.0, -0.1):
        with pytest.raises(BadInput, match="from 0 to below 1"):
            visible_count(49, ratio)


def test_every_patch_is_removed_equally_often():
    generator = torch.Generator().manual_seed(0)
    removed = random_masking(20_000, 8, 0.75, generator=generator).mask.float().mean(0)
    torch.testing.assert_close(removed, torch.full((8,), 0.75), atol=0.02, rtol=0)


def test_tokens_before_the_patches_always_stay():
    tokens = torch.arange(12.0).view(1, 6, 2)
    shown = visible(tokens, torch.tensor([[4, 0]]), prefix=1)
    assert torch.equal(shown, tokens[:, [0, 5, 1]])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_patchify_and_back_is_the_identity(pictures, channels, rows, columns, down, across):
    images = torch.rand(pictures, channels, rows * down, columns * across)
    patches = patchify(images, (rows, columns))
    assert patches.shape == (pictures, down * across, rows * columns * channels)
    assert torch.equal(unpatchify(patches, (rows, columns), (down, across)), images)


def test_the_order_inside_a_patch_is_row_column_channel():
    height, width, channels = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(3), indexing="ij")
    images = (100 * height + 10 * width + channels).permute(2, 0, 1)[None].float()
    second = patchify(images, (2, 3))[0, 1]  # rows 0-1, columns 3-5
    assert second.tolist() == [100 * h + 10 * w + c for h in (0, 1) for w in (3, 4, 5) for c in (0, 1, 2)]
    with pytest.raises(BadInput, match="4x6 are not filled by patches of 4x4"):
        patchify(images, (4, 4))


def test_positions_are_waves_of_the_column_then_of_the_row():
    found = sincos_positions(12, (2, 5))
    for row in range(2):
        for column in range(5):
            waves = [wave(axis * 10_000 ** (-i / 3)) for axis in (column, row) for wave in (math.sin, math.cos) for i in range(3)]
            assert found[5 * row + column].tolist() == pytest.approx(waves, abs=1e-6)
    with pytest.raises(BadInput, match="multiple of 4, got 30"):
        sincos_positions(30, (5, 5))


def decoder(prefix: int = 1) -> MaskedDecoder:
    torch.manual_seed(0)
    return MaskedDecoder(8, (2, 3), 5, prefix=prefix, width=16, depth=2, heads=4).eval()


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_decoder_does_not_care_in_which_order_patches_were_shown(prefix):
    masking = random_masking(4, 6, 0.5)
    tokens = torch.randn(4, prefix + 3, 8)
    painted = decoder(prefix)(tokens, masking.restore)
    assert painted.shape == (4, 6, 5)
    order = torch.cat([masking.keep.flip(1), torch.arange(6).expand(4, -1)[masking.mask].view(4, 3)], dim=1)
    flipped = torch.cat([tokens[:, :prefix], tokens[:, prefix:].flip(1)], dim=1)
    torch.testing.assert_close(decoder(prefix)(flipped, order.argsort(1)), painted)


def test_the_decoder_paints_from_visible_tokens_and_places():
    masking = random_masking(1, 6, 0.5)
    tokens = torch.randn(1, 4, 8, requires_grad=True)
    painted = decoder()(tokens, masking.restore)
    removed = painted[masking.mask]
    assert not torch.allclose(removed[0], removed[1])  # one mask token, different places
    (gradient,) = torch.autograd.grad(removed.sum(), [tokens])
    assert (gradient.abs().sum(-1) > 0).all()


def test_a_checkpoint_of_the_decoder_brings_it_back():
    one = decoder()
    torch.manual_seed(1)
    other = MaskedDecoder(8, (2, 3), 5, width=16, depth=2, heads=4).eval()
    masking, tokens = random_masking(2, 6, 0.5), torch.randn(2, 4, 8)
    assert not torch.allclose(one(tokens, masking.restore), other(tokens, masking.restore))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(tokens, masking.restore), other(tokens, masking.restore))


def test_heads_must_divide_the_width():
    with pytest.raises(BadInput, match="width 16 cannot have 3 heads"):
        MaskedDecoder(8, (2, 3), 5, width=16, heads=3)
