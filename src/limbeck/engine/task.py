"""From a validated recipe to what a run needs: models, datasets, collation and what is measured."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Subset

from limbeck.batch import Batch
from limbeck.data.embedded.digit_scenes import Split
from limbeck.data.images import IMAGE_SOURCES
from limbeck.data.loading import SOURCES, load_data
from limbeck.data.vlm import VQACollator, VQADataset
from limbeck.engine.batches import EVALUATION_BATCH, collate_pairs, derived_seed, evaluation_loader
from limbeck.engine.checkpoint import load_weights
from limbeck.engine.fingerprint import difference, identity, recorded
from limbeck.engine.pictures import Pictures
from limbeck.engine.recipe import CacheSpec, DataSpec, ModelSpec, Recipe, option_overrides
from limbeck.engine.taught import TaughtCollate, TaughtDataset
from limbeck.engine.trainer import Trainer, match_stages
from limbeck.errors import BadInput, StaleCache
from limbeck.evaluate import protocols
from limbeck.methods.base import Method
from limbeck.methods.registry import configure, find
from limbeck.models.classifier import Classifier
from limbeck.models.loading import imported, kind_of, load
from limbeck.models.vlm import VLM
from limbeck.naming import nearest
from limbeck.settings import validated
from limbeck.teachers.cached import CachedTeacher, Scalar
from limbeck.teachers.frozen import FrozenTeacher


@dataclass
class Task:
    """Everything a run trains and measures. data: stage name (or "train") -> dataset; skipped: broken rows, by split; reference: the
    training data unaugmented, for methods that survey it and protocols that learn from it."""

    method: Method
    teacher: VLM | nn.Module | None
    data: dict[str, Any]
    held_out: dict[str, Any]
    collate: Callable[[list[Any]], Batch]
    protocols: tuple[str, ...]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    reference: Any = None

    def measure(self, method: Method, accelerator: Accelerator, *, split: str = "val") -> dict[str, float]:
        """The recipe's protocols on a held-out split. On validation data, the method first chooses there what it does not train."""
        device = accelerator.device
        if split == "val" and type(method).calibrate is not Method.calibrate:
            method.calibrate(self.shown(self.held_out[split], device))
        loader = evaluation_loader(
            self.held_out[split], self.collate, EVALUATION_BATCH, rank=accelerator.process_index, world=accelerator.num_processes
        )
        return protocols.evaluate(
            self.protocols, loader, method, self.teacher, device=device, reference=self.referring(self.reference, device)
        )

    def referring(self, dataset: Any, device: torch.device) -> Callable[[], Iterator[Batch]] | None:
        """What gives a protocol training data to learn from; None where there is none for that."""
        return None if dataset is None else partial(self.shown, dataset, device)

    def shown(self, dataset: Any, device: torch.device) -> Iterator[Batch]:
        """The batches of a dataset in order, on the device."""
        return (send_to_device(batch, device) for batch in evaluation_loader(dataset, self.collate, EVALUATION_BATCH))

    def rehearse(self, trainer: Trainer) -> None:
        """Bring the teacher to the device, and run every protocol on a few held-out samples (`few`), so that what cannot be measured is
        refused before training and not at the first validation."""
        if self.teacher is not None:
            bare_module(self.teacher).to(trainer.accelerator.device)
        if "val" not in self.held_out:
            return
        samples = Subset(self.held_out["val"], few(self.held_out["val"]))
        some = None if self.reference is None else Subset(self.reference, labelled_first(self.reference)[:EVALUATION_BATCH])
        measured = trainer.measured(
            lambda method, accelerator: protocols.evaluate(
                self.protocols, self.shown(samples, accelerator.device), method, self.teacher, device=accelerator.device,
                reference=self.referring(some, accelerator.device),
            )
        )  # fmt: skip
        wanted = trainer.config.select.metric
        if wanted not in measured:
            raise BadInput(f"train.select.metric {wanted!r} is not measured by evaluate: {nearest(wanted, measured)}")

    def commonest_answer(self, split: str) -> float:
        """The share of the commonest answer, or class, among a split's: what a model without eyes reaches. 0 where there are none."""
        labels = getattr(self.held_out.get(split), "labels", None)
        known = torch.as_tensor([] if labels is None else labels)
        if len(known := known[known >= 0]):
            return float(known.bincount().max() / len(known))
        answers = Counter(turns[-1][1] for record in getattr(self.held_out.get(split), "records", ()) if (turns := record.turns))
        return max(answers.values()) / answers.total() if answers else 0.0

    def batches(self, split: str, device_batch: int = EVALUATION_BATCH) -> Any:
        """The batches of a held-out split, in order."""
        if split not in self.held_out:
            raise BadInput(f"this data has no {split!r} split; it has {', '.join(self.held_out) or 'none'}")
        return evaluation_loader(self.held_out[split], self.collate, device_batch)


