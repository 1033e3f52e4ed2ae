"""A run: one recipe, one folder. Train, resume, evaluate; every command and the Python functions come here."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from safetensors.torch import load_file, save_model
from safetensors.torch import load_model as load_model_file
from torch import nn

from limbeck import __version__
from limbeck.batch import Batch, teacher_side
from limbeck.engine.batches import EVALUATION_BATCH, collate_pairs, evaluation_loader, typical_batch
from limbeck.engine.checkpoint import save_tensors, write_atomically
from limbeck.engine.config import TrainConfig
from limbeck.engine.progress import Progress
from limbeck.engine.recipe import CacheSpec, Recipe, load_recipe
from limbeck.engine.task import Task, bare_module, build_task, cache_folder, load_model, open_cache, validator
from limbeck.engine.trainer import PRECISION, Evaluate, Trainer, forget_accelerator, introduce
from limbeck.errors import BadInput, StaleCache
from limbeck.evaluate import protocols
from limbeck.evaluate.cost import first_token, flops, latencies, parameters, size_bytes
from limbeck.evaluate.probe import ProbeResult, probe
from limbeck.methods.base import Method
from limbeck.models.classifier import VIEW_FILE, Classifier
from limbeck.models.loading import load_vlm, quiet_bars
from limbeck.models.vision import load_classifier
from limbeck.models.vlm import VLM
from limbeck.settings import validated

CLAIM = ".claim"  # in a run's folder, while it is set up
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
    loaded, in place of the recipe's. A cache of answers that the recipe asks for by itself is completed or written anew where it no
    longer fits. Raises `BadInput` before anything is written where the recipe, the models or the data do not fit.
    """
    recipe = load_recipe(recipe, overrides)
    if teacher is not None and isinstance(recipe.cache, CacheSpec):
        raise BadInput("`cache` asks the recipe's teacher, and another one is given: leave `cache` out")
    with claimed(Path(out) if out else None, recipe.method.name) as folder:
        recipe, task = with_task(recipe, teacher)
        trainer = task_trainer(task, recipe, folder, quiet=quiet)
        if trainer.accelerator.is_main_process:
            write_head(folder, recipe, task)
        trainer.accelerator.wait_for_everyone()
    return finish(trainer, task, resume=False)


def with_task(recipe: Recipe, teacher: VLM | nn.Module | None = None) -> tuple[Recipe, Task]:
    """The recipe with the folder of its teacher's answers, where it asks for them to be written, and its task."""
    from limbeck.engine.cache import asked_once

    if isinstance(recipe.cache, CacheSpec):
        open_cache(recipe)  # what cannot train from one is refused before the teacher is asked
    answered = asked_once(recipe)
    try:
        return answered, build_task(answered, teacher)
    except StaleCache:
        if answered is recipe:
            raise
    answered = asked_once(recipe, again=True)
    return answered, build_task(answered, teacher)


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
    task = build_task(recipe, student=None if trained_apart else trained_student(folder, recipe), taught=bool(adapters))
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
    load_model_file(bare_module(student), folder / "student" / "model.safetensors")
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
        check_unused(folder)
        processes().wait_for_everyone()

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
    if trainer.accelerator.is_main_process:
        save_student(task.method, trainer.out)  # whatever becomes of measuring it
    test = trainer.measured(partial(task.measure, split="test")) if "test" in task.held_out else {}
    measured, chance = test or validation, task.commonest_answer("test" if test else "val")
    if measured.get("teacher_accuracy", math.inf) <= chance:
        trainer.progress.warn(
            f"the teacher is at chance: it is right on {measured['teacher_accuracy']:.1%} of the answers, always giving the commonest "
            f"one is right on {chance:.1%}; are its weights, its prompt and its pictures what it was trained on?"
        )
    folder = trainer.out
    if trainer.accelerator.is_main_process:
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


@contextmanager
def claimed(folder: Path | None, method: str) -> Iterator[Path]:
    """Hold a run's folder until its recipe is in it. None: a new one, ``runs/<method>-<time>``. Refuses one that holds another run (or
    anything else), or in which another is being set up; what is left empty goes."""
    state = processes()
    made = folder is None or not folder.exists()
    if folder is None:
        [folder] = broadcast_object_list([_new_folder(method) if state.is_main_process else None])
    check_unused(folder)
    state.wait_for_everyone()
    with ExitStack() as held:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            if made:
                held.callback(_remove_empty, folder)
            mark = folder / CLAIM
            file = held.enter_context(mark.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"another run is just being set up in {folder}: choose another --out") from None
            held.callback(mark.unlink, missing_ok=True)
            check_unused(folder)
        yield folder


def _new_folder(method: str) -> Path:
    name = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        with suppress(FileExistsError):
            folder = Path(f"{name}-{number}" if number > 1 else name)
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def check_unused(folder: Path) -> None:
    """`BadInput` for a folder that holds another run, or anything else."""
    if folder.exists() and (not folder.is_dir() or any(path.name != CLAIM for path in folder.iterdir())):
        if (folder / "result.json").exists():
            raise BadInput(f"{folder} holds another run, which is finished: choose another --out")
        if (folder / "recipe.yaml").exists():
            raise BadInput(f"{folder} holds another run: choose another --out, or continue it with `limbeck resume {folder}`")
        raise BadInput(f"{folder} is not empty: choose another --out")


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
    adapters = {name: tensor for name, tensor in method.state_dict().items() if not name.startswith(kept)}
    if adapters:
        save_tensors(adapters, folder / "adapters.safetensors")


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
    with ExitStack() as held:
        if state.is_main_process:
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(lock.open("w")), fcntl.LOCK_EX)
        state.wait_for_everyone()
        yield
