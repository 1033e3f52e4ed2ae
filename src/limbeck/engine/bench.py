"""Does it help? A recipe's method and its controls, over seeds, on the same data; means, deviations and paired intervals."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.engine.progress import Progress
from limbeck.engine.recipe import PATH_KEYS, Arm, Recipe, load_recipe, shipped_recipes
from limbeck.engine.run import environment, forwards, run, trained_student, with_task
from limbeck.engine.task import bare_module, build_task, learns_from_teacher, open_cache, recipe_teacher
from limbeck.errors import BadInput
from limbeck.evaluate.cost import latencies
from limbeck.models.classifier import Classifier
from limbeck.models.vlm import VLM
from limbeck.naming import nearest

# Two-sided 95 % quantiles of Student's t by degrees of freedom 1..30; beyond, the normal's with the first term of what it lacks.
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
        if arm_name(arm) in arms:
            raise BadInput(f"two arms are called {arm_name(arm)!r} (the method itself is one): give each a name of its own")
        arms[arm_name(arm)] = recipe.with_method(arm)
    for variant in arms.values():
        open_cache(variant)  # what cannot train from one is refused before a teacher is asked or anything is trained
    if recipe.cache is not None and recipe.draws_data:
        raise BadInput(
            "bench draws the training data anew for each seed, and a cache holds one draw: leave `cache` out, or give `data.seed`"
        )
    if recipe.cache is not None:
        answered = {name: with_task(variant)[0] for name, variant in arms.items() if learns_from_teacher(variant)}
        recipe = answered.get(recipe.method.name, recipe)
        # A control without a teacher has that cache too, of which it reads nothing: no run is to load the teacher.
        arms = {name: answered.get(name, variant.model_copy(update={"cache": recipe.cache})) for name, variant in arms.items()}
    check_same(folder, recipe)
    teacher = recipe_teacher(recipe)
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


def bench_all(
    *,
    seeds: int = 3,
    out: str | Path,
    names: Sequence[str] = (),
    jobs: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """`bench` of every recipe that ships with Limbeck, has controls and brings its own data; what is finished in ``out`` is not repeated.

    names: only these recipes. Writes ``scoreboard.json`` and ``scoreboard.md`` after every recipe. Returns ``{"rows", "failed"}``: a row is
    ``{"recipe", "method", "control", "metric", "method_mean", "control_mean", "gain", "low", "high", "seeds", "seconds"}`` with the metric
    that the recipe selects by, on test data where there is such; failed: recipe -> why it could not be benched.
    """
    progress, folder = Progress(quiet=quiet), Path(out)
    for name in names:
        if name not in benchable():
            raise BadInput(f"no recipe {name!r} to bench; {nearest(name, benchable())}")
    table: dict[str, Any] = {"rows": [], "failed": {}}
    for name in names or benchable():
        recipe = load_recipe(name)
        progress.note(f"{name}: {', '.join([recipe.method.name, *map(arm_name, recipe.arms)])}")
        try:
            result = bench(recipe, seeds=seeds, out=folder / name, jobs=jobs, quiet=quiet)
        except BadInput as error:
            table["failed"][name] = str(error)
            progress.warn(f"{name}: {error}")
            continue
        table["rows"] += scores(name, recipe.train.select.metric, result)
        (folder / "scoreboard.json").write_text(json.dumps(table, indent=1))
        (folder / "scoreboard.md").write_text(as_markdown(table["rows"]))
    return table


def benchable() -> dict[str, Path]:
    """The shipped recipes that have controls and need no files of the user."""
    found = {}
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        if recipe.arms and not PATH_KEYS & set(recipe.data.model_extra or {}) - {"answers"} and "/" not in name:
            found[name] = path
    return found


def scores(name: str, metric: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of one bench: the method against each control."""
    method, seconds = result["arms"][result["method"]], sum(sum(arm["seconds"]["values"]) for arm in result["arms"].values())
    rows = []
    for control, differences in result["paired"].items():
        if metric in differences:
            gain = differences[metric]
            rows.append(
                {
                    "recipe": name,
                    "method": result["method"],
                    "control": control,
                    "metric": metric,
                    "method_mean": method[metric]["mean"],
                    "control_mean": result["arms"][control][metric]["mean"],
                    "gain": gain["mean"],
                    "low": gain["low"],
                    "high": gain["high"],
                    "seeds": result["seeds"],
                    "seconds": seconds,
                }
            )
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scoreboard as a table; a gain whose interval lies above 0 is bold."""
    lines = [
        "| system | control | metric | with the system | with the control | gain | 95 % interval | seeds | seconds, all arms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = f"{row['gain']:+.3f}"
        within = "-" if row["low"] is None else f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        gain = f"**{gain}**" if (row["low"] or 0) > 0 else gain
        lines.append(
            f"| {row['method']} | {row['control']} | {row['metric'].replace('_', ' ')} | {row['method_mean']:.3f} "
            f"| {row['control_mean']:.3f} | {gain} | {within} | {row['seeds']} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def arm_name(arm: Arm | str) -> str:
    """The name of a control."""
    return arm if isinstance(arm, str) else arm.name


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
    quantile = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def arm_latencies(recipe: Recipe, folders: Mapping[str, Path], teacher: VLM | nn.Module | None) -> dict[str, float]:
    """Milliseconds of one forward on the CPU: the teacher's and each arm's first student's, in turns in this process."""
    students = {}
    for name, path in folders.items():
        with suppress(BadInput):  # of what no library builds again (simkd's student) the run itself measured the latency
            students[name] = trained_student(path, recipe)
    first = next(iter(students.values()), None)
    task = build_task(recipe, teacher, first if isinstance(first, VLM) else None)
    models = {name: model for name, model in {"teacher": task.teacher, **students}.items() if isinstance(model, VLM | Classifier)}
    for model in models.values():
        bare_module(model).to("cpu").eval()
    return latencies(forwards(task, models))


def teacher_row(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The teacher's accuracy and parameters, as some arm's run measured them."""
    for row in (row for rows in results.values() for row in rows if "teacher" in row):
        accuracy = (row["test"] or row["validation"]).get("teacher_accuracy")
        return {"parameters": row["teacher"]["parameters"], **({} if accuracy is None else {"accuracy": accuracy})}
    return {}