def build_task(
    recipe: Recipe, teacher: VLM | nn.Module | None = None, student: VLM | nn.Module | None = None, *, taught: bool = True
) -> Task:
    """Load the models and the data of a recipe and check that they fit. Raises `BadInput` before anything is written.

    teacher, student: already loaded ones; else the recipe's are loaded. The student is drawn from the recipe's seed. taught: whether the
    training data holds a cache's answers, where the recipe trains from one.
    """
    method_class: Any = find(recipe.method.name).load()
    hyper = vars(configure(method_class, recipe.method.hyper))
    for name in recipe.evaluate:
        protocols.find(name)
    torch.manual_seed(recipe.train.seed)
    cached = open_cache(recipe)
    specs = data_specs(recipe)
    pictures = Pictures.of(specs, beside=method_class.unlabelled_beside) if classifies(recipe) else None
    classes = None if pictures is None else pictures.classes
    student = student or load_student(recipe.student, recipe.train.seed, classes)
    if teacher is None and recipe.teacher is not None and recipe.cache is None:
        teacher = load_teacher(recipe.teacher, classes)
    if teacher is not None:
        FrozenTeacher(bare_module(teacher))  # also for a method that only measures against it
    torch.manual_seed(derived_seed(recipe.train.seed, 1))  # however the models were come by; other numbers than the student's
    method = method_class(student, (cached or teacher) if method_class.learns_from_teacher(hyper) else None, **hyper)
    if isinstance(student, VLM):
        task = vision_language_task(recipe, method, student, teacher, specs)
    elif pictures is not None:
        task = pictures_task(recipe, method, teacher, pictures)
    else:
        task = plain_task(recipe, method, teacher if isinstance(teacher, nn.Module) else None, specs)
    return taught_task(recipe, task, cached) if cached is not None and taught else task


def classifies(recipe: Recipe) -> bool:
    """Whether a recipe's student names classes of pictures that one of the image sources holds."""
    if recipe.data.source not in IMAGE_SOURCES:
        return False
    return recipe.data.source not in SOURCES or kind_of(recipe.student.model_dump(exclude_defaults=True)) == "classifier"


def data_specs(recipe: Recipe) -> dict[str, DataSpec]:
    """The training data by stage; "train" is that of every stage without its own."""
    specs = {"train": recipe.data}
    for stage in recipe.train.stages:
        if not stage.data:
            continue
        if stage.name == "train":
            raise BadInput("train.stages: 'train' is what the data of all stages is called: name this stage otherwise")
        specs[stage.name] = validated(DataSpec, stage.data, f"stage {stage.name!r}: its data is a whole `data`")
    return specs


def taught_stages(recipe: Recipe, method: Method) -> list[str]:
    """The keys of `data_specs` that some stage trains on."""
    stages = [stage.name for stage, _ in match_stages(method.stages(), recipe.train.stages)]
    specs = data_specs(recipe)
    return list(dict.fromkeys(name if name in specs else "train" for name in stages))


def check_cacheable(recipe: Recipe) -> None:
    """`BadInput` where a recipe's method does not learn from a cache."""
    method_class = find(recipe.method.name).load()
    if not learns_from_teacher(recipe):
        raise BadInput(f"method {method_class.name!r} learns from no teacher: there is nothing to cache")
    if method_class.record is Method.record:
        raise BadInput(f"method {method_class.name!r} cannot learn from a cache: {method_class.uncached}; `kd` and `compose` can")
    recorded(recipe)


