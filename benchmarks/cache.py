"""What a teacher cache costs: bytes, time to pack and unpack, an epoch beside one of plain fine-tuning, and what is lost by it.

    python benchmarks/cache.py --json cache.json            # a minute on a CPU
    python benchmarks/cache.py --seeds 3                    # and runs from the live teacher and from the cache, over seeds
    python benchmarks/cache.py --tiny                       # the same code in seconds

- *storage*: files of 1,024 samples as `limbeck cache` writes them, ids, counts and seals among them. Logits fall with the logarithm of
  the rank, as a language model's do, more or less steeply from position to position.
- *epoch*: optimiser steps of `sft`, of `kd` from the cache and of `kd` under the live teacher, loading of data included, in turns on one
  machine; CPU time, medians over epochs. The models are the embedded ones, of which a step is so short that all else shows.
- *seeds*: final loss (mean of the last tenth of the steps) and validation accuracy on digit-scenes; the teacher is the one that
  recipes/switch-kd.yaml trains. "live, halved" is the live teacher with each batch in two micro-batches, which differs from "live" by
  rounding alone: what it differs by in the end is what training makes of any difference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import limbeck
from limbeck.engine.batches import StepSampler, training_loader
from limbeck.engine.cache import Chunk, cache, write_shard
from limbeck.engine.config import TrainConfig
from limbeck.engine.recipe import load_recipe
from limbeck.engine.run import run
from limbeck.engine.task import Task, build_task
from limbeck.engine.trainer import build_optimizer
from limbeck.losses.top_k import TopK, top_k
from limbeck.teachers.cached import Index, Rows, TopKLayout
from limbeck.teachers.packing import Packing

SAMPLES = 1024
STORED = {"token": (151_936, 64, 64), "image": (1000, 64, 1)}  # name: ids, kept, rows a sample
DATA = {"source": "digit-scenes", "digits": 300, "questions": 4, "test": 0}


def realistic(rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Logits [rows, V] that fall with the logarithm of a random rank: p ~ rank^-a, a from 1.5 to 6."""
    steepness = 1.5 + 4.5 * torch.rand(rows, 1, generator=generator)
    ranks = torch.rand(rows, vocabulary, generator=generator).argsort(-1) + 1
    return -steepness * ranks.log() + 0.1 * torch.randn(rows, vocabulary, generator=generator)


