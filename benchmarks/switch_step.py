"""Time and memory of one Switch-KD training step: a 0.5B student under a 3B teacher, random weights, one device.

    python benchmarks/switch_step.py --family qwen2.5-vl --batch 8 --json switch_step.json
    python benchmarks/switch_step.py --tiny                      # the same code on the CPU, small, in seconds

Three things are timed in turns, so that a busy machine slows all of them alike, and medians are compared:

- *passes*: the three passes of eq. 5 alone (student, teacher without gradient, switch route), up to the last hidden states, and their
  backward from a plain sum;
- *step*: `SwitchKD.forward` (the passes, the heads at the supervised positions, cross-entropy, two DBiLD) and backward;
- *step + AdamW*: the step and the optimiser's.

Outside the passes is what the method itself adds: 1 - passes / step. Weights of the teacher are bfloat16; those of the student are
float32 under bf16 autocast, as `limbeck run` with ``precision: bf16`` holds them (``--student-dtype bfloat16`` for pure bfloat16).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import limbeck
from limbeck.engine.config import TrainConfig
from limbeck.engine.trainer import build_optimizer, enable_gradient_checkpointing
from limbeck.methods.vlm.switch_kd import SwitchKD
from limbeck.models.loading import build_vlm
from limbeck.models.vlm import VLM

VIDEO, VISION_START, IMAGE = 2, 3, 4  # token ids; any that no text of the benchmark uses
SIZES: dict[str, dict[str, Any]] = {
    "student": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "teacher": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
}  # of Qwen2.5-0.5B and Qwen2.5-3B, with two key-value heads each
TINY: dict[str, dict[str, Any]] = {
    "student": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "teacher": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def configuration(family: str, role: str, tiny: bool) -> dict[str, Any]:
    """The configuration of one of the two models: one vision encoder and vocabulary for both, the language model by role."""
    text = {"vocab_size": 300 if tiny else 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
    text |= (TINY if tiny else SIZES)[role]
    if family == "llava":
        so400m = {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
        }
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
        vision = {"model_type": "siglip_vision_model", "patch_size": 14, "vision_use_head": False, **(small if tiny else so400m)}
        return {
            "model_type": "llava", "image_token_index": IMAGE, "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
            "image_seq_length": (vision["image_size"] // 14) ** 2, "tie_word_embeddings": True,
            "vision_config": vision, "text_config": {"model_type": "qwen2", **text},
        }  # fmt: skip
    pairs = text["hidden_size"] // text["num_attention_heads"] // 2  # rotary pairs of a head, shared among time, height, width
    sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    small = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]}
    return {
        "model_type": "qwen2_5_vl", "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
        "tie_word_embeddings": True,
        "vision_config": {"out_hidden_size": text["hidden_size"], **(small if tiny else {"hidden_size": 1280})},
        "text_config": {"rope_parameters": rope, **text},
    }  # fmt: skip


def build(family: str, role: str, tiny: bool, dtype: torch.dtype, device: torch.device) -> VLM:
    """A model of random weights, made on the device in its dtype."""
    return build_vlm({**configuration(family, role, tiny), "dtype": str(dtype).removeprefix("torch.")}, device=device)


def make_batch(view: VLM, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Random pictures, words and answers in the family's own input format; every sample is of one length."""
    config, batch = view.model.config, arguments.batch
    generator = torch.Generator(device).manual_seed(0)
    vision = config.vision_config
    if view.family == "llava":
        pictures = config.image_seq_length
        shape = (batch, 3, vision.image_size, vision.image_size)
        images: dict[str, Any] = {}
    else:
        side = 2 * vision.spatial_merge_size if arguments.tiny else arguments.grid  # patches a side
        pictures = (side // vision.spatial_merge_size) ** 2
        shape = (batch * side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
        images = {"image_grid_thw": torch.tensor([[1, side, side]] * batch, device=device)}
    words = torch.randint(5, view.vocab_size, (batch, arguments.text), generator=generator, device=device)
    seen = torch.full((batch, pictures), IMAGE, device=device)
    start = torch.full((batch, 1), VISION_START, device=device)
    input_ids = torch.cat([start, seen, words], dim=1)  # [B, T]
    labels = input_ids.clone()
    labels[:, : -arguments.answer] = -100
    images["pixel_values"] = torch.randn(shape, generator=generator, device=device)
    if view.family != "llava":
        images["mm_token_type_ids"] = (input_ids == IMAGE).int()
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels, **images}
    return {"student": inputs, "ids": [str(number) for number in range(batch)]}


def passes(method: SwitchKD, batch: dict[str, Any]) -> None:
    """The three model passes of a step and their backward, without heads, losses and optimiser."""
    inputs = batch["student"]
    student = method.view.read(inputs)
    with torch.no_grad():
        teacher = method.teacher_view.read(inputs)
    switch = method.teacher_view.speak(inputs, student.visual, teacher.replay)
    (student.hidden.float().sum() + switch.float().sum()).backward()


def measure(runs: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of each, interleaved: {"median", "low", "high"}; and the peak of allocated bytes, null without a CUDA device.

    The optimiser's states are there from the warm-up on, so that each peak holds them.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int | None] = dict.fromkeys(runs)
    for repeat in range(repeats + 2):  # two to warm up
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peaks[name] = torch.cuda.max_memory_allocated(device)
            if repeat >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"median_ms": statistics.median(taken), "low_ms": min(taken), "high_ms": max(taken), "peak_bytes": peaks[name]}
        for name, taken in times.items()
    }


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build, run, and return what is printed."""
    device = torch.device("cpu" if arguments.tiny or not torch.cuda.is_available() else "cuda")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("this benchmark needs a CUDA device; --tiny runs it on the CPU with tiny models")
    torch.manual_seed(0)
    student_dtype = getattr(torch, arguments.student_dtype)
    student = build(arguments.family, "student", arguments.tiny, student_dtype, device)
    teacher = build(arguments.family, "teacher", arguments.tiny, torch.bfloat16, device)
    method = SwitchKD(student, teacher, checkpoint_switch=arguments.checkpoint_switch).train()
    if arguments.gradient_checkpointing:
        enable_gradient_checkpointing(method.student)
    batch = make_batch(student, arguments, device)
    optimizer = build_optimizer(method, TrainConfig(), lr=1e-5)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=student_dtype == torch.float32)

    def only_passes() -> None:
        with autocast:
            passes(method, batch)
        optimizer.zero_grad(set_to_none=True)

    def step(update: bool = False) -> None:
        with autocast:
            total = method(batch).total
        total.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed = measure({"passes": only_passes, "step": step, "step + AdamW": lambda: step(update=True)}, arguments.repeats, device)
    tokens = batch["student"]["input_ids"].numel()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "limbeck": limbeck.__version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "arguments": vars(arguments),
        "parameters": {
            role: sum(p.numel() for p in view.model.parameters()) for role, view in (("student", student), ("teacher", teacher))
        },
        "tokens_a_sample": tokens // arguments.batch,
        "tokens_per_second": tokens / (timed["step + AdamW"]["median_ms"] / 1e3),
        "outside_passes": 1 - timed["passes"]["median_ms"] / timed["step"]["median_ms"],
        "timed": timed,
    }


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("qwen2.5-vl", "llava"), default="qwen2.5-vl")
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument(
        "--grid", type=int, default=32, help="patches a side of a picture (qwen2.5-vl); 32 gives 256 image tokens"
    )
    parser.add_argument("--text", type=int, default=128, help="text tokens a sample")
    parser.add_argument("--answer", type=int, default=64, help="of them supervised")
    parser.add_argument("--student-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--checkpoint-switch", action="store_true", help="as the method's option; the recomputation is outside the passes"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    result = benchmark(arguments)
    print(f"{result['device']}   " + "   ".join(f"{name} {number}" for name, number in result["versions"].items()))
    counts = {role: f"{count / 1e6:,.1f} M" for role, count in result["parameters"].items()}
    sizes = f"student {counts['student']}, teacher {counts['teacher']} parameters"
    print(f"{arguments.family}: {sizes}; {arguments.batch} x {result['tokens_a_sample']} tokens a step")
    print(f"{'':14}{'median ms':>10}{'low':>10}{'high':>10}{'peak GiB':>10}")
    for name, row in result["timed"].items():
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        print(f"{name:14}{row['median_ms']:>10.1f}{row['low_ms']:>10.1f}{row['high_ms']:>10.1f}{peak:>10}")
    print(
        f"{result['tokens_per_second']:,.0f} tokens/s; {result['outside_passes']:.1%} of the step is outside the three model passes"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({**result, "arguments": {**vars(arguments), "json": str(arguments.json)}}, indent=1))


if __name__ == "__main__":
    main()
