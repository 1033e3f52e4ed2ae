"""``digit-scenes``: questions about two or four handwritten digits, made on the spot from real data that scikit-learn carries.

The 1,797 digits of ``sklearn.datasets.load_digits`` (8x8 pixels, UCI, CC BY 4.0) are split once into disjoint pools for training,
validation and testing. A scene is two digits side by side, or a 2x2 grid, of one pool: a 16x16 picture with Gaussian noise. The text
is small (fifty words), so that a vision-language model of a hundred thousand parameters learns the task on a CPU within minutes,
while how well it reads digits it has never seen still depends on its vision.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from limbeck.data.records import VQARecord
from limbeck.errors import BadInput
from limbeck.naming import nearest

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
KINDS = ("read", "position", "largest", "sum", "count", "presence")


@dataclass(frozen=True)
class Layout:
    """Where a scene's digits stand. cells: their names, in reading order; lines: which of them a question may ask to add up."""

    cells: tuple[str, ...]
    lines: Mapping[str, tuple[int, ...]]


LAYOUTS = {
    "pair": Layout(("left", "right"), {"digits": (0, 1)}),
    "square": Layout(
        ("top left", "top right", "bottom left", "bottom right"),
        {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)},
    ),
}

_POOL_SEED = 20  # of the one fixed split into pools; changing it changes what every published number was measured on
_VAL_SHARE, _TEST_SHARE = 0.15, 0.25


@cache
def digit_pool(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The handwritten digits of one split: ink [N, 8, 8] in 0..1 (steps of 1/16) and labels [N].

    Stratified by class and the same on every machine; the three pools share no digit.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(_POOL_SEED)
    members = []
    for digit in range(10):
        of_class = rng.permutation(np.flatnonzero(data.target == digit))
        val, test = round(len(of_class) * _VAL_SHARE), round(len(of_class) * _TEST_SHARE)
        parts = {"val": of_class[:val], "test": of_class[val : val + test], "train": of_class[val + test :]}
        members.append(parts[split])
    chosen = np.sort(np.concatenate(members))
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen].astype(np.int64)


