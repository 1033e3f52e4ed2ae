"""Finished runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck.engine.run import run_folder
from limbeck.engine.trainer import brief, flat
from limbeck.errors import BadInput


def compare(runs: Sequence[str | Path]) -> dict[str, Any]:
    """{"metrics": {name: {run: value}}, "differences": {recipe key: {run: value}}} of finished runs.

    Metrics are those of the test split where a run has one, else of validation. Raises `BadInput` for a run that is not finished.
    """
    metrics: dict[str, dict[str, float]] = {}
    keys: dict[str, dict[str, Any]] = {}
    for run in runs:
        folder = run_folder(run)
        if not (folder / "result.json").exists():
            raise BadInput(f"{folder} is not finished: continue it with `limbeck resume {folder}`")
        try:
            result = json.loads((folder / "result.json").read_text())
            found = {**brief(result["test"] or result["validation"]), **result.get("student", {}), "seconds": result["seconds"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{folder / 'result.json'} is not what a run writes ({type(error).__name__}: {error}): remove it and measure again with "
                f"`limbeck resume {folder}`"
            ) from error
        for name, value in found.items():
            metrics.setdefault(name, {})[str(run)] = value
        for key, value in flat(yaml.safe_load((folder / "recipe.yaml").read_text())):
            keys.setdefault(key, {})[str(run)] = value
    differing = {
        key: values for key, values in keys.items() if len(values) < len(runs) or len({str(v) for v in values.values()}) > 1
    }
    return {"metrics": metrics, "differences": differing}
