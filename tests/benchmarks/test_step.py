"""The benchmarks of a step and of an import, small and without peers."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def rows_of(script: dict[str, Any], arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    script["main"](["--no-peers", *arguments, "--json", str(folder / "result.json")])
    return json.loads((folder / "result.json").read_text())["rows"]


@pytest.mark.parametrize("case", ["mlp", "switch-kd"])
def test_every_loop_of_a_step_reaches_the_loss_of_the_one_by_hand(case: str, tmp_path: Path) -> None:
    """It is the script that refuses another loss."""
    rows = rows_of(runpy.run_path(str(BENCHMARKS / "step.py")), ["--tiny", "--cases", case], tmp_path)
    groups = {"mlp": {"kd + hint", "ce + kd", "engine"}, "switch-kd": {"switch-kd", "engine"}}[case]
    assert {(row["group"], row["loop"]) for row in rows} == {(group, loop) for group in groups for loop in ("by hand", "limbeck")}
    for row in rows:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["loop"] != "by hand" or row["ratio"] == 1


def test_an_import_of_limbeck_is_next_to_nothing(tmp_path: Path) -> None:
    script = runpy.run_path(str(BENCHMARKS / "imports.py"))
    for slow in ("limbeck.compose", "limbeck.distill"):
        del script["COMMANDS"][slow]
    ratios = {row["name"]: row["ratio"] for row in rows_of(script, ["--repeats", "1"], tmp_path)}
    assert ratios["import limbeck"] < ratios["limbeck --help"] < ratios["import torch"] == 1
