"""What a training step sees of pictures: resized, augmented, in several views, balanced over classes, or beside unlabelled ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from limbeck.batch import Batch
from limbeck.data.images import Answers, ImageRecord, LabelledImages
from limbeck.data.records import open_image, read_header
from limbeck.errors import BadInput
from limbeck.losses.logits import IGNORE
from limbeck.models.loading import ensure_torchvision
from limbeck.naming import nearest
from limbeck.settings import Strict, validated

Probability = Annotated[float, Field(ge=0, le=1)]
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
Transform = Callable[[Tensor], Tensor]

_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")  # modes of PIL
_BLUR_SIGMA = (0.1, 2.0)  # pixels
_LARGEST_SEED = 2**31 - 1
CACHED_BYTES = 3 * 2**27  # of a dataset's decoded pictures together: fewer are kept in memory


class Augment(Strict):
    """Random changes of training pictures; a name of `PRESETS` in place of the keys takes those.

    where: "worker" changes each picture when it is read (torchvision), "batch" whole batches when they are joined (kornia).
    crop: a part of this share of the picture's area, resized to the whole. pad: pixels of black around it, then a part of the old size.
    flip, vertical_flip: half of the time. rotate: up to so many degrees. colour: strength of changes of brightness, contrast and
    saturation; of the hue a quarter. blur, erase (a rectangle): how often. mixup, cutmix: alpha of Beta(alpha, alpha), from which the share
    of another picture is drawn that is blended over the whole (arXiv 1710.09412) or stands in a rectangle (arXiv 1905.04899); with both,
    each half of the time. Mixed last, when pictures are read: what a teacher is asked of a mixture can be cached.
    """

    where: Literal["worker", "batch"] = "worker"
    crop: Scale | None = None
    pad: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    vertical_flip: bool = False
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    colour: Probability = 0.0
    blur: Probability = 0.0
    erase: Probability = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given not in PRESETS:
            raise ValueError(f"there is no preset {given!r}: {nearest(given, PRESETS)}")
        return PRESETS[given]

    @model_validator(mode="after")
    def _one_crop(self) -> Self:
        if self.crop and self.pad:
            raise ValueError("give crop or pad, not both")
        if self.crop and self.crop[0] > self.crop[1]:
            raise ValueError("crop is [smallest, largest] share of the area")
        return self

    @model_validator(mode="after")
    def _mixed_when_read(self) -> Self:
        if self.mixes and self.where == "batch":
            raise ValueError("mixup and cutmix are done when a picture is read: use where: worker")
        return self

    @property
    def mixes(self) -> bool:
        """Whether training pictures are mixtures of two."""
        return bool(self.mixup or self.cutmix)


PRESETS: dict[str, dict[str, Any]] = {
    "light": {"crop": (0.7, 1.0), "flip": True},
    "standard": {"crop": (0.25, 1.0), "flip": True, "colour": 0.4, "erase": 0.1},
}


class Views(Strict):
    """Several crops of one picture (multi-crop, SwAV, arXiv 2006.09882; DINO, arXiv 2104.14294), each resized to its size in pixels.

    The other changes of `Augment` are drawn for each view anew. scale: the share of the picture's area.
    """

    global_size: Annotated[int, Field(gt=0)]
    local_size: Annotated[int, Field(gt=0)]
    global_count: Annotated[int, Field(ge=0)] = 2
    local_count: Annotated[int, Field(ge=0)] = 4
    global_scale: Scale = (0.4, 1.0)
    local_scale: Scale = (0.05, 0.4)

    @property
    def crops(self) -> list[tuple[int, tuple[float, float]]]:
        """Size and scale of each view, the global ones first."""
        return [(self.global_size, self.global_scale)] * self.global_count + [
            (self.local_size, self.local_scale)
        ] * self.local_count


class Presentation(Strict):
    """The keys of a recipe's ``data:`` that belong to `ImageDataset` and not to the source.

    unlabelled_among: unlabelled pictures are samples like the labelled ones, also for a method that would have them beside these.
    """

    size: Annotated[int, Field(gt=0)] | None = None
    channels: Literal[1, 3] | None = None
    augment: Augment | None = None
    views: Views | None = None
    balance: Literal["none", "class"] = "none"
    unlabelled_among: bool = False
    cache: bool = False


def presentation(spec: Mapping[str, Any]) -> tuple[Presentation, dict[str, Any]]:
    """A spec's `Presentation`, and the rest of it for `load_images`. Raises `BadInput` for wrong values."""
    shown = {key: value for key, value in spec.items() if key in Presentation.model_fields}
    return validated(Presentation, shown, "data"), {key: value for key, value in spec.items() if key not in shown}


