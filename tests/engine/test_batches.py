"""Which samples go into which batch, and how they get there: grouping by length, workers, what fails in them, what they leave."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import limbeck as lb
from limbeck.data.records import VQARecord
from limbeck.data.vlm import VQACollator, VQADataset
from limbeck.engine.batches import (
    StepSampler,
    epoch_batches,
    loaded,
    padding,
    sample_lengths,
    training_loader,
    worker_count,
)
from limbeck.errors import BadInput
from limbeck.models.tiny.digit_vlm import WORDS, build_processor
from tests.engine.test_trainer import Points, method, state, train


def long_tailed(count: int, seed: int = 0) -> torch.Tensor:
    """Lengths of instruction data: a fixed number of image tokens, then many short answers and some long ones."""
    return 64 + torch.from_numpy(np.random.default_rng(seed).lognormal(4.5, 1.0, count)).round()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 7), st.integers(1, 60))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 5), st.integers(0, 12))
def test_grouped_batches_are_the_same_however_they_are_split_and_wherever_a_run_starts(sizes, seed, start):
    micro, world, pieces, rest, per_epoch = sizes
    batch = micro * world * pieces
    length, stop = per_epoch * batch + min(rest, batch - 1), start + 5
    lengths = long_tailed(length, seed)
    options = {"seed": seed, "stop": stop, "lengths": lengths}
    whole = list(StepSampler(length, batch, batch, rank=0, world=1, start=0, **options))
    parts = [list(StepSampler(length, batch, micro, rank=rank, world=world, start=start, **options)) for rank in range(world)]
    for step in range(start, stop):
        mine = slice((step - start) * pieces, (step - start + 1) * pieces)
        assert sorted(key for part in parts for piece in part[mine] for key in piece) == sorted(whole[step])
    seen = epoch_batches(length, batch, seed, 3, lengths).flatten()
    assert len(seen) == per_epoch * batch and len(seen.unique()) == len(seen)


def test_grouping_saves_padding_and_keeps_batches_random():
    lengths = long_tailed(4000)
    assert padding(lengths, 32, 8, seed=0, grouped=False) > 0.4
    assert padding(lengths, 32, 8, seed=0, grouped=True) < 0.05
    batches = [epoch_batches(4000, 32, 0, epoch, lengths) for epoch in range(2)]
    longest = lengths[batches[1]].amax(1)
    assert abs(torch.corrcoef(torch.stack([longest, torch.arange(len(longest)) * 1.0]))[0, 1]) < 0.3  # in no order
    together = [{frozenset(batch) for batch in epoch.tolist()} for epoch in batches]
    assert not together[0] & together[1]  # an epoch makes its own batches
    assert lengths[batches[0][0]].max() == lengths[batches[0]].max()  # the longest first, where memory may fail
    assert torch.equal(epoch_batches(4000, 32, 0, 1, lengths), batches[1])


class Sentences(Points):
    def __init__(self, count: int = 40) -> None:
        super().__init__(count)
        self.lengths = long_tailed(count).tolist()


def test_a_grouped_run_resumes_to_the_same_bits(tmp_path):
    options = {"epochs": 3, "batch_size": 4, "group_by_length": True, "checkpoint_every": 3, "quiet": True, "micro_batch_size": 2}
    whole = lb.distill(method(), Sentences(), out=tmp_path / "whole", **options)
    broken = method()

    def stop(step: int) -> None:
        if step == 17:
            raise KeyboardInterrupt

    broken.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        lb.distill(broken, Sentences(), out=tmp_path / "run", **options)
    resumed = lb.distill(method(), Sentences(), out=tmp_path / "run", resume=True, **options)
    for name, value in state(whole).items():
        assert torch.equal(state(resumed)[name], value), name


def test_data_without_lengths_cannot_be_grouped(tmp_path):
    with pytest.raises(BadInput, match=r"train.group_by_length: the training data \(Points\) has no `lengths`"):
        train(tmp_path / "run", group_by_length=True)
    assert not (tmp_path / "run").exists()
    short = Sentences()
    short.lengths.pop()
    with pytest.raises(BadInput, match="has 40 samples and 39 lengths"):
        sample_lengths(short)


class Noisy(Points):
    """Augments by all three random generators."""

    def __getitem__(self, index: int):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * np.random.rand(), y


def test_augmented_samples_do_not_depend_on_workers_and_leave_dropout_alone(tmp_path):
    runs = {
        (workers, dropout): lb.distill(
            method(dropout), Noisy(), out=tmp_path / f"{workers}-{dropout}", workers=workers, quiet=True, batch_size=8, epochs=2
        )
        for workers in (0, 2)
        for dropout in (0.0, 0.3)
    }
    for dropout in (0.0, 0.3):
        for name, value in state(runs[0, dropout]).items():
            assert torch.equal(state(runs[2, dropout])[name], value), name
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    sampler = StepSampler(40, 8, 8, seed=0, rank=0, world=1, start=0, stop=10)
    batches = list(training_loader(Noisy(), lb_collate, sampler, seed=0, workers=0))
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    first, second = (torch.cat([batch["x"] for batch in part]) for part in (batches[:5], batches[5:]))
    assert not torch.equal(first.sort(0)[0], second.sort(0)[0])  # another epoch, another noise


def lb_collate(items):
    return {"x": torch.stack([x for x, _ in items])}


def broken_records(folder: Path) -> list[VQARecord]:
    records = []
    for index in range(8):
        Image.new("RGB", (16, 16)).save(folder / f"{index}.png")
        records.append(VQARecord(f"row-{index}", (folder / f"{index}.png",), (("which digit is top left?", "7"),)))
    return records


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named_in_one_line_also_from_a_worker(tmp_path, workers):
    records = broken_records(tmp_path)
    processor = build_processor()
    dataset = VQADataset(records, processor)
    (tmp_path / "5.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    sampler = StepSampler(8, 4, 4, seed=0, rank=0, world=1, start=0, stop=2)
    with pytest.raises(BadInput) as caught:
        list(loaded(training_loader(dataset, VQACollator(processor), sampler, seed=0, workers=workers)))
    assert str(caught.value).startswith("record 'row-5' cannot be encoded: ")
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_data_that_cannot_be_sent_to_fresh_processes_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    data = Points()
    data.transform = lambda value: value
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "spawn")
    with pytest.raises(
        BadInput, match=r"train.workers: the training data \(Points\) cannot be sent to worker .* by 'spawn'"
    ) as said:
        lb.distill(method(), data, out=tmp_path / "run", workers=2, quiet=True)
    assert "\n" not in str(said.value)
    assert not (tmp_path / "run").exists()
    lb.distill(method(), data, out=tmp_path / "alone", workers=0, steps=1, quiet=True)


def test_workers_are_as_many_as_asked_for_and_else_what_the_machine_can_spare(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(12), raising=False)
    assert worker_count(None, cpu) == 0
    assert worker_count(3, cpu) == worker_count(3, gpu) == 3
    assert worker_count(0, gpu) == 0
    assert worker_count(None, gpu) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(None, gpu) == 3


def test_interrupted_training_leaves_no_worker(tmp_path):
    built = method()

    def stop(step: int) -> None:
        if step == 3:
            assert len(multiprocessing.active_children()) == 2
            raise KeyboardInterrupt

    built.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", built, workers=2)
    assert not multiprocessing.active_children()


RUN = textwrap.dedent(
    """
    import multiprocessing, signal, time
    import torch
    import torch.utils.data._utils.worker as worker
    import limbeck as lb

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    worker.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds between two looks of a worker at its parent, not 5

    def tell(step):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(0.2)

    data = [(torch.zeros(6), 0)] * 40
    method = lb.compose(None, torch.nn.Linear(6, 3), [lb.CE()])
    method.after_step = tell
    lb.distill(method, data, out="run", steps=500, workers=2, quiet=True)
    """
)


def test_a_run_ended_from_outside_leaves_no_worker(tmp_path):
    runs = {}
    for by in (signal.SIGINT, signal.SIGTERM):
        (tmp_path / by.name).mkdir()
        runs[by] = subprocess.Popen(
            [sys.executable, "-c", RUN], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path / by.name,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    workers = {by: [int(word) for word in run.stdout.readline().split()] for by, run in runs.items()}
    assert [len(pids) for pids in workers.values()] == [2, 2]
    for by, run in runs.items():
        run.send_signal(by)
        run.wait(30)
    deadline = time.monotonic() + 20
    while alive := [pid for pids in workers.values() for pid in pids if "zombie" not in status(pid)]:
        assert time.monotonic() < deadline, f"{alive} live on"
        time.sleep(0.1)


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "zombie"


def test_lengths_are_known_without_decoding_a_picture(tmp_path):
    rng = random.Random(0)
    words = [word for word in WORDS if word.isalpha()]
    records = [
        VQARecord(
            str(index),
            (tmp_path / "missing.png",),
            (("which digit is top left?", " ".join(rng.choices(words, k=1 + int(rng.expovariate(0.1))))),),
        )
        for index in range(200)
    ]
    processor = build_processor()
    dataset = object.__new__(VQADataset)  # without its check, which encodes the longest
    dataset.records, dataset.encoders = records, VQADataset(broken_records(tmp_path), processor).encoders
    tokens = [len(processor.tokenizer(record.turns[0][1])["input_ids"]) for record in records]
    assert np.corrcoef(dataset.lengths, tokens)[0, 1] > 0.97


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_where_this_run_uses_a_gpu(tmp_path, monkeypatch, device):
    from limbeck.engine import trainer as module

    seen = {}

    def spy(*args, pinned: bool, **options):
        seen["pinned"] = pinned
        return training_loader(*args, pinned=False, **options)

    monkeypatch.setattr(module, "training_loader", spy)
    built = module.Trainer(method(), Points(), module.TrainConfig(batch_size=8, workers=0), tmp_path / "run", quiet=True)
    monkeypatch.setattr(type(built.accelerator), "device", torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a machine with a GPU that this run does not use
    next(built._batches(built.plan[0], 0, 1, workers=0))
    assert seen == {"pinned": device == "cuda"}


def test_batches_within_batches_are_pinned_and_copied_whole():
    nested = {"student": {"input_ids": torch.ones(1)}, "taught": {"hint": torch.ones(2)}, "ids": ["a"]}
    from accelerate.utils import send_to_device

    moved = send_to_device(nested, torch.device("meta"), non_blocking=True)
    assert moved["student"]["input_ids"].is_meta and moved["taught"]["hint"].is_meta and moved["ids"] == ["a"]
