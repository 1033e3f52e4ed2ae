"""The picture data of a recipe whose student is an image classifier: read, split, and shown as training and evaluation need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.data.images import LabelledImages, load_images
from limbeck.data.loading import Split
from limbeck.data.views import ImageCollate, ImageDataset, Presentation, presentation
from limbeck.engine.recipe import DataSpec
from limbeck.errors import BadInput


@dataclass
class Pictures:
    """Datasets by stage and by held-out split. reference: the training pictures as they are, with a teacher's answers; the labelled ones,
    where others stand beside them.

    collate: joins their samples. classes: their names. skipped: broken pictures, by split.
    """

    data: dict[str, ImageDataset]
    held_out: dict[str, ImageDataset]
    reference: ImageDataset
    collate: ImageCollate
    classes: tuple[str, ...]
    skipped: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, specs: Mapping[str, DataSpec], *, beside: bool = False) -> Pictures:
        """Read the data of every stage.

        specs: as `limbeck.engine.task.data_specs` gives them, "train" first: where others do not say their channels, they have its.
        beside: see `Method.unlabelled_beside`; ``data.unlabelled_among`` overrules it. Raises `BadInput` for a stage of other classes.
        """
        data: dict[str, ImageDataset] = {}
        references: dict[str, ImageDataset] = {}
        skipped: list[dict[str, Any]] = []
        shown, _ = _parts(specs["train"])
        for stage, spec in specs.items():
            presented, images = _read(spec, "train", skipped, data.get("train"))
            if presented.augment != shown.augment:
                raise BadInput(f"stage {stage!r}: data.augment differs from that of `data`: one run augments in one way")
            if data and images.classes not in ((), data["train"].classes):
                raise BadInput(
                    f"stage {stage!r}: its data's classes ({_first(images.classes)}) are not those of `data` "
                    f"({_first(data['train'].classes)}), and a label is a class's place: list the same ones in the same order in "
                    "data.class_names or data.classes of both"
                )
            unlabelled = images.unlabelled
            paired = beside and not presented.unlabelled_among and bool(unlabelled) and bool(images.labelled.records)
            data[stage] = _dataset(images.labelled if paired else images, presented, True, unlabelled if paired else None, spec)
            plain = presented.model_copy(update={"augment": None, "views": None, "balance": "none"})
            references[stage] = _dataset(images.labelled if paired else images, plain, True, None, spec)
        train = data["train"]
        held_out: dict[str, ImageDataset] = {}
        others: tuple[Split, ...] = ("val", "test")
        for split in others:
            presented, images = _read(specs["train"], split, skipped, train)
            if images.records:
                held_out[split] = _dataset(images, presented, False, None, specs["train"])
        return cls(data, held_out, references["train"], ImageCollate(shown.augment), train.classes, skipped)


def check_alone(dataset: Any) -> None:
    """`BadInput` where what a sample shows depends on more than itself and its view, so that no cache can hold a teacher's answer to it."""
    if not isinstance(dataset, ImageDataset):
        return
    if dataset.augment is not None and dataset.augment.where == "batch":
        raise BadInput(
            "a cache keeps answers to single pictures, and data.augment.where: batch changes batches: use where: worker"
        )
    if dataset.unlabelled is not None:
        raise BadInput(
            "a cache keeps answers to single pictures, and this data shows unlabelled ones beside labelled ones: set "
            "data.unlabelled_among: true"
        )


def _parts(spec: DataSpec) -> tuple[Presentation, dict[str, Any]]:
    """How a spec's pictures are shown, and what says where they are."""
    return presentation(spec.model_dump(exclude={"max_length"}))


def _read(
    spec: DataSpec, split: Split, skipped: list[dict[str, Any]], train: ImageDataset | None
) -> tuple[Presentation, LabelledImages]:
    """How a split's pictures are shown, and they. train: the training data, once they are read."""
    presented, source = _parts(spec)
    images = load_images(source, split)
    skipped.extend({"split": split, **row} for row in images.skipped)
    channels = presented.channels or (train.channels if train is not None else None)
    return presented.model_copy(update={"channels": channels}), images


def _first(classes: Sequence[str]) -> str:
    return ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")


def _dataset(images: LabelledImages, presented: Presentation, train: bool, unlabelled: Any, spec: DataSpec) -> ImageDataset:
    options = presented.model_dump(exclude={"augment", "views", "cache", "unlabelled_among"})
    return ImageDataset(
        images, train=train, augment=presented.augment, views=presented.views, unlabelled=unlabelled, cache=presented.cache or None,
        seed=(spec.model_extra or {}).get("seed", 0), **options,
    )  # fmt: skip
