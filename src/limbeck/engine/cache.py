"""Ask a recipe's teacher once and keep what it says: ``limbeck cache RECIPE``.

Samples are cut into chunks of a fixed grid, a shard each. A writer claims a chunk by a lock on one byte of the file ``lock``, which the
system drops with the process: any number of writers share a folder, none waits for one that died, and no sample is asked for twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from limbeck import __version__
from limbeck.batch import Batch
from limbeck.engine.batches import loaded, typical_batch, typical_samples, worker_count
from limbeck.engine.checkpoint import sync, write_atomically
from limbeck.engine.fingerprint import difference, recorded
from limbeck.engine.pictures import check_alone
from limbeck.engine.progress import Progress
from limbeck.engine.recipe import CacheSpec, Recipe, load_recipe
from limbeck.engine.task import (
    Task,
    answered,
    build_task,
    cache_folder,
    check_cacheable,
    classes_of,
    classifies,
    data_specs,
    learns_from_teacher,
    taught_stages,
)
from limbeck.engine.taught import drawn, matches, sample_ids, seal
from limbeck.engine.trainer import PRECISION, forget_accelerator, place
from limbeck.errors import BadInput, StaleCache
from limbeck.losses.top_k import TopK
from limbeck.models.vlm import VLM
from limbeck.teachers.cached import CachedTeacher, DenseLayout, Index, Layout, Rows, Shard, TopKLayout, read_index

TOP_K = 64
SHARD = 1024  # samples
LOOKED_AT = 2  # samples of a shard, at least, that tell whether it is of this data
SAMPLED = 64  # shards, at least, that the covered mass is read from
BEGUN = ("lock", "vocabulary.json")  # what a writer may leave that is killed before it wrote the index


@dataclass(frozen=True)
class Chunk:
    """The samples of one shard: ``indices`` of a stage's dataset in one view, and those of them that are to be asked for."""

    stage: str
    view: int
    indices: range
    missing: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{quote(self.stage, safe='')}-{self.view}-{self.indices.start:09d}"

    def shards(self, folder: Path) -> list[Path]:
        """Its files: one, and another each time that its samples had become more."""
        return sorted(folder.glob(f"{self.name}*.safetensors"))


