import pytest
import torch

from limbeck.errors import BadInput
from limbeck.evaluate.corruptions import LEVELS, blur, contrast, corrupt

EVERY = [(name, strength) for name, levels in LEVELS.items() for strength in range(1, len(levels) + 1)]


def some(channels=3, size=32):
    """Smooth pictures with an edge."""
    ramp = torch.linspace(0.2, 0.6, size).expand(2, channels, size, size).clone()
    ramp[..., size // 2 :, :] += 0.2
    return ramp


@pytest.mark.parametrize(("name", "strength"), EVERY)
def test_a_picture_is_corrupted_alike_wherever_it_stands(name, strength):
    pictures = some()
    first = corrupt(pictures, name, strength, ["a", "b"])
    assert first.shape == pictures.shape and first.min() >= 0 and first.max() <= 1
    assert not torch.equal(first, pictures)
    torch.manual_seed(7)
    swapped = corrupt(pictures.flip(0), name, strength, ["b", "a"]).flip(0)
    assert torch.allclose(first, swapped, atol=1e-6)
    assert torch.allclose(first[1:], corrupt(pictures[1:], name, strength, ["b"]), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LEVELS)
def test_a_greater_strength_changes_more(name, channels):
    pictures = some(channels)
    changes = [(corrupt(pictures, name, strength, ["a", "b"]) - pictures).abs().mean().item() for strength in (1, 2, 3)]
    assert changes == sorted(changes) and changes[0] < changes[2]


def test_noise_differs_from_picture_to_picture_and_has_its_deviation():
    noise = corrupt(torch.full((2, 1, 64, 64), 0.5), "gaussian-noise", 1, ["a", "b"]) - 0.5
    assert noise.std() == pytest.approx(0.05, rel=0.05)
    assert not torch.allclose(noise[0], noise[1], atol=0.01)


def test_blur_keeps_flat_pictures_and_spreads_a_point_as_a_gaussian():
    flat = torch.full((1, 3, 9, 9), 0.3)
    assert torch.allclose(blur(flat, 0.1, []), flat)
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    spread = blur(point, 2 / 41, [])[0, 0]
    offsets = torch.arange(41.0) - 20
    assert spread.sum() == pytest.approx(1)
    assert ((spread.sum(0) * offsets.square()).sum()).item() == pytest.approx(4, rel=0.05)
    assert torch.allclose(spread, spread.T)


def test_contrast_keeps_the_mean_and_shrinks_the_rest():
    pictures = some()
    changed = contrast(pictures, 0.4, [])
    assert torch.allclose(changed.mean((2, 3)), pictures.mean((2, 3)))
    assert torch.allclose(changed.std((2, 3)), 0.4 * pictures.std((2, 3)))


@pytest.mark.parametrize(
    ("name", "strength", "offset", "says"),
    [("blurr", 1, 0, "did you mean 'blur'"), ("blur", 4, 0, "strengths 1 to 3"), ("jpeg", 1, -2, "in \\[0, 1\\]")],
)
def test_what_cannot_be_corrupted_is_refused(name, strength, offset, says):
    with pytest.raises(BadInput, match=says):
        corrupt(some() + offset, name, strength, ["a", "b"])
