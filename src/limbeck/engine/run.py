"""A run: one recipe, one folder. Train, resume, evaluate; every command and the Python functions come here."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from limbeck import __version__
from limbeck.batch import Batch, teacher_side
from limbeck.engine.batches import EVALUATION_BATCH, collate_pairs, evaluation_loader, typical_batch
from limbeck.engine.checkpoint import write_atomically
from limbeck.engine.config import TrainConfig
from limbeck.engine.progress import Progress
from limbeck.engine.recipe import Recipe, load_recipe
from limbeck.engine.task import Task, bare_module, build_task, cache_folder, load_model, validator
from limbeck.engine.trainer import PRECISION, Evaluate, Trainer, forget_accelerator, introduce
from limbeck.errors import BadInput
from limbeck.evaluate import protocols
from limbeck.evaluate.cost import first_token, flops, latencies, parameters, size_bytes
from limbeck.evaluate.probe import ProbeResult, probe
from limbeck.methods.base import Method
from limbeck.models.classifier import VIEW_FILE, Classifier
from limbeck.models.loading import load_vlm, quiet_bars
from limbeck.models.vision import load_classifier
from limbeck.models.vlm import VLM
from limbeck.settings import validated

VERSIONS = ("torch", "transformers", "accelerate", "numpy", "safetensors", "pydantic", "datasets", "scikit-learn")


@dataclass
class Run:
    """A finished run. student: the trained module, bare. validation, test: metrics of the kept student, where there was such data."""

    path: Path
    method: Method
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)

    @property
    def student(self) -> nn.Module:
        return self.method.deployable()

    @property
    def metrics(self) -> dict[str, float]:
        """Test metrics where there is a test split, else validation metrics."""
        return self.test or self.validation


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    teacher: VLM | nn.Module | None = None,
) -> Run:
    """Train what a recipe describes into the folder ``out`` (default ``runs/<method>-<time>``).

    recipe: a file, the name of a shipped recipe, a mapping or a `Recipe`. overrides: ``["--train.lr", "3e-4"]``. teacher: one already
    loaded, in place of the recipe's. Raises `BadInput` before anything is written where the recipe, the models or the data do not fit.
    """
    recipe = load_recipe(recipe, overrides)
    processes()
    [stamp] = broadcast_object_list([time.strftime("%Y%m%d-%H%M%S")])  # clocks differ between machines
    folder = Path(out or f"runs/{recipe.method.name}-{stamp}")
    claim(folder)
    recipe = with_answers(recipe)
    task = build_task(recipe, teacher)
    trainer = task_trainer(task, recipe, folder, quiet=quiet)
    if trainer.accelerator.is_main_process:
        write_head(folder, recipe, task)
    return finish(trainer, task, resume=False)


def with_answers(recipe: Recipe) -> Recipe:
    """The recipe with the folder of its teacher's answers, where it asks for them to be written."""
    from limbeck.engine.cache import asked_once

    return asked_once(recipe)


