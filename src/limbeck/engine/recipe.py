"""A recipe: which teacher hands what to which student on which data, in one YAML file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from limbeck import __version__
from limbeck.engine.config import TrainConfig
from limbeck.errors import BadInput
from limbeck.methods.registry import configure, find
from limbeck.naming import nearest
from limbeck.settings import Strict, validated


class MethodSpec(BaseModel):
    """name: a method of `limbeck list`; every other key is one of its hyper-parameters, checked against its ``Config``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def hyper(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelSpec(Strict):
    """A model.

    source: transformers (a hub name or a folder) | timm | torchvision | open_clip | efficientnet-lite | python (``pkg.mod:factory``) |
    tiny (embedded, made live) | recipe (train it first by the recipe at ``name``, once; teachers only).
    dtype: of the weights; null: float32 for a student, the checkpoint's own for a teacher. weights: a safetensors file to start from.
    Of image classifiers: pretrained: the library's own weights, true or by name. classes: outputs, or names for a zero-shot model; null:
    those of the data for a student. channels, size: what it is shown; null: as it was trained. prompts: templates of a zero-shot model.
    options: keywords of the factory, or sizes of an embedded model.
    """

    source: str
    name: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    trust_remote_code: bool = False
    random_init: bool = False
    weights: str | None = None
    pretrained: bool | str = False
    classes: Annotated[int, Field(gt=0)] | tuple[str, ...] | None = None
    channels: Annotated[int, Field(gt=0)] | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    prompts: tuple[str, ...] = ()
    options: dict[str, Any] = {}


class DataSpec(BaseModel):
    """source: of `limbeck.data`; every other key belongs to it and is checked by it. max_broken: share of broken rows tolerated."""

    model_config = ConfigDict(extra="allow", frozen=True)
    source: str
    max_broken: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_length: Annotated[int, Field(gt=0)] | None = None


class Arm(Strict):
    """A control that `limbeck bench` trains beside the method."""

    name: str
    method: MethodSpec


class CacheSpec(Strict):
    """A cache of the teacher's answers that is written when it is first needed and kept beside the teachers that Limbeck trained.

    views, top_k: as of `limbeck.engine.cache.cache`."""

    views: Annotated[int, Field(gt=0)] = 1
    top_k: Annotated[int, Field(gt=0)] = 64


class Recipe(Strict):
    """A validated recipe; paths are absolute."""

    method: MethodSpec
    student: ModelSpec
    teacher: ModelSpec | None = None
    data: DataSpec
    cache: CacheSpec | str | None = None
    train: TrainConfig = TrainConfig()
    evaluate: tuple[str, ...] = ("vqa-accuracy",)
    arms: tuple[Arm | str, ...] = ()

    def with_method(self, arm: Arm | str) -> Recipe:
        """This recipe with another method: a name alone takes that method's defaults."""
        method = MethodSpec(name=arm) if isinstance(arm, str) else arm.method
        return self.model_copy(update={"method": method})

    def with_seed(self, seed: int) -> Recipe:
        """This recipe with another training seed; what is drawn of the data for it (scenes, few shots) is drawn anew too, unless the
        recipe gives ``data.seed``. Held-out data never changes."""
        update: dict[str, Any] = {"train": self.train.model_copy(update={"seed": seed})}
        if self.draws_data:
            update["data"] = DataSpec(**{**self.data.model_dump(), "seed": seed})
        return self.model_copy(update=update)

    @property
    def draws_data(self) -> bool:
        """Whether a part of the training data is drawn by the training's seed: it is not where the data names a seed of its own."""
        given = set(self.data.model_extra or {})
        return "seed" not in given and (self.data.source == "digit-scenes" or bool(DRAWN & given))

    @property
    def fingerprint(self) -> str:
        """By what a teacher is known that this recipe trains."""
        return hashlib.blake2b(f"{__version__}\n{self.dump()}".encode(), digest_size=8).hexdigest()

    def dump(self) -> str:
        """YAML that loads back to this recipe; defaults are left out."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


class Loader(yaml.SafeLoader):
    """What looks like a date is text: a folder may be named so, and JSON knows no dates."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe before anything is loaded.

    source: a YAML file, the name of a recipe that ships with Limbeck (``switch-kd``), or a mapping. overrides: ``--train.lr 3e-4`` or
    ``--train.lr=3e-4`` as on the command line. Relative paths in a file are relative to that file, those of overrides to the current
    folder. Raises `BadInput` with one line.
    """
    if isinstance(source, Recipe) and not overrides:
        return source
    if isinstance(source, Recipe):
        values, folder, where = source.model_dump(mode="json", exclude_defaults=True), Path.cwd(), "recipe"
    elif isinstance(source, Mapping):
        values, folder, where = copy.deepcopy(dict(source)), Path.cwd(), "recipe"  # overrides are written into it
    else:
        path = locate(source)
        values, folder, where = _read_yaml(path), path.parent, str(path)
    values = _absolute(values, folder)
    for dotted, value in parse_overrides(overrides):
        _assign(values, dotted, value)
    recipe = validated(Recipe, _absolute(values, Path.cwd()), where)
    for method in (recipe.method, *(arm.method for arm in recipe.arms if isinstance(arm, Arm))):
        configure(find(method.name).load(), method.hyper)
    for arm in recipe.arms:
        if isinstance(arm, str):
            find(arm)
    return recipe


def option_overrides(teacher: ModelSpec) -> list[str]:
    """The options of a teacher that a recipe trains, as overrides of that recipe."""
    return [f"--{key}={json.dumps(value)}" for key, value in teacher.options.items()]


def locate(source: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that ships with Limbeck."""
    path = Path(source)
    if path.is_file():
        return path.resolve()
    shipped = shipped_recipes()
    if str(source) in shipped:
        return shipped[str(source)]
    raise BadInput(f"no recipe {str(source)!r}: neither a file nor one that ships with Limbeck ({nearest(str(source), shipped)})")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with Limbeck, by name."""
    package = Path(__file__).resolve().parents[1] / "recipes"
    folder = package if package.is_dir() else package.parents[2] / "recipes"
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """``["--train.lr", "3e-4", "--train.seed=1"]`` -> [("train.lr", "3e-4"), ("train.seed", 1)]; values are YAML
    (1.1 reads 3e-4 as text; pydantic makes it the number where one is wanted)."""
    pairs = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise BadInput(f"unexpected argument {flag!r}: a recipe key is overridden as --train.lr 3e-4")
        key, given, text = flag[2:].partition("=")
        if not given:
            if not rest:
                raise BadInput(f"--{key} needs a value, as in --train.lr 3e-4")
            text = rest.pop(0)
        try:
            pairs.append((key, yaml.load(text, Loader)))
        except yaml.YAMLError as error:
            raise BadInput(f"--{key} {text!r}: not readable as YAML: {getattr(error, 'problem', None) or error}") from error
    return pairs


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise BadInput(f"--{dotted}: {part!r} is not a group of keys")
    values[last] = value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a text file in UTF-8"
        raise BadInput(f"{path}{place}: not readable as YAML: {problem}") from error
    if not isinstance(values, dict):
        raise BadInput(
            f"{path}: a recipe is a mapping with the keys method, student, data, ...; this file holds {type(values).__name__}"
        )
    return values


SAVED = ("config.json", "limbeck.json", "model.safetensors")
"""Files of which a folder that holds a model has one."""
PATH_KEYS = {"path", "images", "val_path", "test_path", "answers"}
DRAWN = {"shots", "labelled_fraction", "limit", "imbalance"}
"""Keys of image data that draw a part of the training split, by ``seed``."""


def _absolute(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Paths of ``data`` and local model folders, made absolute against the recipe's folder."""

    def placed(path: str) -> str:
        return str((folder / os.path.expanduser(path)).resolve())

    def data(spec: Any) -> Any:
        if not isinstance(spec, Mapping):
            return spec
        return {
            key: placed(value) if key in PATH_KEYS and isinstance(value, str) and _local(spec, key) else value
            for key, value in spec.items()
        }

    def model(spec: Any) -> Any:
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            return spec
        if isinstance(spec.get("weights"), str):
            spec = {**spec, "weights": placed(spec["weights"])}
        here = placed(spec["name"])
        saved = any(Path(here, file).is_file() for file in SAVED)
        return {**spec, "name": here} if spec.get("source") == "recipe" or (spec.get("source") != "python" and saved) else spec

    changed = dict(values)
    for key, change in (("data", data), ("student", model), ("teacher", model)):
        if key in changed:
            changed[key] = change(changed[key])
    if isinstance(changed.get("cache"), str):
        changed["cache"] = placed(changed["cache"])
    if isinstance(changed.get("train"), Mapping) and isinstance(changed["train"].get("stages"), list):
        stages = [
            {**s, "data": data(s["data"])} if isinstance(s, dict) and s.get("data") else s for s in changed["train"]["stages"]
        ]
        changed["train"] = {**changed["train"], "stages": stages}
    return changed


def _local(spec: Mapping[str, Any], key: str) -> bool:
    """A hub name of ``datasets`` is no path."""
    return not (spec.get("source") == "hf" and key == "path")
