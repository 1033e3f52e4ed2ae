"""Which samples go into which step: a pure function of seed, epoch and step, so that a run resumes anywhere."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from limbeck.errors import BadInput
from limbeck.methods.base import Batch

POOL = 50  # batches whose samples are sorted by length together, as transformers' group_by_length
EVALUATION_BATCH = 64  # samples
MOST_WORKERS = 8  # a process, where their number is not given


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every part, the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, from step ``start`` to step ``stop``.

    Every epoch is a permutation drawn from (seed, epoch), cut into batches of ``batch_size``; the rest of an epoch is dropped. Of each
    batch, process ``rank`` of ``world`` takes its ``micro`` samples a micro-batch. Yields lists of (epoch, index).
    lengths: [length], of every sample; where given, the samples of a batch are of like length (`alike`).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        micro: int,
        *,
        seed: int,
        rank: int,
        world: int,
        start: int,
        stop: int,
        lengths: Tensor | None = None,
    ) -> None:
        self.length, self.batch_size, self.micro, self.seed = length, batch_size, micro, seed
        self.rank, self.world, self.start, self.stop, self.lengths = rank, world, start, stop, lengths

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.length // self.batch_size
        epoch, batches = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = epoch_batches(self.length, self.batch_size, self.seed, epoch, self.lengths)
            batch = batches[step % per_epoch].tolist()
            for offset in range(0, self.batch_size, self.micro * self.world):
                mine = offset + self.rank * self.micro
                yield [(epoch, index) for index in batch[mine : mine + self.micro]]

    def __len__(self) -> int:
        return (self.stop - self.start) * (self.batch_size // (self.micro * self.world))


def epoch_batches(length: int, batch_size: int, seed: int, epoch: int, lengths: Tensor | None = None) -> Tensor:
    """The whole batches of an epoch, [batches, batch_size]; with lengths [length] given, each of samples of like length."""
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    order = torch.randperm(length, generator=generator)[: length // batch_size * batch_size]
    if lengths is None:
        return order.view(-1, batch_size)
    return alike(order, batch_size, lengths, generator, longest_first=epoch == 0)


def alike(order: Tensor, batch_size: int, lengths: Tensor, generator: torch.Generator, *, longest_first: bool) -> Tensor:
    """Batches [batches, batch_size] of samples of like length, in random order.

    Up to `POOL` batches of the random ``order`` [batches * batch_size], but at most a quarter of them, are sorted together, longest
    first, so that batches differ from epoch to epoch. longest_first: start with the batch that holds the longest sample, so that
    memory that does not suffice is known at once.
    """
    pool = max(1, min(POOL, len(order) // (4 * batch_size))) * batch_size
    sorted_pools = [part[lengths[part].argsort(descending=True, stable=True)] for part in order.split(pool)]
    batches = torch.cat(sorted_pools).view(-1, batch_size)
    batches = batches[torch.randperm(len(batches), generator=generator)]
    if longest_first:
        longest = int(lengths[batches].amax(1).argmax())
        batches[[0, longest]] = batches[[longest, 0]]
    return batches


def padding(lengths: Tensor, batch_size: int, micro: int, *, seed: int, grouped: bool) -> float:
    """The share of the positions of the first epoch's micro-batches that only fill up to the longest sample."""
    chosen = epoch_batches(len(lengths), batch_size, seed, 0, lengths if grouped else None)
    held = [lengths[part] for batch in chosen for part in batch.split(micro)]
    return 1 - float(sum(part.sum() for part in held) / sum(part.max() * len(part) for part in held))


def sample_lengths(dataset: Any) -> Tensor:
    """What a dataset's ``lengths`` says, [samples]; `BadInput` where it has none, or not one for each sample."""
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        raise BadInput(
            f"train.group_by_length: the training data ({type(dataset).__name__}) has no `lengths`: give it one number a sample, or "
            "leave group_by_length off"
        )
    if len(lengths) != len(dataset):
        raise BadInput(f"train.group_by_length: the training data has {len(dataset)} samples and {len(lengths)} lengths")
    return torch.as_tensor(lengths, dtype=torch.float64)


