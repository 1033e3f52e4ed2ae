"""A teacher asked once: written by killed and by concurrent processes, read without the teacher, refused where it does not fit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import limbeck as lb
from limbeck.batch import teacher_side
from limbeck.engine import cache as writing
from limbeck.engine import task as tasks
from limbeck.engine.batches import StepSampler, training_loader
from limbeck.engine.cache import cache
from limbeck.engine.plan import plan
from limbeck.engine.run import evaluate_run, resume, run
from limbeck.errors import BadInput
from limbeck.losses.top_k import top_k
from limbeck.methods import registry
from limbeck.methods.base import Method
from limbeck.methods.registry import find
from limbeck.methods.vlm.base import VLMMethod
from limbeck.teachers.cached import CachedTeacher, Rows


@pytest.fixture
def recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """`kd` on the recipe of `tests.conftest`; a cache of it keeps all 48 token ids."""
    return {**recipe, "method": {"name": "kd"}, "evaluate": ["vqa-accuracy"], "arms": []}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A cache of the recipe above, in five shards; not to be changed."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    values = {
        "method": {"name": "kd"},
        "teacher": {"source": "transformers", "name": str(teacher_folder)},
        "student": {"source": "tiny", "name": "digit-vlm-student"},
        "data": {"source": "digit-scenes", "scenes": 48, "questions": 2, "val": 40, "test": 40},
    }
    cache(values, out=folder, shard=10, quiet=True)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


@pytest.fixture
def no_teacher_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, loading the teacher fails."""

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    return lambda: monkeypatch.setattr(tasks, "load_teacher", fail)


@pytest.fixture
def no_teacher(no_teacher_after: Callable[[], None]) -> None:
    """Loading the teacher fails."""
    no_teacher_after()


def held(folder: Path) -> Counter[tuple[str, str]]:
    """(view, id) -> how often it is there."""
    found: Counter[tuple[str, str]] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            told = file.metadata()
        found.update((told["view"], name) for name in json.loads(told["ids"]))
    return found


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


# -- what is kept, and what it does -----------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_the_teacher_says(whole, recipe):
    task = tasks.build_task(lb.load_recipe(recipe))
    taught = tasks.build_task(lb.load_recipe({**recipe, "cache": str(whole)}))
    samples = [3, 47, 11]
    live = task.collate([task.data["train"][index] for index in samples])
    kept = taught.collate([taught.data["train"][index] for index in samples])
    assert kept["ids"] == live["ids"]
    with torch.no_grad():
        said = task.method.record(live, 64)["kd"]
    assert torch.equal(said.values.ids.sort(-1).values, kept["taught"]["kd"].ids.sort(-1).values)
    ours, theirs = (torch.zeros(said.values.shape).scatter(-1, t.ids, t.log_probs) for t in (said.values, kept["taught"]["kd"]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    assert said.counts.tolist() == [
        int((item["student"]["labels"] != -100).sum()) for item in map(task.data["train"].__getitem__, samples)
    ]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jeffreys", "jsd"])
def test_all_ids_kept_give_the_gradient_of_the_live_teacher(whole, recipe, divergence):
    recipe["method"] = {"name": "kd", "divergence": divergence}
    gradients = []
    for values in (recipe, {**recipe, "cache": str(whole)}):
        task = tasks.build_task(lb.load_recipe(values))
        task.method.eval()(task.collate([task.data["train"][index] for index in range(6)])).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.method.student.parameters() if p.grad is not None]))
    live, cached = gradients
    assert (live - cached).norm() < 1e-3 * live.norm()


def test_a_run_from_a_cache_is_that_of_the_live_teacher_and_never_loads_it(whole, recipe, tmp_path, teacher_folder, monkeypatch):
    run(recipe, out=tmp_path / "live", quiet=True)
    elsewhere = shutil.copytree(teacher_folder, tmp_path / "teacher")  # other path, same files
    recipe = {**recipe, "cache": str(whole), "teacher": {"source": "transformers", "name": str(elsewhere)}}
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "load_teacher", None)
        run(recipe, out=tmp_path / "cached", quiet=True)
        assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), abs=2e-3)
        shutil.rmtree(elsewhere)  # only what can be compared is
        run(recipe, out=tmp_path / "without", quiet=True, overrides=["--train.workers=2"])
        assert losses(tmp_path / "without") == pytest.approx(losses(tmp_path / "cached"), abs=1e-5)
        assert "accuracy" in evaluate_run(tmp_path / "without")
        planned = plan(recipe)
    assert planned["models"].keys() == {"student"}
    assert planned["stages"][0]["flops"]["teacher"] == 0
    assert str(whole) in planned["notes"][-1]