def open_cache(recipe: Recipe) -> CachedTeacher | None:
    """The cached teacher of a recipe that trains from one; None for a method without a teacher (a control of such a recipe)."""
    if recipe.cache is None:
        return None
    needing = [name for name in recipe.evaluate if protocols.needs_teacher(name)]
    if needing:
        raise BadInput(
            f"evaluate: {', '.join(needing)} needs the teacher, which a run from a cache does not load: leave it out, and measure it "
            f"afterwards with `limbeck evaluate RUN --protocol {needing[0]}`"
        )
    if isinstance(recipe.cache, CacheSpec) or not learns_from_teacher(recipe):
        return None
    check_cacheable(recipe)
    return CachedTeacher(recipe.cache)


def learns_from_teacher(recipe: Recipe) -> bool:
    """Whether a recipe's method needs a teacher, as it is configured."""
    method_class = find(recipe.method.name).load()
    return method_class.learns_from_teacher(vars(configure(method_class, recipe.method.hyper)))


def answered(recipe: Recipe, method: Method, classes: Sequence[str]) -> dict[str, Scalar]:
    """What the answers to a recipe are known by. classes: of its data."""
    specs = data_specs(recipe)
    return identity(recipe, {stage: specs[stage] for stage in taught_stages(recipe, method)}, classes)


def check_fingerprint(recipe: Recipe, method: Method, cached: CachedTeacher, classes: Sequence[str]) -> None:
    """`StaleCache` that names the first thing in which the cache is not this recipe's."""
    differs = difference(cached.index.identity, answered(recipe, method, classes))
    if differs:
        raise StaleCache(
            f"{cached.folder} is not the cache of this recipe: {differs}; write another with `limbeck cache RECIPE --out FOLDER`"
        )


def taught_task(recipe: Recipe, task: Task, cached: CachedTeacher) -> Task:
    """The task with what the cached teacher said beside every training sample."""
    check_fingerprint(recipe, task.method, cached, classes_of(task))
    data = {stage: TaughtDataset(task.data[stage], cached, stage) for stage in taught_stages(recipe, task.method)}
    return replace(task, data=data, collate=TaughtCollate(task.collate, cached))


def classes_of(task: Task) -> tuple[str, ...]:
    """The names of the classes of a task's data; none where it has none."""
    return tuple(getattr(next(iter(task.data.values())), "classes", ()))


def vision_language_task(
    recipe: Recipe, method: Method, student: VLM, teacher: VLM | nn.Module | None, specs: Mapping[str, DataSpec]
) -> Task:
    """Records through the student's processor and, where it reads differently, the teacher's."""
    if teacher is not None and not isinstance(teacher, VLM):
        raise BadInput(f"the student is a vision-language model and the teacher is not ({type(teacher).__name__})")
    if student.processor is None:
        raise BadInput("the student has no processor: a vision-language student needs one to read pictures and questions")
    skipped: list[dict[str, Any]] = []
    limit = min([recipe.data.max_length or context_length(student.model), *([context_length(teacher.model)] if teacher else [])])

    def dataset(spec: DataSpec, split: Split, required: bool) -> VQADataset | None:
        loaded = load_data(spec.model_dump(exclude={"max_length"}), split)
        skipped.extend({"split": split, **row} for row in loaded.skipped)
        if not loaded.records:
            if required:
                raise BadInput(f"data.{spec.source}: no {split} records: nothing to distil on")
            return None
        return VQADataset(
            loaded.records,
            student.processor,
            teacher.processor if teacher else None,
            max_length=limit,
            cache=spec.source == "digit-scenes",
        )

    data = {stage: dataset(spec, "train", True) for stage, spec in specs.items()}
    others: tuple[Split, ...] = ("val", "test")
    held_out: dict[str, Any] = {split: found for split in others if (found := dataset(recipe.data, split, False)) is not None}
    collate = VQACollator(student.processor, teacher.processor if teacher else None)
    return Task(method, teacher, data, held_out, collate, recipe.evaluate, skipped)


