"""What ``train.group_by_length`` and ``train.compile`` save: a small LLaVA pair on questions whose answers differ much in length; and what
``train.channels_last`` saves: a step of labels and KD between convolutional classifiers of timm.

    python benchmarks/speed_switches.py --json speed_switches.json
    python benchmarks/speed_switches.py --tiny                      # the same code in seconds

Words of an answer are log-normal (median 20, up to 400), as in instruction data. An epoch of switch-kd is trained in batches as they
come and in batches of like length, and single steps eagerly and compiled; what is compared is timed in turns, so that a busy machine
slows both alike. Padding is counted in the very batches, not estimated.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image

import limbeck as lb
from limbeck.batch import Batch
from limbeck.data.records import VQARecord
from limbeck.data.vlm import VQACollator, VQADataset
from limbeck.engine.batches import StepSampler, sample_lengths, training_loader
from limbeck.engine.compiling import Compiled
from limbeck.engine.config import TrainConfig
from limbeck.engine.trainer import place
from limbeck.models.loading import load
from limbeck.models.tiny import digit_vlm
from limbeck.models.vlm import VLM

SIZES = {"vision_width": 128, "vision_layers": 3, "text_width": 256, "text_layers": 4, "heads": 4}
CLASSIFIERS = {  # teacher, student, pixels a side
    "efficientnet_lite0 > mobilenetv3_small": ("tf_efficientnet_lite0", "mobilenetv3_small_100", 128),
    "resnet34 > resnet18": ("resnet34", "resnet18", 96),
    "convnext_pico > convnext_atto": ("convnext_pico", "convnext_atto", 96),
}
TINY = {"vision_width": 16, "vision_layers": 2, "text_width": 16, "text_layers": 2, "heads": 2}


def records(count: int) -> list[VQARecord]:
    """Questions about one grey picture with answers of random words."""
    draw, picture = random.Random(0), Image.new("RGB", (16, 16), (128, 128, 128))
    lengths = [min(400, 1 + int(draw.lognormvariate(3.0, 1.0))) for _ in range(count)]
    answers = (" ".join(draw.choices(digit_vlm.WORDS[:21], k=length)) for length in lengths)
    return [VQARecord(str(index), (picture,), (("what is the largest digit?", answer),)) for index, answer in enumerate(answers)]


def batches_of(dataset: VQADataset, collate: VQACollator, batch: int, micro: int, grouped: bool) -> list[Batch]:
    """The micro-batches of the first epoch."""
    lengths = sample_lengths(dataset) if grouped else None
    sampler = StepSampler(
        len(dataset), batch, micro, seed=0, rank=0, world=1, start=0, stop=len(dataset) // batch, lengths=lengths
    )
    return list(training_loader(dataset, collate, sampler, seed=0, workers=0))


def padded(batches: list[Batch]) -> float:
    """The share of positions that only pad."""
    masks = [batch["student"]["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def seconds(method: lb.Method, batches: list[Batch], device: torch.device) -> float:
    """Forward and backward over all of them."""
    start = time.perf_counter()
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total = method(send_to_device(batch, device)).total
        total.backward()
        method.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_by_order(teacher: str, student: str, side: int, samples: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step with the weights of convolutions in torch's usual order and in channels-last order, in turns."""
    batch = {
        "pixel_values": torch.rand(samples, 3, side, side),
        "labels": torch.arange(samples) % 10,
        "ids": list(range(samples)),
    }
    methods = {}
    for order in ("usual", "channels last"):
        pair = (load({"source": "timm", "name": name, "classes": 10}) for name in (teacher, student))
        methods[order] = lb.compose(*pair, ["ce", "kd"])
        for module in (methods[order], methods[order].teacher.module):
            place(module, device, TrainConfig(channels_last=order != "usual"))
        methods[order].prepare(send_to_device(batch, device))
        seconds(methods[order], [batch], device)
    times: dict[str, list[float]] = {order: [] for order in methods}
    for _ in range(repeats):
        for order, method in methods.items():
            times[order].append(seconds(method, [batch], device))
    return {order: 1e3 * statistics.median(of) for order, of in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    sizes, samples, batch, micro = (TINY, 64, 4, 4) if given.tiny else (SIZES, 256, 32, 8)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    (student, processor), (teacher, _) = (digit_vlm.build(f"digit-vlm-{role}", **sizes) for role in ("student", "teacher"))
    method = lb.create("switch-kd", VLM(student, processor), VLM(teacher, processor)).to(device)
    teacher.to(device)
    dataset, collate = VQADataset(records(samples), processor, cache=True), VQACollator(processor)
    ways = {name: batches_of(dataset, collate, batch, micro, grouped) for name, grouped in (("random", False), ("grouped", True))}

    seconds(method, ways["grouped"][:1], device)
    epochs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, batches in ways.items():
            epochs[name].append(seconds(method, batches, device))

    start = time.perf_counter()
    compiled = Compiled([student, teacher], lambda text: sys.exit(text))
    seconds(method, ways["random"][:3], device)
    compiling = time.perf_counter() - start
    steps: dict[str, list[float]] = {"eager": [], "compiled": []}
    for one in ways["random"][: 4 * given.repeats]:
        steps["compiled"].append(seconds(method, [one], device))
        with compiled.paused():
            steps["eager"].append(seconds(method, [one], device))
    compiled.close()

    classifiers = {
        name: step_by_order(*names, side // 2 if given.tiny else side, 4 if given.tiny else 32, 2 * given.repeats, device)
        for name, (*names, side) in CLASSIFIERS.items()
    }
    result: dict[str, Any] = {
        "padding": {name: padded(batches) for name, batches in ways.items()},
        "epoch_seconds": {name: statistics.median(times) for name, times in epochs.items()},
        "step_ms": {name: 1e3 * statistics.median(times) for name, times in steps.items()},
        "compiling_seconds": compiling,
        "classifier_step_ms": classifiers,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"limbeck": lb.__version__},
    }
    for what, unit in (("padding", ""), ("epoch_seconds", " s"), ("step_ms", " ms")):
        print(f"{what.replace('_', ' ')}: " + ", ".join(f"{name} {value:.3g}{unit}" for name, value in result[what].items()))
    print(f"compiling: {compiling:.0f} s, on {result['device']}, {result['threads']} thread(s)")
    for name, times in classifiers.items():
        ratio = times["channels last"] / times["usual"]
        print(f"a step of {name}: {times['usual']:.0f} ms, channels last {times['channels last']:.0f} ms ({ratio:.2f})")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