class ImageDataset(Dataset[dict[str, Any]]):
    """Labelled pictures as tensors.

    images: what to show. size: resize the shorter side to it and cut out the middle; None requires pictures of one size.
    channels: 1 (grey) or 3; None as the first picture has them. train: the arguments from ``augment`` to ``answers`` count only then.
    balance: "class" makes every epoch draw labelled pictures with each class equally often (`draw`).
    unlabelled: pictures to stand beside the labelled ones: there are as many samples as these, and an epoch pairs each with a labelled
    one, all of which are used equally often, or as ``balance`` says. cache: keep decoded pictures in memory as bytes; None: where all of
    them, taken to be as large as the first is kept, have at most `CACHED_BYTES`. answers: of the pictures as "aspects"; default those
    of ``images``. seed: of the pairing.

    A sample has ``id``, ``index`` (the labelled picture's position in ``labels``), ``pixel_values`` (float [C, H, W] in 0..1, not
    normalised: a model does that for itself), ``labels`` (int) and, where asked for, ``unlabelled`` [C, H, W], ``views`` (of [C, h, w]),
    ``aspects`` [Q] and, of a mixture, ``mixed_labels`` (the label of the other picture) and ``mixed_share`` (the other's, in [0, 1]).
    Labelled pictures are mixed with labelled ones, unlabelled with unlabelled. What is random in it comes from torch's generator alone.
    Attributes: ``labels`` [N] and ``ids`` of the samples, ``classes``, ``shape`` (C, H, W).
    Raises `BadInput` for no pictures, a missing package, and a picture that cannot be read or is of another size when it is reached.
    """

    def __init__(
        self,
        images: LabelledImages,
        *,
        size: int | None = None,
        channels: Literal[1, 3] | None = None,
        train: bool = False,
        augment: Augment | None = None,
        views: Views | None = None,
        balance: Literal["none", "class"] = "none",
        unlabelled: Sequence[ImageRecord] | None = None,
        cache: bool | None = False,
        answers: Answers | None = None,
        seed: int = 0,
    ) -> None:
        if not images.records:
            raise BadInput("there are no pictures to make a dataset of")
        self.images, self.size, self.seed = images, size, seed
        self.classes = images.classes
        self.labels = torch.tensor([record.label for record in images.records])  # [N]
        self.augment, self.views = (augment, views) if train else (None, None)
        self.unlabelled = list(unlabelled) if train and unlabelled is not None else None
        self.members = self._members() if train and balance == "class" else []
        if train and balance == "class" and not self.members:
            raise BadInput("data.balance: class needs labels, and no picture has one")
        self.mixing = self.augment is not None and self.augment.mixes
        self.alike = [(self.labels == IGNORE).nonzero()[:, 0], (self.labels != IGNORE).nonzero()[:, 0]] if self.mixing else []
        if self.mixing and self.views is not None:
            raise BadInput(
                "data.augment mixes whole pictures (mixup, cutmix), and data.views shows crops of one: leave one of them out"
            )
        self._check_unlabelled()
        self.aspects = _aspects(images.records, answers or images.answers) if train else None  # [N, Q]

        crops_here = self.augment is not None and self.augment.crop is not None and self.augment.where == "worker"
        self._keeps_whole = size is not None and (crops_here or self.views is not None)  # until a crop is taken of it
        first = images.records[0]
        self.channels = channels or _channels(first)
        self._original: tuple[int, ...] | None = None
        decoded = self._decoded(first)
        if cache is None:
            cache = decoded.numel() * (len(images.records) + len(self.unlabelled or ())) <= CACHED_BYTES
        self._cache: dict[tuple[bool, int], Tensor] | None = {} if cache else None
        self._original = None if size else tuple(decoded.shape)
        self.shape = (self.channels, size or decoded.shape[1], size or decoded.shape[2])
        self._pipelines()  # a missing package is known at once
        if self.augment is not None and self.augment.where == "batch":
            _batch_changes(self.augment, self.shape, crop=True)

    def __len__(self) -> int:
        return len(self.images.records) if self.unlabelled is None else len(self.unlabelled)

    @property
    def ids(self) -> list[str]:
        """The name of each sample; in pairs, the unlabelled picture's."""
        return [record.id for record in (self.images.records if self.unlabelled is None else self.unlabelled)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample ``index`` itself, as epoch 0 pairs it."""
        return self._sample(index if self.unlabelled is None else self._paired(0, index), index)

    def draw(self, epoch: int, index: int) -> dict[str, Any]:
        """What stands at place ``index`` of an epoch: the sample, another of a class drawn uniformly, or the epoch's pair."""
        if self.unlabelled is not None:
            return self._sample(self._balanced() if self.members else self._paired(epoch, index), index)
        return self._sample(self.chosen(index), index)

    def chosen(self, index: int) -> int:
        """Which sample is drawn for place ``index`` of an epoch: itself, or for a labelled one any of a class drawn uniformly."""
        return self._balanced() if self.members and self.labels[index] != IGNORE else index

    def _sample(self, labelled: int, index: int) -> dict[str, Any]:
        record, raw = self.images.records[labelled], self._raw(labelled)
        show, view_each = self._pipelines()
        sample: dict[str, Any] = {"id": record.id, "index": labelled, "pixel_values": show(raw), "labels": record.label}
        if view_each:
            sample["views"] = tuple(view(raw) for view in view_each)
        if self.unlabelled is not None:
            sample["unlabelled"] = show(self._raw(index, unlabelled=True))
        if self.aspects is not None:
            sample["aspects"] = self.aspects[labelled]
        if self.mixing:
            self._mix(sample, labelled, show)
        if self.augment is not None and self.augment.where == "batch":
            sample["augment_seed"] = int(torch.randint(_LARGEST_SEED, ()))
        return sample

    def _mix(self, sample: dict[str, Any], labelled: int, show: Transform) -> None:
        """Put another picture of its kind into each picture of a sample."""
        assert self.augment is not None
        other = self._other(labelled)
        sample["mixed_labels"] = self.images.records[other].label
        sample["pixel_values"], sample["mixed_share"] = _mixed(self.augment, sample["pixel_values"], show(self._raw(other)))
        if self.unlabelled is not None:
            other = int(torch.randint(len(self.unlabelled), ()))
            sample["unlabelled"], _ = _mixed(self.augment, sample["unlabelled"], show(self._raw(other, unlabelled=True)))

    def _other(self, index: int) -> int:
        """Which picture to mix with a labelled one: a labelled one, drawn as ``balance`` says; with an unlabelled one: any such."""
        known = bool(self.labels[index] != IGNORE)
        if self.members and known:
            return self._balanced()
        return int(self.alike[known][int(torch.randint(len(self.alike[known]), ()))])

    def _pipelines(self) -> tuple[Transform, list[Transform]]:
        """What turns the bytes of a picture into ``pixel_values``, and what into each view."""
        here = self.augment if self.augment is not None and self.augment.where == "worker" else None
        show = _scaled if here is None and not self._keeps_whole else _changes(here or Augment(), self.shape, self._keeps_whole)
        crops = [] if self.views is None else self.views.crops
        return show, [_view(here or Augment(), size, scale, self.channels) for size, scale in crops]

    def _raw(self, index: int, *, unlabelled: bool = False) -> Tensor:
        """The bytes of a labelled or an unlabelled picture, [C, h, w]."""
        record = self.unlabelled[index] if unlabelled and self.unlabelled is not None else self.images.records[index]
        if self._cache is None:
            return self._decoded(record)
        if (unlabelled, index) not in self._cache:
            self._cache[unlabelled, index] = self._decoded(record)
        return self._cache[unlabelled, index]

    def _decoded(self, record: ImageRecord) -> Tensor:
        """Bytes [C, h, w]: of the size that is shown, or whole."""
        try:
            image = open_image(record.image).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:  # decoders raise all kinds
            raise BadInput(f"picture {record.id!r} cannot be read: {_one_line(error)}") from error
        if self.size is not None and not self._keeps_whole:
            image = resized(image, self.size)
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, self.channels).permute(2, 0, 1).contiguous()
        if self._original is not None and tuple(pixels.shape) != self._original:
            height, width = self._original[1:]
            raise BadInput(
                f"picture {record.id!r} is {image.width}x{image.height} and the first one {width}x{height}: set data.size to resize them"
            )
        return pixels

    def _paired(self, epoch: int, index: int) -> int:
        """The labelled picture beside unlabelled picture ``index``."""
        count = len(self.images.records)
        return int(_order(count, self.seed, epoch)[index % count])

    def _balanced(self) -> int:
        members = self.members[int(torch.randint(len(self.members), ()))]
        return int(members[int(torch.randint(len(members), ()))])

    def _members(self) -> list[Tensor]:
        """The positions of each class that has pictures."""
        return [(self.labels == label).nonzero()[:, 0] for label in self.labels.unique().tolist() if label != IGNORE]

    def _check_unlabelled(self) -> None:
        if self.unlabelled is None:
            return
        if not self.unlabelled:
            raise BadInput("there are no unlabelled pictures to stand beside the labelled ones")
        if (self.labels == IGNORE).any():
            raise BadInput("beside unlabelled pictures only labelled ones may stand: pass `images.labelled`")


