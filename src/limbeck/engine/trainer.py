"""Turns the crank of any `Method`: stages, precision, accumulation, devices, evaluation, checkpoints, trackers, exact resume."""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, broadcast, gather_object, send_to_device
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from limbeck.engine.batches import (
    EVALUATION_BATCH,
    StepSampler,
    check_trainable,
    check_workers,
    collate_pairs,
    evaluation_loader,
    loaded,
    sample_lengths,
    training_loader,
    typical_batch,
    worker_count,
)
from limbeck.engine.checkpoint import (
    Checkpoint,
    Checkpoints,
    flatten,
    restore_rng,
    rng_state,
    save_tensors,
    unflatten,
    write_atomically,
)
from limbeck.engine.compiling import Compiled
from limbeck.engine.config import StageConfig, TrainConfig
from limbeck.engine.diagnosis import shares
from limbeck.engine.progress import Progress
from limbeck.errors import BadInput, NonFiniteLoss
from limbeck.methods.base import Batch, Losses, Method, Stage
from limbeck.naming import nearest

Evaluate = Callable[[Method, Accelerator], dict[str, float]]
Share = float | Tensor
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
ON_EVERY_PROCESS = StateDictOptions(full_state_dict=True)
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class PlannedStage:
    """One stage with every number resolved. batch_size: over all processes; micro: of a process at a time; steps: optimiser steps;
    lengths: of every sample, where batches are to be of like length."""

    name: str
    trainable: tuple[str, ...]
    weights: Mapping[str, float]
    dataset: Any
    batch_size: int
    micro: int
    steps: int
    lr: float
    evaluate_every: int
    lengths: Tensor | None = None


@dataclass
class Position:
    """Where a run stands: ``step`` counts all stages, ``in_stage`` the current one."""

    stage: int = 0
    in_stage: int = 0
    step: int = 0
    best_step: int | None = None
    best_value: float | None = None


