"""What a training step costs beyond its arithmetic: Limbeck beside a loop written by hand, torchdistill and timm's distillation task.

    python benchmarks/step.py --json benchmarks/results/step.json     # installs the peers into a virtual environment of its own
    python benchmarks/step.py --no-peers                         # in this environment
    python benchmarks/step.py --no-peers --tiny                  # the same code, in seconds

Each row trains its own copy of one student, from the same weights on the same batches, and has to reach the loss of the loop by hand.
The loops of a group take turns in one process; CPU time of one thread is compared, block by block: the median of the ratios and of the
differences, and their quartiles. The loop by hand calls body and head and takes the feature between them directly; all use one fused
SGD (AdamW for switch-kd).

- *kd + hint*: KL at temperature 4 and the mean squared error of a feature through a linear layer. limbeck: `compose` in a loop of
  one's own. torchdistill: `DistillationBox.forward_process` and `post_forward_process`, with its teacher put in eval mode.
- *ce + kd*: the labels and the KL. timm: `LogitDistillationTask`.
- *engine*: `Trainer.fit`, which loads and collates, schedules, clips, journals and looks for values that are not finite, beside a loop by
  hand over a `DataLoader` that loads, schedules, clips and writes a line every 10 steps.
- *switch-kd*: three passes of two LLaVA models on digit-scenes. By hand: vision tower, projector and language model called in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _peers import ensure, machine, rerun
from torch import Tensor, nn

PEERS = ("torchdistill==1.1.5", "timm==1.0.31")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
TEMPERATURE = 4.0
LR = 1e-3
LOG_EVERY = 10

Block = Callable[[int], float]
"""Trains so many steps; returns the last loss."""
Loss = Callable[[dict[str, Any]], Tensor]
"""The loss of a batch."""


# -- the models ------------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A body, whose output is the feature, and a head."""

    num_classes, in_chans = 10, 3  # what timm's task asks a model for
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Tokens(nn.Module):
    """[B, 3, 32, 32] -> [B, 64, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, 64, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.positions


class Mean(nn.Module):
    """[B, N, D] -> [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp(width: int) -> Net:
    return Net(nn.Sequential(nn.Linear(192, width), nn.ReLU()), nn.Linear(width, 10))


def cnn(width: int) -> Net:
    def stage(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    body = nn.Sequential(*stage(3, width), *stage(width, 2 * width), *stage(2 * width, 4 * width))
    return Net(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)))


def vit(width: int) -> Net:
    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)

    return Net(nn.Sequential(Tokens(width), *(block() for _ in range(4))), nn.Sequential(Mean(), nn.Linear(width, 10)))


@dataclass(frozen=True)
class Case:
    """build: width -> model; student, teacher: widths; shape: of a sample; batch: samples a step; steps: of a block."""

    build: Callable[[int], Net]
    student: int
    teacher: int
    shape: tuple[int, ...]
    batch: int
    steps: int


CASES = {
    "mlp": Case(mlp, 64, 128, (192,), 16, 200),
    "cnn": Case(cnn, 16, 32, (3, 32, 32), 32, 5),
    "vit": Case(vit, 64, 128, (3, 32, 32), 16, 5),
}


@dataclass
class Setting:
    """One student to train, with the teacher, the adapter and the data that every loop of a case has alike."""

    student: Net
    teacher: Net
    adapter: nn.Module
    batch: dict[str, Any]

    @classmethod
    def of(cls, case: Case) -> Setting:
        torch.manual_seed(0)
        student, teacher = case.build(case.student), case.build(case.teacher).eval().requires_grad_(False)
        x, labels = torch.randn(case.batch, *case.shape), torch.randint(10, (case.batch,))
        with torch.no_grad():
            before, after = student.eval().body(x).shape, teacher.body(x).shape
        convolution = len(before) == 4
        adapter = nn.Conv2d(before[1], after[1], 1) if convolution else nn.Linear(before[-1], after[-1])
        return cls(student.train(), teacher, adapter, {"pixel_values": x, "labels": labels})


