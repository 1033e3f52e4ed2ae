"""The benchmark of the teacher cache, on little data."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cache.py"


def test_the_benchmark_measures_what_was_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tiny", "--epochs", "1", "--seeds", "1", "--steps", "2", "--top-k", "48"]
    runpy.run_path(str(SCRIPT))["main"]([*small, "--json", str(tmp_path / "cache.json")])
    result = json.loads((tmp_path / "cache.json").read_text())
    token, image = result["storage"]["token"], result["storage"]["image"]
    assert token["row_bytes"] < token["bytes"] <= 200
    assert image["row_bytes"] < image["bytes"] <= 400
    for row in (token, image):
        assert row["worst_log_prob"] < 0.05
        assert row["worst_kl"] < 1e-4
    assert result["epoch"]["ratio_to_sft"].keys() == {"sft", "kd from the cache", "kd, live"}
    live, halved, cached = (result["seeds"][name]["loss"] for name in ("live", "live, halved", "cached"))
    assert live == pytest.approx(halved, abs=1e-4)
    assert live == pytest.approx(cached, abs=1e-3)
    assert "x sft" in capsys.readouterr().out
