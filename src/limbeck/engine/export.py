"""A trained image classifier as files that other programs run, each compared with what was trained before it gets its name.

``student/`` is the model as its own library loads it. ``model.onnx`` is one graph from pictures to logits, ``model.int8.onnx`` the
same with 8-bit weights and activations whose scale is found at run time (dynamic quantisation). ``export.json`` and
``MODEL_CARD.md`` say what was written, how far it is from the PyTorch model, and how to use it.
"""

from __future__ import annotations

import copy
import hashlib
import html
import importlib.util
import io
import json
import logging
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Subset

from limbeck import __version__
from limbeck.batch import Batch
from limbeck.engine.batches import EVALUATION_BATCH, evaluation_loader
from limbeck.engine.recipe import MethodSpec, Recipe, load_recipe
from limbeck.engine.run import check_unused, reopen, run_folder, trained_student
from limbeck.engine.task import Task, build_task
from limbeck.errors import BadInput, LimbeckError
from limbeck.evaluate.cost import latencies, parameters
from limbeck.models.classifier import VIEW_FILE, WEIGHTS_FILE, Classifier, logits_of
from limbeck.naming import nearest

FORMATS = ("safetensors", "onnx")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
STUDENT, ONNX, INT8 = "student", "model.onnx", "model.int8.onnx"
INPUT, OUTPUT = "pixel_values", "logits"
OLDEST_OPSET = 18  # the first whose Resize is antialiased, and the exporter's own
CUTS = (1, 3, 8)  # where a batch is cut, so that graphs are asked with 1, 2, 5 and many pictures
LOST = 0.01  # of the accuracy: what quantisation may cost without a warning
NAMED = 50  # classes that a model card lists
COLOURS = {1: "grey", 3: "RGB"}

Runtime = Callable[[Tensor], Tensor]
"""Inputs [B, C, H, W] -> logits [B, K], on the CPU."""


@dataclass(frozen=True)
class ExportConfig:
    """formats: of `FORMATS`. int8: a quantised graph beside the ONNX one. opset: of the ONNX operators; None: the exporter's
    choice. batch: pictures at a time, or "dynamic": any number. preprocessing: whether the graph resizes and normalises, or gets what
    the model itself is shown. tolerance: how far any logit of the graph may be from PyTorch's.

    Raises `BadInput` for what is not known, does not go together, or needs a package that is not there.
    """

    formats: Sequence[str] = FORMATS
    int8: bool = False
    opset: int | None = None
    batch: int | Literal["dynamic"] = "dynamic"
    preprocessing: bool = True
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise BadInput(f"unknown export format {name!r}: {nearest(name, FORMATS)}")
        if not self.formats:
            raise BadInput(f"no export format given: known are {', '.join(FORMATS)}")
        if self.int8 and not self.onnx:
            raise BadInput("int8 quantises the ONNX graph: add onnx to the formats")
        if self.opset is not None and self.opset < OLDEST_OPSET:
            raise BadInput(f"opset {self.opset}: expected {OLDEST_OPSET} or newer, older ones have no antialiased resize")
        if self.batch != "dynamic" and (not isinstance(self.batch, int) or self.batch < 1):
            raise BadInput(f"batch {self.batch!r}: expected dynamic, or a number of pictures")
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if self.onnx and missing:
            raise BadInput(f"exporting to ONNX needs {', '.join(missing)}: pip install 'limbeck[export]'")

    @property
    def onnx(self) -> bool:
        return "onnx" in self.formats


@dataclass
class Answers:
    """What each runtime makes of the same pictures. logits: [N, K] each, "torch" first; labels: [N], -100 = unknown."""

    logits: dict[str, Tensor]
    labels: Tensor
    batch_sizes: list[int] = field(default_factory=list)

    def difference(self, name: str) -> float:
        """The largest difference of a logit from PyTorch's; NaN where either is."""
        return (self.logits[name].double() - self.logits["torch"].double()).abs().max().item()

    def agreement(self, name: str) -> float:
        """The share of pictures that a runtime and PyTorch put into one class."""
        return (self.logits[name].argmax(-1) == self.logits["torch"].argmax(-1)).double().mean().item()

    def accuracy(self, name: str) -> float | None:
        """Top-1, over the labelled pictures; None without any."""
        known = self.labels != -100
        return (self.logits[name].argmax(-1) == self.labels)[known].double().mean().item() if known.any() else None


