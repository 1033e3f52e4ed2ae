"""What a recipe would do and cost, without doing it: ``limbeck run RECIPE --dry-run``.

transformers models are built on the meta device from their configuration alone, so that a plan needs neither weights nor memory nor, with
folders that hold a ``config.json``, a network. Data that is on this machine is read and checked as the run would; for data
that is not, lengths are assumptions (`Assumptions`), and the plan says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from limbeck.engine.batches import padding, sample_lengths
from limbeck.engine.estimate import PARTS, Sizes, Tokens, Work, flops, image_tokens, memory, sizes_of
from limbeck.engine.pictures import Pictures
from limbeck.engine.recipe import (
    PATH_KEYS,
    CacheSpec,
    DataSpec,
    ModelSpec,
    Recipe,
    load_recipe,
    option_overrides,
    parse_overrides,
)
from limbeck.engine.task import (
    Task,
    check_fingerprint,
    classifies,
    data_specs,
    learns_from_teacher,
    load_model,
    open_cache,
    pictures_task,
    plain_task,
    taught_task,
    vision_language_task,
)
from limbeck.engine.trainer import PlannedStage, choose_trainable, introduce, match_stages, stage_steps
from limbeck.errors import BadInput
from limbeck.evaluate import protocols
from limbeck.evaluate.cost import flops as forward_flops
from limbeck.methods.base import Method
from limbeck.methods.objectives import unwrapped
from limbeck.methods.registry import configure, find
from limbeck.methods.vlm.base import VLMMethod
from limbeck.models.loading import kind_of
from limbeck.models.vlm import VLM
from limbeck.naming import nearest

MEASURED = 64  # samples whose tokens are counted
GIB = 2**30


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say.

    devices: processes of the launch, one device each. flops: a device's peak, FLOP/s (an H100's in bf16). utilisation: the share of it
    that training reaches. samples: of a data set that is not on this machine. image_tokens, text_tokens, answer_tokens: of an
    average sample of it; image_tokens null asks the model's configuration; text counts question and answer, answer the supervised.
    """

    devices: int = 1
    flops: float = 989e12
    utilisation: float = 0.4
    samples: int | None = None
    image_tokens: int | None = None
    text_tokens: int = 128
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        if self.devices < 1 or self.flops <= 0 or not 0 < self.utilisation <= 1:
            given = f"{self.devices}, {self.flops} and {self.utilisation}"
            raise BadInput(f"a plan needs devices >= 1, flops > 0 and 0 < utilisation <= 1, given {given}")


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe, *, overrides: Sequence[str] = (), plan: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Resolve a recipe and estimate what it costs; nothing is trained or written.

    overrides: as of `limbeck.engine.run.run`; those under ``--plan.`` set `Assumptions` (``--plan.devices 32``). plan: the same as a
    mapping. Returns what ``limbeck run --dry-run --json`` prints: ``{"method", "assumptions", "models", "taps", "checks", "notes",
    "sample", "stages", "hours"}``; bytes, FLOP and hours by the formulas of `limbeck.engine.estimate`.
    Raises `BadInput` where the run would: unknown keys, models that cannot be switched, data that is here and broken.
    """
    assumed, rest = assumptions(overrides, plan or {})
    resolved = load_recipe(recipe, rest)
    method_class: Any = find(resolved.method.name).load()
    hyper = vars(configure(method_class, resolved.method.hyper))
    for name in resolved.evaluate:
        protocols.find(name)
    specs = data_specs(resolved)
    pictures = Pictures.of(specs, beside=method_class.unlabelled_beside) if classifies(resolved) else None
    classes = None if pictures is None else pictures.classes
    student = skeleton(resolved.student, classes)
    cached = open_cache(resolved)
    teacher = skeleton(resolved.teacher, classes) if resolved.teacher and cached is None else None
    method = method_class(student, (cached or teacher) if method_class.learns_from_teacher(hyper) else None, **hyper)
    if cached is not None:
        check_fingerprint(resolved, method, cached, classes or ())
    if isinstance(method, VLMMethod):
        planned = _plan_vision_language(resolved, method, teacher, specs, assumed)
    else:
        bare = teacher.model if isinstance(teacher, VLM) else teacher
        task = plain_task(resolved, method, bare, specs) if pictures is None else pictures_task(resolved, method, bare, pictures)
        planned = _plan_plain(resolved, method, bare, task, assumed)
    if isinstance(resolved.cache, CacheSpec):
        planned["notes"].append(
            f"the teacher is asked once, {resolved.cache.views} views of each sample, and not loaded while training"
        )
    if cached is not None:
        planned["notes"].append(f"the teacher is not loaded: what it says is read from {cached.folder}")
    return planned


def assumptions(overrides: Sequence[str], given: Mapping[str, Any]) -> tuple[Assumptions, list[str]]:
    """The assumptions among the overrides (``--plan.devices 32``) and in ``given``, and the overrides that are left."""
    known = [field.name for field in dataclasses.fields(Assumptions)]
    values, rest = dict(given), []
    for key, value in parse_overrides(overrides):
        if key.startswith("plan."):
            values[key.removeprefix("plan.")] = value
        else:
            rest.append(f"--{key}={json.dumps(value)}")
    for key in values:
        if key not in known:
            raise BadInput(f"a plan has no assumption {key!r}; {nearest(key, known)}")
    try:
        return TypeAdapter(Assumptions).validate_python(values), rest
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("plan", *map(str, first["loc"])))
        raise BadInput(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def skeleton(spec: ModelSpec, classes: Sequence[str] | None = None) -> VLM | nn.Module:
    """The model of a spec, for its sizes: on the meta device where transformers builds a vision-language model; a recipe's student is not
    trained. classes: of the data."""
    if spec.source == "recipe":
        recipe = load_recipe(spec.name, option_overrides(spec))
        return skeleton(recipe.student, Pictures.of(data_specs(recipe)).classes if classifies(recipe) else None)
    if spec.source != "transformers" or kind_of(spec.model_dump(exclude_defaults=True)) == "classifier":
        return load_model(spec, seed=0, classes=classes)
    with torch.device("meta"):
        return load_model(spec.model_copy(update={"random_init": True, "weights": None}), seed=0)


def views_of(method: VLMMethod) -> dict[str, VLM]:
    """The student's view and, where the method asks a teacher in person, the teacher's."""
    teacher = getattr(method, "teacher_view", None)
    return {"student": method.view, **({} if teacher is None else {"teacher": teacher})}


# -- vision-language models ------------------------------------------------------------------------------------------------------------


def _plan_vision_language(
    recipe: Recipe, method: VLMMethod, teacher: VLM | nn.Module | None, specs: Mapping[str, DataSpec], assumed: Assumptions
) -> dict[str, Any]:
    views = views_of(method)
    sizes = {side: sizes_of(view) for side, view in views.items()}
    lengths, tokens, notes = _measure(recipe, method, teacher, specs, assumed)
    stages, asked = [], set[str]()
    for stage in _stages(recipe, method, lengths, assumed):
        frozen = choose_trainable(method, stage)
        trains = _trainable_parts(method)
        for parameter in frozen:
            parameter.requires_grad_(True)
        weights = {**method.weights, **stage.weights}
        terms = {name: weight for name, weight in weights.items() if weight} or {"ce": 1.0}
        work = Work(
            trained=[part for part in PARTS if trains.get(part)],
            teacher="teacher" in views and any(name != "ce" for name in terms),
            switch="switch" in terms,
            checkpointed=recipe.train.gradient_checkpointing,
            recomputed_switch=recipe.method.hyper.get("checkpoint_switch", False),
        )
        per_sample = flops(sizes["student"], tokens["student"], work, sizes.get("teacher"), tokens.get("teacher"))
        row = _stage_row(stage, trains, terms, lengths, per_sample, assumed, _once(recipe, stage, lengths, per_sample, asked))
        row["tokens"] = round(row["samples_seen"] * tokens["student"].all)
        row["micro_batch_size"] = recipe.train.micro_batch_size or stage.batch_size // assumed.devices
        row["memory"] = _memory(recipe, row["micro_batch_size"], sizes, tokens, work, assumed)
        stages.append(row)
    return {
        "method": recipe.method.name,
        "assumptions": dataclasses.asdict(assumed),
        "models": {side: _model_row(getattr(recipe, side), view, sizes[side]) for side, view in views.items()},
        "taps": _taps(method, views),
        "checks": _checks(method, views),
        "notes": notes,
        "sample": {side: dataclasses.asdict(count) for side, count in tokens.items()},
        "stages": stages,
        "hours": sum(stage["hours"] for stage in stages),
    }


def _measure(
    recipe: Recipe, method: VLMMethod, teacher: VLM | nn.Module | None, specs: Mapping[str, DataSpec], assumed: Assumptions
) -> tuple[dict[str, int | None], dict[str, Tokens], list[str]]:
    """Samples by stage (None: unknown), tokens of an average sample by side, and what of it is assumed."""
    views = views_of(method)
    lacking = next((path for spec in specs.values() for path in _absent(spec)), None)
    if lacking is None and method.view.processor is not None:
        task = vision_language_task(recipe, method, method.view, teacher, specs)
        if (cached := open_cache(recipe)) is not None:
            taught_task(recipe, task, cached)  # are its samples all there?
        samples: dict[str, int | None] = {stage: len(dataset) for stage, dataset in task.data.items()}
        train = task.data["train"]
        return samples, {side: _count(train, side, view) for side, view in views.items()}, [_padding(recipe, train, assumed)]
    why = f"{lacking} is not on this machine" if lacking else f"{recipe.student.name} has no processor"
    notes = [f"{why}: samples and tokens are assumed (--plan.samples, --plan.text_tokens, --plan.answer_tokens)"]
    tokens = {}
    for side, view in views.items():
        pictured = assumed.image_tokens or image_tokens(view)
        if pictured is None:
            raise BadInput(f"how many tokens a picture becomes in {view.family} depends on its size: state --plan.image_tokens")
        tokens[side] = Tokens(pictured, assumed.text_tokens, assumed.answer_tokens)
    return dict.fromkeys(specs, assumed.samples), tokens, notes


def _padding(recipe: Recipe, dataset: Any, assumed: Assumptions) -> str:
    """What grouping by length saves, or would save."""
    config, lengths = recipe.train, sample_lengths(dataset)
    batch = min(config.batch_size, len(dataset))
    micro = config.micro_batch_size or max(1, batch // assumed.devices)
    plain, grouped = (padding(lengths, batch, micro, seed=config.seed, grouped=grouped) for grouped in (False, True))
    state = "on" if config.group_by_length else "off"
    return f"padding is about {plain:.0%} of a micro-batch of {micro}, {grouped:.0%} with train.group_by_length (it is {state})"


def _absent(spec: DataSpec) -> list[str]:
    """The files that a data spec names and this machine lacks. What a hub holds counts as absent: a plan downloads nothing."""
    return [
        value
        for key, value in (spec.model_extra or {}).items()
        if key in PATH_KEYS and not Path(str(value)).expanduser().exists()
    ]


def _count(dataset: Any, side: str, view: VLM) -> Tokens:
    """Mean tokens over up to `MEASURED` samples, spread evenly."""
    config = view.model.config
    picture = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
    chosen = range(0, len(dataset), max(1, len(dataset) // MEASURED))[:MEASURED]
    image = text = answer = 0
    for index in chosen:
        sample = dataset[index]
        inputs = sample.get(side, sample["student"])
        pictured = int((inputs["input_ids"] == picture).sum())
        image += pictured
        text += len(inputs["input_ids"]) - pictured
        answer += int((inputs["labels"] != -100).sum())
    return Tokens(image / len(chosen), text / len(chosen), answer / len(chosen))


def _trainable_parts(method: VLMMethod) -> dict[str, int]:
    """Trainable parameters by part of the student; "adapters" for what is none of it."""
    trains: dict[str, int] = {}
    for name, parameter in method.named_parameters():
        part = method.view.part_of(name.removeprefix("student.")) if name.startswith("student.") else "adapters"
        if parameter.requires_grad:
            trains[part] = trains.get(part, 0) + parameter.numel()
    return trains


def _model_row(spec: ModelSpec, view: VLM, sizes: Sizes) -> dict[str, Any]:
    return {
        "name": f"{spec.source}:{spec.name}",
        "family": view.family,
        "dtype": str(next(view.model.parameters()).dtype).removeprefix("torch."),
        "parameters": {**sizes.parameters, "total": sizes.total},
        "vocabulary": sizes.vocabulary,
    }


def _taps(method: VLMMethod, views: Mapping[str, VLM]) -> list[dict[str, Any]]:
    """What the visual switch reads in the student and replaces in the teacher; nothing for methods without one."""
    if "switch" not in method.weights:
        return []
    action = {"student": "its input is read", "teacher": "its input is replaced"}
    return [
        {"model": side, "module": module, "what": action[side], "width": width}
        for side, view in views.items()
        for module, width in zip(view.parts()["projector"], view.visual_widths, strict=False)
    ]


def _checks(method: VLMMethod, views: Mapping[str, VLM]) -> list[dict[str, str]]:
    """What was checked when the method was built; a check that fails has raised by then."""
    if "teacher" not in views:
        return []
    rows = [{"check": "vocabulary", "result": f"{method.vocabulary:,} token ids are shared"}]
    if "switch" in method.weights:
        ours, theirs = (list(view.visual_widths) for view in views.values())
        bridged = "" if ours == theirs else ", through a trained bridge"
        rows.append({"check": "visual switch", "result": f"widths {ours} -> {theirs}{bridged}; token counts: on the first batch"})
    return rows


# -- any other modules -----------------------------------------------------------------------------------------------------------------


def _plan_plain(recipe: Recipe, method: Method, teacher: nn.Module | None, task: Task, assumed: Assumptions) -> dict[str, Any]:
    """Forwards are counted, not estimated: torch's FlopCounterMode on one sample; 3 forwards of the student, 1 of a teacher that the
    method learns from."""
    if (cached := open_cache(recipe)) is not None:
        task = taught_task(recipe, task, cached)
    dataset = next(iter(task.data.values()))
    if recipe.train.group_by_length:
        sample_lengths(dataset)
    batch = task.collate([dataset[index] for index in range(min(2, len(dataset)))])
    introduce(method, dataset)
    with torch.no_grad():
        method.eval().prepare(batch)
    models = {"student": method.student, **({"teacher": teacher} if teacher is not None else {})}
    forward = {side: forward_flops(model, batch["pixel_values"][:1]) for side, model in models.items()}
    lengths = {stage: len(data) for stage, data in task.data.items()}
    taught = float(forward.get("teacher", 0)) if learns_from_teacher(recipe) else 0.0
    stages, asked = [], set[str]()
    for stage in _stages(recipe, method, lengths, assumed):
        frozen = choose_trainable(method, stage)
        trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
        for parameter in frozen:
            parameter.requires_grad_(True)
        per_sample = {"student": 3.0 * forward["student"], "teacher": taught, "switch": 0.0}
        terms = {name: weight for name, weight in {**method.weights, **stage.weights}.items() if weight}
        once = _once(recipe, stage, lengths, per_sample, asked)
        stages.append(_stage_row(stage, {"method": trained}, terms, lengths, per_sample, assumed, once))
    return {
        "method": recipe.method.name,
        "assumptions": dataclasses.asdict(assumed),
        "models": {
            side: {
                "name": f"{getattr(recipe, side).source}:{getattr(recipe, side).name}",
                "family": type(unwrapped(model)).__name__,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "parameters": {"total": sum(parameter.numel() for parameter in model.parameters())},
            }
            for side, model in models.items()
        },
        "taps": [],
        "objectives": [dataclasses.asdict(row) for row in getattr(method, "plan", list)()],
        "checks": [],
        "notes": ["memory is estimated for vision-language models only"],
        "sample": {},
        "stages": stages,
        "hours": sum(stage["hours"] for stage in stages),
    }


# -- stages ----------------------------------------------------------------------------------------------------------------------------


def _stages(recipe: Recipe, method: Method, lengths: Mapping[str, int | None], assumed: Assumptions) -> Iterable[PlannedStage]:
    config = recipe.train
    for stage, given in match_stages(method.stages(), config.stages):
        samples = lengths.get(stage.name, lengths["train"])
        batch = min(given.batch_size or config.batch_size, samples or 2**31)
        stated = given.steps or (config.steps if given.epochs is None else None)
        if samples is None and stated is None:
            raise BadInput(
                f"stage {stage.name!r} lasts as long as data that is not here: state --plan.samples, or steps in the recipe"
            )
        each = assumed.devices * (config.micro_batch_size or 1)
        if batch % each:
            pieces = f" in micro-batches of {config.micro_batch_size}" if config.micro_batch_size else ""
            raise BadInput(
                f"batch_size {batch} cannot be shared by {assumed.devices} devices{pieces}: choose a multiple of {each}"
            )
        steps = stage_steps(config, given, (samples or 0) // batch)
        micro = config.micro_batch_size or batch // assumed.devices
        yield PlannedStage(stage.name, stage.trainable, stage.weights, None, batch, micro, steps, given.lr or config.lr, 0)


def _once(
    recipe: Recipe, stage: PlannedStage, lengths: Mapping[str, int | None], per_sample: Mapping[str, float], asked: set[str]
) -> int | None:
    """For how many samples a stage asks a teacher that a cache asks once: by the first stage that learns from it on that data. None: at
    every step. asked: the data of earlier stages."""
    data = stage.name if stage.name in lengths else "train"
    samples = lengths[data]
    if not isinstance(recipe.cache, CacheSpec) or samples is None or not per_sample["teacher"]:
        return None
    if data in asked:
        return 0
    asked.add(data)
    return samples * recipe.cache.views


def _stage_row(
    stage: PlannedStage,
    trains: Mapping[str, int],
    terms: Mapping[str, float],
    lengths: Mapping[str, int | None],
    per_sample: Mapping[str, float],
    assumed: Assumptions,
    asked: int | None,
) -> dict[str, Any]:
    samples, seen = lengths.get(stage.name, lengths["train"]), stage.batch_size * stage.steps
    total = {route: cost * seen for route, cost in per_sample.items()}
    if asked is not None:
        total["teacher"] = per_sample["teacher"] * asked
    return {
        "name": stage.name,
        "trains": dict(trains),
        "terms": dict(terms),
        "samples": samples,
        "batch_size": stage.batch_size,
        "steps": stage.steps,
        "epochs": seen / samples if samples else None,
        "lr": stage.lr,
        "samples_seen": seen,
        "flops": {**total, "total": sum(total.values())},
        "hours": sum(total.values()) / (assumed.devices * assumed.flops * assumed.utilisation) / 3600,
    }


def _memory(
    recipe: Recipe, micro: int, sizes: Mapping[str, Sizes], tokens: Mapping[str, Tokens], work: Work, assumed: Assumptions
) -> dict[str, dict[str, float]]:
    config, rows = recipe.train, {}
    teacher = None if isinstance(recipe.cache, CacheSpec) else sizes.get("teacher")
    for launch, sharded in (("ddp", False), ("fsdp2", True)):
        held = memory(
            sizes["student"], tokens["student"], work, micro=micro, devices=assumed.devices, sharded=sharded,
            mixed=config.precision != "fp32", states=2 if config.optimizer == "adamw" else 1, averaged=config.ema is not None,
            teacher=teacher, teacher_tokens=tokens.get("teacher"),
        )  # fmt: skip
        rows[launch] = {**held, "total": sum(held.values())}
    return rows


# -- printing --------------------------------------------------------------------------------------------------------------------------


def print_plan(planned: Mapping[str, Any]) -> None:
    """Print what `plan` returned as tables on standard output. Cells are plain text, never markup."""
    assumed = planned["assumptions"]
    models = planned["models"]
    _table(
        ("model", "family", "weights", *PARTS, "parameters"),
        [
            (
                f"{side} {_brief_name(row['name'])}",
                row["family"],
                row["dtype"],
                *(_count_of(row["parameters"].get(part)) for part in (*PARTS, "total")),
            )
            for side, row in models.items()
        ],
        right=(3, 4, 5, 6),
    )
    if planned["taps"]:
        rows = [(row["model"], row["module"], row["what"], str(row["width"])) for row in planned["taps"]]
        _table(("visual switch", "module", "", "width"), rows, right=(3,))
    if planned.get("objectives"):
        _table(
            ("term", "weight", "student", "teacher", "adapter"),
            [
                (row["term"], f"{row['weight']:g}", f"{row['student']} {list(row['student_shape'])}",
                 "-" if row["teacher"] is None else f"{row['teacher']} {list(row['teacher_shape'])}", row["adapter"] or "-")
                for row in planned["objectives"]
            ],
        )  # fmt: skip
    if planned["checks"]:
        _table(("check", "result"), [(row["check"], row["result"]) for row in planned["checks"]])
    if planned["sample"]:
        _table(
            ("tokens a sample", "image", "text", "of them answer"),
            [(side, *(f"{row[key]:.0f}" for key in ("image", "text", "answer"))) for side, row in planned["sample"].items()],
            right=(1, 2, 3),
        )
    _table(
        ("stage", "trains", "terms", "batch", "steps", "epochs", "samples", "tokens"),
        [
            (row["name"], "  ".join(f"{part} {_count_of(number)}" for part, number in row["trains"].items()),
             "  ".join(f"{name} {weight:g}" for name, weight in row["terms"].items()), f"{row['batch_size']:,}", f"{row['steps']:,}",
             "-" if row["epochs"] is None else f"{row['epochs']:.2f}", f"{row['samples_seen']:,}", _count_of(row.get("tokens")))
            for row in planned["stages"]
        ],
        right=(3, 4, 5, 6, 7),
    )  # fmt: skip
    routes = ("student", "teacher", "switch", "total")
    _table(
        ("FLOP", *routes, "time"),
        [
            (row["name"], *(f"{row['flops'][route]:.2e}" for route in routes), _duration(row["hours"]))
            for row in planned["stages"]
        ],
        right=(1, 2, 3, 4, 5),
    )
    memories = {f"{row['name']}, {launch}": held for row in planned["stages"] for launch, held in row.get("memory", {}).items()}
    if memories:
        kinds = [kind for kind in next(iter(memories.values())) if any(held[kind] for held in memories.values())]
        rows = [(kind, *(f"{held[kind] / GIB:.2f}" for held in memories.values())) for kind in kinds]
        _table(("GiB a device", *memories), rows, right=tuple(range(1, len(memories) + 1)))
    for note in planned["notes"]:
        print(f"note: {note}")
    print(
        f"{_duration(planned['hours'])} on {assumed['devices']} x {assumed['flops'] / 1e12:g} TFLOP/s at {assumed['utilisation']:.0%} "
        "(--plan.devices, --plan.flops, --plan.utilisation)"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    table = Table(box=SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _brief_name(name: str) -> str:
    """source:/a/long/path -> source:path; hub names as they are."""
    source, _, rest = name.partition(":")
    return f"{source}:{Path(rest).name}" if Path(rest).is_absolute() else name


def _duration(hours: float) -> str:
    for size, unit in ((1.0, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / size:.1f} {unit}"
    return f"{3600 * hours:.2g} s"


def _count_of(number: float | None) -> str:
    """3,505,483,632 -> 3.51 B; a dash where there is none."""
    if number is None:
        return "-"
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
