"""Does it help? A recipe's method and its controls, over seeds, on the same data; means, deviations and paired intervals."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.engine.progress import Progress
from limbeck.engine.recipe import Recipe, load_recipe
from limbeck.engine.run import environment, run, trained_student, with_inputs
from limbeck.engine.task import build_task, load_teacher, open_cache
from limbeck.errors import BadInput
from limbeck.evaluate.cost import latencies
from limbeck.models.vlm import VLM

# Two-sided 95 % quantiles of Student's t by degrees of freedom 1..30; beyond, the normal's.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def bench(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    seeds: int = 3,
    out: str | Path,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train every arm of a recipe over seeds 0..seeds-1 and compare them on held-out data.

    A seed draws the student's initial weights, the training data where the recipe makes it, and the order of batches; the teacher is one.
    Finished runs in ``out`` are read, not repeated, so that an interrupted bench goes on. jobs: runs at a time, each in a process with
    its share of the cores; the default is one a core for the embedded models, which are too small for threads, without a GPU, else 1.
    Returns
    ``{"method", "arms": {arm: {metric: {"mean", "std", "values"}}}, "paired": {arm: {metric: {"mean", "low", "high"}}}, "teacher",
    "latency_ms", "runs", "environment"}``; paired is method minus arm, by seed, with a 95 % t interval (null for one seed).
    """
    if seeds < 1:
        raise BadInput(f"bench needs at least 1 seed, got {seeds}")
    recipe = load_recipe(source, overrides)
    progress, folder = Progress(quiet=quiet), Path(out)
    arms = {recipe.method.name: recipe}
    for arm in recipe.arms:
        arms[arm if isinstance(arm, str) else arm.name] = recipe.with_method(arm)
    for variant in arms.values():
        open_cache(variant)  # what cannot train from it is refused before anything is trained
    if recipe.cache is not None and seeds > 1 and recipe.data.source == "digit-scenes":
        raise BadInput("bench draws new digit-scenes for each seed, and a cache holds one draw: leave `cache` out, or --seeds 1")
    check_same(folder, recipe)
    teacher = load_teacher(recipe.teacher) if recipe.teacher and recipe.cache is None else None
    paths = {(name, seed): folder / name / f"seed-{seed}" for seed in range(seeds) for name in arms}
    missing = [(arms[name].with_seed(seed), path) for (name, seed), path in paths.items() if not (path / "result.json").exists()]
    alone = torch.cuda.is_available() or recipe.student.source != "tiny"
    jobs = jobs or (1 if alone else os.cpu_count() or 1)
    for number, path in enumerate(train_all(missing, jobs, teacher), 1):
        progress.note(f"{number} of {len(missing)} runs: {path}")
    results = {name: [json.loads((paths[name, seed] / "result.json").read_text()) for seed in range(seeds)] for name in arms}
    measured = {name: gather([numbers(result) for result in rows]) for name, rows in results.items()}
    main = measured[recipe.method.name]
    table = {
        "method": recipe.method.name,
        "seeds": seeds,
        "split": "test" if results[recipe.method.name][0]["test"] else "val",
        "arms": {name: {metric: summary(values) for metric, values in metrics.items()} for name, metrics in measured.items()},
        "paired": {
            name: {metric: paired(main[metric], values) for metric, values in metrics.items() if metric in main}
            for name, metrics in measured.items()
            if name != recipe.method.name
        },
        "teacher": teacher_row(results),
        "latency_ms": arm_latencies(recipe, {name: paths[name, 0] for name in arms}, teacher),
        "runs": {name: [str(folder / name / f"seed-{seed}") for seed in range(seeds)] for name in arms},
        "environment": environment(),
    }
    (folder / "bench.json").write_text(json.dumps(table, indent=1))
    return table


def check_same(folder: Path, recipe: Recipe) -> None:
    """A bench folder holds one recipe: another one is refused."""
    mark = folder / "bench.yaml"
    if mark.exists() and mark.read_text() != recipe.dump():
        raise BadInput(f"{folder} holds a bench of another recipe: choose another --out")
    if not mark.exists() and folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty and holds no bench: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipe.dump())


def train_all(work: Sequence[tuple[Recipe, Path]], jobs: int, teacher: VLM | nn.Module | None) -> Iterator[Path]:
    """Train every arm, ``jobs`` at a time; yields each folder when it is done. Other processes load the teacher themselves."""
    if jobs == 1 or len(work) < 2:
        yield from (train_arm(arm, path, teacher=teacher) for arm, path in work)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=share_cores, initargs=(jobs,)) as pool:
        futures = [pool.submit(train_arm, *item) for item in work]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train_arm(recipe: Recipe, path: Path, *, teacher: VLM | nn.Module | None = None) -> Path:
    """Train one arm. One that was cut off starts again: arms are short, and a bench must not depend on where it was cut."""
    if (path / "recipe.yaml").exists():
        shutil.rmtree(path)
    run(recipe, out=path, teacher=teacher, quiet=True)
    return path


def share_cores(jobs: int) -> None:
    """Give this process its part of the cores: more threads than cores would wait for each other."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a bench compares: those of the test split where there is one, and what the student costs."""
    student = result["student"]
    return {
        **(result["test"] or result["validation"]),
        "parameters": float(student["parameters"]),
        "seconds": result["seconds"],
    }


def gather(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Per metric, the values over seeds; a metric that a seed lacks is left out."""
    return {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def paired(values: Sequence[float], controls: Sequence[float]) -> dict[str, float | None]:
    """The mean difference by seed with its 95 % interval (Student's t over the paired differences)."""
    differences = [value - control for value, control in zip(values, controls, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return {"mean": mean, "low": None, "high": None}
    freedom = len(differences) - 1
    quantile = T95[freedom - 1] if freedom <= len(T95) else 1.96
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def arm_latencies(recipe: Recipe, folders: Mapping[str, Path], teacher: VLM | nn.Module | None) -> dict[str, float]:
    """Milliseconds of one forward on the CPU: the teacher's and each arm's first student's, in turns in this process."""
    students = {name: trained_student(path, recipe) for name, path in folders.items()}
    task = build_task(recipe, teacher, next(iter(students.values())))
    readers = {name: view for name, view in {"teacher": task.teacher, **students}.items() if isinstance(view, VLM)}
    for view in readers.values():
        view.model.to("cpu").eval()
    return latencies(with_inputs(task, readers))


def teacher_row(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The teacher's accuracy and parameters, as some arm's run measured them."""
    for row in (row for rows in results.values() for row in rows if "teacher" in row):
        accuracy = (row["test"] or row["validation"]).get("teacher_accuracy")
        return {"parameters": row["teacher"]["parameters"], **({} if accuracy is None else {"accuracy": accuracy})}
    return {}