def export(
    run: str | Path,
    *,
    out: str | Path | None = None,
    formats: Sequence[str] = FORMATS,
    int8: bool = False,
    opset: int | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    preprocessing: bool = True,
    samples: int = 2000,
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Write the student of a finished run into the folder ``out`` (default ``RUN/exported``) and return what ``export.json`` holds.

    samples: at most so many held-out pictures (of the test split, else of the validation split, else of the training data) to
    compare on, spread over the split. The other arguments are those of `ExportConfig`. Raises `BadInput` where the run or the
    arguments do not fit, and `LimbeckError` where the graph does not say what the model says; then nothing is left in ``out``.
    """
    config = ExportConfig(tuple(formats), int8, opset, batch, preprocessing, tolerance)
    if samples < 1:
        raise BadInput(f"samples {samples}: expected at least one picture to compare on")
    folder = run_folder(run)
    out = Path(out or folder / "exported")
    check_unused(out)
    recipe = load_recipe(folder / "recipe.yaml")
    student, task = trained(folder, recipe)
    split, pictures = held_out(task)
    some = [index * len(pictures) // samples for index in range(samples)] if len(pictures) > samples else range(len(pictures))
    return export_module(
        student,
        evaluation_loader(Subset(pictures, some), task.collate, EVALUATION_BATCH),
        out=out,
        config=config,
        split=split,
        student=folder / "student",
        origin={
            "run": folder.resolve().name,
            "method": recipe.method.name,
            "student": f"{recipe.student.source}:{recipe.student.name}",
        },
        resized=getattr(pictures, "size", None),
    )


def trained(folder: Path, recipe: Recipe) -> tuple[nn.Module, Task]:
    """The trained classifier of a run, and the data that any method would get; without the teacher, where it can be had without.

    Raises `BadInput` for an unfinished run and for a vision-language student.
    """
    student = folder / "student"
    if not student.is_dir():
        raise BadInput(f"{folder} has no student yet: finish it with `limbeck resume {folder}`")
    if (student / "config.json").exists() and not (student / VIEW_FILE).exists():
        raise BadInput(
            f"{folder} holds a vision-language model, and export writes image classifiers: ship {student} as it is, "
            "AutoModelForImageTextToText.from_pretrained and AutoProcessor.from_pretrained of transformers load it"
        )
    if ships_another(folder):
        task, _ = reopen(folder, teacher=False)
        shipped = Classifier.of(task.method.deployable())
        shipped.spec = {}  # that of the student that was trained
        return shipped, task
    model: Any = trained_student(folder, recipe)
    alone = {"method": MethodSpec.model_validate({"name": "compose", "objectives": ["ce"]}), "teacher": None, "cache": None}
    return model, build_task(recipe.model_copy(update=alone), student=model)


def ships_another(folder: Path) -> bool:
    """Whether a run's method ships something else than it trains, which only the method can put together again."""
    adapters = folder / "adapters.safetensors"
    if not adapters.exists():
        return False
    with safe_open(adapters, "pt") as file:
        return any(name.startswith("student.") for name in file.keys())  # noqa: SIM118


def held_out(task: Task) -> tuple[str, Any]:
    """The pictures to compare on, and the name of their split."""
    for split in ("test", "val"):
        if split in task.held_out:
            return split, task.held_out[split]
    return "train", task.reference if task.reference is not None else next(iter(task.data.values()))


def export_module(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    out: str | Path,
    config: ExportConfig | None = None,
    split: str = "held-out",
    student: Path | None = None,
    origin: Mapping[str, str] | None = None,
    resized: int | None = None,
) -> dict[str, Any]:
    """Write a classifier into the folder ``out`` and return what ``export.json`` holds.

    model: a `Classifier`, or a module from pictures [B, C, H, W] to logits [B, K]. batches: real pictures under ``pixel_values``
    and, where they are known, their ``labels``; iterated over twice, and the first says which pictures the graph takes. split: what
    to call them. student: a folder that holds the model as its library loads it; None: written here. origin: where the model is
    from. resized: pixels a side that the data's pictures were resized to. Raises as `export`.
    """
    config, out = config or ExportConfig(), Path(out)
    check_unused(out)
    view = copy.deepcopy(Classifier.of(model)).cpu().float().eval()
    inputs = _given(view, config)(_pictures(next(iter(batches), {})))
    with _staged(out) as folder:
        if "safetensors" in config.formats:
            if student is not None:
                shutil.copytree(student, folder / STUDENT)
            else:
                view.save(folder / STUDENT)
        result: dict[str, Any] = {
            "limbeck": __version__,
            "packages": {name: version(name) for name in ("torch", "safetensors", *(PACKAGES if config.onnx else ()))},
            "origin": dict(origin or {}),
            "model": type(view.model).__name__,
            "source": view.spec.get("source"),
            "parameters": parameters(view),
            "classes": list(view.classes),
            "input": _described(view, inputs, config, resized),
            "warnings": [],
        }
        if config.onnx:
            result |= _graphs(view, inputs, batches, folder, config, split)
        result["files"] = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        (folder / "MODEL_CARD.md").write_text(model_card(result), encoding="utf-8")
        (folder / "export.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _pictures(batch: Batch) -> Tensor:
    """A batch's pictures [B, C, H, W], as the CPU computes with them."""
    pictures = batch.get("pixel_values")
    if not isinstance(pictures, Tensor) or pictures.dim() != 4 or not len(pictures):
        raise BadInput("export compares on pictures: a batch has no `pixel_values` [B, C, H, W]")
    return pictures.cpu().float()


def _given(view: Classifier, config: ExportConfig) -> Callable[[Tensor], Tensor]:
    """What the graph is given of pictures in [0, 1]: themselves, or what the model is shown."""
    return Tensor.contiguous if config.preprocessing else lambda pictures: view.prepared(pictures).contiguous()


def _described(view: Classifier, inputs: Tensor, config: ExportConfig, resized: int | None) -> dict[str, Any]:
    """What the graph takes."""
    _, channels, height, width = inputs.shape
    normalised = view.normalises and not config.preprocessing
    return {
        "name": INPUT,
        "shape": [_batch(config), channels, height, width],
        "layout": "NCHW",
        "dtype": "float32",
        "colours": COLOURS.get(channels, f"{channels} channels"),
        "range": None if normalised else [0.0, 1.0],
        "resized": resized,
        "preprocessing": "in the graph" if config.preprocessing else "by the caller",
        "mean": _decimals(view.mean) if view.normalises else None,
        "std": _decimals(view.std) if view.normalises else None,
        "size": view.size,
    }


def _decimals(values: Tensor) -> list[float]:
    """As they were written before they became float32."""
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


class _Bare(nn.Module):
    """The model behind a view: it takes what the view shows it."""

    def __init__(self, view: Classifier) -> None:
        super().__init__()
        self.model = view.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return logits_of(self.model(pixel_values))


def _graphs(
    view: Classifier, some: Tensor, batches: Iterable[Batch], folder: Path, config: ExportConfig, split: str
) -> dict[str, Any]:
    """Write the graphs, and compare them with the model and with one another. some: inputs of one batch."""
    graph = view if config.preprocessing else _Bare(view).eval()
    opset = write_onnx(graph, some, folder / ONNX, config)
    runtimes: dict[str, Runtime] = {"torch": graph, "onnx": _session(folder / ONNX)}
    quantised = write_int8(folder / ONNX, folder / INT8) if config.int8 else {}
    if config.int8:
        runtimes["int8"] = _session(folder / INT8)
    found = answers(runtimes, batches, _given(view, config), config.batch)
    difference, count, largest = found.difference("onnx"), len(found.labels), found.logits["torch"].abs().max().item()
    if not difference <= config.tolerance:  # also where it is NaN
        raise LimbeckError(
            f"the ONNX graph differs from the PyTorch model by up to {difference:.3g} on {count} {split} pictures, more than "
            f"{config.tolerance:g}: nothing was written; where it is rounding (logits reach {largest:.3g}, and both name the same class "
            f"on {found.agreement('onnx'):.2%} of them), allow it by a larger tolerance"
        )
    one = some[:1] if config.batch == "dynamic" else _whole(some, config.batch)[: config.batch]
    milliseconds = latencies({name: partial(runtime, one) for name, runtime in runtimes.items()})
    report: dict[str, Any] = {
        "output": {"name": OUTPUT, "shape": [_batch(config), found.logits["onnx"].shape[1]]},
        "opset": opset,
        "checked": {
            "split": split,
            "pictures": count,
            "batch_sizes": found.batch_sizes,
            "tolerance": config.tolerance,
            "max_difference": difference,
            "largest_logit": largest,
            "agreement": found.agreement("onnx"),
        },
        "accuracy": {name: found.accuracy(name) for name in runtimes},
        "latency": {"batch": len(one), "threads": torch.get_num_threads(), "ms": milliseconds},
    }
    if config.int8:
        report["int8"] = {
            "layers": quantised,
            "max_difference": found.difference("int8"),
            "agreement": found.agreement("int8"),
        }
        report["warnings"] = int8_warnings(found, milliseconds, folder, quantised, split)
    return report


def write_onnx(graph: nn.Module, inputs: Tensor, path: Path, config: ExportConfig) -> int:
    """Write a module as an ONNX file that the checker of onnx accepts; returns its opset.

    Weights are in the file; only those of 2 GB or more lie beside it, since no single file can hold them. inputs: [B, C, H, W].
    Raises `BadInput` where the exporter cannot follow the module, in its own words.
    """
    import onnx

    dynamic = config.batch == "dynamic"
    example = (
        _whole(inputs, 2)[:2] if dynamic else _whole(inputs, int(config.batch))[: int(config.batch)]
    )  # 1 would be taken as fixed
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                graph, (example,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=config.opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None, verbose=False,
            )  # fmt: skip
            assert program is not None
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # stack traces: they name the folders of this machine
            program.save(path)
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # exporters raise all kinds
        given = "" if config.opset is None else f" with opset {config.opset}"
        mends = ["leave the opset to the exporter"] if config.opset else []
        mends += ["a fixed batch may do (--batch 1)"] if dynamic else []
        said = "; ".join([f"{_name(graph)} cannot be written as ONNX{given}: {_root(error)}", *mends])
        raise BadInput(said) from error
    opset = next(each.version for each in onnx.load(path, load_external_data=False).opset_import if not each.domain)
    if config.opset not in (None, opset):
        raise BadInput(f"opset {config.opset} is unknown to the exporter, which wrote {opset}: leave it to the exporter")
    return opset


def write_int8(source: Path, path: Path) -> dict[str, int]:
    """Quantise an ONNX file dynamically; returns how many layers of each kind were: ``{"convolution": 3, "matrix product": 1}``.

    Weights become uint8: with int8 ones onnxruntime's convolutions on x86 are several times slower. Those of matrix products get a
    scale a column, those of convolutions one for all. Activations get theirs from each batch, so that no calibration data is needed.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded = path.with_name("folded.onnx")
    try:
        with _quietly():
            quant_pre_process(source, folded, skip_symbolic_shape=True)  # else transposed weights stay float32
            quantize_dynamic(folded, path, weight_type=QuantType.QUInt8, per_channel=True)
        model = onnx.load(path)
        used = {node.domain for node in model.graph.node} | {""}
        kept = [each for each in model.opset_import if each.domain in used]
        del model.opset_import[:]
        model.opset_import.extend(kept)
        onnx.save(model, path)
    except Exception as error:  # quantisers raise all kinds
        raise BadInput(f"onnxruntime cannot quantise the graph: {_root(error)}; export without int8") from error
    finally:
        folded.unlink(missing_ok=True)
    operators = Counter(node.op_type for node in model.graph.node)
    return {"convolution": operators["ConvInteger"], "matrix product": operators["MatMulInteger"]}


@torch.no_grad()
def answers(
    runtimes: Mapping[str, Runtime],
    batches: Iterable[Batch],
    inputs: Callable[[Tensor], Tensor],
    batch: int | Literal["dynamic"],
) -> Answers:
    """Ask every runtime about every picture, in batches of several sizes, or of the one that graphs are fixed to."""
    logits: dict[str, list[Tensor]] = {name: [] for name in runtimes}
    labels, sizes = [], set()
    for each in batches:
        given = inputs(_pictures(each))
        pieces = given.tensor_split(CUTS) if batch == "dynamic" else _whole(given, batch).split(batch)
        pieces = [piece for piece in pieces if len(piece)]
        sizes |= {len(piece) for piece in pieces}
        for name, runtime in runtimes.items():
            logits[name].append(torch.cat([runtime(piece) for piece in pieces])[: len(given)])
        labels.append(each["labels"].cpu() if "labels" in each else torch.full((len(given),), -100))
    return Answers({name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels), sorted(sizes))


def int8_warnings(
    found: Answers, milliseconds: Mapping[str, float], folder: Path, quantised: Mapping[str, int], split: str
) -> list[str]:
    """In words, what speaks against the quantised graph."""
    said = []
    before, after = found.accuracy("onnx"), found.accuracy("int8")
    if before is not None and after is not None and before - after > LOST:
        said.append(f"int8 costs accuracy: {after:.1%} of the {split} pictures, float32 {before:.1%}; ship {ONNX}")
    if before is None and found.agreement("int8") < 1 - LOST:
        said.append(
            f"int8 names another class than float32 on {1 - found.agreement('int8'):.1%} of the {split} pictures; ship {ONNX}"
        )
    if milliseconds["int8"] >= milliseconds["onnx"]:
        why = ": onnxruntime's 8-bit convolutions are slower than its float32 ones" if quantised["convolution"] else ""
        said.append(
            f"int8 is not faster on this machine ({milliseconds['int8']:.3g} ms, float32 {milliseconds['onnx']:.3g} ms){why}"
        )
    sizes = [(folder / name).stat().st_size for name in (INT8, ONNX)]
    if sizes[0] >= sizes[1]:
        said.append(f"int8 is not smaller ({sizes[0]:,} bytes, float32 {sizes[1]:,}): the model has few weights to quantise")
    return said


def _session(path: Path) -> Runtime:
    """An ONNX file in onnxruntime, with as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(inputs: Tensor) -> Tensor:
        [found] = session.run([OUTPUT], {INPUT: inputs.numpy()})
        return torch.from_numpy(found)

    return logits


def _whole(inputs: Tensor, batch: int) -> Tensor:
    """Inputs with the last one repeated, so that their number is a multiple of ``batch``."""
    return torch.cat([inputs, inputs[-1:].expand(-len(inputs) % batch, *inputs.shape[1:])])


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` where nothing goes wrong, and else goes."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        if out.exists():  # empty, and perhaps the current folder, from which a replaced one would vanish
            for path in [*staged.iterdir()]:
                path.replace(out / path.name)
        else:
            staged.replace(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters talk to whoever wrote the model, in logs, warnings and prints; what matters of it is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root(error: BaseException) -> str:
    """The first line of what an error was caused by, in the beginning."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _name(graph: nn.Module) -> str:
    return type(graph.model).__name__


def _batch(config: ExportConfig) -> int | str:
    """The first size of inputs and outputs: a number, or the name of one that is free."""
    return "batch" if config.batch == "dynamic" else config.batch


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The model card


def model_card(result: Mapping[str, Any]) -> str:
    """What was written and how to load it, as Markdown. Names of the user's are escaped."""
    origin, taken = result["origin"], result["input"]
    lines = [
        f"# {escaped(origin.get('run') or result['model'])}",
        "",
        f"An image classifier ({escaped(result['model'])}, {result['parameters']:,} parameters), written by Limbeck "
        f"{result['limbeck']}" + (f", trained by the method {escaped(origin['method'])}" if "method" in origin else "") + ".",
        "",
        *_files(result),
        "",
        "## Input",
        "",
        *_taken(taken),
        "",
        "## Classes",
        "",
        _classes(result["classes"]),
        "",
    ]
    lines += _measured(result) if "accuracy" in result else []
    lines += [*(f"- {escaped(text)}" for text in result["warnings"]), ""] if result["warnings"] else []
    lines += ["## Use", "", *_use(result)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is, in one line."""
    line = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return html.escape(re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line), quote=False)


def _files(result: Mapping[str, Any]) -> list[str]:
    rows = [f"| {escaped(name)} | {entry['bytes']:,} | {entry['sha256'][:16]} |" for name, entry in result["files"].items()]
    return ["| file | bytes | sha256, first 16 |", "|---|---|---|", *rows]


def _taken(taken: Mapping[str, Any]) -> list[str]:
    batch, channels, height, width = taken["shape"]
    pictures = "any number of pictures" if batch == "batch" else f"{batch} picture(s) at a time"
    said = [f"`{INPUT}`: float32 [{batch}, {channels}, {height}, {width}], {taken['colours']}, {pictures}."]
    if taken["range"]:
        said.append("Values from 0 to 1 (bytes divided by 255).")
    if taken["preprocessing"] == "in the graph":
        inside = [f"resizes to {taken['size']}x{taken['size']}"] if taken["size"] not in (None, height) else []
        inside += [f"normalises by mean {taken['mean']} and standard deviation {taken['std']}"] if taken["mean"] else []
        said.append(f"The graph itself {' and '.join(inside)}." if inside else "The graph changes nothing of them.")
    elif taken["mean"]:
        said.append(f"Values from 0 to 1, normalised by the caller: (x - mean) / std, mean {taken['mean']}, std {taken['std']}.")
    if taken["resized"]:
        said.append(
            f"Pictures had their shorter side resized to {taken['resized']} (bicubic, antialiased), the middle square taken."
        )
    if _resizes(taken):
        said.append(f"The caller then resizes them to {width}x{height} (bilinear, antialiased).")
    return said


def _classes(classes: Sequence[str]) -> str:
    if not classes:
        return "Their names are not known."
    more = f", ... ({len(classes)}; all in export.json)" if len(classes) > NAMED else ""
    return ", ".join(f"{index}: {escaped(str(name))}" for index, name in enumerate(classes[:NAMED])) + more


def _measured(result: Mapping[str, Any]) -> list[str]:
    checked, speed = result["checked"], result["latency"]
    rows = []
    for name, accuracy in result["accuracy"].items():
        shown = "-" if accuracy is None else f"{accuracy:.4f}"
        rows.append(f"| {name} | {shown} | {speed['ms'][name]:.3g} |")
    return [
        "## Measured",
        "",
        f"On {checked['pictures']:,} {escaped(checked['split'])} pictures; latency: median of a batch of {speed['batch']}, "
        f"{speed['threads']} CPU thread(s).",
        "",
        "| runtime | accuracy | ms |",
        "|---|---|---|",
        *rows,
        "",
        f"Largest difference of a logit between {ONNX} and PyTorch: {checked['max_difference']:.2g}; same class on "
        f"{checked['agreement']:.2%} of the pictures.",
        "",
    ]


def _use(result: Mapping[str, Any]) -> list[str]:
    graphs = [name for name in (ONNX, INT8) if name in result["files"]]
    lines = _student_lines(result["source"]) if any(name.startswith(f"{STUDENT}/") for name in result["files"]) else []
    if graphs:
        named = " (the same for `model.int8.onnx`)" if INT8 in graphs else ""
        lines += [f"onnxruntime{named}:", "", "```python", *_onnx_snippet(ONNX, result["input"]), "```"]
    return lines


def _student_lines(source: str | None) -> list[str]:
    """How ``student/`` is loaded. A model without a source is put together by the method that trained it."""
    if source is None:
        return [f"`{STUDENT}/{WEIGHTS_FILE}` holds the weights for PyTorch: `safetensors.torch.load_file` reads them.", ""]
    lines = [
        "PyTorch, pictures in [0, 1]:",
        "",
        "```python",
        "from limbeck.models.vision import load_classifier",
        "",
        f'model = load_classifier("{STUDENT}").eval()',
        "logits = model(pixel_values)",
        "```",
        "",
    ]
    if source in ("timm", "efficientnet-lite"):
        lines += [f'timm alone, for normalised pictures: `timm.create_model("local-dir:{STUDENT}", pretrained=True)`.', ""]
    return lines


def _resizes(taken: Mapping[str, Any]) -> bool:
    """Whether the caller does what the model's view does in training: resize the data's pictures to the model's size."""
    return taken["preprocessing"] == "by the caller" and taken["size"] not in (None, taken["resized"])


def _onnx_snippet(name: str, taken: Mapping[str, Any]) -> list[str]:
    batch, channels, height, width = taken["shape"]
    mode = "L" if channels == 1 else "RGB"
    to_nchw = "pixels[None, None]" if channels == 1 else "pixels.transpose(2, 0, 1)[None]"
    normalised = not taken["range"]
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        f'session = onnxruntime.InferenceSession("{name}")',
        'picture = ImageOps.exif_transpose(Image.open("picture.png"))',
        'if picture.mode.startswith("I"):  # 16 bits of grey',
        "    picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))",
        f'picture = picture.convert("{mode}")',
    ]
    if taken["resized"] or not _resizes(taken):
        cut = (taken["resized"], taken["resized"]) if taken["resized"] else (width, height)
        lines += [f"picture = ImageOps.fit(picture, {cut}, Image.Resampling.BICUBIC)"]
    if _resizes(taken):
        lines += [f"picture = picture.resize(({width}, {height}), Image.Resampling.BILINEAR)"]
    lines += ["pixels = np.asarray(picture, dtype=np.float32) / 255", f"pixel_values = {to_nchw}"]
    if normalised:
        lines += [
            f"mean = np.array({taken['mean']}, dtype=np.float32)[:, None, None]",
            f"std = np.array({taken['std']}, dtype=np.float32)[:, None, None]",
            "pixel_values = (pixel_values - mean) / std",
        ]
    if batch not in ("batch", 1):
        lines += [f"pixel_values = pixel_values.repeat({batch}, axis=0)  # {batch} pictures at a time"]
    return [*lines, f'[logits] = session.run(["{OUTPUT}"], {{"{INPUT}": pixel_values}})', "print(logits.argmax(-1))"]