def resume(folder: str | Path, *, quiet: bool = False) -> Run:
    """Go on with an interrupted run from its newest whole checkpoint, mid-epoch; the result is that of the uninterrupted run."""
    folder = run_folder(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    if (folder / "result.json").exists():
        raise BadInput(f"{folder} is complete: nothing to resume (its student is in {folder / 'student'})")
    task = build_task(recipe)
    return finish(task_trainer(task, recipe, folder, quiet=quiet), task, resume=True)


def task_trainer(task: Task, recipe: Recipe, folder: Path, *, quiet: bool) -> Trainer:
    """The trainer of a task, ready to train: placed, surveyed and rehearsed."""
    trainer = Trainer(
        task.method,
        task.data,
        recipe.train,
        folder,
        collate=task.collate,
        evaluate=validator(task),
        reference=task.reference,
        quiet=quiet,
    )
    trainer.setup()
    task.rehearse(trainer)
    return trainer


def evaluate_run(folder: str | Path, *, split: str = "test", names: Sequence[str] | None = None) -> dict[str, float]:
    """Measure the student of a finished run on a split. names: protocols, else the recipe's."""
    wanted = names or load_recipe(run_folder(folder) / "recipe.yaml").evaluate
    task, accelerator = reopen(folder, teacher=any(map(protocols.needs_teacher, wanted)))
    task.batches(split)
    if names:
        task.protocols = tuple(names)
    with torch.no_grad(), accelerator.autocast():
        return task.measure(task.method, accelerator, split=split)


def reopen(folder: str | Path, *, teacher: bool = True) -> tuple[Task, Accelerator]:
    """The task of a finished run with its trained student in place, on the device, in eval mode.

    teacher: whether it is needed; a run that trained from a cache, which still is there, is reopened without it otherwise.
    """
    folder = run_folder(folder)
    if not (folder / "student").is_dir():
        raise BadInput(f"{folder} has no student yet: finish it with `limbeck resume {folder}`")
    recipe = load_recipe(folder / "recipe.yaml")
    if isinstance(recipe.cache, str) and (teacher or not Path(recipe.cache).is_dir()):
        recipe = recipe.model_copy(update={"cache": None})
    adapters = load_file(folder / "adapters.safetensors") if (folder / "adapters.safetensors").exists() else {}
    trained_apart = any(name.startswith("student.") for name in adapters)
    task = build_task(recipe, student=None if trained_apart else trained_student(folder, recipe))
    if adapters:
        introduce(task.method, next(iter(task.data.values())))
        with torch.no_grad():
            task.method.eval().prepare(typical_batch(next(iter(task.data.values())), task.collate))
        task.method.load_state_dict(adapters, strict=False)
    forget_accelerator()
    accelerator = Accelerator(mixed_precision=PRECISION[recipe.train.precision])
    task.method.to(accelerator.device).eval()
    if task.teacher is not None:
        bare_module(task.teacher).to(accelerator.device)
    return task, accelerator


def trained_student(folder: Path, recipe: Recipe) -> VLM | nn.Module:
    """The student that a run wrote, by the library that it came from."""
    if (folder / "student" / VIEW_FILE).exists():
        return load_classifier(folder / "student")
    if (folder / "student" / "config.json").exists():
        return load_vlm("transformers", str(folder / "student"), dtype="float32")
    student = load_model(recipe.student, recipe.train.seed)
    bare_module(student).load_state_dict(load_file(folder / "student" / "model.safetensors"))
    return student


def probe_run(folder: str | Path, *, split: str = "val") -> ProbeResult:
    """The four hybrids of teacher and student vision and language of a finished run (`limbeck.evaluate.probe`)."""
    task, accelerator = reopen(folder)
    if not isinstance(task.teacher, VLM) or not isinstance(getattr(task.method, "view", None), VLM):
        raise BadInput(f"{folder}: a probe needs a vision-language student and teacher; this recipe has no such teacher")
    switched = protocols.switch_of(task.method)
    view: Any = task.method.view
    with accelerator.autocast():
        return probe(task.batches(split), view, task.teacher, switched=switched, device=accelerator.device)


def distill(
    method: Method,
    train_data: Any,
    eval_data: Any = None,
    *,
    out: str | Path,
    collate: Callable[[list[Any]], Batch] = collate_pairs,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    quiet: bool = False,
    lr: float = 1e-3,
    **train: Any,
) -> Run:
    """Train any `Method` on any map-style dataset.

    train_data, eval_data: datasets of (image, label) pairs or mappings of tensors; other items need ``collate``. evaluate: called with
    (method, accelerator) on validation data; the default measures the accuracy of the student on ``eval_data``. lr: peak learning rate;
    the default suits modules that start from random weights, a pretrained student wants less. train: the other keywords of
    `limbeck.engine.config.TrainConfig` (epochs, batch_size, precision, ...). resume: go on from the newest checkpoint in ``out``.
    """
    config = validated(TrainConfig, {"lr": lr, **train}, "distill")
    folder = Path(out)
    if not resume:
        claim(folder)

    def accuracy(method: Method, accelerator: Accelerator) -> dict[str, float]:
        loader = evaluation_loader(
            eval_data, collate, EVALUATION_BATCH, rank=accelerator.process_index, world=accelerator.num_processes
        )
        return protocols.evaluate(protocols.default_for(method), loader, method, device=accelerator.device)

    measure = evaluate or (accuracy if eval_data is not None else None)
    trainer = Trainer(method, train_data, config, folder, collate=collate, evaluate=measure, quiet=quiet)
    trainer.setup()
    if trainer.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "environment.json", json.dumps(environment(), indent=1))
    validation = trainer.fit(resume=resume)
    if trainer.accelerator.is_main_process:
        save_student(method, folder)
    trainer.accelerator.wait_for_everyone()
    return Run(folder, method, validation)


def finish(trainer: Trainer, task: Task, *, resume: bool) -> Run:
    """Train to the end, keep the student, measure it on the test split."""
    started = time.perf_counter()
    validation = trainer.fit(resume=resume)
    seconds = time.perf_counter() - started
    test = trainer.measured(partial(task.measure, split="test")) if "test" in task.held_out else {}
    measured, chance = test or validation, task.commonest_answer("test" if test else "val")
    if measured.get("teacher_accuracy", 1.0) <= chance:
        trainer.progress.warn(
            f"the teacher is at chance: it is right on {measured['teacher_accuracy']:.1%} of the answers, always giving the commonest "
            f"one is right on {chance:.1%}; are its weights, its prompt and its pictures what it was trained on?"
        )
    folder = trainer.out
    if trainer.accelerator.is_main_process:
        save_student(task.method, folder)
        result = {"validation": validation, "test": test, "seconds": seconds, "steps": trainer.total_steps, **costs(task)}
        write_atomically(folder / "result.json", json.dumps(result, indent=1))
    trainer.accelerator.wait_for_everyone()
    return Run(folder, task.method, validation, test)


