"""Which samples go into which step: a pure function of seed, epoch and step, so that a run resumes anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from limbeck.errors import BadInput
from limbeck.methods.base import Batch


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every part, the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, from step ``start`` to step ``stop``.

    Every epoch is a permutation drawn from (seed, epoch), cut into batches of ``batch_size``; the rest of an epoch is dropped. Of each
    batch, process ``rank`` of ``world`` takes its ``micro`` samples a micro-batch. Yields lists of (epoch, index).
    """

    def __init__(
        self, length: int, batch_size: int, micro: int, *, seed: int, rank: int, world: int, start: int, stop: int
    ) -> None:
        self.length, self.batch_size, self.micro, self.seed = length, batch_size, micro, seed
        self.rank, self.world, self.start, self.stop = rank, world, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.length // self.batch_size
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
                order = torch.randperm(self.length, generator=generator)
            first = step % per_epoch * self.batch_size
            batch = order[first : first + self.batch_size].tolist()
            for offset in range(0, self.batch_size, self.micro * self.world):
                mine = offset + self.rank * self.micro
                yield [(epoch, index) for index in batch[mine : mine + self.micro]]

    def __len__(self) -> int:
        return (self.stop - self.start) * (self.batch_size // (self.micro * self.world))


class _Items(Dataset[Any]):
    """A dataset addressed by (epoch, index). In a worker, random augmentation is seeded by them, not by the worker's history."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[str, Any]:
        epoch, index = key
        if get_worker_info() is not None:
            seed = derived_seed(self.seed, epoch, index)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
        return str(index), self.dataset[index]


class _Collate:
    """Collate items and name them: ``ids`` are the dataset's own where its items have them, else the indices."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[str, Any]]) -> Batch:
        names, samples = zip(*items, strict=True)
        batch = self.collate(list(samples))
        batch.setdefault("ids", list(names))
        return batch


def collate_pairs(items: list[Any]) -> Batch:
    """The default: items are mappings of tensors, or (image, label) pairs."""
    if isinstance(items[0], dict):
        ids = [item["id"] for item in items] if "id" in items[0] else None
        batch = default_collate([{key: value for key, value in item.items() if key != "id"} for item in items])
        return batch if ids is None else {**batch, "ids": ids}
    if isinstance(items[0], tuple | list) and len(items[0]) == 2:
        images, labels = default_collate(items)
        return {"pixel_values": images, "labels": labels}
    raise BadInput(
        f"a dataset item is a mapping of tensors or an (image, label) pair; this one is {type(items[0]).__name__}: pass `collate`"
    )


def training_loader(
    dataset: Any, collate: Callable[[list[Any]], Any], sampler: StepSampler, *, seed: int, workers: int
) -> DataLoader[Any]:
    """Micro-batches in the sampler's order; pinned memory where there is a GPU."""
    return DataLoader(
        _Items(dataset, seed),
        batch_sampler=sampler,
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=False,
    )


def evaluation_loader(
    dataset: Any, collate: Callable[[list[Any]], Any], batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader[Any]:
    """Every sample once, in order; process ``rank`` of ``world`` takes every ``world``-th batch."""
    batches = [
        [(0, index) for index in range(first, min(first + batch_size, len(dataset)))]
        for first in range(rank * batch_size, len(dataset), world * batch_size)
    ]
    return DataLoader(
        _Items(dataset, 0), batch_sampler=_Fixed(batches), collate_fn=_Collate(collate), num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


class _Fixed(Sampler[list[tuple[int, int]]]):
    def __init__(self, batches: Sequence[list[tuple[int, int]]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def typical_batch(dataset: Any, collate: Callable[[list[Any]], Any]) -> Batch:
    """A batch to try a method on: the samples that a dataset calls ``typical`` of what its batches hold, else the first two."""
    typical = getattr(dataset, "typical", range(min(2, len(dataset))))
    return collate([dataset[index] for index in typical])


def check_trainable(dataset: Any, batch_size: int) -> int:
    """The batch size that this dataset allows; `BadInput` for an empty dataset or one without a length."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise BadInput(
            f"the training data is {type(dataset).__name__}: a map-style dataset (len and [index]) is needed to resume exactly"
        )
    if len(dataset) == 0:
        raise BadInput("the training data is empty: nothing to distil on")
    return min(batch_size, len(dataset))
