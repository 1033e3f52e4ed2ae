"""The benchmark of losses over a vocabulary, on a small one and without peers."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "logits.py"


def test_every_row_is_the_objective_of_its_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--no-peers", "--vocabulary", "4000", "--tokens", "64", "--hidden", "8", "--repeats", "1", "--device", "cpu"]
    runpy.run_path(str(SCRIPT))["main"]([*small, "--json", str(tmp_path / "logits.json")])
    result = json.loads((tmp_path / "logits.json").read_text())
    assert all(row["same"] for row in result["results"])
    assert {row["group"] for row in result["results"]} >= {"KL", "JSD", "CE + KL", "top-64 KL", "DBiLD", "KL, frozen head"}
    firsts = [row for row in result["results"] if row["row"] in ("naive", "pairs")]
    assert firsts and all(row["time_ratio"] == row["memory_ratio"] == 1 for row in firsts)
    assert "10 % of the positions" in capsys.readouterr().out
