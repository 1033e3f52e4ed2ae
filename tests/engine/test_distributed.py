"""Two processes train what one trains: replicated (DDP) and sharded (FSDP2), whole, accumulated, interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from limbeck.engine.config import TrainConfig
from limbeck.engine.run import run
from limbeck.engine.trainer import check_launch
from limbeck.errors import BadInput

RECIPE = {
    "method": {"name": "switch-kd", "k_min": 4, "window": 16, "schedule": "pretrain-dft"},
    "teacher": {"source": "tiny", "name": "digit-vlm-teacher"},
    "student": {"source": "tiny", "name": "digit-vlm-student"},
    "data": {"source": "digit-scenes", "scenes": 48, "questions": 2, "val": 70, "test": 3},  # 70: a batch each; 3: one for rank 0 only
    "train": {
        "batch_size": 16, "lr": 3e-3, "log_every": 1, "evaluate_every": 3, "checkpoint_every": 2,
        "stages": [{"name": "pretrain", "steps": 2}, {"name": "dft", "steps": 4}],
    },
    "evaluate": ["vqa-accuracy", "switch-route"],
}  # fmt: skip


def fsdp2_environment() -> dict[str, str]:
    """What ``accelerate launch --config_file configs/accelerate/fsdp2-4x8.yaml`` hands to the processes, for the tiny models' blocks."""
    config = Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp2-4x8.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "-m", "limbeck"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return environment | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer,CLIPEncoderLayer"}


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training row, in the order written."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def students(*folders: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "student" / "model.safetensors") for folder in folders]


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    assert [step for step, _ in losses(one)] == [step for step, _ in losses(other)] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close([loss for _, loss in losses(one)], [loss for _, loss in losses(other)], rtol=0, atol=tolerance)
    ours, theirs = students(one, other)
    # Adam divides by gradients that are all but zero, and enlarges what rounding makes of them.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(RECIPE, out=folder, quiet=True)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    rendezvous = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    worker = str(Path(__file__).with_name("two_processes.py"))
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, worker, request.param, str(folder / "recipe.yaml"), str(folder)],
        env={**(fsdp2_environment() if request.param == "fsdp2" else os.environ), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


def test_two_processes_train_what_one_trains(alone: Path, together: Path) -> None:
    assert_same_run(alone, together / "whole")


def test_held_out_data_is_measured_as_by_one(alone: Path, together: Path) -> None:
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (alone, together / "whole"))
    for split in ("validation", "test"):
        assert one[split] == pytest.approx(two[split], abs=1e-6)


def test_an_interrupted_run_resumes_to_the_same_weights(together: Path) -> None:
    assert losses(together / "resumed") == losses(together / "whole")
    whole, resumed = students(together / "whole", together / "resumed")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_the_run_folder_is_that_of_one_process(alone: Path, together: Path) -> None:
    """Both processes leave one folder: nothing half-written, nothing of the second but its random state."""

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    extra = files(together / "whole") - files(alone)
    assert files(alone) <= files(together / "whole")
    assert {Path(name).name for name in extra} == {"rng-1.safetensors"}
    assert json.loads((together / "whole" / "environment.json").read_text())["processes"] == 2


def test_checkpoints_hold_whole_tensors(alone: Path, together: Path) -> None:
    """A sharded run's checkpoint is the same file as any other's: it resumes under any number of processes."""
    last = sorted((alone / "checkpoints").glob("step-*"))[-1].name
    one = load_file(alone / "checkpoints" / last / "method.safetensors")
    two = load_file(together / "whole" / "checkpoints" / last / "method.safetensors")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_accumulation_trains_what_one_batch_trains(alone: Path, tmp_path: Path) -> None:
    """Answers differ in length, so that the mean over micro-batches is not the mean over tokens unless it is weighed."""
    run(RECIPE, out=tmp_path / "run", overrides=["--train.micro_batch_size=4"], quiet=True)
    assert_same_run(alone, tmp_path / "run")


def test_processes_that_do_not_know_of_each_other_are_refused() -> None:
    state = SimpleNamespace(num_processes=1, is_fsdp2=False, distributed_type=DistributedType.NO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(BadInput, match="2 processes were launched and do not know of each other"):
            check_launch(state, TrainConfig())


@pytest.mark.parametrize("given", [{"ema": 0.99}, {"diagnose_every": 5}, {"channels_last": True}])
def test_what_cannot_be_sharded_is_refused_by_name(given: dict[str, float]) -> None:
    state = SimpleNamespace(num_processes=1, is_fsdp2=True, distributed_type=DistributedType.FSDP)
    with pytest.raises(BadInput, match=next(iter(given))):
        check_launch(state, TrainConfig(**given))


@pytest.mark.parametrize(
    ("kind", "way_out"), [(DistributedType.FSDP, "fsdp_version: 2"), (DistributedType.DEEPSPEED, "FSDP2 instead")]
)
def test_other_ways_to_shard_are_refused(kind: DistributedType, way_out: str) -> None:
    state = SimpleNamespace(num_processes=1, is_fsdp2=False, distributed_type=kind)
    with pytest.raises(BadInput, match=way_out):
        check_launch(state, TrainConfig())