def storage(thing: str, tiny: bool) -> dict[str, float]:
    """Bytes on disk a token or an image, seconds a million rows, and how far what is read is from what was written."""
    vocabulary, k, each = STORED[thing]
    generator = torch.Generator().manual_seed(0)
    distinct = 64 if tiny else 1024
    said = TopK.joined([top_k(realistic(64, vocabulary, generator), k) for _ in range(distinct // 64)])
    packing = Packing(k, vocabulary, 1.0)
    rows, packed_in = timed(lambda: packing.pack(said))
    read, unpacked_in = timed(lambda: packing.unpack(rows))
    order = said.ids.argsort(-1).gather(1, read.ids.argsort(-1).argsort(-1))  # where the read ids stood
    off = read.log_probs - said.log_probs.gather(1, order)
    divergence = -(said.log_probs.gather(1, order).exp() * off).sum(-1) - said.log_rest.exp() * (read.log_rest - said.log_rest)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lock").touch()
        layout = TopKLayout(k=k, vocabulary=vocabulary, temperature=1.0)
        index = Index(identity={}, entries={"kd": layout}, top_k=k)
        many = TopK.joined([said] * (SAMPLES * each // distinct)) if each > 1 or tiny else said
        counts = torch.full((SAMPLES,), each)
        ids = [f"train/{number:08d}" for number in range(SAMPLES)]
        chunk = Chunk("train", 0, range(SAMPLES), tuple(range(SAMPLES)))
        batches = iter([([0.0] * SAMPLES, {})])
        write_shard(Path(folder), index, chunk, ids, batches, ask=lambda _: {"kd": Rows(many, counts)})
        [file] = Path(folder).glob("*.safetensors")
        size = file.stat().st_size / (SAMPLES * each)
    covered = read.covered.sort().values
    return {
        "bytes": size,
        "row_bytes": packing.width,
        "pack_us": 1e6 * packed_in / distinct,
        "unpack_us": 1e6 * unpacked_in / distinct,
        "worst_log_prob": off.abs().max().item(),
        "mean_kl": divergence.mean().item(),
        "worst_kl": divergence.abs().max().item(),
        "covered_mean": covered.mean().item(),
        "covered_p5": covered[len(covered) // 20].item(),
    }


def timed(call: Callable[[], Any], repeats: int = 5) -> tuple[Any, float]:
    """What a call returns, and its median CPU time in seconds."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        taken.append(time.process_time() - start)
    return result, statistics.median(taken)


def epochs(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median CPU seconds of an epoch of each arm, and the ratios to `sft`."""
    scenes, batch = (64, 16) if arguments.tiny else (2048, 64)
    recipe: dict[str, Any] = {
        "method": {"name": "kd"},
        "teacher": {"source": "tiny", "name": "digit-vlm-teacher"},
        "student": {"source": "tiny", "name": "digit-vlm-student"},
        "data": {**DATA, "scenes": scenes, "val": 0},
    }
    cache(recipe, out=folder, quiet=True)
    without = {key: value for key, value in recipe.items() if key != "teacher"}
    arms = {
        "sft": {**without, "method": {"name": "sft"}},
        "kd from the cache": {**recipe, "cache": str(folder)},
        "kd, live": recipe,
    }
    tasks = {name: build_task(load_recipe(values)) for name, values in arms.items()}
    optimizers = {name: build_optimizer(task.method, TrainConfig(), 1e-3) for name, task in tasks.items()}

    def epoch(name: str, number: int) -> float:
        task: Task = tasks[name]
        task.method.train()
        each, start = scenes // batch, time.process_time()
        sampler = StepSampler(scenes, batch, batch, seed=0, rank=0, world=1, start=number * each, stop=(number + 1) * each)
        for loaded in training_loader(task.data["train"], task.collate, sampler, seed=0, workers=0):
            task.method(loaded).total.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
        return time.process_time() - start

    for name in arms:
        epoch(name, 0)  # to warm up
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(1, 1 + arguments.epochs):
        for name in arms:
            taken[name].append(epoch(name, number))
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(values, taken["sft"], strict=True)) for name, values in taken.items()}
    return {"seconds": seconds, "ratio_to_sft": ratios, "epochs": arguments.epochs, "samples": scenes}


def seeds(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Final loss and validation accuracy of `kd`, from the live teacher and from one cache, by seed."""
    recipe: dict[str, Any] = {
        "method": {"name": "kd"},
        "teacher": {"source": "recipe", "name": str(Path(__file__).parents[1] / "recipes" / "digit-scenes-teacher.yaml")},
        "student": {"source": "tiny", "name": "digit-vlm-student"},
        "data": {**DATA, "scenes": 4000, "val": 1200},
        "train": {
            "steps": arguments.steps, "batch_size": 64, "lr": 4e-3, "warmup": 0.1, "weight_decay": 0.01, "log_every": 1,
            "evaluate_every": arguments.steps,
        },
    }  # fmt: skip
    if arguments.tiny:
        recipe |= {"teacher": {"source": "tiny", "name": "digit-vlm-teacher"}, "data": {**DATA, "scenes": 64, "val": 20}}
    cache(recipe, out=folder / "cache", top_k=arguments.top_k, quiet=True)
    found: dict[str, dict[str, list[float]]] = {name: {"loss": [], "accuracy": []} for name in ("live", "live, halved", "cached")}
    halved = {**recipe, "train": {**recipe["train"], "micro_batch_size": 8 if arguments.tiny else 32}}
    for seed in range(arguments.seeds):
        for name, values in zip(found, (recipe, halved, {**recipe, "cache": str(folder / "cache")}), strict=True):
            finished = run(values, out=folder / f"{name}-{seed}", overrides=[f"--train.seed={seed}"], quiet=True)
            rows = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
            losses = [row["loss"] for row in rows if "loss" in row]
            found[name]["loss"].append(statistics.fmean(losses[-max(1, len(losses) // 10) :]))
            found[name]["accuracy"].append(finished.validation["accuracy"])
            print(
                f"seed {seed}, {name}: loss {found[name]['loss'][-1]:.4f}, accuracy {found[name]['accuracy'][-1]:.4f}",
                file=sys.stderr,
            )
    return found


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=9, help="timed epochs of each arm")
    parser.add_argument("--seeds", type=int, default=0, help="runs from the live teacher and from the cache")
    parser.add_argument("--steps", type=int, default=1600, help="of each of these runs")
    parser.add_argument("--top-k", type=int, default=8, help="of their cache, of 48 ids")
    parser.add_argument("--tiny", action="store_true", help="little data, few steps")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"storage": {thing: storage(thing, arguments.tiny) for thing in STORED}}
    head = ("on disk", "packed", "pack µs", "unpack µs", "log p off by", "mean KL", "worst KL", "covered", "5th p.")
    print(f"{'bytes':18}" + "".join(f"{cell:>13}" for cell in head))
    for thing, row in result["storage"].items():
        vocabulary, k, _ = STORED[thing]
        cells = [f"{row[key]:.1f}" for key in ("bytes", "row_bytes", "pack_us", "unpack_us")]
        cells += [f"{row[key]:.1e}" for key in ("worst_log_prob", "mean_kl", "worst_kl")]
        cells += [f"{row[key]:.3f}" for key in ("covered_mean", "covered_p5")]
        print(f"{thing + f', {k} of {vocabulary:,}':22}"[:22] + "".join(f"{cell:>13}" for cell in cells))
    with tempfile.TemporaryDirectory() as folder:
        result["epoch"] = epochs(arguments, Path(folder) / "epochs")
        for name, seconds in result["epoch"]["seconds"].items():
            print(f"{name:18} {seconds:7.2f} s an epoch, {result['epoch']['ratio_to_sft'][name]:.3f} x sft")
        if arguments.seeds:
            result["seeds"] = seeds(arguments, Path(folder))
            for name, values in result["seeds"].items():
                spread = {key: statistics.stdev(v) if len(v) > 1 else 0.0 for key, v in values.items()}
                told = "   ".join(f"{key} {statistics.fmean(v):.4f} ± {spread[key]:.4f}" for key, v in values.items())
                print(f"{name:12} {told}   ({arguments.seeds} seeds)")
    if arguments.json:
        versions = {"limbeck": limbeck.__version__, "torch": torch.__version__, "python": platform.python_version()}
        arguments.json.write_text(json.dumps({**result, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