def pictures_task(recipe: Recipe, method: Method, teacher: VLM | nn.Module | None, pictures: Pictures) -> Task:
    """Pictures and their classes, each model shown them as it was trained to see them."""
    if isinstance(teacher, VLM):
        raise BadInput(
            f"the student classifies pictures and the teacher is a vision-language model ({type(teacher.model).__name__})"
        )
    if not method.reads_mixtures and any(dataset.mixing for dataset in pictures.data.values()):
        raise BadInput(
            f"method {method.name!r} learns from whole pictures, and data.augment mixes two (mixup, cutmix); `compose` can"
        )
    known = teacher.classes if isinstance(teacher, Classifier) else ()
    if moved(known, pictures.classes):
        same = sorted(known) == sorted(pictures.classes)
        mend = "list the teacher's order in data.classes" if same else "take a teacher of the data's own classes"
        raise BadInput(
            f"teacher and data name {'the same' if same else 'some of the same'} classes in another order: "
            f"{moved(known, pictures.classes)}; {mend}"
        )
    check_student(recipe.student, pictures.classes)
    names = recipe.evaluate if "evaluate" in recipe.model_fields_set else protocols.default_for(method)
    return Task(
        method,
        teacher,
        dict(pictures.data),
        dict(pictures.held_out),
        pictures.collate,
        names,
        pictures.skipped,
        pictures.reference,
    )


def plain_task(recipe: Recipe, method: Method, teacher: nn.Module | None, specs: Mapping[str, DataSpec]) -> Task:
    """Datasets of (image, label) pairs, from a function that the recipe names: ``{source: python, name: "pkg.mod:function"}``."""

    def dataset(spec: DataSpec, split: str) -> Any:
        if spec.source != "python":
            raise BadInput(f"data.source {spec.source!r} holds questions and answers; a classifier learns from source: python")
        options = dict(spec.model_extra or {})
        return imported(options.pop("name", ""))(split, **options)

    data = {stage: dataset(spec, "train") for stage, spec in specs.items()}
    held_out = {split: found for split in ("val", "test") if (found := dataset(recipe.data, split)) is not None}
    names = ("classification",) if recipe.evaluate == Recipe.model_fields["evaluate"].default else recipe.evaluate
    return Task(method, teacher, data, held_out, collate_pairs, names)


def load_student(spec: ModelSpec, seed: int, classes: Sequence[str] | None = None) -> VLM | nn.Module:
    """The student of a spec, to be trained. classes: of the data, whose places it learns: a spec that names none takes their names,
    whatever a checkpoint named its outputs."""
    student = load_model(trainable(spec), seed, classes)
    if classes and isinstance(student, Classifier) and not isinstance(spec.classes, tuple):
        student.classes = tuple(classes)
    return student


def check_student(spec: ModelSpec, classes: Sequence[str]) -> None:
    """`BadInput` where what a student's spec says of its classes contradicts the data's, whose places it learns."""
    given = spec.classes
    if given is None or not classes:
        return
    if isinstance(given, int):
        if given < len(classes):
            raise BadInput(
                f"student.classes is {given} and the data have {len(classes)} classes: leave it out, or give at least {len(classes)}"
            )
    elif len(given) != len(classes):
        raise BadInput(
            f"student.classes names {len(given)} and the data have {len(classes)} classes: leave it out, or name each of them in the "
            "data's order"
        )
    elif moved(given, classes):
        raise BadInput(
            f"student.classes names classes of the data in another order: {moved(given, classes, 'student')}; leave it out, or list "
            "them in the data's order"
        )


def moved(names: Sequence[str], classes: Sequence[str], whose: str = "teacher") -> str:
    """Which class of the data stands at another place among as many names, in words; "" where none does."""
    places = {name: place for place, name in enumerate(classes)} if len(names) == len(classes) else {}
    found = ((name, place) for place, name in enumerate(names) if places.get(name, place) != place)
    return next((f"{name} is class {place} of the {whose}, {places[name]} of the data" for name, place in found), "")


