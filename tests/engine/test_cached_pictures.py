"""Answers to pictures in folders that change, and answers that a recipe asks for by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limbeck.engine import cache as writing
from limbeck.engine.bench import bench
from limbeck.engine.cache import cache
from limbeck.engine.fingerprint import identity
from limbeck.engine.recipe import load_recipe
from limbeck.engine.run import evaluate_run, run
from limbeck.engine.task import build_task, data_specs
from limbeck.errors import BadInput, StaleCache
from limbeck.losses.top_k import top_k
from limbeck.methods.compose import Compose
from limbeck.models.loading import load
from limbeck.teachers.cached import Index, TopKLayout, read_index

CNN = {"source": "tiny", "name": "cnn", "options": {"widths": [4]}}


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 12 pictures, and some to test on."""
    for number in range(1, 13):
        for name in ("a", "b"):
            picture(tmp_path / "data" / "train" / name / f"{number:02d}.png", 100 * number + ord(name))
            picture(tmp_path / "data" / "test" / name / f"{number:02d}.png", 100 * number + ord(name) + 7)
    return tmp_path / "data"


def recipe(folder: Path, objectives: Any = ("ce", "kd"), **changes: Any) -> dict[str, Any]:
    augment = changes.pop("augment", {"flip": True, "pad": 1})
    return {
        "method": {"name": "compose", "objectives": list(objectives)},
        "teacher": CNN,
        "student": CNN,
        "data": {"source": "imagefolder", "path": str(folder), **({"augment": augment} if augment else {})},
        "train": {"steps": 3, "batch_size": 8, "lr": 1e-3, "evaluate_every": 0, "checkpoint_every": 0},
        "evaluate": ["classification"],
        **changes,
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many pictures the teacher was asked about, each time; what it says is kept below ``tmp_path``."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "kept"))
    numbers: list[int] = []
    own = Compose.record

    def counted(self: Compose, batch: Any, k: int) -> Any:
        numbers.append(len(batch["pixel_values"]))
        return own(self, batch, k)

    monkeypatch.setattr(Compose, "record", counted)
    return numbers


@pytest.mark.parametrize("augment", [None, {"flip": True, "pad": 1}])
def test_pictures_may_be_added_wherever_they_sort(augment, folder, asked, tmp_path):
    """A picture's views are drawn by its name: another that comes before it changes none of them."""
    values = recipe(folder, augment=augment)
    cache(values, out=tmp_path / "cache", views=2, quiet=True)
    picture(folder / "train" / "a" / "00.png", 1)
    with pytest.raises(StaleCache, match="lacks 1 of 25 samples"):
        run({**values, "cache": str(tmp_path / "cache")}, out=tmp_path / "early", quiet=True)
    asked.clear()
    cache(values, out=tmp_path / "cache", quiet=True)
    assert sum(asked) == 2, "its two views"
    run({**values, "cache": str(tmp_path / "cache")}, out=tmp_path / "run", quiet=True)


def test_mixtures_of_pictures_that_were_added_to_are_refused(folder, tmp_path):
    """Which picture another is mixed with is drawn from all that there are."""
    values = recipe(folder, augment={"mixup": 1.0})
    cache(values, out=tmp_path / "cache", quiet=True)
    picture(folder / "train" / "a" / "00.png", 1)
    with pytest.raises(StaleCache, match=r"was written of other data: sample .* is not what the teacher was shown"):
        cache(values, out=tmp_path / "cache", quiet=True)


@pytest.mark.parametrize("change", ["renamed", "added"])
def test_other_classes_are_refused(change, folder, tmp_path):
    """A teacher answers by the number of a class."""
    cache(recipe(folder), out=tmp_path / "cache", quiet=True)
    if change == "renamed":
        (folder / "train" / "a").rename(folder / "train" / "z")
        (folder / "test" / "a").rename(folder / "test" / "z")
    else:
        picture(folder / "train" / "c" / "01.png", 1)
    for again in (
        lambda: cache(recipe(folder), out=tmp_path / "cache", quiet=True),
        lambda: build_task(load_recipe(recipe(folder, cache=str(tmp_path / "cache")))),
    ):
        with pytest.raises(StaleCache, match="the data's classes are others, or in another order"):
            again()


def test_the_student_stands_beside_the_teacher(folder, tmp_path, monkeypatch):
    """Where a term reads usual points, a dry forward of the student finds them: on the teacher's device."""
    placed: list[torch.nn.Module] = []
    own = writing.place
    monkeypatch.setattr(writing, "place", lambda module, *rest: placed.append(module) or own(module, *rest))
    cache(recipe(folder, ("ce", "hint")), out=tmp_path / "cache", quiet=True)
    assert any(isinstance(module, Compose) for module in placed)


def test_moved_folders_change_nothing(folder, tmp_path):
    """A teacher's recipe, like its data, is known by what it says and not by where it lies."""

    def known(values: dict[str, Any]) -> dict[str, Any]:
        loaded = load_recipe(values)
        return identity(loaded, data_specs(loaded))

    told = []
    for name in ("here", "there"):
        shutil.copytree(folder, tmp_path / name / "data")
        teacher = recipe(Path("data"), ["ce"], teacher=None)
        (tmp_path / name / "teacher.yaml").write_text(json.dumps(teacher))
        values = recipe(tmp_path / name / "data", teacher={"source": "recipe", "name": str(tmp_path / name / "teacher.yaml")})
        told.append(known(values))
    values["data"]["cache"] = True  # decoded pictures in memory: nothing that a teacher sees
    assert told[0] == told[1] == known(values)


def test_answers_are_asked_for_again_where_they_no_longer_fit(folder, asked, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    values = recipe(folder, teacher={**CNN, "weights": str(weights)}, cache={"views": 2})

    def trained(seed: int) -> None:
        save_file(load({**CNN, "classes": 2, "seed": seed}).model.state_dict(), weights)

    def questions(name: str) -> int:
        asked.clear()
        run(values, out=tmp_path / name, quiet=True)
        return sum(asked)

    trained(0)
    whole = questions("first")
    assert whole >= 2 * 24 and questions("second") == 0
    trained(1)
    assert questions("other-teacher") == whole and questions("the-same") == 0
    picture(folder / "train" / "a" / "00.png", 1)
    assert questions("grown") == 2
    [answers] = [path for path in (tmp_path / "kept" / "answers").iterdir() if path.is_dir()]
    shutil.rmtree(answers)
    assert questions("lost") >= 2 * 25
    assert read_index(answers).views == 2
    shutil.rmtree(answers)
    cache(values, out=answers, quiet=True)
    assert read_index(answers).views == 2, "the recipe says how many"


def test_what_cannot_train_from_answers_is_refused_before_they_are_asked_for(folder, asked, tmp_path):
    spec = {"cache": {"views": 1}}
    for values, says in (
        (recipe(folder, ["ce", "simkd"], **spec), "'simkd' ships the teacher's classifier"),
        (recipe(folder, ["ce", "ofd"], **spec), "'ofd' reads the teacher's BatchNorm layers"),
        (recipe(folder, **spec, evaluate=["agreement"]), "needs the teacher, which a run from a cache does not load"),
    ):
        with pytest.raises(BadInput, match=says):
            run(values, out=tmp_path / "run", quiet=True)
        with pytest.raises(BadInput, match=says):
            bench(values, seeds=1, out=tmp_path / "bench", jobs=1, quiet=True)
    with pytest.raises(BadInput, match="asks the recipe's teacher, and another one is given"):
        run(recipe(folder, **spec), out=tmp_path / "run", quiet=True, teacher=load({**CNN, "classes": 2}))
    with pytest.raises(BadInput, match="learns from no teacher"):
        cache(recipe(folder, ["ce"]), out=tmp_path / "cache", quiet=True)
    assert not asked and not (tmp_path / "run").exists()


def test_every_arm_has_the_answers_that_it_learns_from(folder, asked, tmp_path):
    arms = [{"name": "kd-alone", "method": {"name": "compose", "objectives": ["ce", "kd"]}}]
    values = recipe(folder, ["ce", "kd", "hint"], cache={"views": 1}, arms=arms)
    result = bench(values, seeds=1, out=tmp_path / "bench", jobs=1, quiet=True)
    assert result["arms"].keys() == {"compose", "kd-alone"}
    with pytest.raises(BadInput, match="two arms are called 'compose'"):
        bench({**values, "arms": [{**arms[0], "name": "compose"}]}, seeds=1, out=tmp_path / "twice", jobs=1, quiet=True)


def test_a_student_is_measured_whatever_became_of_what_it_learned_from(folder, tmp_path):
    values = recipe(folder)
    cache(values, out=tmp_path / "cache", quiet=True)
    run({**values, "cache": str(tmp_path / "cache")}, out=tmp_path / "run", quiet=True)
    before = evaluate_run(tmp_path / "run")
    picture(folder / "train" / "a" / "00.png", 1)
    assert evaluate_run(tmp_path / "run") == before


def test_pictures_that_another_machine_resizes_by_other_roundings_are_the_same(folder, tmp_path):
    values = recipe(folder, augment=None)
    cache(values, out=tmp_path / "cache", quiet=True)
    dataset = build_task(load_recipe({**values, "cache": str(tmp_path / "cache")})).data["train"]
    step = torch.from_numpy(np.random.default_rng(1).integers(-1, 2, (24, 8, 8)))
    own = type(dataset.dataset).__getitem__

    class Elsewhere(type(dataset.dataset)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = own(self, index)
            return {**item, "pixel_values": item["pixel_values"] + step[index] / 255}

    dataset.dataset.__class__ = Elsewhere
    assert len([dataset[index] for index in range(24)]) == 24
    step *= 60
    with pytest.raises(BadInput, match="is not what the teacher was shown"):
        _ = [dataset[index] for index in range(24)]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_teacher_that_overflows_is_not_kept(broken):
    logits = torch.randn(4, 10)
    logits[2, 3] = broken
    with pytest.raises(BadInput, match="NaN or infinity"):
        TopKLayout(k=3, vocabulary=10, temperature=1.0).encode(top_k(logits, 3))
    logits[2, 3] = -float("inf")  # an id that is masked
    TopKLayout(k=3, vocabulary=10, temperature=1.0).encode(top_k(logits, 3))


def test_folders_of_others_are_left_as_they_are(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty and holds no teacher cache"):
        cache(recipe(folder), out=tmp_path / "mine", quiet=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["note.txt"]
    with pytest.raises(BadInput, match="where: batch"):
        cache(recipe(folder, augment={"flip": True, "where": "batch"}), out=tmp_path / "cache", quiet=True)
    cache(recipe(folder), out=tmp_path / "cache", quiet=True)


@pytest.mark.parametrize(
    ("key", "value", "says"), [("views", 10**13, "views"), ("entries", {}, "entries"), (None, "[" * 10**5, "unreadable")]
)
def test_an_index_that_nothing_can_have_written_is_refused_in_one_line(key, value, says, folder, tmp_path):
    cache(recipe(folder), out=tmp_path / "cache", quiet=True)
    path = tmp_path / "cache" / "cache.json"
    path.write_text(value if key is None else json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BadInput, match=says):
        read_index(tmp_path / "cache")
    assert Index.model_fields["views"].default == 1


@pytest.mark.parametrize("halves", [(1.0, -np.inf), (-1.0, -0.5), (np.nan, -0.5), (1.0, 0.5)])
def test_masses_that_cannot_be_are_refused(halves):
    packing = TopKLayout(k=3, vocabulary=10, temperature=1.0).packing
    rows = packing.pack(top_k(torch.randn(1, 10), 3))
    rows[:, -4:] = np.array([halves], dtype="<f2").view(np.uint8)
    with pytest.raises(ValueError, match="out of range"):
        packing.unpack(rows)