def cache(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    top_k: int | None = None,
    views: int | None = None,
    shard: int | None = None,
    batch_size: int = 64,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a recipe's teacher over every training sample and keep what its method learns from in the folder ``out``.

    top_k, views: ids kept of a distribution, and random draws of each sample; else the recipe's ``cache`` says them, else they are 64 and
    1. Training shows view n mod ``views`` in epoch n.
    shard: samples of a file, default 1024: what a crash can lose. batch_size: samples that the teacher reads at once. A folder that
    holds a part of this cache is completed, with its own top_k, views and shard, beside any other process that does the same.
    Returns ``{"path", "samples", "views", "shards", "bytes", "seconds", "entries": {name: {"kind", "rows", "bytes", "bytes_a_row",
    "covered": {"mean", "p5", "min"}}}}``; "covered" (of top-k entries) is the probability mass of the kept ids.
    Raises `BadInput` for a method that cannot learn from a cache, and for a folder that holds anything else.
    """
    started, folder = time.perf_counter(), Path(out)
    recipe = load_recipe(recipe, overrides)
    if isinstance(recipe.cache, CacheSpec):
        top_k, views = top_k or recipe.cache.top_k, views or recipe.cache.views
    recipe = recipe.model_copy(update={"cache": None})
    check_cacheable(recipe)
    for name, given in (("--top-k", top_k), ("--views", views), ("--shard", shard), ("--batch-size", batch_size)):
        if given is not None and given < 1:
            raise BadInput(f"{name} is {given}; expected at least 1")
    check_free(folder)
    task = build_task(recipe)
    data = {stage: task.data[stage] for stage in taught_stages(recipe, task.method)}
    ids = {stage: sample_ids(dataset) for stage, dataset in data.items()}
    for dataset in data.values():
        check_alone(dataset)
    forget_accelerator()
    accelerator = Accelerator(mixed_precision=PRECISION[recipe.train.precision])
    progress = Progress(quiet=quiet or not accelerator.is_main_process)
    workers = worker_count(recipe.train.workers, accelerator.device)
    place(task.method.eval(), accelerator.device, recipe.train)
    for teacher in task.method.teachers():
        place(teacher.module, accelerator.device, recipe.train)

    def ask(batch: Batch, top_k: int) -> dict[str, Rows]:
        with torch.no_grad(), accelerator.autocast():
            return task.method.record(send_to_device(batch, accelerator.device), top_k)

    with Claims(folder) as claims:
        with claims.hold("index"):
            index = agree(folder, recipe, task, ask, top_k=top_k, views=views, shard=shard)
        for stage, dataset in data.items():
            check_draws(dataset, ids[stage], index.views, progress.warn)
        kept = CachedTeacher(folder)
        chunks = to_ask(kept, ids, index)
        if any(chunk.missing for chunk in chunks):
            check_kept(kept, data, ids)
        total = sum(len(chunk.indices) for chunk in chunks)
        known = total - sum(len(chunk.missing) for chunk in chunks)
        first = len(chunks) * accelerator.process_index // accelerator.num_processes
        chunks = chunks[first:] + chunks[:first]
        with progress.bar(total, known):
            write = partial(write_shard, folder, index, ask=partial(ask, top_k=index.top_k))
            for wait in (False, True):  # the second time, for the chunks that others had claimed
                chunks = [chunk for chunk in chunks if chunk.missing]
                for number, chunk in enumerate(chunks):
                    with claims.hold(chunk.name, wait=wait) as mine:
                        if not mine:
                            continue
                        chunk = still_missing(folder, chunk, ids[chunk.stage])
                        if chunk.missing:
                            names = ids[chunk.stage]
                            write(chunk, names, loader(data[chunk.stage], chunk, names, task, batch_size, workers))
                    known += len(chunks[number].missing)
                    progress.advance(known, {}, known / (time.perf_counter() - started))
                    chunks[number] = replace(chunk, missing=())
    return summary(folder, started)


def asked_once(recipe: Recipe, *, again: bool = False) -> Recipe:
    """A recipe whose ``cache`` says how to write one, with the folder of that cache in its place: written the first time it is asked for,
    and kept by what the answers depend on. again: that folder proved stale: complete it, or write it anew where it holds what a teacher
    said of other things. A method without a teacher needs none."""
    if not isinstance(recipe.cache, CacheSpec):
        return recipe
    if not learns_from_teacher(recipe):
        return recipe.model_copy(update={"cache": None})
    from limbeck.engine.run import one_at_a_time, processes

    folder = cache_folder() / "answers" / f"{recipe.method.name}-{_known_by(recipe)}"
    done, state = folder.with_name(f"{folder.name}.done"), processes()
    with one_at_a_time(folder.with_name(f"{folder.name}.lock"), state):
        [missing] = broadcast_object_list([again or not done.exists()])
        if missing:
            if state.is_main_process:
                Progress().note(f"asking the teacher, once; its answers are kept in {folder}")
            try:
                cache(recipe, out=folder)
            except StaleCache:
                state.wait_for_everyone()
                if state.is_main_process:
                    shutil.rmtree(folder)
                state.wait_for_everyone()
                cache(recipe, out=folder)
            state.wait_for_everyone()
            if state.is_main_process:
                done.touch()
    return recipe.model_copy(update={"cache": str(folder)})


def _known_by(recipe: Recipe) -> str:
    """By what `asked_once` finds the answers again: all of a recipe that they depend on. The student is a part of it where samples are
    tokens of its own."""
    told: dict[str, Any] = {
        "version": __version__,
        "method": recorded(recipe),
        "data": {stage: spec.model_dump(mode="json") for stage, spec in data_specs(recipe).items()},
        "precision": recipe.train.precision,
        "cache": recipe.model_dump(mode="json")["cache"],
        "teacher": recipe.teacher and recipe.teacher.model_dump(mode="json"),
    }
    if recipe.teacher is not None and recipe.teacher.source == "recipe":
        told["teacher"]["name"] = load_recipe(recipe.teacher.name).fingerprint
    if not classifies(recipe):
        told["student"] = recipe.student.model_dump(mode="json")
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_free(folder: Path) -> None:
    """`BadInput` for a folder that holds anything but a cache."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file: choose another --out")
    if not folder.exists() or (folder / "cache.json").exists():
        return
    if any(path.name not in BEGUN and not path.name.startswith(".") for path in folder.iterdir()):
        raise BadInput(f"{folder} is not empty and holds no teacher cache: choose another --out")