class _Items(Dataset[Any]):
    """A dataset addressed by (epoch, index), which also seed its random augmentation: a sample is the same in the main process and in
    any worker, whatever was drawn before. Seeding costs more than fetching from memory, so that it begins with the first batch that
    draws: that one is fetched again."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.numpy = np.random.MT19937()
        self.draws = False
        with random_state_kept(self.numpy):
            seed_all(0)
            self.undrawn = _next_numbers()

    def __getitem__(self, key: tuple[int, int]) -> tuple[str, Any]:
        epoch, index = key
        seed_all(derived_seed(self.seed, epoch, index))
        return self._fetched(epoch, index)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[str, Any]]:
        with random_state_kept(self.numpy):
            if not self.draws:
                seed_all(0)
                fetched = [self._fetched(epoch, index) for epoch, index in keys]
                if _next_numbers() == self.undrawn:
                    return fetched
                self.draws = True
            return [self[key] for key in keys]

    def _fetched(self, epoch: int, index: int) -> tuple[str, Any]:
        draw = getattr(self.dataset, "draw", None)  # of data that shows an epoch's own view of a sample
        return str(index), self.dataset[index] if draw is None else draw(epoch, index)


def seed_all(seed: int) -> None:
    """Seed the CPU's random generators: torch's, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _next_numbers() -> tuple[float, ...]:
    return torch.rand((), device="cpu").item(), random.random(), np.random.random()


@contextmanager
def random_state_kept(other: np.random.MT19937) -> Iterator[None]:
    """Afterwards the CPU's random generators, dropout's among them, are as before. other: stands in for NumPy's, whose state takes
    long to copy."""
    python, numpy = random.getstate(), np.random.mtrand.get_bit_generator()
    np.random.mtrand.set_bit_generator(other)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.mtrand.set_bit_generator(numpy)


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
    dataset: Any, collate: Callable[[list[Any]], Any], sampler: StepSampler, *, seed: int, workers: int, pinned: bool = False
) -> DataLoader[Any]:
    """Micro-batches in the sampler's order. pinned: in page-locked memory, from where they are copied to a GPU while it computes."""
    return DataLoader(
        _Items(dataset, seed),
        batch_sampler=sampler,
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=False,  # a stage is one pass: its workers live as long
    )


def loaded(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """The batches of a loader. Its workers end with it: exhausted, closed, or broken off by an exception, whose traceback would keep
    them alive. What a dataset refuses in a worker is raised as without workers."""
    batches = iter(loader)
    try:
        yield from batches
    except BadInput as error:
        # torch raises it again with the worker's traceback as its text; what was said is the last line of that.
        raise BadInput(str(error).strip().splitlines()[-1].removeprefix(f"{BadInput.__module__}.BadInput: ")) from None
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def worker_count(given: int | None, device: torch.device) -> int:
    """How many processes load data for this one: as given, else none beside a CPU, which trains itself, and up to `MOST_WORKERS` of
    the machine's cores, divided among its processes, beside a GPU."""
    if given is not None:
        return given
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_workers(dataset: Any, collate: Callable[[list[Any]], Any], workers: int) -> None:
    """`BadInput` where workers start as fresh processes and what they need cannot be sent to them."""
    start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if not workers or start == "fork":
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            pickle.dump((dataset, collate), nowhere)
    except Exception as error:  # pickling raises all kinds
        raise BadInput(
            f"train.workers: the training data ({type(dataset).__name__}) cannot be sent to worker processes, which this system starts "
            f"by {start!r}: {' '.join(str(error).split())}; define what it names at the top of a module, or set train.workers: 0"
        ) from error


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
    return collate([dataset[index] for index in typical_samples(dataset)])


def typical_samples(dataset: Any) -> Sequence[int]:
    """The positions of the samples that a dataset calls ``typical``, else the first two."""
    return getattr(dataset, "typical", range(min(2, len(dataset))))


def check_trainable(dataset: Any, batch_size: int) -> int:
    """The batch size that this dataset allows; `BadInput` for an empty dataset or one without a length."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise BadInput(
            f"the training data is {type(dataset).__name__}: a map-style dataset (len and [index]) is needed to resume exactly"
        )
    if len(dataset) == 0:
        raise BadInput("the training data is empty: nothing to distil on")
    return min(batch_size, len(dataset))