class ImageCollate:
    """Joins samples of an `ImageDataset`: ``ids``, ``pixel_values`` [B, C, H, W], ``labels`` [B], ``index`` [B] and, where samples have
    them, ``mixed_labels`` [B], ``mixed_share`` [B], ``aspects`` [B, Q], ``unlabelled`` [B, C, H, W] and ``views``, a list of [B, C, h, w].

    augment: that of the training data; with ``where: batch`` the pictures of training samples are changed here, drawn from numbers
    that came with the samples, so that the same samples together always give the same batch.
    """

    def __init__(self, augment: Augment | None = None) -> None:
        self.augment = augment

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """The batch of these samples, in their order."""
        first = samples[0]
        batch: dict[str, Any] = {
            "ids": [sample["id"] for sample in samples],
            **{
                key: torch.tensor([sample[key] for sample in samples])
                for key in ("labels", "index", "mixed_labels", "mixed_share")
                if key in first
            },
            **{
                key: torch.stack([sample[key] for sample in samples])
                for key in ("pixel_values", "unlabelled", "aspects")
                if key in first
            },
        }
        if "views" in first:
            batch["views"] = [torch.stack(view) for view in zip(*(sample["views"] for sample in samples), strict=True)]
        if "augment_seed" in first:
            self._change(batch, [sample["augment_seed"] for sample in samples])
        return batch

    def _change(self, batch: dict[str, Any], seeds: list[int]) -> None:
        if self.augment is None:
            raise BadInput("the training data leave augmentation to the batch: make `ImageCollate` with the same augment")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            for key in ("pixel_values", "unlabelled"):
                if key in batch:
                    batch[key] = _changed(batch[key], self.augment, crop=True)
            if "views" in batch:
                batch["views"] = [_changed(view, self.augment, crop=False) for view in batch["views"]]