# -- the loops -------------------------------------------------------------------------------------------------------------------------


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=LR, momentum=0.9, fused=True)


def loop(loss_of: Loss, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> Block:
    """One batch, again and again."""

    def block(steps: int) -> float:
        for _ in range(steps):
            loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return block


def kl_by_hand(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    q, p = F.log_softmax(logits / TEMPERATURE, -1), F.softmax(teacher_logits / TEMPERATURE, -1)
    return F.kl_div(q, p, reduction="batchmean") * TEMPERATURE**2


def kd_hint_by_hand(setting: Setting) -> Loss:
    student, teacher, adapter = setting.student, setting.teacher, setting.adapter

    def loss_of(batch: dict[str, Any]) -> Tensor:
        x = batch["pixel_values"]
        with torch.no_grad():
            target = teacher.body(x)
            teacher_logits = teacher.head(target)
        feature = student.body(x)
        return kl_by_hand(student.head(feature), teacher_logits) + F.mse_loss(adapter(feature), target)

    return loss_of


def ce_kd_by_hand(setting: Setting) -> Loss:
    student, teacher = setting.student, setting.teacher

    def loss_of(batch: dict[str, Any]) -> Tensor:
        x = batch["pixel_values"]
        with torch.no_grad():
            teacher_logits = teacher(x)
        logits = student(x)
        return F.cross_entropy(logits, batch["labels"]) + kl_by_hand(logits, teacher_logits)

    return loss_of


def limbeck_method(setting: Setting, terms: str) -> Any:
    from limbeck import CE, KD, Hint, compose

    kd = KD(temperature=TEMPERATURE)
    method = compose(setting.teacher, setting.student, [kd, Hint("body", "body")] if terms == "kd + hint" else [CE(), kd])
    method.prepare(setting.batch)
    if terms == "kd + hint":
        method.adapters["hint"].load_state_dict(setting.adapter.state_dict())
    return method


def limbeck_loop(method: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> Block:
    return loop(lambda batch: method(batch).total, batch, optimizer)


def torchdistill_loop(setting: Setting) -> Block:
    from torchdistill.core.distillation import DistillationBox

    class Adapted(nn.Module):
        """Where its hook finds the adapter's output."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.adapter = setting.student, setting.adapter

        def forward(self, x: Tensor) -> Tensor:
            feature = self.net.body(x)
            self.adapter(feature)
            return self.net.head(feature)

    def seen(path: str, teacher: bool) -> dict[str, Any]:
        return {"is_from_teacher": teacher, "module_path": path, "io": "output"}

    whole = {"module_path": ".", "io": "output"}
    both = {
        f"{role}_module_{key.removeprefix('module_')}": value for role in ("student", "teacher") for key, value in whole.items()
    }
    terms = {
        # alpha = 0: its bare KL, without the temperature^2
        "kd": {
            "criterion": {
                "key": "KDLoss",
                "kwargs": {**both, "temperature": TEMPERATURE, "alpha": 0.0, "reduction": "batchmean"},
            },
            "weight": TEMPERATURE**2,
        },
        "hint": {
            "criterion": {"key": "MSELoss", "kwargs": {}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {"input": seen("adapter", False), "target": seen("body", True)},
            },
            "weight": 1.0,
        },
    }
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False, "forward_hook": {"output": ["body"]}},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True, "forward_hook": {"output": ["adapter"]}},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": 0.9, "fused": True}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = DistillationBox(setting.teacher, Adapted(), {}, config, torch.device("cpu"), None, False, 1)
    box.teacher_model.eval()
    box.student_model.train()

    def block(steps: int) -> float:
        for _ in range(steps):
            loss = box.forward_process(*setting.batch.values())
            box.post_forward_process(loss)
        return loss.item()

    return block


def timm_loop(setting: Setting) -> Block:
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        setting.student, setting.teacher, nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=1.0,
        temperature=TEMPERATURE, device=torch.device("cpu"), verbose=False,
    )  # fmt: skip
    return loop(lambda batch: task(batch["pixel_values"], batch["labels"])["loss"], setting.batch, sgd(setting.student))


# -- switch-kd -------------------------------------------------------------------------------------------------------------------------


def switch_kd_task(tiny: bool) -> Any:
    """The models, data and training of ``recipes/switch-kd.yaml``, under an untrained teacher."""
    from limbeck.engine.recipe import load_recipe
    from limbeck.engine.task import build_task
    from limbeck.models.loading import load_vlm

    small = {"data.scenes": 64, "data.digits": 50, "data.val": 8, "data.test": 8, "train.batch_size": 8} if tiny else {}
    overrides = [part for key, value in {**small, "evaluate": "[]"}.items() for part in (f"--{key}", str(value))]
    recipe = load_recipe("switch-kd", overrides)
    return build_task(recipe, teacher=load_vlm("tiny", "digit-vlm-teacher")), recipe.train


def switch_kd_by_hand(student: Any, teacher: Any) -> Loss:
    """Two LLaVA models, part by part."""
    from limbeck.losses import dbild

    ours, theirs, image = student.model, teacher.model, student.config.image_token_index

    def see(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model.vision_tower(inputs["pixel_values"]).last_hidden_state[:, 1:]

    def speak(model: Any, inputs: dict[str, Tensor], visual: Tensor) -> Tensor:
        words = model.language_model.get_input_embeddings()(inputs["input_ids"])
        placeholders = (inputs["input_ids"] == image).unsqueeze(-1)
        embedded = words.masked_scatter(placeholders, model.multi_modal_projector(visual))
        return model.language_model(
            inputs_embeds=embedded, attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state

    def loss_of(batch: dict[str, Any]) -> Tensor:
        inputs = batch["student"]
        at = torch.nonzero(inputs["labels"][:, 1:] != -100, as_tuple=True)
        with torch.no_grad():
            target = teacher.lm_head(speak(theirs, inputs, see(theirs, inputs))[at])
        visual = see(ours, inputs)
        logits = student.lm_head(speak(ours, inputs, visual)[at])
        switched = teacher.lm_head(speak(theirs, inputs, visual)[at])
        ce = F.cross_entropy(logits, inputs["labels"][at[0], at[1] + 1])
        return ce + dbild(logits, target) + dbild(switched, target)

    return loss_of


# -- engine ----------------------------------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """(picture, label) pairs."""

    def __init__(self, shape: tuple[int, ...], samples: int) -> None:
        self.x, self.labels = torch.randn(samples, *shape), torch.randint(10, (samples,)).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.labels[index]


def engine_by_hand(loss_of: Loss, modules: list[nn.Module], batches: Iterator[Any], config: Any, log: Path) -> Block:
    """The loop as a person writes it who schedules, clips and logs."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    warmup = config.warmup * config.steps
    losses: list[Tensor] = []
    done = 0

    def block(steps: int) -> float:
        nonlocal done
        for _ in range(steps):
            share = (done + 1) / (warmup + 1)
            if done >= warmup:
                share = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (config.steps - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * share
            loss = loss_of(next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            done += 1
            if done % LOG_EVERY == 0:
                with log.open("a") as file:
                    file.write(json.dumps({"step": done, "loss": sum(loss.item() for loss in losses) / LOG_EVERY}) + "\n")
                losses.clear()
        return loss.item()

    return block


def engine_in_turns(
    method: Any, data: Any, collate: Any, config: Any, loss_of: Loss, modules: list[nn.Module], blocks: int, steps: int
) -> dict[str, list[float]]:
    """Seconds a step of `Trainer.fit` and of the loop by hand: after each block of the one, `Method.after_step` runs one of the other."""
    from limbeck.engine.batches import StepSampler
    from limbeck.engine.trainer import Trainer

    update = {"steps": (blocks + 1) * steps, "evaluate_every": 0, "checkpoint_every": 0, "log_every": LOG_EVERY}
    config = config.model_copy(update=update)
    times: dict[str, list[float]] = {"by hand": [], "limbeck": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(method, data, config, Path(folder), collate=collate, quiet=True)
        trainer.setup()
        samples = trainer.plan[0].dataset
        order = StepSampler(
            len(samples), config.batch_size, config.batch_size, seed=config.seed, rank=0, world=1, start=0, stop=config.steps
        )
        indices = [[index for _, index in batch] for batch in order]
        for index in {index for batch in indices for index in batch}:
            _ = samples[index]  # digit-scenes keeps what it has encoded: neither loop is to do it for the other
        batches = iter(torch.utils.data.DataLoader(samples, batch_sampler=indices, collate_fn=collate))
        by_hand = engine_by_hand(loss_of, modules, batches, config, Path(folder) / "by-hand.jsonl")
        started = 0.0

        def turn(step: int) -> None:
            nonlocal started
            if step % steps == 0:
                ended = time.process_time()
                by_hand(steps)
                times["limbeck"].append((ended - started) / steps)
                times["by hand"].append((time.process_time() - ended) / steps)
                started = time.process_time()

        method.after_step = turn
        started = time.process_time()
        trainer.fit()
        ours, theirs = (_logged(file) for file in (trainer.metrics_file, Path(folder) / "by-hand.jsonl"))
    agree({"by hand": theirs[0], "limbeck": ours[0]})
    return {name: seconds[1:] for name, seconds in times.items()}  # the first block warms up


def _logged(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


# -- the measurement -------------------------------------------------------------------------------------------------------------------


def agree(losses: dict[str, float]) -> None:
    """The same arithmetic gives the same loss: to 1e-4."""
    for name, loss in losses.items():
        if not math.isclose(loss, losses["by hand"], rel_tol=1e-4):
            raise SystemExit(f"{name} reaches a loss of {loss}, the loop by hand {losses['by hand']}: not the same arithmetic")


def in_turns(loops: dict[str, Block], blocks: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds a step, block by block; who begins changes from block to block. Losses have to agree after the first steps."""
    agree({name: run(5) for name, run in loops.items()})
    for run in loops.values():
        run(steps)
    times: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for block in range(blocks):
        for name in names[block % len(names) :] + names[: block % len(names)]:
            started = time.process_time()
            loops[name](steps)
            times[name].append((time.process_time() - started) / steps)
    return times


def summary(case: str, group: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row a loop: microseconds a step, and beside the loop by hand the ratio and the difference; medians and quartiles."""
    rows = []
    for name, seconds in times.items():
        pairs = list(zip(seconds, times["by hand"], strict=True))
        row: dict[str, Any] = {"case": case, "group": group, "loop": name, "us": 1e6 * statistics.median(seconds)}
        for key, values in (("ratio", [a / b for a, b in pairs]), ("extra_us", [1e6 * (a - b) for a, b in pairs])):
            row[f"{key}_low"], row[key], row[f"{key}_high"] = statistics.quantiles(values, n=4, method="inclusive")
        rows.append(row)
    return rows


def plain(case: str, peers: bool, blocks: int, steps: int | None) -> list[dict[str, Any]]:
    """kd + hint, ce + kd, and the engine on one of `CASES`."""
    sizes = CASES[case]
    steps = steps or sizes.steps
    setting = Setting.of(sizes)

    def fresh() -> Setting:
        return copy.deepcopy(setting)

    rows = []
    for group, loss_by_hand, peer in (
        ("kd + hint", kd_hint_by_hand, ("torchdistill", torchdistill_loop)),
        ("ce + kd", ce_kd_by_hand, ("timm", timm_loop)),
    ):
        own, hand = fresh(), fresh()
        method = limbeck_method(own, group)
        loops = {
            "by hand": loop(loss_by_hand(hand), hand.batch, sgd(hand.student, hand.adapter)),
            "limbeck": limbeck_loop(method, own.batch, sgd(method)),
        }
        if peers:
            loops[peer[0]] = peer[1](fresh())
        rows += summary(case, group, in_turns(loops, blocks, steps))

    from limbeck.engine.batches import collate_pairs
    from limbeck.engine.config import TrainConfig

    own, hand = fresh(), fresh()
    method = limbeck_method(own, "kd + hint")
    method.prepare = lambda batch: None  # keep the adapter, which is that of the loop by hand
    config = TrainConfig(batch_size=sizes.batch, lr=LR, optimizer="sgd")
    modules = [hand.student, hand.adapter]
    data = Pairs(sizes.shape, 16 * sizes.batch)
    times = engine_in_turns(method, data, collate_pairs, config, kd_hint_by_hand(hand), modules, blocks, steps)
    return [*rows, *summary(case, "engine", times)]


def switch_kd(tiny: bool, blocks: int, steps: int | None) -> list[dict[str, Any]]:
    """switch-kd on digit-scenes: the method in a loop of one's own, and the engine."""
    steps = steps or 3
    task, config = switch_kd_task(tiny)
    method = task.method
    batch = task.collate([task.data["train"][index] for index in range(config.batch_size)])
    student, teacher = method.student, method.teacher.module

    def by_hand() -> tuple[Any, Loss]:
        own = copy.deepcopy(student)
        return own, switch_kd_by_hand(own, teacher)

    def adamw(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    engine_student, engine_loss = by_hand()
    hand_student, hand_loss = by_hand()
    method.train()
    own = copy.deepcopy(student.state_dict())
    loops = {
        "by hand": loop(hand_loss, batch, adamw(hand_student.train())),
        "limbeck": limbeck_loop(method, batch, adamw(method)),
    }
    rows = summary("digit-scenes", "switch-kd", in_turns(loops, blocks, steps))
    student.load_state_dict(own)
    data = task.data["train"]
    times = engine_in_turns(method, data, task.collate, config, engine_loss, [engine_student.train()], blocks, steps)
    return [*rows, *summary("digit-scenes", "engine", times)]


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = (*CASES, "switch-kd")
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--no-peers", action="store_true", help="in this environment; nothing is installed")
    parser.add_argument("--venv", type=Path, help="where the peers are installed; default: a folder in the user's cache")
    parser.add_argument("--tiny", action="store_true", help="two blocks of five steps")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    if not arguments.no_peers:
        rerun(ensure("step", PEERS, arguments.venv), **ONE_THREAD)
    from limbeck.models.loading import ensure_torchvision

    ensure_torchvision()
    torch.set_num_threads(1)
    blocks, steps = (2, 5) if arguments.tiny else (arguments.blocks, None)
    rows = []
    for case in arguments.cases:
        if case == "switch-kd":
            rows += switch_kd(arguments.tiny, blocks, steps)
        else:
            rows += plain(case, not arguments.no_peers, blocks, steps)
    result = {"machine": machine("torch", "limbeck", *(name.partition("==")[0] for name in PEERS)), "rows": rows}
    print(result["machine"])
    print(f"{'case':14}{'group':12}{'loop':14}{'ms a step':>10}{'ratio':>8}{'quartiles':>16}{'extra us':>10}{'quartiles':>16}")
    for row in rows:
        quartiles = f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}"
        extra = f"{row['extra_us_low']:.0f} - {row['extra_us_high']:.0f}"
        print(
            f"{row['case']:14}{row['group']:12}{row['loop']:14}{row['us'] / 1e3:>10.3f}{row['ratio']:>8.3f}{quartiles:>16}"
            f"{row['extra_us']:>10.0f}{extra:>16}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