class Claims:
    """What this process has claimed among all that write into a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "lock").open("a")

    @contextmanager
    def hold(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the claim of that name inside; False where another process has it and ``wait`` is not set."""
        byte = zlib.crc32(name.encode())
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, byte)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def agree(folder: Path, recipe: Recipe, task: Task, ask: Callable[[Batch, int], dict[str, Rows]], **given: int | None) -> Index:
    """The index of the folder: written by who comes first; who comes later must want the same."""
    ours = answered(recipe, task.method, classes_of(task))
    if (folder / "cache.json").exists():
        index = read_index(folder)
        differs = difference(index.identity, ours)
        if differs is None:
            kept = {name: getattr(index, name) for name in given}
            asked = next((name for name, value in given.items() if value not in (None, kept[name])), None)
            differs = asked and f"its {asked} is {kept[asked]}, {given[asked]} is asked for"
        if differs:
            raise StaleCache(f"{folder} holds another cache: {differs}; choose another --out")
        return index
    wanted = {"top_k": TOP_K, "views": 1, "shard": SHARD} | {name: value for name, value in given.items() if value}
    stage = taught_stages(recipe, task.method)[0]
    said = ask(typical_batch(task.data[stage], task.collate), wanted["top_k"])
    told: dict[str, Any] = dict(wanted)
    if isinstance(task.teacher, VLM):
        told |= {"family": task.teacher.family, "head": task.teacher.vocab_size}
        tokenizer = getattr(task.teacher.processor, "tokenizer", None)
        if tokenizer is not None:
            write_atomically(folder / "vocabulary.json", json.dumps(tokenizer.get_vocab()))
    index = Index(identity=ours, entries={name: layout_of(rows) for name, rows in said.items()}, **told)
    write_atomically(folder / "cache.json", index.model_dump_json(indent=1))
    return index


def layout_of(rows: Rows) -> Layout:
    """How an entry is kept: features of a half-precision teacher in its dtype, others as float16."""
    values = rows.values
    if isinstance(values, TopK):
        return TopKLayout(k=values.ids.shape[-1], vocabulary=values.vocabulary, temperature=values.temperature)
    dtype: Any = "bfloat16" if values.dtype == torch.bfloat16 else "float16"
    return DenseLayout(dtype=dtype, shape=tuple(values.shape[1:]))


def check_draws(dataset: Any, ids: Sequence[str], views: int, warn: Callable[[str], None]) -> None:
    """Whether a view of a sample can be drawn again, and whether one view is all that there is."""
    index = typical_samples(dataset)[0]
    first, again, other = (drawn(dataset, view, index, ids[index]) for view in (0, 0, 1))
    if not matches(seal(dataset, index, first), dataset, index, again):
        raise BadInput(
            f"sample {ids[index]!r} is not the same when it is drawn twice from one seed: student and teacher would "
            "not see one picture; draw its randomness from torch, numpy or random"
        )
    if views == 1 and not matches(seal(dataset, index, first), dataset, index, other):
        warn("the pictures are augmented at random and one view of each is kept: every epoch will show the same; see --views")