def test_an_interrupted_run_from_a_cache_resumes_to_the_same_bits(whole, recipe, tmp_path, no_teacher, monkeypatch):
    recipe["cache"] = str(whole)
    run(recipe, out=tmp_path / "run", quiet=True)
    method_class: Any = find("kd").load()

    def stop(self: Method, step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(method_class, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, out=tmp_path / "resumed", quiet=True)
    resume(tmp_path / "resumed", quiet=True)
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_compares_with_the_teacher_is_measured_afterwards(whole, recipe, tmp_path):
    recipe["cache"] = str(whole)
    with pytest.raises(BadInput, match="evaluate: switch-route, teacher-agreement needs the teacher, which a run from a cache"):
        run({**recipe, "evaluate": ["vqa-accuracy", "switch-route", "teacher-agreement"]}, out=tmp_path / "no")
    run({**recipe, "train": {**recipe["train"], "steps": 1}}, out=tmp_path / "run", quiet=True)
    assert "teacher_agreement" in evaluate_run(tmp_path / "run", names=["teacher-agreement"])


# -- what is refused ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": {"name": "kd", "temperature": 4.0}}, "method.temperature is 1.0 in the cache, 4.0 in the recipe"),
        ({"data": {"source": "digit-scenes", "scenes": 48, "questions": 2, "noise": 0.3}}, "train.noise is not given in the cache, 0.3"),
        ({"teacher": {"source": "tiny", "name": "digit-vlm-teacher"}}, "teacher.source is transformers in the cache, tiny in the recipe"),
        ({"teacher.dtype": "bfloat16"}, "teacher.dtype is not given in the cache, bfloat16 in the recipe"),
        ({"method": {"name": "switch-kd"}}, "method 'switch-kd' cannot learn from a cache: its switch route"),
        ({"method": {"name": "bild"}}, "method 'bild' cannot learn from a cache: its student-led pairs"),
        ({"cache": "nowhere"}, "is no teacher cache, it has no cache.json: write one with `limbeck cache"),
    ],
)  # fmt: skip
def test_another_recipe_is_refused_and_named(whole, recipe, change, says, no_teacher, tmp_path):
    recipe = {**recipe, "cache": str(whole), **{key: value for key, value in change.items() if "." not in key}}
    if "teacher.dtype" in change:
        recipe["teacher"] = {**recipe["teacher"], "dtype": change["teacher.dtype"]}
    for command in (lambda: run(recipe, out=tmp_path / "run"), lambda: plan(recipe)):
        with pytest.raises(BadInput) as error:
            command()
        assert says in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer_config.json", "processor_config.json"])
def test_other_files_of_the_teacher_are_refused_and_named(whole, recipe, file, teacher_folder, tmp_path, no_teacher):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    content = bytearray((folder / file).read_bytes())
    content[-5] ^= 1
    (folder / file).write_bytes(content)
    recipe = {**recipe, "cache": str(whole), "teacher": {"source": "transformers", "name": str(folder)}}
    with pytest.raises(BadInput, match=f"not the cache of this recipe: the content of the teacher's {file} differs"):
        run(recipe, out=tmp_path / "run")


def test_a_large_file_is_known_by_pieces_of_every_tensor(tmp_path, monkeypatch):
    from limbeck.engine import fingerprint

    monkeypatch.setattr(fingerprint, "WHOLE", 0)
    tensors = {name: torch.zeros(5000) for name in "abc"}
    save_file(tensors, tmp_path / "one.safetensors")
    first = fingerprint._digest(tmp_path / "one.safetensors")
    for name in tensors:
        save_file({**tensors, name: tensors[name] + 1}, tmp_path / "other.safetensors")
        assert fingerprint._digest(tmp_path / "other.safetensors") != first
    save_file(tensors, tmp_path / "other.safetensors")
    assert fingerprint._digest(tmp_path / "other.safetensors") == first