class Trainer:
    """Trains one method into one run folder.

    data: a map-style dataset, or a mapping from stage name to one. evaluate: called with the method in eval mode (and the accelerator),
    returns metrics on *validation* data; it chooses the checkpoint that becomes the student. reference: the training data unaugmented,
    for a method that surveys it; default the data of the first stage. out: the run folder.
    """

    def __init__(
        self,
        method: Method,
        data: Any,
        config: TrainConfig,
        out: str | Path,
        *,
        collate: Callable[[list[Any]], Batch] = collate_pairs,
        evaluate: Evaluate | None = None,
        reference: Any = None,
        quiet: bool = False,
    ) -> None:
        forget_accelerator()
        self.accelerator = Accelerator(
            mixed_precision=PRECISION[config.precision],
            log_with=list(config.trackers) or None,
            project_dir=str(out),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        check_launch(self.accelerator, config)
        self.method, self.config, self.out = method, config, Path(out)
        self.collate, self.evaluate, self.reference = collate, evaluate, reference
        self.checkpoints = Checkpoints(self.out / "checkpoints")
        self.progress = Progress(quiet=quiet or not self.accelerator.is_main_process)
        self.workers = worker_count(config.workers, self.accelerator.device)
        self.compiled = Compiled((), self.progress.warn)
        self.plan = self._plan(data)
        self.position = Position()
        self.ema: torch.optim.swa_utils.AveragedModel | None = None

    # -- before the first step -------------------------------------------------------------------------------------------------------

    def _plan(self, data: Any) -> list[PlannedStage]:
        config, world = self.config, self.accelerator.num_processes
        planned = []
        for stage, given in match_stages(self.method.stages(), config.stages):
            dataset = data.get(stage.name, data.get("train")) if isinstance(data, Mapping) else data
            batch_size = check_trainable(dataset, given.batch_size or config.batch_size)
            micro = config.micro_batch_size or max(1, batch_size // world)
            if batch_size % (micro * world):
                raise BadInput(
                    f"stage {stage.name!r}: a batch of {batch_size} samples (the data has {len(dataset)}) is not a multiple of "
                    f"micro_batch_size {micro} x {world} process(es)"
                )
            per_epoch = len(dataset) // batch_size
            steps = stage_steps(config, given, per_epoch)
            every = per_epoch if config.evaluate_every is None else config.evaluate_every
            lengths = sample_lengths(dataset) if config.group_by_length else None
            check_workers(dataset, self.collate, self.workers)
            planned.append(
                PlannedStage(
                    stage.name, stage.trainable, stage.weights, dataset, batch_size, micro, steps, given.lr or config.lr, every,
                    lengths,
                )
            )  # fmt: skip
        return planned

    @property
    def total_steps(self) -> int:
        """Optimiser steps over all stages."""
        return sum(stage.steps for stage in self.plan)

    def setup(self) -> None:
        """Place everything, look at one batch, and let the method check it. Raises before anything is trained or written."""
        torch.manual_seed(self.config.seed)
        device = self.accelerator.device
        place(self.method, device, self.config)
        for teacher in self.method.teachers():
            place(teacher.module, device, self.config)
            teacher.overlap = self.config.overlap_teacher
        if self.config.gradient_checkpointing:
            enable_gradient_checkpointing(self.method.student)
        first = self.plan[0]
        introduce(self.method, first.dataset)
        self.method.total_steps = self.total_steps
        self.method.steps_per_epoch = len(first.dataset) // first.batch_size
        batch = send_to_device(typical_batch(first.dataset, self.collate), device)
        with torch.no_grad(), self.accelerator.autocast():
            self.method.eval()
            self.method.prepare(batch)
        place(self.method, device, self.config)
        self._survey(first.dataset if self.reference is None else self.reference)
        self._rehearse(batch)
        if self.config.ema is not None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(self.config.ema)
            self.ema = torch.optim.swa_utils.AveragedModel(self.method.student, multi_avg_fn=average, use_buffers=True)

    def _survey(self, dataset: Any) -> None:
        """Show a method that asks for it the whole training data."""
        if type(self.method).survey is Method.survey:
            return
        loader = evaluation_loader(dataset, self.collate, EVALUATION_BATCH)
        with torch.no_grad(), self.accelerator.autocast():
            self.method.survey(send_to_device(batch, self.accelerator.device) for batch in loader)
        self.method.to(self.accelerator.device)

    def _rehearse(self, batch: Batch) -> None:
        """Enter every stage that trains a part or weighs a term by a name that the method's weights lack, and ask it for its losses once:
        what it cannot train, and what weighs nothing, is refused here."""
        for stage in self.plan:
            own_weights = self.method.weights
            if stage.trainable == ("*",) and own_weights.keys() >= stage.weights.keys():
                continue
            frozen = choose_trainable(self.method, stage)
            self.method.weights = {**own_weights, **stage.weights}
            with torch.enable_grad(), self.accelerator.autocast():
                terms = [*own_weights, *self.method(batch)]
            self.method.weights = own_weights
            for name in stage.weights:
                if name not in terms:
                    raise BadInput(f"stage {stage.name!r}: no term {name!r} to weigh; {nearest(name, set(terms))}")
            for parameter in frozen:
                parameter.requires_grad_(True)

    # -- the crank -------------------------------------------------------------------------------------------------------------------

    def fit(self, *, resume: bool = False) -> dict[str, float]:
        """Train every stage after `setup`; returns the validation metrics of the student that was kept.

        resume: go on from the newest checkpoint.
        """
        torch.manual_seed(self.config.seed + self.accelerator.process_index)
        checkpoint = self.checkpoints.latest(self.progress.warn) if resume else None
        if checkpoint is not None:
            self._restore_method(checkpoint)
        elif resume:
            self.progress.warn("no checkpoint was written yet: starting from the beginning")
        if self.accelerator.is_main_process:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            self._trim_metrics()
        self.accelerator.init_trackers("limbeck", {}) if self.config.trackers else None
        with self.progress.bar(self.total_steps, self.position.step):
            for index in range(self.position.stage, len(self.plan)):
                with ExitStack() as held:
                    self._stage(index, checkpoint, held)
                checkpoint = None
        self._keep_best()
        metrics = self.measured(self.evaluate) if self.evaluate else {}
        # Accelerator.end_training would also end the process group, which is needed yet.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return metrics

    def _stage(self, index: int, checkpoint: Checkpoint | None, held: ExitStack) -> None:
        """Train one stage. held: closed when it ends, however it ends."""
        stage, config, accelerator, bare = self.plan[index], self.config, self.accelerator, self.method
        if accelerator.is_fsdp2:
            self.method = replica(bare)
        base_weights = dict(self.method.weights)
        self.method.weights = {**base_weights, **stage.weights}
        frozen = choose_trainable(self.method, stage)
        optimizer = build_optimizer(self.method, config, stage.lr)
        model, optimizer = accelerator.prepare(self.method, optimizer)
        if checkpoint is not None:
            self._restore_stage(checkpoint, model, optimizer)
        self._compile(stage, held)
        pieces = stage.batch_size // (stage.micro * accelerator.num_processes)
        batches = self._batches(stage, self.position.in_stage, stage.steps, self.workers)
        held.callback(batches.close)
        journal = Journal(self, stage)
        model.train()
        while self.position.in_stage < stage.steps:
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * schedule(config, self.position.in_stage, stage.steps)
            self.method.steps_done = self.position.step
            batch, terms, norm = self._step(model, optimizer, [next(batches) for _ in range(pieces)])
            self.position.in_stage += 1
            self.position.step += 1
            self.method.after_step(self.position.step)
            if self.ema is not None:
                self.ema.update_parameters(self.method.student)
            journal.add(batch, terms, norm, optimizer.param_groups[0]["lr"])
            last = self.position.in_stage == stage.steps
            evaluate_now = self.evaluate and stage.evaluate_every and (self.position.in_stage % stage.evaluate_every == 0 or last)
            if config.diagnose_every and self.position.step % config.diagnose_every == 0:
                journal.diagnose(batch[-1])
            if evaluate_now:
                journal.flush()
                self._evaluate(stage)
                model.train()
            if evaluate_now or last or (config.checkpoint_every and self.position.step % config.checkpoint_every == 0):
                journal.flush()
                self._save(model, optimizer)
                journal.since = time.perf_counter()  # nothing of that is training
        self.method.weights = base_weights
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._unwrap()
        if accelerator.is_fsdp2:
            bare.load_state_dict(get_model_state_dict(self.method, options=ON_EVERY_PROCESS))
            self.method = bare.to(accelerator.device)
        self.position.stage, self.position.in_stage = index + 1, 0

    def _step(self, model: nn.Module, optimizer: Any, micro: list[Batch]) -> tuple[list[Batch], dict[str, Tensor], Tensor | None]:
        """One optimiser step over this process's micro-batches; returns them, what they add to the mean of each weighted term over all
        processes, and the norm of the gradient, where it is clipped and no scaler may skip the step.

        Nothing here waits for the device. accelerate's own ``backward`` and optimiser scale what fp16 asks to be scaled; elsewhere they
        only take time (half a millisecond a step: they look for packages), so that torch is called directly.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        sums: dict[str, Tensor] = {}
        norm, batches = None, []
        for index, (batch, (share, apart)) in enumerate(zip(micro, self._shares(micro), strict=True)):
            if device.type != "cpu":
                batch = send_to_device(batch, device, non_blocking=True)
            with synchronised(accelerator, model, index == len(micro) - 1):
                losses = Losses(model(batch))
                if apart:
                    losses = Losses({name: value.float() * apart.get(name, share) for name, value in losses.items()})
                    share = 1.0
                # DDP averages gradients over processes; the share is of the global batch.
                total = times(losses.total, share * accelerator.num_processes)
                total.backward() if accelerator.scaler is None else accelerator.backward(total)
            for name, value in losses.items():
                part = times(value.detach().float(), share)
                sums[name] = sums[name] + part if name in sums else part
            batches.append(batch)
        if self.config.clip is not None:
            if accelerator.is_fsdp2:  # in the model's own order: accelerate compares the list with it, element by element
                norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], self.config.clip)
            else:
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                accelerator.unscale_gradients(optimizer)
                norm = nn.utils.clip_grad_norm_(parameters, self.config.clip)
        (optimizer.optimizer if accelerator.scaler is None else optimizer).step()
        optimizer.optimizer.zero_grad(set_to_none=True)
        return batches, sums, norm if accelerator.scaler is None else None

    def _shares(self, micro: list[Batch]) -> list[tuple[Share, dict[str, Share]]]:
        """The share of each micro-batch in the units of the whole batch, and of terms that have their own, by name, in those; on the
        device where other processes hold parts of that."""
        world, device = self.accelerator.num_processes, self.accelerator.device
        if world == 1 and len(micro) == 1:
            return [(1.0, {})]
        counts = []
        for batch in micro:
            units = self.method.units(batch)
            counts.append({"": len(batch["ids"]), **units} if isinstance(units, Mapping) else {"": units})
        sums = {name: float(sum(count[name] for count in counts)) for name in counts[0]}
        wholes: Mapping[str, Share] = {name: max(whole, 1.0) for name, whole in sums.items()}
        if world > 1:
            here = torch.cat([torch.full((1,), whole, device=device) for whole in sums.values()])
            wholes = dict(zip(sums, self.accelerator.reduce(here).clamp_min(1), strict=True))
        shares: list[dict[str, Share]] = [{name: count[name] / whole for name, whole in wholes.items()} for count in counts]
        differ = world > 1 or any(len(set(one.values())) > 1 for one in shares)
        return [(one.pop(""), one if differ else {}) for one in shares]

    def _batches(self, stage: PlannedStage, start: int, stop: int, workers: int) -> Generator[Batch, None, None]:
        """This process's micro-batches from step ``start`` to step ``stop`` of a stage."""
        sampler = StepSampler(
            len(stage.dataset), stage.batch_size, stage.micro, seed=self.config.seed, rank=self.accelerator.process_index,
            world=self.accelerator.num_processes, start=start, stop=stop, lengths=stage.lengths,
        )  # fmt: skip
        pinned = self.accelerator.device.type == "cuda"
        return loaded(
            training_loader(stage.dataset, self.collate, sampler, seed=self.config.seed, workers=workers, pinned=pinned)
        )

    def _compile(self, stage: PlannedStage, held: ExitStack) -> None:
        """Compile what ``train.compile`` names, and ask for the losses of the stage's first batch once, also where a run resumes
        elsewhere: what cannot be compiled is known before a step is taken, and graphs depend on no other batch."""
        models = [self.method.student] if self.config.compile in ("student", "both") else []
        if self.config.compile in ("teacher", "both"):
            models += [teacher.module for teacher in self.method.teachers()]
        self.compiled = Compiled(models, self.progress.warn)
        held.callback(self.compiled.close)
        if not models:
            return
        random, buffers = rng_state(), {name: buffer.clone() for name, buffer in self.method.named_buffers()}
        batch = next(self._batches(stage, 0, 1, workers=0))
        self.method.train()
        with self.accelerator.autocast():
            self.method(send_to_device(batch, self.accelerator.device))
        with torch.no_grad():
            for name, buffer in self.method.named_buffers():
                buffer.copy_(buffers[name])
        restore_rng(random)

    # -- evaluation ------------------------------------------------------------------------------------------------------------------

    def measured(self, measure: Evaluate) -> dict[str, float]:
        """Call ``measure`` on the student as it would be shipped: eval mode, averaged weights, the run's precision, no gradient."""
        was_training = self.method.training
        self.method.eval()
        self._agree()
        with self.compiled.paused(), self._averaged(), gathered(self.method), torch.no_grad(), self.accelerator.autocast():
            metrics = measure(self.method, self.accelerator)
        self.method.train(was_training)
        return metrics

    @torch.no_grad()
    def _agree(self) -> None:
        """Take the first process's statistics (BatchNorm's, an average's), as DDP does before a forward: each process's are of what it saw
        since."""
        if self.accelerator.num_processes == 1:
            return
        equal = getattr(self.method, "_ddp_params_and_buffers_to_ignore", ())
        for module in (self.method, self.ema):
            for name, buffer in module.named_buffers() if module is not None else ():
                if buffer.is_floating_point() and name not in equal:
                    buffer.copy_(broadcast(buffer.contiguous()))

    def _evaluate(self, stage: PlannedStage) -> None:
        assert self.evaluate is not None
        metrics = self.measured(self.evaluate)
        select, position = self.config.select, self.position
        if select.metric not in metrics:
            raise BadInput(f"train.select.metric {select.metric!r} is not measured; {nearest(select.metric, metrics)}")
        value = metrics[select.metric]
        better = position.best_value is None or (
            value >= position.best_value if select.mode == "max" else value <= position.best_value
        )
        if better and not math.isnan(value):
            position.best_step, position.best_value = position.step, value
        self._write({"step": position.step, "stage": stage.name, "validation": metrics})
        self.progress.note(f"step {position.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in brief(metrics).items()))

    @contextmanager
    def _averaged(self) -> Any:
        """The student with its averaged weights, where an EMA is kept. What is chosen meanwhile (`Method.calibrate`) is kept in both."""
        if self.ema is None:
            yield
            return
        student = self.method.student
        own = {name: value.clone() for name, value in student.state_dict().items()}
        averaged = self.ema.module.state_dict()
        student.load_state_dict(averaged)
        try:
            yield
        finally:
            for name, buffer in student.named_buffers():
                if name in own and not torch.equal(buffer, averaged[name]):
                    own[name] = buffer.clone()
                    averaged[name].copy_(buffer)
            student.load_state_dict(own)

    def _keep_best(self) -> None:
        """Leave the method with the weights that validation chose (the last ones where nothing was validated), averaged if asked."""
        best = self.position.best_step
        if best is not None and best != self.position.step:
            self._load_method_state(self.checkpoints.of_step(best))
        if self.ema is not None:
            self.method.student.load_state_dict(self.ema.module.state_dict())

    # -- checkpoints -----------------------------------------------------------------------------------------------------------------

    def _save(self, model: nn.Module, optimizer: Any) -> None:
        accelerator, step = self.accelerator, self.position.step
        weights: dict[str, Any] = get_model_state_dict(self.method if not is_sharded(model) else model, options=FULL)
        states = optimizer_state(model, optimizer.optimizer)
        staged = self.checkpoints.staging(step)
        if accelerator.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save_tensors(rng_state(), staged / f"rng-{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            tensors, tree = flatten(states)
            tied = {
                "method": save_tensors(weights, staged / "method.safetensors"),
                "optimizer": save_tensors(tensors, staged / "optimizer.safetensors"),
            }
            if self.ema is not None:
                tied["ema"] = save_tensors(self.ema.state_dict(), staged / "ema.safetensors")
            state = {
                "position": vars(self.position),
                "world": accelerator.num_processes,
                "weights": dict(self.method.weights),
                "optimizer": tree,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                "tied": tied,
            }
            (staged / "state.json").write_text(json.dumps(state))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.checkpoints.commit(step)
            self.checkpoints.prune(self.config.keep, self.position.best_step)
        accelerator.wait_for_everyone()

    def _load_method_state(self, checkpoint: Checkpoint) -> None:
        try:
            set_model_state_dict(self.method, dict(checkpoint.tensors("method")), options=StateDictOptions(strict=True))
        except RuntimeError as error:
            raise BadInput(
                f"{checkpoint.path} does not fit this recipe's models: {str(error).splitlines()[-1].strip()}"
            ) from error
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.tensors("ema"))

    def _restore_method(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        if state["world"] != self.accelerator.num_processes:
            self.progress.warn(
                f"written by {state['world']} processes, resumed by {self.accelerator.num_processes}: the data order is the same, "
                "random numbers (dropout) are not"
            )
        self._load_method_state(checkpoint)
        self.position = Position(**state["position"])
        self.accelerator.wait_for_everyone()  # every process has chosen its checkpoint
        if self.accelerator.is_main_process:
            self.checkpoints.discard_after(checkpoint.step)
        stage = self.plan[self.position.stage]
        if self.position.in_stage >= stage.steps:
            self.position = replace(self.position, stage=self.position.stage + 1, in_stage=0)
        self.progress.note(f"resuming at step {self.position.step}")

    def _restore_stage(self, checkpoint: Checkpoint, model: nn.Module, optimizer: Any) -> None:
        state = checkpoint.state()
        if self.position.in_stage > 0:  # else the checkpoint closed the stage before: this one starts with a new optimiser
            self.method.weights = state["weights"]
            states = unflatten(checkpoint.tensors("optimizer"), state["optimizer"])
            load_optimizer_state(model, optimizer.optimizer, states)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        mine = f"rng-{self.accelerator.process_index}"
        restore_rng(checkpoint.tensors(mine if (checkpoint.path / f"{mine}.safetensors").exists() else "rng-0"))

    def _unwrap(self) -> None:
        """Leave a stage: the method bare again, nothing of the optimiser kept by accelerate."""
        self.accelerator.unwrap_model(self.method, keep_fp32_wrapper=False)
        self.method.__dict__.pop("_is_accelerate_prepared", None)  # else the next stage gets no autocast
        self.accelerator.free_memory()

    # -- the record ------------------------------------------------------------------------------------------------------------------

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: training terms every ``log_every`` steps, validation metrics when evaluated."""
        return self.out / "metrics.jsonl"

    def _write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.config.trackers:
            numbers = {key: value for key, value in flat(row) if isinstance(value, int | float) and key != "step"}
            self.accelerator.log(numbers, step=row["step"])

    def _trim_metrics(self) -> None:
        """Drop rows that a crash left behind the checkpoint: they are written again."""
        if not self.metrics_file.exists():
            return
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that the crash cut
            if row["step"] <= self.position.step:
                rows.append(line)
        write_atomically(self.metrics_file, "".join(f"{line}\n" for line in rows))


class Journal:
    """Collects the terms of the steps of a stage without waiting for the device, and reads them every ``log_every`` steps."""

    def __init__(self, trainer: Trainer, stage: PlannedStage) -> None:
        self.trainer, self.stage = trainer, stage
        self.pending: list[tuple[int, list[Any], dict[str, Tensor], Tensor | None]] = []
        self.every = 1 if trainer.accelerator.device.type == "cpu" else trainer.config.log_every
        self.rows: list[dict[str, float]] = []
        self.samples, self.since, self.lr = 0, time.perf_counter(), 0.0
        self.remarked: set[str] = set()

    def add(self, batches: list[Batch], terms: dict[str, Tensor], norm: Tensor | None, lr: float) -> None:
        self.pending.append((self.trainer.position.step, [batch["ids"] for batch in batches], terms, norm))
        self.samples += self.stage.batch_size
        self.lr = lr
        if len(self.pending) >= self.every:
            self._read()
        if self.trainer.position.step % self.trainer.config.log_every == 0:
            self.flush()

    def _read(self) -> None:
        """Look at the pending terms, summed over the processes, and norms; the first that is not finite stops the run."""
        read = [{name: value.item() for name, value in terms.items()} for _, _, terms, _ in self.pending]
        for (step, sampled, _, norm), values in zip(self.pending, summed(read, self.trainer.accelerator), strict=True):
            broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
            if not broken and norm is not None and not math.isfinite(length := entire(norm).item()):
                broken = [f"the gradient's norm is {length}"]
            if broken:
                ids = [str(name) for names in sampled for name in names]
                last = self.trainer.checkpoints.all()
                kept = f"the checkpoint of step {last[-1].step} is intact" if last else "no checkpoint was written yet"
                raise NonFiniteLoss(
                    f"step {step}: {', '.join(broken)} "
                    f"(terms: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}) "
                    f"on samples {', '.join(ids[:16])}{' ...' if len(ids) > 16 else ''}; {kept}: lower train.lr, or look at those samples"
                )
            self.rows.append(values)
        self.pending.clear()

    def flush(self) -> None:
        """Write the mean of the terms since the last row."""
        self._read()
        if not self.rows:
            return
        trainer, elapsed = self.trainer, time.perf_counter() - self.since
        names = dict.fromkeys(name for row in self.rows for name in row)
        weighted = {name: sum(row.get(name, 0.0) for row in self.rows) / len(self.rows) for name in names}
        weights = trainer.method.weights
        row = {
            "step": trainer.position.step,
            "stage": self.stage.name,
            "lr": self.lr,
            "loss": sum(weighted.values()),
            "terms": {
                name: {
                    "raw": value / weights[name] if weights.get(name) else value,
                    "weight": weights.get(name, 1.0),
                    "weighted": value,
                }
                for name, value in weighted.items()
            },
            "samples_per_second": self.samples / max(elapsed, 1e-9),
        }
        trainer._write(row)
        trainer.progress.advance(trainer.position.step, weighted, self.samples / max(elapsed, 1e-9))
        self.rows, self.samples, self.since = [], 0, time.perf_counter()

    def diagnose(self, batch: Batch) -> None:
        """Measure each term's share of the gradient and its agreement with the others; warn in words."""
        trainer = self.trainer
        with trainer.compiled.paused():
            report, remarks = shares(trainer.method, batch)
        trainer._write({"step": trainer.position.step, "stage": self.stage.name, "gradient": report})
        for term, remark in remarks.items():
            if term not in self.remarked:
                self.remarked.add(term)
                trainer.progress.warn(remark)


# -- pieces --------------------------------------------------------------------------------------------------------------------------


def match_stages(own: Sequence[Stage], given: Sequence[StageConfig]) -> list[tuple[Stage, StageConfig]]:
    """The method's stages with what the recipe says of them. A recipe that names stages decides which run, in its order; a name that
    the method knows starts from the method's own trainable parts and weights."""
    if not given:
        return [(stage, StageConfig(name=stage.name)) for stage in own]
    known = {stage.name: stage for stage in own}
    matched = []
    for config in given:
        base = known.get(config.name, Stage(config.name))
        trainable = base.trainable if config.trainable is None else config.trainable
        matched.append((replace(base, trainable=trainable, weights={**base.weights, **config.weights}), config))
    return matched


def introduce(method: Method, dataset: Any) -> None:
    """Tell a method of the training data what memories need: how many samples there are and, where the data says it, their labels; where
    unlabelled pictures stand beside labelled ones, of these."""
    labels = getattr(dataset, "labels", None)
    method.train_size, method.train_labels = len(dataset) if labels is None else len(labels), labels


def stage_steps(config: TrainConfig, given: StageConfig, per_epoch: int) -> int:
    """Optimiser steps of a stage: by its own ``steps`` or ``epochs``, else by those of ``train``."""
    epochs, steps = (given.epochs, given.steps) if given.epochs or given.steps else (config.epochs, config.steps)
    return steps or max(1, round((epochs or config.epochs) * per_epoch))


def choose_trainable(method: Method, stage: PlannedStage) -> list[nn.Parameter]:
    """Freeze what this stage does not train; returns what was frozen. `BadInput` where a pattern matches nothing."""
    names = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    for pattern in stage.trainable:
        if not fnmatch.filter(names, pattern):
            raise BadInput(f"stage {stage.name!r}: no trainable parameter matches {pattern!r}; {nearest(pattern, names[:200])}")
    frozen = []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad and not any(fnmatch.fnmatch(name, pattern) for pattern in stage.trainable):
            parameter.requires_grad_(False)
            frozen.append(parameter)
    return frozen


def build_optimizer(method: nn.Module, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW or SGD, fused where torch has it; no weight decay on vectors (biases, norms)."""
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    if not parameters:
        raise BadInput("nothing to train: every parameter of the student is frozen")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=fused)


def schedule(config: TrainConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at step ``step`` (from 0) of a stage: linear warm-up, then the schedule, to 0 at the end."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


def enable_gradient_checkpointing(student: nn.Module) -> None:
    """transformers' own switch; refused for modules without one."""
    switch = getattr(student, "gradient_checkpointing_enable", None)
    if switch is None:
        raise BadInput(
            f"train.gradient_checkpointing: {type(student).__name__} has no gradient_checkpointing_enable(); leave it off"
        )
    switch({"use_reentrant": False})


def place(module: nn.Module, device: torch.device, config: TrainConfig) -> None:
    """Put a module on the device, and its convolutions' weights in the order that ``channels_last`` asks for."""
    module.to(device)
    if config.channels_last:
        convert_conv2d_weight_memory_format(module, torch.channels_last)


def synchronised(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients cross processes with the last micro-batch of a step only."""
    return nullcontext() if last else accelerator.no_sync(model)


def summed(rows: list[dict[str, float]], accelerator: Accelerator) -> list[dict[str, float]]:
    """Each row with what all processes have of it, by name: a term may be absent from the batches of some."""
    if accelerator.num_processes == 1 or not rows:
        return rows
    parts = zip(*gather_object([rows]), strict=True)
    return [
        {name: sum(part.get(name, 0.0) for part in row) for name in dict.fromkeys(name for part in row for name in part)}
        for row in parts
    ]


def entire(value: Tensor) -> Tensor:
    """A tensor that may lie in parts on several processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def times(value: Tensor, share: Share) -> Tensor:
    """The product; nothing is computed where the share is a plain 1."""
    return value if isinstance(share, float) and share == 1 else value * share


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by parameter name; a parameter that never got gradient has none."""
    if is_sharded(model):
        return get_optimizer_state_dict(model, optimizer, options=FULL)
    names = ordered_names(model, optimizer)
    return {"state": {names[index]: state for index, state in optimizer.state_dict()["state"].items()}}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, Any]) -> None:
    """Undo `optimizer_state`; the optimiser's groups stay as they were built."""
    if is_sharded(model):
        set_optimizer_state_dict(model, optimizer, states, options=replace(FULL, strict=False))
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {key: laid_out_as(parameters[index], value) for key, value in states["state"][name].items()}
        for index, name in enumerate(ordered_names(model, optimizer))
        if name in states["state"]
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def laid_out_as(parameter: Tensor, value: Any) -> Any:
    """A value of an optimiser's state in the memory order of its parameter: fused kernels read both as they lie in memory."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def ordered_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the optimiser's order."""
    names = {parameter: name.removeprefix("module.") for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor (FSDP2)."""
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def forget_accelerator() -> None:
    """Let the next `Accelerator` of this process have another precision. What accelerate turned into FSDP it only finds again as the
    plain multi-device launch that it was."""
    AcceleratorState._reset_state()
    if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def check_launch(accelerator: Accelerator, config: TrainConfig) -> None:
    """`BadInput` where the processes do not know of each other, or where what is asked for cannot be sharded."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched != accelerator.num_processes:
        raise BadInput(
            f"{launched} processes were launched and do not know of each other: each would train alone. Without a GPU, "
            "`accelerate launch --cpu` joins them"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise BadInput(
            "DeepSpeed is not supported (its optimiser states have no names to save them by): shard with FSDP2 instead"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("FSDP version 1 is not supported: set fsdp_version: 2 in the accelerate config (configs/accelerate)")
    for key, given in (("ema", config.ema), ("diagnose_every", config.diagnose_every), ("channels_last", config.channels_last)):
        if accelerator.is_fsdp2 and given:
            raise BadInput(f"train.{key} does not work on sharded weights (FSDP2): leave it out, or launch with DDP")


def replica(method: Method) -> Method:
    """A copy to shard, which shares the teachers; the method itself waits in host memory. Sharding by FSDP2 cannot be undone."""
    shared = {id(module): module for teacher in method.teachers() for module in teacher.module.modules()}
    return copy.deepcopy(method.to("cpu"), memo=dict(shared))


@contextmanager
def gathered(method: nn.Module) -> Any:
    """Inside, sharded weights are whole on every process and no forward is a collective, so that processes may see different numbers
    of batches; what is not sharded stays as it is."""
    units = [module for module in method.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not method, recurse=False)
            unit.reshard()


def brief(metrics: Mapping[str, float]) -> dict[str, float]:
    """The headline metrics: those without a part after a slash."""
    return {name: value for name, value in metrics.items() if "/" not in name}


def flat(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("terms/ce/raw", 0.3) pairs of a nested mapping."""
    pairs: list[tuple[str, Any]] = []
    for key, value in nested.items():
        pairs.extend(flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)])
    return pairs
