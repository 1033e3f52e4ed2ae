"""Load a model from a spec: ``{source: transformers, name: org/model}`` or ``{source: python, name: pkg.mod:factory}``.

What is known about image classifiers of other libraries is in `limbeck.models.vision`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from limbeck.errors import BadInput
from limbeck.models import vision
from limbeck.models.classifier import Classifier
from limbeck.models.libraries import as_dtype, ensure_torchvision, one_line, quiet_bars, require
from limbeck.models.tiny import classifiers
from limbeck.models.vlm import VLM
from limbeck.teachers.frozen import cast_weights

__all__ = [
    "SOURCES",
    "build_vlm",
    "ensure_torchvision",
    "from_python",
    "from_tiny",
    "from_transformers",
    "imported",
    "kind_of",
    "load",
    "load_module",
    "load_vlm",
    "quiet_bars",
    "register_source",
]

Loader = Callable[..., VLM | nn.Module]
Kind = Literal["vlm", "classifier", "unknown"]

SOURCES: dict[str, Loader] = {}
"""Source name -> loader. A loader takes the spec's ``name`` first and the spec's other keys as keyword arguments."""

VISION_SOURCES = {
    "timm": vision.from_timm,
    "torchvision": vision.from_torchvision,
    "open_clip": vision.from_open_clip,
    "efficientnet-lite": vision.from_efficientnet_lite,
}
"""Sources that know image classifiers alone."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # a tokenizer alone reads no images


def register_source(name: str, load: Loader) -> None:
    """Make ``source: name`` known to specs; ``load(name, **options)`` returns a `VLM`, a `Classifier` or a module."""
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
    loaded = SOURCES[source](name, **options)
    if isinstance(loaded, Classifier) and not loaded.spec:
        loaded.spec = {key: value for key, value in spec.items() if key not in ("pretrained", "weights")}
    return loaded