def costs(task: Task) -> dict[str, Any]:
    """Parameters and latency of the student, as it is shipped, and of the teacher; bytes and operations too, of image classifiers."""
    views = {"student": getattr(task.method, "view", task.method.deployable()), "teacher": task.teacher}
    found: dict[str, Any] = {
        name: {"parameters": parameters(bare_module(view))} for name, view in views.items() if view is not None
    }
    calls = forwards(task, {name: view for name, view in views.items() if isinstance(view, VLM | Classifier)})
    device = next(task.method.student.parameters()).device
    for name, milliseconds in latencies(calls, device=device).items():
        found[name]["latency_ms"] = milliseconds
        view = views[name]
        if isinstance(view, Classifier):
            found[name] |= {"bytes": size_bytes(view), "flops": flops(view, *calls[name].args)}
    return found


def forwards(task: Task, models: Mapping[str, VLM | Classifier]) -> dict[str, partial[Any]]:
    """One forward of each model over one held-out sample, on its device; "teacher" reads the teacher's side. Empty without samples."""
    split = next(iter(task.held_out), None)
    if split is None:
        return {}
    sample = task.collate([task.held_out[split][0]])

    def forward(name: str, model: VLM | Classifier) -> partial[Any]:
        device = next(bare_module(model).parameters()).device
        if isinstance(model, Classifier):
            return partial(model.eval(), sample["pixel_values"].to(device))
        inputs = teacher_side(sample) if name == "teacher" else sample["student"]
        return partial(
            first_token, model, {key: value.to(device) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        )

    return {name: forward(name, model) for name, model in models.items()}


def claim(folder: Path) -> None:
    """Refuse a folder that holds another run (or anything else)."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / "result.json").exists():
            raise BadInput(f"{folder} holds another run, which is finished: choose another --out")
        if (folder / "recipe.yaml").exists():
            raise BadInput(f"{folder} holds another run: choose another --out, or continue it with `limbeck resume {folder}`")
        raise BadInput(f"{folder} is not empty: choose another --out")
    processes().wait_for_everyone()


def processes() -> PartialState:
    """The processes of this launch; joined on CPUs where ``accelerate launch --cpu`` says so."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def run_folder(folder: str | Path) -> Path:
    """The folder of a run; `BadInput` where there is none."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise BadInput(f"{folder} is not a run folder: it has no recipe.yaml")
    return folder


def write_head(folder: Path, recipe: Recipe, task: Task) -> None:
    """What a run writes before its first step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.yaml", recipe.dump())
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=1))
    if task.skipped:
        write_atomically(folder / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in task.skipped))


def save_student(method: Method, folder: Path) -> None:
    """Write ``student/`` so that the library it came from loads it, whole or not at all; adapters beside it."""
    staged = folder / ".student"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    student: Any = method.deployable()
    if isinstance(student, Classifier):
        student.save(staged)
    elif hasattr(student, "save_pretrained"):
        with quiet_bars():
            student.save_pretrained(staged)
        processor = getattr(getattr(method, "view", None), "processor", None)
        if processor is not None:
            processor.save_pretrained(staged)
    else:
        save_model(student, str(staged / "model.safetensors"))
    shutil.rmtree(folder / "student", ignore_errors=True)
    os.replace(staged, folder / "student")
    kept = "student." if student is method.student else "nothing"  # a method that ships something else than it trains keeps both
    adapters = {name: tensor.contiguous() for name, tensor in method.state_dict().items() if not name.startswith(kept)}
    if adapters:
        save_file(adapters, folder / "adapters.safetensors")


def environment() -> dict[str, Any]:
    """What a run ran on. No environment variables: they hold secrets."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "limbeck": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": processes().num_processes,
        "packages": found,
    }


def trained_once(source: str, overrides: Sequence[str] = ()) -> VLM | nn.Module:
    """The student of a recipe, trained the first time it is asked for and kept in the cache under the recipe's fingerprint."""
    recipe = load_recipe(source, overrides)
    kept = cache_folder() / "teachers" / f"{Path(source).stem}-{recipe.fingerprint}"
    state = processes()
    with one_at_a_time(kept.with_name(f"{kept.name}.lock"), state):
        [missing] = broadcast_object_list([not (kept / "student").is_dir()])
        if missing:
            unfinished = kept.with_name(f"{kept.name}.unfinished")
            if state.is_main_process:
                Progress().note(f"training the teacher of {Path(source).name}, once; it is kept in {kept}")
                shutil.rmtree(unfinished, ignore_errors=True)
            state.wait_for_everyone()
            run(recipe, out=unfinished)
            if state.is_main_process:
                os.replace(unfinished, kept)
            state.wait_for_everyone()
    if (kept / "student" / VIEW_FILE).exists():
        return load_classifier(kept / "student")
    return load_vlm("transformers", str(kept / "student"))


@contextmanager
def one_at_a_time(lock: Path, state: PartialState) -> Any:
    """Hold a lock file among the programs of this machine; the processes of one program hold it together."""
    import fcntl

    with ExitStack() as held:
        if state.is_main_process:
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(lock.open("w")), fcntl.LOCK_EX)
        state.wait_for_everyone()
        yield
