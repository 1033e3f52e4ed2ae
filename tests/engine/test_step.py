"""What a training step must not do beside its arithmetic: wait for the device, or seed what draws nothing."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import limbeck as lb
from limbeck.engine.batches import StepSampler, collate_pairs, training_loader
from limbeck.engine.trainer import Journal, Trainer
from limbeck.methods.base import Losses

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
"""What makes the host wait for a GPU: the size or the value of its result depends on data."""


class Watch(TorchDispatchMode):
    """Counts the operators of `WAITS` at the step that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.seen = 0, Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[self.step] += func in WAITS
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_host_waits_for_the_device_only_where_it_logs(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, step, add = Watch(), Trainer._step, Journal.add

    def watched_step(trainer: Trainer, *arguments: Any) -> Any:
        watch.step = trainer.position.step + 1
        with watch:
            return step(trainer, *arguments)

    def watched_add(journal: Journal, *arguments: Any) -> None:
        journal.every = journal.trainer.config.log_every  # as beside a GPU
        with watch:
            add(journal, *arguments)

    monkeypatch.setattr(Trainer, "_step", watched_step)
    monkeypatch.setattr(Journal, "add", watched_add)
    torch.manual_seed(0)
    objectives = [lb.CE(), lb.KD(temperature=2.0), lb.Hint("body", "body", weight=0.5), lb.Cosine("body", "body")]
    data = [(torch.randn(6), index % 3) for index in range(32)]
    options = {"optimizer": optimizer, "batch_size": 8, "micro_batch_size": 4, "log_every": 4, "steps": 10, "evaluate_every": 0}
    lb.distill(lb.compose(Net(8), Net(6), objectives), data, out=tmp_path / "run", quiet=True, **options)
    assert [number for number in range(1, 11) if watch.seen[number]] == [4, 8]


def test_every_term_of_a_total_gets_the_very_same_gradient() -> None:
    terms = {name: torch.tensor(1.0, requires_grad=True) * 2 for name in "abc"}
    arrived = []
    for term in terms.values():
        term.register_hook(arrived.append)
    Losses(terms).total.backward()
    assert {gradient.data_ptr() for gradient in arrived} == {arrived[0].data_ptr()}


class Drawing:
    """Draws, by the generator named, from the second sample on; says how often it was asked."""

    def __init__(self, generator: str | None) -> None:
        self.generator, self.asked = generator, 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.asked += 1
        draws = {"torch": lambda: torch.rand(()).item(), "random": random.random, "numpy": np.random.random}
        drawn = draws[self.generator]() if self.generator and index else 0.0
        return {"index": torch.tensor(index), "drawn": torch.tensor(drawn, dtype=torch.float64)}


def drawn_by(dataset: Drawing, batch_size: int) -> dict[int, float]:
    sampler = StepSampler(12, batch_size, batch_size, seed=0, rank=0, world=1, start=0, stop=12 // batch_size)
    loader = training_loader(dataset, collate_pairs, sampler, seed=0, workers=0)
    return {int(i): float(x) for batch in loader for i, x in zip(batch["index"], batch["drawn"], strict=True)}


@pytest.mark.parametrize("generator", ["torch", "random", "numpy"])
def test_what_a_sample_draws_is_its_own_and_the_generators_stay(generator: str) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    one, four = drawn_by(Drawing(generator), 1), drawn_by(Drawing(generator), 4)
    assert one == four
    assert len(set(one.values())) == 12
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2][1])


def test_a_dataset_that_draws_nothing_is_asked_once_a_sample() -> None:
    still, drawing = Drawing(None), Drawing("numpy")
    drawn_by(still, 4)
    drawn_by(drawing, 4)
    assert still.asked == 12
    assert drawing.asked == 16  # its first batch again, this time seeded
