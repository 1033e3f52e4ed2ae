"""Facts about hidden-digits: one body for all, a real digit on it, and nothing of one split in another."""

import numpy as np
import pytest
from PIL import Image

from limbeck.data.embedded.hidden_digits import DIGIT, SIDE, body, hidden
from limbeck.data.images import load_images
from limbeck.errors import BadInput

pytest.importorskip("sklearn")
SPEC = {"source": "hidden-digits", "limit": 40}


def pixels(record) -> np.ndarray:
    return np.asarray(record.image)


def test_the_digit_covers_the_body_at_a_random_place_and_nothing_else():
    ink = np.linspace(0, 1, DIGIT * DIGIT).reshape(DIGIT, DIGIT)
    shared, places = np.rint(255 * body()), set()
    for seed in range(60):
        picture = hidden(ink, np.random.default_rng(seed), noise=0)
        differs = np.argwhere(picture != shared)
        top, left = differs.min(0)
        assert (differs.max(0) - differs.min(0) < DIGIT).all()
        places.add((top, left))
    assert len(places) > 30
    corner = hidden(ink * 0 + 1, np.random.default_rng(0), noise=0)
    assert (corner == 255).sum() == DIGIT * DIGIT
    assert picture.shape == (SIDE, SIDE) and picture.dtype == np.uint8


def test_contrast_and_noise():
    ink = np.ones((DIGIT, DIGIT))
    faint = hidden(ink, np.random.default_rng(0), noise=0, contrast=0.25) / 255
    strong = hidden(ink, np.random.default_rng(0), noise=0) / 255
    np.testing.assert_allclose(faint - body(), 0.25 * (strong - body()), atol=0.005)
    noisy = (
        hidden(ink * 0.5, np.random.default_rng(0), noise=0.1) / 255 - hidden(ink * 0.5, np.random.default_rng(0), noise=0) / 255
    )
    inside = noisy[(body() > 0.25) & (body() < 0.75)]
    assert 0.07 < inside.std() < 0.13


def test_pictures_are_the_same_every_time_and_all_different():
    once, again = load_images(SPEC, "train"), load_images(SPEC, "train")
    assert [record.id for record in once.records] == [record.id for record in again.records]
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(once.records, again.records, strict=True))
    assert len({pixels(record).tobytes() for record in once.records}) == 40
    assert once.classes == tuple("0123456789")


def test_splits_share_no_digit_and_follow_those_of_digits():
    seen = {}
    for split in ("train", "val", "test"):
        images = load_images({"source": "hidden-digits"}, split)
        plain = load_images({"source": "digits"}, split)
        assert [record.label for record in images.records] == [record.label for record in plain.records]
        seen[split] = {record.id.split("/")[1].split("-")[0] for record in images.records}
    assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])


def test_the_hidden_digit_is_the_real_one():
    plain = {record.id.split("/")[1]: record for record in load_images({"source": "digits"}, "val").records}
    shared = body()
    for record in load_images({"source": "hidden-digits", "noise": 0}, "val").records[:20]:
        number = record.id.split("/")[1].split("-")[0]
        ink, picture = pixels(plain[number]), pixels(record)
        windows = [
            (top, left)
            for top in range(SIDE - DIGIT + 1)
            for left in range(SIDE - DIGIT + 1)
            if (picture[top : top + DIGIT, left : left + DIGIT] == ink).all()
        ]
        assert windows
        top, left = windows[0]
        rest = np.ones_like(shared, dtype=bool)
        rest[top : top + DIGIT, left : left + DIGIT] = False
        assert (picture == np.rint(255 * shared))[rest].all()


def test_copies_are_of_training_digits_alone():
    spec = {"source": "hidden-digits", "copies": 3}
    copied, single = load_images(spec, "train"), load_images({"source": "hidden-digits"}, "train")
    assert len(copied.records) == 3 * len(single.records)
    assert len({record.id for record in copied.records}) == len(copied.records)
    first = {record.id: record for record in copied.records}
    assert all((pixels(first[record.id]) == pixels(record)).all() for record in single.records)
    assert len(load_images(spec, "val").records) == len(load_images({"source": "hidden-digits"}, "val").records)


def test_copies_of_a_digit_are_in_one_part():
    def numbers(**more) -> list[str]:
        return [record.id.split("-")[1] for record in load_images({"source": "hidden-digits", **more}, "train").records]

    low, high = numbers(part=[0, 0.25], copies=3), numbers(part=[0.25, 1], copies=3)
    assert not set(low) & set(high)
    assert sorted(low + high) == sorted(numbers(copies=3))
    assert set(low) == set(numbers(part=[0, 0.25]))


def test_bad_input():
    with pytest.raises(BadInput, match="copies"):
        load_images({**SPEC, "copies": 0}, "train")
    with pytest.raises(BadInput, match="contrast"):
        load_images({**SPEC, "contrast": 0}, "train")
    assert isinstance(load_images(SPEC, "train").records[0].image, Image.Image)
