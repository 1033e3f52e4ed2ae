"""Runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.engine.compare import compare
from limbeck.errors import BadInput


@pytest.mark.parametrize("content", [b'{"test": {', b"\xff", b"[]", b"{}", b'{"test": {"a": 1}}', b'{"test": 3, "seconds": 1}'])
def test_a_broken_result_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_text("method: {name: sft}\n")
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"result.json is not what a run writes .* `limbeck resume ") as error:
        compare([tmp_path])
    assert "\n" not in str(error.value)
