"""Which methods exist, without importing any of them.

A third party's package adds one through an entry point of the group ``limbeck.methods``::

    [project.entry-points."limbeck.methods"]
    my-method = "my_package.my_module:MyMethod"
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from limbeck.errors import BadInput
from limbeck.naming import nearest

if TYPE_CHECKING:
    from limbeck.methods.base import Method

GROUP = "limbeck.methods"


@dataclass(frozen=True)
class Entry:
    """Where a method lives and what it is. target: ``package.module:Class``; models: the kind of models it distils."""

    name: str
    target: str
    models: str
    summary: str
    paper: str = ""

    def load(self) -> type[Method]:
        """Import the class; a third party's package that is broken is reported by name."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise BadInput(f"method {self.name!r} cannot be imported from {self.target!r}: {error}") from error


BUILT_IN = (
    Entry("switch-kd", "limbeck.methods.vlm.switch_kd:SwitchKD", "vision-language",
          "labels + DBiLD to the teacher's logits, along the ordinary and the visual-switch route", "arXiv 2604.14629"),
    Entry("bild", "limbeck.methods.vlm.bild:BiLD", "vision-language",
          "labels + bi-directional logits difference with a fixed k", "arXiv 2406.13555"),
    Entry("kd", "limbeck.methods.vlm.kd:KD", "vision-language",
          "labels + KL to the teacher's logits (forward, reverse, Jeffreys, JSD)", "arXiv 1503.02531"),
    Entry("sft", "limbeck.methods.vlm.sft:SFT", "vision-language", "labels only: the control without a teacher"),
    Entry("trg", "limbeck.methods.recognition.trg:TRG", "image classifiers",
          "labels + KD + relations between patch tokens of the whole batch", "arXiv 2306.12442"),
    Entry("lelp", "limbeck.methods.recognition.lelp:LELP", "image classifiers",
          "few classes split softly into subclasses along directions of the teacher's embedding", "arXiv 2409.20449"),
    Entry("prockd", "limbeck.methods.recognition.prockd:ProCKD", "image classifiers",
          "prototypes of the teacher's tokens guide a student of another task", "arXiv 2212.13180"),
    Entry("cmd", "limbeck.methods.recognition.cmd:CMD", "image backbones",
          "self-distillation without labels: views, regions, and bags of patches", "arXiv 2401.08860"),
    Entry("dmae", "limbeck.methods.recognition.dmae:DMAE", "vision transformers",
          "a masked autoencoder learns a teacher's tokens on the visible patches", "arXiv 2208.12256"),
    Entry("mae", "limbeck.methods.recognition.dmae:MAE", "vision transformers",
          "a masked autoencoder alone: the control of dmae", "arXiv 2111.06377"),
    Entry("makd", "limbeck.methods.recognition.makd:MaKD", "image classifiers",
          "labels + what a large model answers to questions about each picture", "arXiv 2501.13341"),
    Entry("dho", "limbeck.methods.recognition.dho:DHO", "image classifiers",
          "few labels and a zero-shot teacher, each with a head of its own", "arXiv 2505.07675"),
    Entry("ema-self", "limbeck.methods.recognition.ema_self:EMASelf", "image classifiers",
          "a moving average of the student is its teacher", "arXiv 1703.01780"),
    Entry("compose", "limbeck.methods.compose:Compose", "any",
          "any objectives on any two modules: labels, logits, features"),
)  # fmt: skip


def methods() -> dict[str, Entry]:
    """Every known method by name: the built-in ones, then those of installed packages."""
    known = {entry.name: entry for entry in BUILT_IN}
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else point.value.partition(".")[0]
        known.setdefault(point.name, Entry(point.name, point.value, "any", f"from the package {package}"))
    return known


def find(name: str) -> Entry:
    """The entry of that name; `BadInput` names the nearest known one."""
    known = methods()
    if name not in known:
        raise BadInput(f"unknown method {name!r}; {nearest(name, known)}")
    return known[name]


def hyper_parameters(method: type[Method]) -> dict[str, Any]:
    """A method's hyper-parameters and their defaults (the fields of its ``Config``)."""
    return {
        item.name: None if item.default is dataclasses.MISSING else item.default for item in dataclasses.fields(method.Config)
    }


def configure(method: type[Method], values: Mapping[str, Any]) -> Any:
    """Validate hyper-parameters against the method's ``Config`` dataclass; `BadInput` names the key and what would be right."""
    from pydantic import TypeAdapter, ValidationError

    known = hyper_parameters(method)
    for key in values:
        if key not in known:
            raise BadInput(f"method {method.name!r} has no hyper-parameter {key!r}; {nearest(key, known)}")
    try:
        return TypeAdapter(method.Config).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise BadInput(f"method.{where}: {reason} (given {first['input']!r})" if where else f"method: {reason}") from error


def describe(method: type[Method]) -> str:
    """The method's file docstring: paper, what moves where, differences between paper and code."""
    return inspect.getdoc(inspect.getmodule(method)) or ""
