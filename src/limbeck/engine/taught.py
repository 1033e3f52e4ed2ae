"""Training data with what a cached teacher said of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from limbeck.batch import Batch
from limbeck.data.vlm import VQADataset
from limbeck.engine.batches import derived_seed, random_state_kept, seed_all, typical_samples
from limbeck.errors import BadInput
from limbeck.losses.logits import IGNORE
from limbeck.teachers.cached import CachedTeacher

TOLERANCE = 1e-3  # by which a projection may differ, of the pixels' root mean square; and
STEP = 4 / 255
"""At least: another machine resizes by other roundings, and pixels that are off by one move it by a quarter of that."""
LOOKED_AT = 4096  # pixels
STAND_IN = np.random.MT19937()  # for NumPy's own generator while a sample is drawn


class TaughtItem(NamedTuple):
    """A dataset's item, and the shard and encoded rows of what the teacher said of it."""

    item: Any
    said: tuple[int, dict[str, Tensor]]


class TaughtDataset(Dataset[Any]):
    """The samples of a dataset beside what the teacher said of them.

    Epoch n shows view n mod ``views`` of each sample: the very pixels that the teacher saw. Raises `BadInput` where the cache lacks
    samples, and when a sample is reached that is not what the teacher was shown.
    """

    def __init__(self, dataset: Any, teacher: CachedTeacher, stage: str) -> None:
        self.dataset, self.teacher = dataset, teacher
        self.ids = sample_ids(dataset)
        self.places = teacher.places(stage, self.ids)  # [views, samples, 2]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def typical(self) -> Sequence[int]:
        """Those of the dataset."""
        return typical_samples(self.dataset)

    @property
    def labels(self) -> Tensor | None:
        """Those of the dataset, where it has any."""
        return getattr(self.dataset, "labels", None)

    @property
    def lengths(self) -> Sequence[float]:
        """Those of the dataset, where it has any."""
        return self.dataset.lengths

    def __getitem__(self, index: int) -> TaughtItem:
        return self.draw(0, index)

    def draw(self, epoch: int, index: int) -> TaughtItem:
        """What stands at place ``index`` of an epoch, as it shows it: the sample, or the one that the dataset chooses in its place."""
        index = getattr(self.dataset, "chosen", int)(index)
        view = epoch % len(self.places)
        shard, position = self.places[view, index].tolist()
        item = drawn(self.dataset, view, index, self.ids[index])
        if not matches(self.teacher.opened(shard).seals[position], self.dataset, index, item):
            what = "questions or answer tokens" if _asked(item) else "pixels"
            raise BadInput(
                f"sample {self.ids[index]!r} is not what the teacher was shown: its {what} (view {view}) are others than when "
                f"{self.teacher.folder} was written; write another cache"
            )
        return TaughtItem(item, (shard, self.teacher.rows(shard, position)))


class TaughtCollate:
    """Joins items as ``collate`` does; of a `TaughtDataset`, with ``taught`` in the batch."""

    def __init__(self, collate: Callable[[list[Any]], Batch], teacher: CachedTeacher) -> None:
        self.collate, self.teacher = collate, teacher

    def __call__(self, items: list[Any]) -> Batch:
        if not isinstance(items[0], TaughtItem):  # held-out samples
            return self.collate(items)
        batch = self.collate([item for item, _ in items])
        return {**batch, "taught": self.teacher.decode([said for _, said in items])}


def sample_ids(dataset: Any) -> list[str]:
    """The name of each sample: its record's id, what the dataset's ``ids`` says, or its position. `BadInput` where two share one."""
    if isinstance(dataset, VQADataset):
        ids = [record.id for record in dataset.records]
    else:
        ids = [str(name) for name in getattr(dataset, "ids", range(len(dataset)))]
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        double = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadInput(f"two samples have the id {double!r}: a cache keeps the teacher's answers by it, give each its own")
    return ids


def drawn(dataset: Any, view: int, index: int, name: str) -> Any:
    """Sample ``index`` with its random augmentation drawn from the view and its name alone; the random generators are as before
    afterwards."""
    if isinstance(dataset, VQADataset):  # always encoded in the same way
        return dataset[index]
    with random_state_kept(STAND_IN):
        seed_all(derived_seed(view, zlib.crc32(name.encode("utf-8", "surrogateescape"))))
        return dataset[index]


def seal(dataset: Any, index: int, item: Any) -> float:
    """A number by which to tell whether a sample is still what the teacher was shown: a checksum of questions and answer tokens, or a
    projection of the pixels."""
    return _sealed(dataset, index, item)[0]


def matches(sealed: float, dataset: Any, index: int, item: Any) -> bool:
    """Whether a sample has this seal, up to rounding of its pixels."""
    own, tolerance = _sealed(dataset, index, item)
    return abs(own - sealed) <= tolerance


def _sealed(dataset: Any, index: int, item: Any) -> tuple[float, float]:
    """A sample's seal, and by how much another may differ from it."""
    if _asked(item):
        labels = item["student"]["labels"].numpy()
        told = repr(dataset.records[index].turns) if isinstance(dataset, VQADataset) else ""
        return float(zlib.crc32(labels[labels != IGNORE].tobytes(), zlib.crc32(told.encode()))), 0.0
    pixels = _pixels(item)
    projected = float(pixels @ _signs(len(pixels))) / max(1, len(pixels)) ** 0.5
    return projected, max(STEP, TOLERANCE * float(np.sqrt(np.square(pixels).mean())))


def _asked(item: Any) -> bool:
    return isinstance(item, dict) and "student" in item


def _pixels(item: Any) -> NDArray[np.float64]:
    """[N]: up to about `LOOKED_AT` of them, evenly spread."""
    pixels = torch.as_tensor(item["pixel_values"] if isinstance(item, dict) else item[0]).reshape(-1)
    return pixels[:: max(1, len(pixels) // LOOKED_AT)].double().numpy()


@cache
def _signs(count: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).choice([-1.0, 1.0], count)
