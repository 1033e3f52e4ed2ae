"""``train.compile``: what is compiled, that taps still see and act, and that a run goes on where nothing can be compiled."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import limbeck as lb
from limbeck import taps
from limbeck.engine import compiling
from limbeck.engine.compiling import Compiled, repeated_blocks
from tests.engine.test_trainer import Points, rows, state


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.norm(self.up(x)).tanh())


class Deep(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList([Block(width), Block(width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def method(*hints: lb.Hint) -> lb.Method:
    torch.manual_seed(0)
    return lb.compose(Deep(16), Deep(8), [lb.CE(), lb.KD(temperature=2.0), *hints])


def train(out, built=None, **options):
    options = {"epochs": 2, "batch_size": 8, "lr": 1e-2, **options}
    return lb.distill(built or method(), Points(), Points(20, 1), out=out, quiet=True, **options)


@pytest.fixture
def traced(monkeypatch):
    """Compile without generating code."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    counters.clear()


def assert_alike(one, other) -> None:
    for name, value in state(one).items():
        torch.testing.assert_close(state(other)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_compiled_blocks_train_alike_and_leave_no_trace(tmp_path, traced, capsys, whose):
    options = {"diagnose_every": 4}  # which goes through a graph twice
    plain = train(tmp_path / "plain", **options)
    compiled = train(tmp_path / "compiled", compile=whose, **options)
    assert counters["stats"]["unique_graphs"] == {"student": 1, "teacher": 1, "both": 2}[whose]  # two blocks, one graph
    assert_alike(plain, compiled)
    for model in (compiled.student, compiled.method.teacher.module):
        assert not any("forward" in vars(module) for module in model.modules())
    assert "compile" not in capsys.readouterr().err


def test_a_compiled_run_resumes_to_the_same_bits(tmp_path, traced):
    options = {"compile": "both", "checkpoint_every": 3, "evaluate_every": 4, "ema": 0.9}
    whole = train(tmp_path / "whole", **options)
    broken = method()

    def stop(step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt

    broken.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", broken, **options)
    assert not any("forward" in vars(module) for module in broken.student.modules())
    resumed = train(tmp_path / "run", **options, resume=True)
    for name, value in state(whole).items():
        assert torch.equal(state(resumed)[name], value), name


def no_compiler(*_args):
    raise RuntimeError("there is no compiler\nhere")


def test_what_cannot_be_compiled_trains_to_the_bits_of_the_uncompiled_run(tmp_path, monkeypatch, capsys):
    plain = train(tmp_path / "plain")
    monkeypatch.setattr(compiling, "BACKEND", no_compiler)
    fallen = train(tmp_path / "fallen", compile="both")
    for name, value in state(plain).items():
        assert torch.equal(state(fallen)[name], value), name
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ["warning: train.compile: going on uncompiled: RuntimeError: there is no compiler"]


def test_a_graph_that_fails_later_on_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fails_when_run(graph, _inputs):
        calls = []

        def run(*args):
            calls.append(None)
            if len(calls) == 5:
                raise RuntimeError("out of resources")
            return graph.forward(*args)

        return run

    monkeypatch.setattr(compiling, "BACKEND", fails_when_run)
    assert train(tmp_path / "run", compile="student").validation["accuracy"] > 0
    assert capsys.readouterr().err.count("going on uncompiled: RuntimeError: out of resources") == 1


def test_without_a_cpp_compiler_torch_says_so_in_one_line(tmp_path, capsys):
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        train(tmp_path / "run", compile="student", steps=2)
    [said] = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("warning: train.compile: going on uncompiled: InvalidCxxCompiler: No working C++ compiler found")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_generated_code_trains_alike(tmp_path, capsys):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3))
    twin = copy.deepcopy(student)
    plain = train(tmp_path / "plain", lb.compose(None, student, [lb.CE()]))
    compiled = train(tmp_path / "compiled", lb.compose(None, twin, [lb.CE()]), compile="student")
    assert_alike(plain, compiled)
    assert "compile" not in capsys.readouterr().err


def test_taps_on_a_block_and_inside_one_see_what_they_see_uncompiled(tmp_path, traced, capsys):
    on_a_block = lb.Hint("blocks.0", "blocks.1", weight=0.5)
    inside = lb.Hint("blocks.1.up", "blocks.1.up", weight=0.5)
    plain = train(tmp_path / "plain", method(on_a_block, inside))
    compiled = train(tmp_path / "compiled", method(on_a_block, inside), compile="both")
    assert_alike(plain, compiled)
    assert counters["stats"]["unique_graphs"] == 2  # the blocks that nothing is read inside of
    logged = [[row["terms"] for row in rows(tmp_path / run) if "terms" in row] for run in ("plain", "compiled")]
    for one, other in zip(*logged, strict=True):
        for term in ("hint", "hint_2"):
            assert other[term]["raw"] == pytest.approx(one[term]["raw"], rel=1e-3)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "inside of Block something is tapped" in said[0]


def test_bypassed_and_replaced_blocks_stay_so_when_compiled(traced):
    model, x = Deep(8).eval(), torch.randn(4, 6)
    stem = model.stem(x)
    compiled = Compiled([model], print)
    warm = model(x)
    with taps.bypass(model, {"blocks.0": lambda value: value, "blocks.1": lambda value: value}):
        torch.testing.assert_close(model(x), model.head(stem))
    with taps.replace(model, {"blocks.1": stem}):
        torch.testing.assert_close(model(x), model.head(stem))
    with taps.replace(model, {"blocks.1.up": torch.zeros(4, 8)}):
        assert not torch.equal(model(x), warm)
    torch.testing.assert_close(model(x), warm)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].up.weight.zero_()
    assert not torch.equal(twin(x), warm)  # a copy runs its own weights
    torch.testing.assert_close(model(x), warm)
    compiled.close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_blocks_are_the_outermost_repeated_ones():
    assert list(repeated_blocks(Deep(4))) == ["blocks.0", "blocks.1"]
    stages = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Block(2), Block(2)), nn.Sequential(Block(2), Block(2)))
    assert list(repeated_blocks(stages)) == ["1", "2"]
    assert list(repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == [""]


@pytest.mark.parametrize(("whose", "checkpointing"), [("student", True), ("both", False)])
def test_vision_language_models_compile_their_layers_and_switch_as_before(
    recipe, tmp_path, monkeypatch, capsys, whose, checkpointing
):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    counters.clear()
    options = ["--train.steps=3", "--train.evaluate_every=0", f"--train.gradient_checkpointing={checkpointing}"]
    plain = lb.run(recipe, out=tmp_path / "plain", overrides=options, quiet=True)
    compiled = lb.run(recipe, out=tmp_path / "compiled", overrides=[*options, f"--train.compile={whose}"], quiet=True)
    # The student's language layers; the teacher's with and without gradient, and its vision layers, which transformers' recorder cuts.
    assert counters["stats"]["unique_graphs"] == {"student": 1, "both": 1 + 2 + 3}[whose]
    assert "compile" not in capsys.readouterr().err
    losses = [[row["loss"] for row in rows(run.path)] for run in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    files = [load_file(run.path / "student" / "model.safetensors") for run in (plain, compiled)]
    assert files[0].keys() == files[1].keys()
