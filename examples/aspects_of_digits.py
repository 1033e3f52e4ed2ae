"""Write recipes/digits-aspects.json: what an oracle answers about the embedded handwritten digits (``pip install limbeck[embedded]``).

    python examples/aspects_of_digits.py --out recipes/digits-aspects.json

It stands in for a multimodal language model, so that the method `makd` can be tried without one: ten yes/no questions about each training
picture of ``source: digits``, seven answered from the pixels and three from the digit's value, all as soft probabilities, and one answer in
ten wrong. With a real model: ``limbeck synth answers``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from limbeck.data.images import load_images
from limbeck.data.records import open_image

WRONG = 0.1  # share of the answers that are turned round
SURE = 0.9  # probability that is given to what the value says

QUESTIONS = (
    "Does the digit enclose at least one loop?",
    "Does the digit enclose two loops?",
    "Does the digit look the same in a mirror?",
    "Does the digit look the same upside down?",
    "Is there more ink in the upper half than in the lower half?",
    "Is there a long straight vertical stroke?",
    "Is there a long straight horizontal stroke?",
    "Is the value of the digit even?",
    "Is the value of the digit greater than 4?",
    "Is the value of the digit a multiple of 3?",
)


def loops(ink: NDArray[np.float32]) -> int:
    """How many areas of background are enclosed by ink: [8, 8] in 0..1, looked at twice as large, so that thin loops stay open."""
    background = ndimage.zoom(np.pad(ink, 1), 2, order=1) < 0.35
    areas, count = ndimage.label(background)
    return sum(int((areas == area).sum() > 1) for area in range(1, count + 1)) - 1  # the outside is one


def seen(ink: NDArray[np.float32]) -> list[float]:
    """How much speaks for yes, over 0, or for no, below, of the questions about the picture."""
    enclosed, mass = loops(ink), ink.sum()
    same = [np.corrcoef(ink.ravel(), ink[turned].ravel())[0, 1] for turned in (np.s_[:, ::-1], np.s_[::-1, ::-1])]
    upper = (ink[:4].sum() - ink[4:].sum()) / mass
    strokes = [(ink > 0.5).sum(axis).max() for axis in (0, 1)]
    return [
        2 * enclosed - 1,
        2 * enclosed - 3,
        6 * (same[0] - 0.6),
        6 * (same[1] - 0.6),
        15 * upper,
        1.5 * (strokes[0] - 5.5),
        1.5 * (strokes[1] - 4.5),
    ]


def answers(name: str, ink: NDArray[np.float32], digit: int) -> list[float]:
    """Probabilities of yes, one a question. name: decides which of them are wrong."""
    of_picture = [1 / (1 + np.exp(-score)) for score in seen(ink)]
    of_value = [SURE if holds else 1 - SURE for holds in (digit % 2 == 0, digit > 4, digit % 3 == 0)]
    draw = np.random.default_rng(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()))
    wrong = draw.random(len(QUESTIONS)) < WRONG
    return [round(float(1 - p if turned else p), 2) for p, turned in zip([*of_picture, *of_value], wrong, strict=True)]


def main() -> None:
    """Ask about every training picture, and write what was answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/digits-aspects.json"), help="the file to write")
    given = parser.parse_args()
    records = load_images({"source": "digits"}, "train").records
    asked = {}
    for record in records:
        ink = np.asarray(open_image(record.image).convert("L"), dtype=np.float32) / 255
        asked[record.id] = answers(record.id, ink, record.label)
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in asked.items())
    given.out.write_text(f'{{"questions": {json.dumps(QUESTIONS, indent=1)},\n"answers": {{\n{rows}\n}}}}\n', encoding="utf-8")
    print(f"{len(QUESTIONS)} questions about {len(asked)} pictures: {given.out}")


if __name__ == "__main__":
    main()