def resized(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size`` (bicubic, antialiased), then the middle square."""
    shorter = min(image.size)
    if shorter != size:
        width, height = (max(size, round(side * size / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size)) if image.size != (size, size) else image


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


# The pipelines are built in the process that uses them, so that datasets can be sent to workers.


@cache
def _changes(augment: Augment, shape: tuple[int, int, int], whole: bool) -> Transform:
    """Bytes [C, h, w] -> [C, H, W] in 0..1. whole: the picture still has its own size."""
    v2 = _transforms()
    channels, *size = shape
    steps: list[nn.Module] = []
    if augment.crop is not None:
        steps += [v2.RandomResizedCrop(size, scale=augment.crop)]
    elif whole:
        steps += [v2.Resize(size[0], v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    if augment.pad:
        steps += [v2.RandomCrop(size, padding=augment.pad)]
    return v2.Compose([*steps, *_further(augment, size[0], channels)])


@cache
def _view(augment: Augment, size: int, scale: tuple[float, float], channels: int) -> Transform:
    """Bytes [C, h, w] -> a view [C, size, size] in 0..1."""
    v2 = _transforms()
    crop = v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, *_further(augment, size, channels)])


def _further(augment: Augment, size: int, channels: int) -> list[nn.Module]:
    """What is no crop."""
    v2, strength = _transforms(), augment.colour
    steps: list[nn.Module] = []
    if augment.flip:
        steps += [v2.RandomHorizontalFlip()]
    if augment.vertical_flip:
        steps += [v2.RandomVerticalFlip()]
    if augment.rotate:
        steps += [v2.RandomRotation(augment.rotate, v2.InterpolationMode.BILINEAR)]
    if strength:
        tints = (strength, strength / 4) if channels == 3 else (0, 0)
        steps += [v2.ColorJitter(strength, strength, *tints)]
    if augment.blur:
        steps += [v2.RandomApply([v2.GaussianBlur(_kernel(size), _BLUR_SIGMA)], p=augment.blur)]
    steps += [v2.Lambda(_scaled)]
    if augment.erase:
        steps += [v2.RandomErasing(p=augment.erase)]
    return steps


def _mixed(augment: Augment, picture: Tensor, other: Tensor) -> tuple[Tensor, float]:
    """A picture [C, H, W] with another in it, and the other's share."""
    kinds = [name for name in ("mixup", "cutmix") if getattr(augment, name)]
    name = kinds[int(torch.randint(len(kinds), ()))]
    pictures, shares = _mixer(name, getattr(augment, name))(torch.stack([picture, other]), torch.arange(2))
    return pictures[0], float(shares[0, 1])


@cache
def _mixer(name: str, alpha: float) -> Any:
    """Mixes a batch of two with each other; its labels tell the shares."""
    v2 = _transforms()
    return {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=alpha, num_classes=2)


@cache
def _batch_changes(augment: Augment, shape: tuple[int, int, int], *, crop: bool) -> nn.Module:
    """[B, C, H, W] -> the same, each picture changed on its own."""
    ensure_torchvision()
    try:
        import kornia.augmentation as kornia
    except ImportError as error:
        raise BadInput("augment with where: batch needs the package kornia: pip install kornia") from error
    channels, height, width = shape
    strength = augment.colour
    steps: list[nn.Module] = []
    if augment.crop is not None and crop:
        steps += [kornia.RandomResizedCrop((height, width), scale=augment.crop)]
    if augment.pad and crop:
        steps += [kornia.RandomCrop((height, width), padding=augment.pad)]
    if augment.flip:
        steps += [kornia.RandomHorizontalFlip()]
    if augment.vertical_flip:
        steps += [kornia.RandomVerticalFlip()]
    if augment.rotate:
        steps += [kornia.RandomRotation(augment.rotate, p=1.0)]
    if strength and channels == 3:
        steps += [kornia.ColorJitter(strength, strength, strength, strength / 4)]
    elif strength:
        span = (1 - strength, 1 + strength)
        steps += [kornia.RandomBrightness(span), kornia.RandomContrast(span)]
    if augment.blur:
        steps += [kornia.RandomGaussianBlur(_kernel(height), _BLUR_SIGMA, p=augment.blur)]
    if augment.erase:
        steps += [kornia.RandomErasing(p=augment.erase)]
    return nn.Sequential(*steps)


def _changed(pictures: Tensor, augment: Augment, *, crop: bool) -> Tensor:
    channels, height, width = pictures.shape[1:]
    return _batch_changes(augment, (channels, height, width), crop=crop)(pictures).clamp(0, 1)


def _transforms() -> Any:
    ensure_torchvision()
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise BadInput("augment and views need torchvision: pip install 'limbeck[vision]'") from error
    return v2


def _kernel(size: int) -> int:
    """Width of the blur: about a tenth of the picture, odd."""
    return max(3, size // 20 * 2 + 1)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..count-1, [count]."""
    drawn = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return torch.randperm(count, generator=torch.Generator().manual_seed(drawn))


def _aspects(records: Sequence[ImageRecord], answers: Answers | None) -> Tensor | None:
    if answers is None:
        return None
    missing = next((record.id for record in records if record.id not in answers.probabilities), None)
    if missing is not None:
        raise BadInput(f"there are no answers for picture {missing!r}")
    return torch.tensor([answers.probabilities[record.id] for record in records])


def _channels(record: ImageRecord) -> Literal[1, 3]:
    try:
        return 1 if read_header(record.image).mode in _GREY else 3
    except Exception as error:  # decoders raise all kinds
        raise BadInput(f"picture {record.id!r} cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