def digit_scenes(
    split: Split = "train",
    scenes: int = 600,
    *,
    digits: int | None = None,
    questions: int = 1,
    kinds: Sequence[str] = KINDS,
    layout: str = "pair",
    seed: int = 0,
    noise: float = 0.1,
) -> list[VQARecord]:
    """Build scenes with their questions; the same arguments give the same pictures and words.

    split: whose pool of handwritten digits to draw from.
    scenes: how many pictures, one record each.
    digits: how many distinct handwritten digits to use, in equal parts of each class; None uses the whole pool (1,078 to train).
    questions: questions a scene, asked as turns of one conversation; a record with several has the kind "mixed". Validation and
        test records have exactly one each, whose kind goes round ``kinds``.
    kinds: which of `KINDS` to ask: "read" (all digits), "position" (the digit on the left ...), "largest", "sum", "count" (how many
        3), "presence" (is there a 7: yes as often as no).
    layout: "pair", two digits side by side, or "square", a 2x2 grid, with sums of rows and columns: a model of this size needs many
        times as long to learn the words for four places.
    noise: standard deviation of the pixel noise, as a share of the range from blank to full ink; the sum is clipped to the range.

    Raises `BadInput` for an unknown split or a number out of range.
    """
    if split not in SPLITS:
        raise BadInput(f"digit-scenes has no split {split!r}; it has {', '.join(SPLITS)}")
    ink, labels = digit_pool(split)
    digits = len(labels) if digits is None else digits
    if not 10 <= digits <= len(labels):
        raise BadInput(f"digit-scenes: digits={digits} must be within 10..{len(labels)}, the {split} pool")
    if split != "train" and questions != 1:
        raise BadInput(f"digit-scenes: {split} records have exactly one question each, so questions={questions} cannot be used")
    if not kinds:
        raise BadInput(f"digit-scenes: kinds is empty; choose from {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise BadInput(f"digit-scenes asks no questions of the kind {kind!r}: {nearest(kind, KINDS)}")
    if layout not in LAYOUTS:
        raise BadInput(f"digit-scenes has no layout {layout!r}: {nearest(layout, LAYOUTS)}")
    place = LAYOUTS[layout]
    distinct = {
        "read": 1,
        "position": len(place.cells),
        "largest": 1,
        "sum": len(place.lines),
        "count": 2,
        "presence": 2,
    }  # at least
    most = sum(distinct[kind] for kind in set(kinds))
    if not 1 <= questions <= most:
        raise BadInput(
            f"digit-scenes: questions={questions} must be within 1..{most}, the distinct questions of {', '.join(kinds)}"
        )
    if scenes < 1 or noise < 0:
        raise BadInput(f"digit-scenes: scenes={scenes} must be at least 1 and noise={noise} at least 0")

    rng = np.random.default_rng([seed, SPLITS.index(split)])
    used = _equal_parts(labels, digits, rng)
    grids = rng.choice(used, size=(scenes, len(place.cells)))  # [N, cells], in reading order
    pictures = ink[grids].reshape(scenes, -1, 2, 8, 8).transpose(0, 1, 3, 2, 4).reshape(scenes, -1, 16)
    margin = (16 - pictures.shape[1]) // 2
    pictures = np.pad(pictures, ((0, 0), (margin, margin), (0, 0)))  # [N, 16, 16]
    pictures = pictures + noise * rng.standard_normal(pictures.shape, dtype=np.float32)
    pixels = np.rint(pictures.clip(0, 1) * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)  # [N, 16, 16, 3]

    words = random.Random(f"{seed}/{split}")
    records = []
    for number, (grid, picture) in enumerate(zip(labels[grids].tolist(), pixels, strict=True)):
        if questions == 1:
            kind, turns = _single(grid, number, kinds, place, words)
        else:
            kind, turns = "mixed", _conversation(grid, questions, kinds, place, words)
        records.append(VQARecord(f"digit-scenes/{split}/{seed}/{number}", (Image.fromarray(picture),), turns, kind))
    return records


def _equal_parts(labels: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``count`` positions in ``labels``, as evenly over the classes as it divides; the first n of them are so for every n."""
    shuffled = rng.permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        of_class = shuffled[labels[shuffled] == digit]
        rank_in_class[of_class] = np.arange(len(of_class))
    return np.lexsort((labels, rank_in_class))[:count]


def _single(
    grid: list[int], number: int, kinds: Sequence[str], place: Layout, rng: random.Random
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The one question of record ``number``: kinds go round, and yes takes turns with no."""
    kind = kinds[number % len(kinds)]
    if kind == "presence":
        return kind, (_presence(grid, present=number // len(kinds) % 2 == 0, rng=rng),)
    return kind, (_ask(kind, grid, place, rng),)


def _conversation(
    grid: list[int], questions: int, kinds: Sequence[str], place: Layout, rng: random.Random
) -> tuple[tuple[str, str], ...]:
    """Distinct questions in random order, the kinds as evenly spread as their number allows."""
    turns: list[tuple[str, str]] = []
    while len(turns) < questions:
        for kind in rng.sample(kinds, len(kinds)):
            turn = _ask(kind, grid, place, rng)
            if turn not in turns and len(turns) < questions:
                turns.append(turn)
    return tuple(turns)


def _ask(kind: str, grid: list[int], place: Layout, rng: random.Random) -> tuple[str, str]:
    """One question of this kind about the digits ``grid`` (reading order), and its answer."""
    if kind == "read":
        return "what are the digits?", " ".join(str(digit) for digit in grid)
    if kind == "position":
        cell = rng.randrange(len(grid))
        return f"which digit is {place.cells[cell]}?", str(grid[cell])
    if kind == "largest":
        return "which digit is the largest?", str(max(grid))
    if kind == "sum":
        line = rng.choice(list(place.lines))
        return f"what is the sum of the {line}?", str(sum(grid[cell] for cell in place.lines[line]))
    if kind == "count":
        # First how often, then which digit: most digits are absent, so that "0" would nearly always be right.
        times = rng.choice(sorted({grid.count(digit) for digit in range(10)}))
        digit = rng.choice([digit for digit in range(10) if grid.count(digit) == times])
        return f"how many {digit} are there?", str(times)
    return _presence(grid, present=rng.random() < 0.5, rng=rng)


def _presence(grid: list[int], *, present: bool, rng: random.Random) -> tuple[str, str]:
    digit = rng.choice([digit for digit in range(10) if (digit in grid) == present])
    return f"is there a {digit}?", "yes" if present else "no"