def kind_of(spec: Mapping[str, Any]) -> Kind:
    """What `load` would return, told without loading weights; "unknown" for what only running it tells (python, recipe).

    Raises `BadInput` where the configuration of a transformers model cannot be read.
    """
    source = spec["source"]
    if source in VISION_SOURCES or vision.is_saved(spec["name"]):
        return "classifier"
    if source == "tiny":
        return "classifier" if spec["name"] in classifiers.NAMES else "vlm"
    if source == "transformers":
        return _kind(_config(spec["name"], spec.get("trust_remote_code", False), spec.get("options")))
    return "unknown"


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
    options: Mapping[str, Any] | None = None,
    classes: vision.Classes | None = None,
    prompts: Sequence[str] = vision.PROMPTS,
    size: int | None = None,
) -> VLM | Classifier:
    """A vision-language model and its processor, or an image classifier, from the hub or a folder; safetensors only.

    name: ``org/model``, or a folder with a ``config.json``. A folder without processor files gives a `VLM` without processor, or a
    `Classifier` that normalises nothing. dtype: e.g. "bfloat16"; None keeps that of the checkpoint. trust_remote_code: run code that
    comes with the model. random_init: fresh weights of the model's configuration; nothing but the configuration is read.
    options: fields of the configuration to change. Of image classifiers: classes: outputs, or their names; another number than the
    model's gives a fresh head, and CLIP and its like make their head of the names and prompts. size: pixels a side that it is shown.
    Raises `BadInput` for a folder that is missing or holds only pickled weights, and for what is no such model.
    """
    config = _config(name, trust_remote_code, options)
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        name = str(folder)
        _check_folder(folder, weights=not random_init)
    if _kind(config) == "classifier":
        with one_line(name), quiet_bars(local):
            return vision.from_transformers_config(
                name,
                config,
                classes=classes,
                prompts=prompts,
                size=size,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                random_init=random_init,
                device=device,
            )
    _check_kind(config, name)
    if classes is not None or size is not None:
        raise BadInput(f"{name} is a vision-language model: it takes no `classes` and no `size`")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with one_line(name), quiet_bars(local):
        if random_init:
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code, dtype=as_dtype(dtype))
        else:
            model = AutoModelForImageTextToText.from_pretrained(
                name,
                config=config,
                dtype=as_dtype(dtype) or "auto",
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
    dtype: of its weights (`cast_weights`); device: where it goes; None leaves it as it is.
    Raises `BadInput` where the factory cannot be found or returns something else.
    """
    made = imported(name)(**(options or {}))
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made = VLM(*made)
    if not isinstance(made, VLM | nn.Module):
        raise BadInput(f"{name} returned a {type(made).__name__}: return a VLM, a (model, processor) pair or a module")
    module = made.model if isinstance(made, VLM) else made
    if (weights := as_dtype(dtype)) is not None:
        cast_weights(module, weights)
    module.to(device)
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


def from_tiny(
    name: str, *, classes: vision.Classes | None = None, options: Mapping[str, Any] | None = None, seed: int = 0
) -> VLM | Classifier:
    """One of Limbeck's own small models, freshly initialised (`limbeck.models.tiny`). options: its sizes.

    name: also a folder that a classifier was saved into. classes: outputs of a classifier (``cnn``, ``mlp``), or their names.
    """
    if vision.is_saved(name):
        return vision.reopened(name, "tiny", classes)
    if name in classifiers.NAMES:
        if classes is None:
            raise BadInput(f"tiny {name!r} needs `classes`: how many outputs, or their names")
        for key in options or {}:
            if key not in classifiers.OPTIONS:
                raise BadInput(
                    f"tiny {name!r} has no option {key!r}{_nearest(key, classifiers.OPTIONS)}; known: {', '.join(classifiers.OPTIONS)}"
                )
        view = classifiers.build(name, classes if isinstance(classes, int) else len(classes), seed, **(options or {}))
        view.classes = () if isinstance(classes, int) else tuple(classes)
        return view
    _require_transformers()
    from limbeck.models.tiny import digit_vlm

    if classes is not None:
        raise BadInput(
            f"tiny {name!r} is a vision-language model: it takes no `classes`; classifiers are {', '.join(classifiers.NAMES)}"
        )
    return VLM(*digit_vlm.build(name, seed, **(options or {})))


def build_vlm(config: Mapping[str, Any] | str | Path, *, device: str | torch.device = "meta") -> VLM:
    """A model of random weights from its configuration, for planning; on the meta device it takes no memory.

    config: a folder with a ``config.json``, the file itself, or a dict with ``model_type``.
    Raises `BadInput` where it is not the configuration of a vision-language model.
    """
    _require_transformers()
    from transformers import AutoConfig, AutoModelForImageTextToText

    with one_line(str(config)):
        if isinstance(config, Mapping):
            if "model_type" not in config:
                raise BadInput(f"a configuration needs `model_type`, given: {', '.join(config)}")
            resolved = AutoConfig.for_model(**config)
        else:
            resolved = AutoConfig.from_pretrained(str(config))
        _check_kind(resolved, str(config) if isinstance(config, str | Path) else "the configuration given")
        with torch.device(device):
            return VLM(AutoModelForImageTextToText.from_config(resolved))


register_source("transformers", from_transformers)
register_source("python", from_python)
register_source("tiny", from_tiny)
for _source, _load in VISION_SOURCES.items():
    register_source(_source, _load)


def _require_transformers() -> None:
    require("transformers", "'limbeck[vlm]'")


def _config(name: str, trust_remote_code: bool, options: Mapping[str, Any] | None) -> Any:
    """The configuration of a folder or hub name, with some fields changed."""
    _require_transformers()
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, weights=False)
    elif folder.is_absolute() or name.startswith(("~", "./", "../")):
        raise BadInput(f"there is no folder {name}: give a folder with a config.json, or a hub name such as org/model")
    with one_line(name):
        where = str(folder) if folder.is_dir() else name
        config, unknown = AutoConfig.from_pretrained(
            where, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **(options or {})
        )
    for key in unknown:
        raise BadInput(f"options: a {config.model_type} configuration has no {key!r}{_nearest(key, vars(config))}")
    return config


def _kind(config: Any) -> Kind:
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in own_code:
        return "vlm"
    classifies = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or "AutoModelForImageClassification" in own_code
    return "classifier" if classifies or vision.is_dual_encoder(config) else "unknown"


def _check_folder(folder: Path, *, weights: bool) -> None:
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} holds no config.json: it is no folder that from_pretrained can read")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if weights and not any(folder.glob("*.safetensors")):
        found = f"only pickled weights ({', '.join(pickled)}), which can run code when read" if pickled else "no weights"
        raise BadInput(f"{folder} holds {found}: save them with save_pretrained, which writes safetensors")


def _check_kind(config: Any, name: str) -> None:
    if _kind(config) == "vlm":
        return
    raise BadInput(
        f"{name} is a {config.model_type} model, which takes no images with text and names no classes of images: a vision-language model "
        "or an image classifier is needed"
    )


def _check_options(source: str, options: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(SOURCES[source]).parameters.values())[1:]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            raise BadInput(f"source {source!r} has no option {option!r}{_nearest(option, known)}; known: {', '.join(known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
