"""The embedded task: honest pools, honest pictures, right answers."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from limbeck.data.embedded.digit_scenes import KINDS, LAYOUTS, SPLITS, digit_pool, digit_scenes
from limbeck.data.records import VQARecord
from limbeck.errors import BadInput

CELLS = {2: ["left", "right"], 4: ["top left", "top right", "bottom left", "bottom right"]}


def digit_bytes(split: str) -> dict[bytes, int]:
    """The digits of a pool as the bytes that a noise-free picture shows them as."""
    ink, labels = digit_pool(split)
    return {np.rint(cell * 255).astype(np.uint8).tobytes(): int(label) for cell, label in zip(ink, labels, strict=True)}


def cells(record: VQARecord, layout: str) -> list[bytes]:
    """The cells of a picture in reading order; what is around them is blank."""
    pixels = np.asarray(record.images[0])
    assert pixels.shape == (16, 16, 3)
    assert (pixels == pixels[..., :1]).all()
    rows = (4,) if layout == "pair" else (0, 8)
    assert layout == "square" or not pixels[[0, 1, 2, 3, 12, 13, 14, 15]].any()
    return [pixels[y : y + 8, x : x + 8, 0].tobytes() for y in rows for x in (0, 8)]


def solve(question: str, grid: list[int]) -> str:
    """The answer worked out from the words of the question, independently of how the task was made."""
    if question == "what are the digits?":
        return " ".join(map(str, grid))
    if question == "what is the sum of the digits?":
        return str(grid[0] + grid[1])
    if question == "which digit is the largest?":
        return str(sorted(grid)[-1])
    if cell := re.fullmatch(r"which digit is (\w+(?: \w+)?)\?", question):
        return str(dict(zip(CELLS[len(grid)], grid, strict=True))[cell[1]])
    if line := re.fullmatch(r"what is the sum of the (\w+) (row|column)\?", question):
        return str(sum(digit for name, digit in zip(CELLS[4], grid, strict=True) if line[1] in name.split()))
    if count := re.fullmatch(r"how many (\d) are there\?", question):
        return str(Counter(grid)[int(count[1])])
    asked = re.fullmatch(r"is there a (\d)\?", question)
    assert asked, question
    return "yes" if int(asked[1]) in grid else "no"


def test_the_pools_share_no_digit_and_together_are_the_data_set():
    pools = {split: set(digit_bytes(split)) for split in SPLITS}
    assert not pools["train"] & pools["val"]
    assert not pools["train"] & pools["test"]
    assert not pools["val"] & pools["test"]
    together = np.concatenate([digit_pool(split)[0] for split in SPLITS])
    assert sorted(cell.tobytes() for cell in together) == sorted(
        (image / 16).astype(np.float32).tobytes() for image in load_digits().images
    )


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_has_its_share_of_each_pool(split):
    counts = Counter(digit_pool(split)[1].tolist())
    assert sorted(counts) == list(range(10))
    assert max(counts.values()) <= 1.1 * min(counts.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", SPLITS)
def test_pictures_show_digits_of_the_pool_and_every_answer_is_right(split, layout):
    known = digit_bytes(split)
    records = digit_scenes(split, 300, noise=0, layout=layout, questions=8 if split == "train" else 1)
    for record in records:
        grid = [known[cell] for cell in cells(record, layout)]
        assert len(set(record.turns)) == len(record.turns)
        for question, answer in record.turns:
            assert answer == solve(question, grid), (question, grid)
    asked = {question for record in records for question, _ in record.turns}
    assert len(asked) > {"pair": 22, "square": 25}[layout]  # of 25 and 30


def test_a_student_may_be_shown_few_digits_in_equal_parts():
    known = digit_bytes("train")
    shown = {cell for record in digit_scenes("train", 400, digits=30, noise=0) for cell in cells(record, "pair")}
    assert len(shown) == 30
    assert set(Counter(known[cell] for cell in shown).values()) == {3}


def test_noise_has_the_spread_asked_for_and_leaves_the_digits_alone():
    clean, noisy = (
        np.stack(
            [np.asarray(record.images[0], dtype=np.float64)[..., 0] / 255 for record in digit_scenes("train", 400, noise=noise)]
        )
        for noise in (0, 0.1)
    )
    inside = (clean > 0.4) & (clean < 0.6)  # where clipping to the range does not reach
    assert (noisy - clean)[inside].std() == pytest.approx(0.1, rel=0.03)
    assert (noisy - clean)[inside].mean() == pytest.approx(0, abs=0.003)


def test_held_out_records_have_one_question_each_with_kinds_and_yes_in_balance():
    records = digit_scenes("test", 600, kinds=KINDS)
    assert all(len(record.turns) == 1 for record in records)
    assert set(Counter(record.kind for record in records).values()) == {100}
    assert Counter(record.turns[0][1] for record in records if record.kind == "presence") == {"yes": 50, "no": 50}
    counts = Counter(record.turns[0][1] for record in records if record.kind == "count")
    assert counts.most_common(1)[0][1] < 60  # no answer is nearly always right
    assert {record.kind for record in digit_scenes("val", 8)} == set(KINDS)


def test_a_seed_gives_the_same_data_and_another_seed_other_data():
    def contents(seed: int) -> list[tuple[bytes, tuple[tuple[str, str], ...]]]:
        return [(record.images[0].tobytes(), record.turns) for record in digit_scenes("train", 20, questions=3, seed=seed)]

    assert contents(1) == contents(1)
    assert not set(contents(1)) & set(contents(2))


def test_ids_are_unique():
    ids = [record.id for split in SPLITS for record in digit_scenes(split, 50)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "dev"}, "no split 'dev'"),
        ({"digits": 5}, r"within 10\.\.1078"),
        ({"digits": 5000}, r"within 10\.\.1078"),
        ({"split": "test", "questions": 2}, "exactly one question"),
        ({"questions": 10}, r"within 1\.\.9"),
        ({"questions": 0, "layout": "square"}, r"within 1\.\.14"),
        ({"kinds": ["positoin"]}, "did you mean 'position'"),
        ({"kinds": []}, "kinds is empty"),
        ({"layout": "sqare"}, "did you mean 'square'"),
        ({"scenes": 0}, "at least 1"),
        ({"noise": -1.0}, "at least 0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(wrong, message):
    with pytest.raises(BadInput, match=message) as raised:
        digit_scenes(**wrong)
    assert "\n" not in str(raised.value)
