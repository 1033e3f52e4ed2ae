"""Limbeck distils visual knowledge: what a large vision or vision-language model knows, into a student small enough to ship.

The public names are loaded when they are first used, so that ``import limbeck`` and ``limbeck --help`` cost next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "create": "limbeck.api",
    "list_methods": "limbeck.api",
    "compose": "limbeck.methods.compose",
    **dict.fromkeys(
        (
            "CE",
            "KD",
            "StandardisedKD",
            "DKD",
            "DIST",
            "TAKD",
            "DML",
            "ONE",
            "Hint",
            "Cosine",
            "CWD",
            "MGD",
            "SimKD",
            "RKD",
            "SP",
            "PKT",
            "CC",
            "CRD",
            "AT",
            "NST",
            "VID",
            "ReviewKD",
            "FSP",
            "OFD",
            "Objective",
        ),
        "limbeck.methods.objectives",
    ),
    "Classifier": "limbeck.models.classifier",
    "load_classifier": "limbeck.models.vision",
    "distill": "limbeck.engine.run",
    "run": "limbeck.engine.run",
    "resume": "limbeck.engine.run",
    "evaluate_run": "limbeck.engine.run",
    "probe_run": "limbeck.engine.run",
    "Run": "limbeck.engine.run",
    "bench": "limbeck.engine.bench",
    "bench_all": "limbeck.engine.bench",
    "export": "limbeck.engine.export",
    "cache": "limbeck.engine.cache",
    "load_recipe": "limbeck.engine.recipe",
    "VLM": "limbeck.models.vlm",
    "load_vlm": "limbeck.models.loading",
    "FrozenTeacher": "limbeck.teachers.frozen",
    "Method": "limbeck.methods.base",
    "Losses": "limbeck.methods.base",
    "Stage": "limbeck.methods.base",
    "Batch": "limbeck.batch",
    "BadInput": "limbeck.errors",
    "LimbeckError": "limbeck.errors",
}

__all__ = [
    "AT",
    "CC",
    "CE",
    "CRD",
    "CWD",
    "DIST",
    "DKD",
    "DML",
    "FSP",
    "KD",
    "MGD",
    "NST",
    "OFD",
    "ONE",
    "PKT",
    "RKD",
    "SP",
    "TAKD",
    "VID",
    "VLM",
    "BadInput",
    "Batch",
    "Classifier",
    "Cosine",
    "FrozenTeacher",
    "Hint",
    "LimbeckError",
    "Losses",
    "Method",
    "Objective",
    "ReviewKD",
    "Run",
    "SimKD",
    "Stage",
    "StandardisedKD",
    "__version__",
    "bench",
    "bench_all",
    "cache",
    "compose",
    "create",
    "distill",
    "evaluate_run",
    "export",
    "list_methods",
    "load_classifier",
    "load_recipe",
    "load_vlm",
    "probe_run",
    "resume",
    "run",
]

if TYPE_CHECKING:
    from limbeck.api import create, list_methods
    from limbeck.batch import Batch
    from limbeck.engine.bench import bench, bench_all
    from limbeck.engine.cache import cache
    from limbeck.engine.export import export
    from limbeck.engine.recipe import load_recipe
    from limbeck.engine.run import Run, distill, evaluate_run, probe_run, resume, run
    from limbeck.errors import BadInput, LimbeckError
    from limbeck.methods.base import Losses, Method, Stage
    from limbeck.methods.compose import compose
    from limbeck.methods.objectives import (
        AT,
        CC,
        CE,
        CRD,
        CWD,
        DIST,
        DKD,
        DML,
        FSP,
        KD,
        MGD,
        NST,
        OFD,
        ONE,
        PKT,
        RKD,
        SP,
        TAKD,
        VID,
        Cosine,
        Hint,
        Objective,
        ReviewKD,
        SimKD,
        StandardisedKD,
    )
    from limbeck.models.classifier import Classifier
    from limbeck.models.loading import load_vlm
    from limbeck.models.vision import load_classifier
    from limbeck.models.vlm import VLM
    from limbeck.teachers.frozen import FrozenTeacher


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
