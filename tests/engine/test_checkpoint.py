import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.engine.checkpoint import (
    Checkpoints,
    flatten,
    load_weights,
    restore_rng,
    rng_state,
    save_tensors,
    unflatten,
    write_atomically,
)
from limbeck.errors import BadInput


def write(checkpoints: Checkpoints, step: int, value: float) -> None:
    staged = checkpoints.staging(step)
    staged.mkdir(parents=True)
    tied = save_tensors({"w": torch.full((4,), value)}, staged / "method.safetensors")
    (staged / "state.json").write_text(json.dumps({"tied": {"method": tied}}))
    checkpoints.commit(step)


@pytest.fixture
def three(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30):
        write(checkpoints, step, step)
    return checkpoints


def test_the_newest_whole_checkpoint_is_found(three):
    assert three.latest().step == 30
    assert three.latest().tensors("method")["w"].tolist() == [30.0] * 4


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(three, damage):
    file = three.of_step(30).path / "method.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "remove":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text("{")
    said = []
    assert three.latest(said.append).step == 20
    assert len(said) == 1
    assert "step 30 is corrupt" in said[0]
    assert "falling back to step 20" in said[0]


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_none(three, tmp_path):
    for checkpoint in three.all():
        (checkpoint.path / "manifest.json").unlink()
    with pytest.raises(BadInput, match="no earlier one is whole"):
        three.latest()
    assert Checkpoints(tmp_path / "empty").latest() is None


def test_what_a_crash_left_half_written_is_not_a_checkpoint(three):
    (three.staging(40)).mkdir()
    (three.staging(40) / "method.safetensors").write_bytes(b"half")
    assert three.latest().step == 30
    three.prune(keep=1, also=10)
    assert [checkpoint.step for checkpoint in three.all()] == [10, 30]
    assert not three.staging(40).exists()


def test_a_folder_of_another_name_is_no_checkpoint(three):
    kept = three.folder / "step-00000030.bak"
    kept.mkdir()
    assert [checkpoint.step for checkpoint in three.all()] == [10, 20, 30]
    three.prune(keep=1, also=None)
    assert kept.is_dir()


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff\xfe\x00", b'{"state.json": 3}', b'{"state.json": {}}'])
def test_a_manifest_that_is_none_falls_back_to_the_checkpoint_before(three, content):
    (three.of_step(30).path / "manifest.json").write_bytes(content)
    said = []
    assert three.latest(said.append).step == 20
    assert "manifest.json" in said[0]


def test_tied_tensors_are_written_once_and_tied_again(tmp_path):
    weight = torch.randn(100, 100)
    tied = save_tensors({"a": weight, "b": weight, "part": weight[:3]}, tmp_path / "x.safetensors")
    assert tied == {"b": "a"}
    assert (tmp_path / "x.safetensors").stat().st_size < 1.1 * 4 * 103 * 100 + 1000


def test_random_generators_continue_where_they_were():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    random.gauss(0, 1), np.random.randn()
    state = rng_state()
    first = (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist())
    restore_rng(state)
    assert (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist()) == first


nested = st.recursive(
    st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(), st.just(torch.tensor([1.0, 2.0]))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=4), nested, max_size=4))
def test_flatten_survives_json(tree):
    tensors, rest = flatten(tree)
    again = unflatten(tensors, json.loads(json.dumps(rest)))
    assert str(again) == str(tree)


def test_pickle_is_refused_and_a_broken_file_named(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(BadInput, match="pickle checkpoints can run code"):
        load_weights(tmp_path / "weights.pt")
    (tmp_path / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        load_weights(tmp_path / "weights.safetensors")


def test_a_text_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]