def few(dataset: Any) -> list[int]:
    """The positions of a few samples, two where there are so many: where they have labels, one of each class."""
    labels = known_labels(dataset)
    firsts = [] if labels is None else [int((labels == label).nonzero()[0]) for label in labels[labels >= 0].unique()]
    return list(dict.fromkeys([*firsts, *labelled_first(dataset)]))[: max(2, len(firsts))]


def labelled_first(dataset: Any) -> list[int]:
    """The positions of all samples: where they have labels, those of the labelled ones before the others."""
    labels = known_labels(dataset)
    return list(range(len(dataset))) if labels is None else (labels < 0).int().argsort(stable=True).tolist()


def known_labels(dataset: Any) -> Tensor | None:
    """The label of each sample, [N], below 0 where it has none; None where the dataset does not tell."""
    labels = getattr(dataset, "labels", None)
    return labels if isinstance(labels, Tensor) and labels.shape == (len(dataset),) else None


def load_model(spec: ModelSpec, seed: int, classes: Sequence[str] | None = None) -> VLM | nn.Module:
    """The model of a spec; random weights are drawn from ``seed``. classes: of the data, for a classifier that does not say its own."""
    values = spec.model_dump(exclude_defaults=True, exclude={"weights"})
    torch.manual_seed(seed)
    if classes is not None and spec.classes is None and kind_of(values) == "classifier":
        values["classes"] = list(classes) if spec.source == "open_clip" else len(classes)
    model = load({**values, "seed": seed} if spec.source == "tiny" else values)
    if classes is not None and not isinstance(model, VLM):
        model = model if isinstance(model, Classifier) else Classifier(model, spec=values)
        model.classes = model.classes or tuple(classes)
    if spec.weights is not None:
        bare = model.model if isinstance(model, VLM | Classifier) else model
        try:
            bare.load_state_dict(load_weights(Path(spec.weights)))
        except RuntimeError as error:
            raise BadInput(f"{spec.weights} does not fit {type(bare).__name__}: {str(error).splitlines()[-1].strip()}") from error
    return model


def bare_module(model: VLM | nn.Module) -> nn.Module:
    """The module behind a view, or the module itself."""
    return model.model if isinstance(model, VLM) else model


def trainable(spec: ModelSpec) -> ModelSpec:
    """A student's spec: float32 weights unless it says otherwise, whatever its checkpoint holds; autocast gives the speed."""
    return spec.model_copy(update={"dtype": spec.dtype or "float32"}) if spec.source == "transformers" else spec


def recipe_teacher(recipe: Recipe) -> VLM | nn.Module | None:
    """The teacher of a recipe, loaded; None where it has none, or a cache stands for it."""
    if recipe.teacher is None or recipe.cache is not None:
        return None
    named_by_data = recipe.teacher.weights is not None or recipe.teacher.source in ("open_clip", "tiny")
    classes = Pictures.of(data_specs(recipe)).classes if named_by_data and classifies(recipe) else None
    return load_teacher(recipe.teacher, classes)


def load_teacher(spec: ModelSpec, classes: Sequence[str] | None = None) -> VLM | nn.Module:
    """The teacher of a spec. ``source: recipe`` trains it by that recipe, once, into the cache. One with weights of its own library keeps
    its own classes; one that reads its classes' names, or has weights of the user's, gets those of the data."""
    if spec.source != "recipe":
        fits = spec.weights is not None or spec.source in ("open_clip", "tiny")
        return load_model(spec, seed=0, classes=classes if fits else None)
    from limbeck.engine.run import trained_once

    return trained_once(spec.name, option_overrides(spec))


def cache_folder() -> Path:
    """Where teachers that Limbeck trained are kept: $LIMBECK_CACHE, else ~/.cache/limbeck."""
    return Path(os.environ.get("LIMBECK_CACHE") or Path.home() / ".cache" / "limbeck")


def context_length(model: nn.Module) -> int:
    """Tokens that the language part can read; unlimited where its config does not say."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or 2**31


def validator(task: Task) -> Callable[[Method, Accelerator], dict[str, float]] | None:
    """What the trainer calls to validate, or None without a validation split."""
    return partial(task.measure, split="val") if "val" in task.held_out else None
