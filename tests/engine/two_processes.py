"""What `test_distributed` launches on two CPU processes: a run, and the same run interrupted and resumed.

torchrun --nproc-per-node 2 two_processes.py ddp|fsdp2 RECIPE.json FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

torch.set_num_threads(1)
launch, recipe_file, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
state = PartialState(cpu=True)
if launch == "fsdp2":  # accelerate offers FSDP to what it takes for a GPU launch only; what it then runs is the same on gloo
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU

import yaml  # noqa: E402

from limbeck.engine import trainer  # noqa: E402
from limbeck.engine.run import resume, run  # noqa: E402


class Interrupted(Exception):
    """Stands in for the end of the machine's lease."""


def interrupt_after(step: int) -> None:
    """Let training stop right after the checkpoint of ``step``, once."""
    own = trainer.Trainer._save

    def save(self, model, optimizer):
        assert trainer.is_sharded(model) == (launch == "fsdp2")
        own(self, model, optimizer)
        if self.position.step == step:
            trainer.Trainer._save = own
            raise Interrupted

    trainer.Trainer._save = save


recipe = yaml.safe_load(recipe_file.read_text())
run(recipe, out=folder / "whole", quiet=True)
interrupt_after(4)
try:
    run(recipe, out=folder / "resumed", quiet=True)
except Interrupted:
    resume(folder / "resumed", quiet=True)
torch.distributed.destroy_process_group()