def check_kept(teacher: CachedTeacher, data: Mapping[str, Any], ids: Mapping[str, Sequence[str]]) -> None:
    """`StaleCache` where samples that are kept are shown otherwise now, by the looks of some: a mixture's other picture is drawn from all
    that there are."""
    places = {stage: {name: index for index, name in enumerate(names)} for stage, names in ids.items()}
    for number, shard in enumerate(teacher.shards):
        known = places.get(shard.stage, {})
        held = [(row, name) for row, name in enumerate(shard.ids) if name in known]
        for row, name in held[:: max(1, len(held) // LOOKED_AT)]:
            dataset, index = data[shard.stage], known[name]
            item = drawn(dataset, shard.view, index, name)
            if not matches(teacher.opened(number).seals[row], dataset, index, item):
                raise StaleCache(
                    f"{teacher.folder} was written of other data: sample {name!r} is not what the teacher was shown; choose another --out"
                )


def to_ask(teacher: CachedTeacher, ids: Mapping[str, Sequence[str]], index: Index) -> list[Chunk]:
    """Every chunk, with the samples that no shard holds yet."""
    held: dict[tuple[str, int], set[str]] = defaultdict(set)
    for shard in teacher.shards:
        held[shard.stage, shard.view].update(shard.ids)
    return [
        Chunk(stage, view, indices, tuple(i for i in indices if names[i] not in held[stage, view]))
        for view in range(index.views)
        for stage, names in ids.items()
        for start in range(0, len(names), index.shard)
        for indices in [range(start, min(start + index.shard, len(names)))]
    ]


def still_missing(folder: Path, chunk: Chunk, ids: Sequence[str]) -> Chunk:
    """The chunk as it is now that nobody else writes it."""
    held = {name for path in chunk.shards(folder) for name in Shard.of(path).ids}
    return replace(chunk, missing=tuple(index for index in chunk.missing if ids[index] not in held))


class _Drawn(Dataset[tuple[float, Any]]):
    """The missing samples of a chunk, each with its seal."""

    def __init__(self, dataset: Any, chunk: Chunk, ids: Sequence[str]) -> None:
        self.dataset, self.chunk, self.ids = dataset, chunk, ids

    def __len__(self) -> int:
        return len(self.chunk.missing)

    def __getitem__(self, position: int) -> tuple[float, Any]:
        index = self.chunk.missing[position]
        item = drawn(self.dataset, self.chunk.view, index, self.ids[index])
        return seal(self.dataset, index, item), item


def _with_seals(items: list[tuple[float, Any]], collate: Callable[[list[Any]], Batch]) -> tuple[list[float], Batch]:
    return [sealed for sealed, _ in items], collate([item for _, item in items])


def loader(dataset: Any, chunk: Chunk, ids: Sequence[str], task: Task, batch_size: int, workers: int) -> Iterator[Any]:
    """(seals, batch) of the missing samples of a chunk, in order."""
    collate = partial(_with_seals, collate=task.collate)
    return loaded(DataLoader(_Drawn(dataset, chunk, ids), batch_size, collate_fn=collate, num_workers=workers))


def write_shard(
    folder: Path,
    index: Index,
    chunk: Chunk,
    ids: Sequence[str],
    batches: Iterator[Any],
    *,
    ask: Callable[[Batch], dict[str, Rows]],
) -> None:
    """Ask the teacher and write what it says; the file is whole or not there."""
    seals: list[float] = []
    pieces: dict[str, list[torch.Tensor]] = defaultdict(list)
    for sealed, batch in batches:
        seals += sealed
        for name, rows in ask(batch).items():
            layout = index.entries[name]
            encoded = layout.encode(rows.values)
            if (encoded.dtype, tuple(encoded.shape[1:])) != layout.row:
                raise BadInput(
                    f"the teacher's {name!r} is {list(encoded.shape[1:])} of one sample and {list(layout.row[1])} of another: "
                    "a cache keeps rows of one shape; give all pictures one size"
                )
            if int(rows.counts.sum()) != len(encoded):
                raise BadInput(f"record: {name!r} has {len(encoded)} rows and counts {int(rows.counts.sum())} of them")
            pieces[name].append(encoded)
            pieces[f"{name}.counts"].append(rows.counts.to("cpu", torch.int32))
    tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
    tensors["seals"] = torch.tensor(seals, dtype=torch.float64)
    told = {"stage": chunk.stage, "view": str(chunk.view), "ids": json.dumps([ids[i] for i in chunk.missing])}
    names = (folder / f"{chunk.name}{f'+{number}' if number else ''}.safetensors" for number in count())
    final = next(path for path in names if not path.exists())
    staged = folder / f"{chunk.name}.writing"
    save_file(tensors, staged, told)
    staged.chmod((folder / "lock").stat().st_mode)  # safetensors lets nobody else read it
    sync(staged)
    os.replace(staged, final)
    sync(folder)


def summary(folder: Path, started: float) -> dict[str, Any]:
    """What a folder holds; the covered mass is of `SAMPLED` shards or more, evenly spread."""
    teacher = CachedTeacher(folder)
    shards = teacher.shards
    looked_at = range(0, len(shards), max(1, len(shards) // SAMPLED))
    entries: dict[str, Any] = {}
    for name, layout in teacher.index.entries.items():
        held = [teacher.opened(number).rows[name] for number in range(len(shards))]
        rows, size = sum(len(part) for part in held), sum(part.nbytes for part in held)
        entries[name] = {"kind": layout.kind, "rows": rows, "bytes": size, "bytes_a_row": size / rows if rows else 0.0}
        if isinstance(layout, TopKLayout) and rows:
            covered = teacher.covered(name, looked_at)
            found = (covered.mean(), np.quantile(covered, 0.05), covered.min())
            entries[name]["covered"] = dict(zip(("mean", "p5", "min"), map(float, found), strict=True))
    return {
        "path": str(folder),
        "samples": sum(len(shard.ids) for shard in shards if shard.view == 0),
        "views": teacher.index.views,
        "shards": len(shards),
        "bytes": sum(shard.path.stat().st_size for shard in shards),
        "seconds": time.perf_counter() - started,
        "entries": entries,
    }
