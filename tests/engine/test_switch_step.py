"""The benchmark that runs on a GPU, on tiny models here."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "switch_step.py"


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava"])
def test_the_benchmark_times_a_step(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch", "2", "--text", "12", "--answer", "4", "--repeats", "1"]
    runpy.run_path(str(SCRIPT))["main"](["--tiny", "--family", family, *small, "--json", str(tmp_path / "step.json")])
    result = json.loads((tmp_path / "step.json").read_text())
    assert set(result["timed"]) == {"passes", "step", "step + AdamW"}
    assert result["versions"].keys() >= {"torch", "transformers", "python", "cuda"}
    assert result["tokens_per_second"] == pytest.approx(
        2 * result["tokens_a_sample"] / result["timed"]["step + AdamW"]["median_ms"] * 1e3
    )
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava"])
def test_its_full_models_are_of_the_stated_sizes(family: str, role: str) -> None:
    """Built on the meta device: the language parts are Qwen2.5-0.5B and -3B, and both models see with one encoder."""
    from limbeck.engine.estimate import sizes_of
    from limbeck.models.loading import build_vlm

    sizes = sizes_of(build_vlm(runpy.run_path(str(SCRIPT))["configuration"](family, role, False)))
    assert sizes.parameters["language"] == {"student": 494_032_768, "teacher": 3_085_938_688}[role]
    assert sizes.vision.width == {"qwen2.5-vl": 1280, "llava": 1152}[family]