def test_a_student_of_another_vocabulary_is_refused_like_beside_the_teacher(copied, recipe):
    words = json.loads((copied / "vocabulary.json").read_text())
    words["<image>"], words["yes"] = words["yes"], words["<image>"]
    (copied / "vocabulary.json").write_text(json.dumps(words))
    with pytest.raises(BadInput, match=r"student llava has 48 token ids, teacher llava 48, and token '<image>' is 3 in one"):
        tasks.build_task(lb.load_recipe({**recipe, "cache": str(copied)}))


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def damage_rows(path: Path) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8 : 8 + length])["kd"]["data_offsets"]
    content[8 + length + start : 8 + length + stop] = b"\xff" * (stop - start)
    path.write_bytes(content)


def damage_shape(path: Path) -> None:
    with safe_open(path, "pt") as file:
        told = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, "kd": tensors["kd"][:, :-3].contiguous()}, path, told)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def no_ids(path: Path) -> None:
    save_file(load_file(path), path, {"stage": "train", "view": "0"})


def read_all(recipe: dict[str, Any]) -> None:
    task = tasks.build_task(lb.load_recipe(recipe))
    task.collate([task.data["train"][index] for index in range(48)])


@pytest.mark.parametrize("damage", [damage_header, damage_rows, damage_shape, cut, no_ids])
def test_a_damaged_shard_is_named_with_what_to_do_and_written_again(copied, recipe, damage):
    shard = sorted(copied.glob("*.safetensors"))[2]
    damage(shard)
    with pytest.raises(BadInput) as error:
        read_all({**recipe, "cache": str(copied)})
    assert f"{shard} is damaged" in str(error.value)
    assert "delete it and run `limbeck cache` again" in str(error.value)
    assert "\n" not in str(error.value)
    shard.unlink()
    with pytest.raises(BadInput, match="lacks 10 of 48 samples of the stage 'train'"):
        tasks.build_task(lb.load_recipe({**recipe, "cache": str(copied)}))
    assert cache(recipe, out=copied, quiet=True)["samples"] == 48
    assert set(held(copied).values()) == {1}


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "unreadable"), ("[]", "no mapping"), ('{"format": 2}', "format"), ('{"format": 1, "entries": {}}', "identity")],
)
def test_an_index_that_is_none_is_one_line(copied, text, says):
    (copied / "cache.json").write_text(text)
    with pytest.raises(BadInput, match=says) as error:
        CachedTeacher(copied)
    assert "\n" not in str(error.value)


def test_a_writer_that_was_killed_before_the_index_leaves_no_obstacle(recipe, tmp_path):
    for name in ("lock", "vocabulary.json", ".cache.json.123"):
        (tmp_path / name).write_text("{")
    assert cache(recipe, out=tmp_path, quiet=True)["samples"] == 48
    tasks.build_task(lb.load_recipe({**recipe, "cache": str(tmp_path)}))


