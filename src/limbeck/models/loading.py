"""Load a model from a spec: ``{source: transformers, name: org/model}`` or ``{source: python, name: pkg.mod:factory}``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.errors import BadInput
from limbeck.models.vlm import VLM

Loader = Callable[..., VLM | nn.Module]

SOURCES: dict[str, Loader] = {}
"""Source name -> loader. A loader takes the spec's ``name`` first and the spec's other keys as keyword arguments."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # a tokenizer alone reads no images

_KEPT_ALIVE: list[torch.library.Library] = []  # an operator schema goes when its Library does


def register_source(name: str, load: Loader) -> None:
    """Make ``source: name`` known to specs; ``load(name, **options)`` returns a `VLM` or a module."""
    SOURCES[name] = load


def load(spec: Mapping[str, Any]) -> VLM | nn.Module:
    """Load what a spec describes.

    spec: ``source`` (a key of `SOURCES`), ``name``, and the options of that source, e.g. ``dtype: bfloat16``.
    Raises `BadInput` for an unknown source or option, naming the nearest, and for what the source cannot load.
    """
    options = dict(spec)
    missing = [key for key in ("source", "name") if key not in options]
    if missing:
        raise BadInput(f"a model spec needs `source` and `name`; {' and '.join(missing)} not in {options}")
    source, name = options.pop("source"), options.pop("name")
    if source not in SOURCES:
        raise BadInput(f"unknown model source {source!r}{_nearest(source, SOURCES)}; known: {', '.join(sorted(SOURCES))}")
    _check_options(source, options)
    return SOURCES[source](name, **options)


def load_vlm(source: str, name: str, **options: Any) -> VLM:
    """Like `load`, and a vision-language model is expected.

    options: those of the source, e.g. `from_transformers`: dtype, trust_remote_code, random_init, device.
    Raises `BadInput` where something else is loaded.
    """
    loaded = load({"source": source, "name": name, **options})
    if isinstance(loaded, VLM):
        return loaded
    raise BadInput(f"{source} {name!r} is a {type(loaded).__name__}, not a vision-language model")


def load_module(spec: Mapping[str, Any]) -> nn.Module:
    """Like `load`, and gives the bare module, also of a vision-language model."""
    loaded = load(spec)
    return loaded.model if isinstance(loaded, VLM) else loaded


def from_transformers(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    random_init: bool = False,
    device: str | torch.device | None = None,
) -> VLM:
    """A vision-language model and its processor from the hub or a folder; safetensors only.

    name: ``org/model``, or a folder with a ``config.json``. A folder without processor files gives a `VLM` without processor.
    dtype: e.g. "bfloat16"; None keeps that of the checkpoint. trust_remote_code: run code that comes with the model.
    random_init: fresh weights of the model's configuration; nothing but the configuration is read.
    Raises `BadInput` for a folder that is missing or holds only pickled weights, and for what is no vision-language model.
    """
    _require_transformers()
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        name = str(folder)
        _check_folder(folder, weights=not random_init)
    elif folder.is_absolute() or name.startswith(("~", "./", "../")):
        raise BadInput(f"there is no folder {name}: give a folder with a config.json, or a hub name such as org/model")
    with _one_line(name), quiet_bars(local):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        _check_kind(config, name)
        if random_init:
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code, dtype=_dtype(dtype))
        else:
            model = AutoModelForImageTextToText.from_pretrained(
                name,
                config=config,
                dtype=_dtype(dtype) or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
        bare = local and not any((folder / file).exists() for file in PROCESSOR_FILES)
        processor = None if bare else AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    return VLM(model.to(device) if device is not None else model, processor)


def from_python(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> VLM | nn.Module:
    """What a function of yours returns: a `VLM`, a (model, processor) pair of a vision-language model, or any module.

    name: ``pkg.mod:factory``, importable from where limbeck runs. options: keyword arguments for the factory.
    dtype, device: where the module goes; None leaves it as it is.
    Raises `BadInput` where the factory cannot be found or returns something else.
    """
    made = imported(name)(**(options or {}))
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made = VLM(*made)
    if not isinstance(made, VLM | nn.Module):
        raise BadInput(f"{name} returned a {type(made).__name__}: return a VLM, a (model, processor) pair or a module")
    module = made.model if isinstance(made, VLM) else made
    module.to(device=device, dtype=_dtype(dtype))
    return made


def imported(name: str) -> Any:
    """What ``pkg.mod:name`` names; torchvision is made importable first. Raises `BadInput` where it cannot be found."""
    module_name, colon, factory_name = name.partition(":")
    if not (module_name and colon and factory_name):
        raise BadInput(f"{name!r} names no function: write pkg.mod:factory")
    ensure_torchvision()
    try:
        return getattr(importlib.import_module(module_name), factory_name)
    except ImportError as error:
        raise BadInput(f"cannot import {module_name!r} for {name!r}: {error}") from error
    except AttributeError as error:
        functions = [key for key, value in vars(importlib.import_module(module_name)).items() if callable(value)]
        raise BadInput(f"{module_name} has no {factory_name!r}{_nearest(factory_name, functions)}") from error


def from_tiny(name: str, *, options: Mapping[str, int] | None = None, seed: int = 0) -> VLM:
    """One of Limbeck's own small models, freshly initialised (`limbeck.models.tiny`). options: its sizes."""
    _require_transformers()
    from limbeck.models.tiny import digit_vlm

    return VLM(*digit_vlm.build(name, seed, **(options or {})))


def build_vlm(config: Mapping[str, Any] | str | Path, *, device: str | torch.device = "meta") -> VLM:
    """A model of random weights from its configuration, for planning; on the meta device it takes no memory.

    config: a folder with a ``config.json``, the file itself, or a dict with ``model_type``.
    Raises `BadInput` where it is not the configuration of a vision-language model.
    """
    _require_transformers()
    from transformers import AutoConfig, AutoModelForImageTextToText

    with _one_line(str(config)):
        if isinstance(config, Mapping):
            if "model_type" not in config:
                raise BadInput(f"a configuration needs `model_type`, given: {', '.join(config)}")
            resolved = AutoConfig.for_model(**config)
        else:
            resolved = AutoConfig.from_pretrained(str(config))
        _check_kind(resolved, str(config) if isinstance(config, str | Path) else "the configuration given")
        with torch.device(device):
            return VLM(AutoModelForImageTextToText.from_config(resolved))


@contextmanager
def quiet_bars(quiet: bool = True) -> Iterator[None]:
    """Keep transformers' own progress bars off while reading and writing local folders: a run shows one bar, its own."""
    from transformers.utils import logging

    shown = quiet and logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work beside a torch that its compiled library cannot be loaded into (e.g. a CPU torch).

    torchvision refuses to be imported without its operators ``nms`` and ``qnms``. Where its library cannot be loaded their
    schemas are declared here; transforms and models then work, and only a call of a compiled operator fails. Call it before the
    first import of torchvision, timm or a transformers model; where torchvision is imported or not installed, it does nothing.
    """
    spec = None if "torchvision" in sys.modules or _KEPT_ALIVE else importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(library)
            return
    except OSError:
        pass
    schemas = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT_ALIVE.append(schemas)


register_source("transformers", from_transformers)
register_source("python", from_python)
register_source("tiny", from_tiny)


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise BadInput("transformers is not installed: pip install 'limbeck[vlm]'")
    ensure_torchvision()


def _check_folder(folder: Path, *, weights: bool) -> None:
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} holds no config.json: it is no folder that from_pretrained can read")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if weights and not any(folder.glob("*.safetensors")):
        found = f"only pickled weights ({', '.join(pickled)}), which can run code when read" if pickled else "no weights"
        raise BadInput(f"{folder} holds {found}: save them with save_pretrained, which writes safetensors")


def _check_kind(config: Any, name: str) -> None:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    remote_code = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote_code:
        return
    raise BadInput(f"{name} is a {config.model_type} model, which takes no images with text: a vision-language model is needed")


def _check_options(source: str, options: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(SOURCES[source]).parameters.values())[1:]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            raise BadInput(f"source {source!r} has no option {option!r}{_nearest(option, known)}; known: {', '.join(known)}")


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what transformers raises for wrong input into one line."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is not run unless you read it and set `trust_remote_code: true`"
        raise BadInput(f"cannot load {name}: {reason}") from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    resolved = getattr(torch, dtype, None)
    if isinstance(resolved, torch.dtype):
        return resolved
    raise BadInput(f"unknown dtype {dtype!r}: write float32, bfloat16 or float16")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