def test_a_folder_of_something_else_is_not_written_into(recipe, whole, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty and holds no teacher cache"):
        cache(recipe, out=tmp_path, quiet=True)
    with pytest.raises(BadInput, match=r"holds another cache: method.temperature is 1.0 in the cache, 3.0 in the recipe"):
        cache(recipe, out=whole, overrides=["--method.temperature=3.0"], quiet=True)
    with pytest.raises(BadInput, match="its top_k is 64, 8 is asked for"):
        cache(recipe, out=whole, top_k=8, quiet=True)
    with pytest.raises(BadInput, match="learns from no teacher"):
        cache(recipe, out=tmp_path / "new", overrides=["--method={name: sft}"], quiet=True)
    with pytest.raises(BadInput, match="--views is 0"):
        cache(recipe, out=tmp_path / "new", views=0, quiet=True)


# -- who writes ---------------------------------------------------------------------------------------------------------------------------


def write(recipe: dict[str, Any], folder: Path, die_at: int) -> None:
    """Write a cache of 12 shards, and note how many; killed before shard number ``die_at`` has its name."""
    own, calls = os.replace, []

    def replace(*paths: Any) -> None:
        if str(paths[0]).endswith(".writing"):
            calls.append(None)
            if len(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        own(*paths)

    writing.os.replace = replace
    samples = cache(recipe, out=folder, shard=4, batch_size=2, quiet=True)["samples"]
    folder.with_name(f"written-{os.getpid()}").write_text(f"{len(calls)} {samples}")


def writers(*arguments: Any, count: int) -> list[tuple[int | None, list[int]]]:
    """Exit status, and shards and samples as noted, of some processes that write at once."""
    processes = [get_context("fork").Process(target=write, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    found = []
    for process in processes:
        process.join(120)
        note = arguments[1].with_name(f"written-{process.pid}")
        found.append((process.exitcode, [int(part) for part in note.read_text().split()] if note.exists() else []))
    return found


def test_a_killed_writer_loses_its_shard_and_the_next_goes_on(recipe, tmp_path):
    folder, die_at = tmp_path / "cache", random.randint(3, 12)
    assert writers(recipe, folder, die_at, count=1) == [(-signal.SIGKILL, [])]
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(kept) == die_at - 1
    assert writers(recipe, folder, 0, count=1) == [(0, [12 - len(kept), 48])]
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len(held(folder)) == 48
    assert set(held(folder).values()) == {1}
    assert {path.suffix for path in folder.iterdir()} == {"", ".json", ".safetensors"}  # nothing half-written is left
    CachedTeacher(folder).places("train", [name for _, name in held(folder)])


def test_writers_at_once_ask_for_each_sample_once(recipe, tmp_path):
    folder = tmp_path / "cache"
    told = writers(recipe, folder, 0, count=2)
    assert [status for status, _ in told] == [0, 0]
    assert sum(shards for _, (shards, _) in told) == 12
    assert [samples for _, (_, samples) in told] == [48, 48]  # each returns when all is there
    assert set(held(folder).values()) == {1}


def test_a_chunk_that_is_claimed_is_left_to_its_owner(tmp_path):
    def other() -> None:
        with writing.Claims(tmp_path) as claims:
            for name in "ab":
                with claims.hold(name, wait=False) as mine:
                    (tmp_path / name).write_text(str(mine))

    with writing.Claims(tmp_path) as claims, claims.hold("a") as mine:
        assert mine
        process = get_context("fork").Process(target=other)
        process.start()
        process.join(60)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["False", "True"]


def test_data_that_grew_is_completed_and_nothing_is_asked_for_again(teacher_folder, tmp_path, monkeypatch):
    from limbeck.data.embedded.digit_scenes import digit_scenes

    records = digit_scenes("train", 30, questions=2)
    for record in records:
        record.images[0].save(tmp_path / f"{record.id.rpartition('/')[2]}.png")
    rows = [
        {
            "id": record.id,
            "image": f"{record.id.rpartition('/')[2]}.png",
            "question": record.turns[0][0],
            "answer": record.turns[0][1],
        }
        for record in records
    ]
    recipe = {
        "method": {"name": "kd"},
        "teacher": {"source": "transformers", "name": str(teacher_folder)},
        "student": {"source": "tiny", "name": "digit-vlm-student"},
        "data": {"source": "vqa-jsonl", "path": str(tmp_path / "train.jsonl")},
        "train": {"steps": 2, "batch_size": 8},
    }
    file, folder, asked = tmp_path / "train.jsonl", tmp_path / "cache", []
    own = find("kd").load().record
    monkeypatch.setattr(find("kd").load(), "record", lambda self, batch, k: asked.extend(batch["ids"]) or own(self, batch, k))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    cache(recipe, out=folder, shard=8, quiet=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))  # grown, and in another order
    with pytest.raises(BadInput, match="lacks 10 of 30 samples"):
        run({**recipe, "cache": str(folder)}, out=tmp_path / "run")
    asked.clear()
    assert cache(recipe, out=folder, quiet=True)["samples"] == 30
    assert sorted(asked) == sorted(row["id"] for row in rows[20:])
    parts = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    middle = min(parts, key=lambda path: path.name)  # a chunk's first file is lost, its later ones stay
    middle.unlink()
    assert cache(recipe, out=folder, quiet=True)["samples"] == 30
    assert all(path.stat().st_mtime_ns == when for path, when in parts.items() if path != middle)
    run({**recipe, "cache": str(folder)}, out=tmp_path / "run", quiet=True)
    rows[5]["answer"] = "yes" if rows[5]["answer"] != "yes" else "no"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.build_task(lb.load_recipe({**recipe, "cache": str(folder)}))
    with pytest.raises(BadInput, match="is not what the teacher was shown: its questions or answer tokens"):
        task.data["train"][5]


# -- any modules, and pictures augmented at random ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pixel_values).flatten(1))


def net(width: int, seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(width)


class Pictures(torch.utils.data.Dataset):
    """24 pictures, shifted, flipped and noised at random by three libraries' generators."""

    def __init__(self, augment: bool = True) -> None:
        self.x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.augment = augment

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = self.x[index]
        if self.augment:
            picture = picture.roll(random.randrange(8), -1) + np.random.randn() + 0.1 * torch.randn(1, 8, 8)
            picture = picture.flip(-1) if torch.rand(()) < 0.5 else picture
        return picture, index % 10


def pictures(split: str, augment: bool = True) -> Pictures | None:
    return Pictures(augment) if split == "train" else None


def unsteady(split: str) -> torch.utils.data.Dataset | None:
    """Pictures whose randomness nobody can seed."""
    source = random.SystemRandom()

    class Unsteady(Pictures):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return self.x[index] + source.random(), 0

    return Unsteady() if split == "train" else None


def twins(split: str) -> torch.utils.data.Dataset | None:
    dataset = Pictures()
    dataset.ids = ["same"] * 24
    return dataset if split == "train" else None


HERE = "tests.engine.test_cache"
PLAIN: dict[str, Any] = {
    "method": {
        "name": "compose",
        "objectives": ["ce", {"kd": {"temperature": 2.0}}, {"hint": {"student": "body", "teacher": "body"}}],
    },
    "teacher": {"source": "python", "name": f"{HERE}:net", "options": {"width": 16, "seed": 1}},
    "student": {"source": "python", "name": f"{HERE}:net", "options": {"width": 4, "seed": 2}},
    "data": {"source": "python", "name": f"{HERE}:pictures"},
    "train": {"epochs": 4, "batch_size": 8, "lr": 1e-3, "log_every": 1},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "cache"
    result = cache(PLAIN, out=folder, views=3, shard=10, quiet=True)
    assert result["samples"] == 24
    assert {name: entry["rows"] for name, entry in result["entries"].items()} == {"kd": 72, "hint": 72}
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_the_student_sees_the_view_that_the_teacher_saw(plain, workers):
    """In every epoch, in any order, with workers and without: the teacher, asked about the student's pixels, says what is kept."""
    task = tasks.build_task(lb.load_recipe({**PLAIN, "cache": str(plain)}))
    teacher, seen = net(16, seed=1).eval(), {}
    sampler = StepSampler(24, 8, 8, seed=7, rank=0, world=1, start=0, stop=15)
    for step, batch in enumerate(training_loader(task.data["train"], task.collate, sampler, seed=7, workers=workers)):
        with torch.no_grad():
            said = top_k(teacher(batch["pixel_values"]), 64, temperature=2.0)
            features = teacher.body(batch["pixel_values"])
        kept = batch["taught"]["kd"]
        torch.testing.assert_close(
            torch.zeros(8, 10).scatter(-1, kept.ids, kept.log_probs), torch.zeros(8, 10).scatter(-1, said.ids, said.log_probs),
            rtol=0, atol=5e-3,
        )  # fmt: skip
        torch.testing.assert_close(batch["taught"]["hint"], features, rtol=2e-3, atol=2e-3)
        for name, picture in zip(batch["ids"], batch["pixel_values"], strict=True):
            seen.setdefault((step // 3 % 3, name), []).append(picture)
    assert all(torch.equal(picture, pictures_[0]) for pictures_ in seen.values() for picture in pictures_)
    assert not torch.equal(seen[0, "5"][0], seen[1, "5"][0])  # epochs show other views


def test_drawing_leaves_the_random_generators_as_they_were(plain):
    dataset = tasks.build_task(lb.load_recipe({**PLAIN, "cache": str(plain)})).data["train"]
    for seed in (0, 1):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        dataset.draw(1, 3)
        after = torch.rand(()).item(), random.random(), np.random.rand()
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        assert after == (torch.rand(()).item(), random.random(), np.random.rand())


def test_composed_objectives_train_from_a_cache(plain, tmp_path, no_teacher):
    finished = run({**PLAIN, "cache": str(plain)}, out=tmp_path / "run", quiet=True)
    assert [row.teacher_shape for row in finished.method.plan()] == [None, (10,), (16, 2, 2)]
    terms = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["terms"]
    assert terms.keys() == {"ce", "kd", "hint"}
    assert plan({**PLAIN, "cache": str(plain)})["objectives"][2]["teacher_shape"] == (16, 2, 2)
    other = {**PLAIN, "cache": str(plain), "method": {"name": "compose", "objectives": ["ce", {"kd": {"temperature": 5.0}}]}}
    with pytest.raises(BadInput, match=r"method.hint.teacher is body in the cache, not given in the recipe"):
        run(other, out=tmp_path / "other")
    rebuilt = {**PLAIN, "cache": str(plain), "data": {**PLAIN["data"], "augment": False}}
    with pytest.raises(BadInput, match=r"data.train.augment"):
        run(rebuilt, out=tmp_path / "other")


def test_the_cached_composition_has_the_gradient_of_the_live_one(plain):
    gradients = []
    for values in (PLAIN, {**PLAIN, "cache": str(plain)}):
        task = tasks.build_task(lb.load_recipe(values))
        taught = tasks.build_task(lb.load_recipe({**PLAIN, "cache": str(plain)}))
        batch = taught.collate([taught.data["train"].draw(2, index) for index in range(8)])
        batch = batch if "cache" in values else {key: value for key, value in batch.items() if key != "taught"}
        torch.manual_seed(0)
        task.method.prepare(batch)
        task.method(batch).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.method.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[0].norm()


def test_pictures_that_changed_are_refused_by_name(plain):
    dataset = tasks.build_task(lb.load_recipe({**PLAIN, "cache": str(plain)})).data["train"]
    dataset.dataset.x[4] = dataset.dataset.x[4].flip(-1)
    with pytest.raises(BadInput, match=r"sample '4' is not what the teacher was shown: its pixels \(view 0\)"):
        dataset[4]
    dataset.dataset.x[5] *= 1 + 1e-6  # rounding on another machine
    dataset[5]


@pytest.mark.parametrize(
    ("function", "says"), [("unsteady", "not the same when it is drawn twice"), ("twins", "two samples have the id 'same'")]
)
def test_data_that_cannot_be_kept_is_refused(function, says, tmp_path):
    with pytest.raises(BadInput, match=says):
        cache({**PLAIN, "data": {"source": "python", "name": f"{HERE}:{function}"}}, out=tmp_path / "cache", quiet=True)


def test_augmentation_with_one_view_is_warned_of(tmp_path, capsys):
    cache(PLAIN, out=tmp_path / "augmented", quiet=True)
    assert "see --views" in capsys.readouterr().err
    cache({**PLAIN, "data": {**PLAIN["data"], "augment": False}}, out=tmp_path / "plain", quiet=True)
    assert not capsys.readouterr().err


# -- a method of one's own ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoOptions:
    """None."""


class SeeAlike(VLMMethod):
    """The student's visual features are pulled to the teacher's: a ragged entry of whole tensors."""

    name = "see-alike"
    Config = NoOptions

    def record(self, batch: lb.Batch, top_k: int) -> dict[str, Rows]:
        [visual] = self.teacher_view.see(teacher_side(batch))  # [B, N, D]
        keep = torch.arange(len(visual)) % 3 + 1  # other numbers of rows a sample
        return {"see": Rows(torch.cat([seen[:count] for seen, count in zip(visual, keep.tolist(), strict=True)]), keep)}

    def forward(self, batch: lb.Batch) -> lb.Losses:
        [visual] = self.view.see(batch["student"])
        target = batch["taught"]["see"]
        return self.weigh(see=(visual.mean() - target.mean()).square())


def test_a_method_of_ones_own_keeps_what_it_likes(recipe, tmp_path, monkeypatch, no_teacher_after):
    entry = registry.Entry("see-alike", f"{HERE}:SeeAlike", "vision-language", "")
    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, entry))
    recipe["method"] = {"name": "see-alike"}
    result = cache(recipe, out=tmp_path / "cache", shard=24, batch_size=12, quiet=True)
    assert result["entries"]["see"]["kind"] == "dense"
    assert result["entries"]["see"]["rows"] == 48 // 3 * (1 + 2 + 3)
    assert result["entries"]["see"]["bytes_a_row"] == 2 * 48  # float16, the tower's width
    live = tasks.build_task(lb.load_recipe(recipe))
    no_teacher_after()
    taught = tasks.build_task(lb.load_recipe({**recipe, "cache": str(tmp_path / "cache")}))
    kept = taught.collate([taught.data["train"][index] for index in (13, 2, 30)])["taught"]["see"]  # 2 + 3 + 1 rows
    [seen] = live.teacher.see(live.collate([live.data["train"][index] for index in (13, 2, 30)])["student"])
    torch.testing.assert_close(kept, torch.cat([seen[0, :2], seen[1, :3], seen[2, :1]]), rtol=2e-3, atol=2e-3)
    run({**recipe, "cache": str(tmp_path / "cache")}, out=tmp_path / "run", quiet=True, overrides=["--train.steps=2"])
