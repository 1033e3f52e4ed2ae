"""Distil your own pair: two ``from_pretrained`` folders, a ``vqa-jsonl`` file and a folder of pictures (``pip install limbeck[vlm]``).

    python examples/own_pair.py --teacher models/large --student models/small \\
        --data data/train.jsonl --images data/images --out runs/own --epochs 2

Trains the student by Switch-KD, measures it on the pictures held out from ``--data``, splits its errors into those of seeing and those
of speaking, and lets the folder ``OUT/student`` answer a question in transformers alone. docs/own-data.md tells the same step by step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import limbeck as lb
from limbeck.data.loading import load_data


def recipe(given: argparse.Namespace) -> dict[str, Any]:
    """What a recipe file would say (recipes/own-pair.yaml), as a mapping."""
    gpu = torch.cuda.is_available()
    return {
        "method": {"name": given.method},
        "teacher": {"source": "transformers", "name": given.teacher, "dtype": "bfloat16" if gpu else None},
        "student": {"source": "transformers", "name": given.student},
        "data": {"source": "vqa-jsonl", "path": given.data, "images": given.images, "val_fraction": given.val_fraction},
        "train": {
            "epochs": given.epochs,
            "batch_size": given.batch_size,
            "micro_batch_size": given.micro_batch_size,
            "lr": given.lr,
            "precision": "bf16" if gpu else "fp32",
            "gradient_checkpointing": gpu,
            "diagnose_every": 50,
        },
        "evaluate": ["vqa-accuracy", "teacher-agreement"],
    }


def answer(student: Path, picture: Image.Image, question: str) -> str:
    """What the finished student says, loaded as anybody loads a model: no Limbeck here."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(student).eval()
    processor = AutoProcessor.from_pretrained(student)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def main() -> None:
    """Distil, measure, probe, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the large model, with its processor")
    parser.add_argument("--student", required=True, help="folder of the small model, with its processor")
    parser.add_argument("--data", required=True, help="JSON lines: image, question, answer; or LLaVA conversations")
    parser.add_argument("--images", required=True, help="folder that image paths are relative to")
    parser.add_argument("--out", required=True, help="the run folder; must not exist yet")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--method", default="switch-kd", help="switch-kd, kd, bild or sft (the control without a teacher)")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=32, help="samples a step")
    parser.add_argument("--micro-batch-size", type=int, default=None, help="samples that are in memory at once")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share of the pictures held out to validate")
    given = parser.parse_args()

    run = lb.run(recipe(given), out=given.out)
    print(f"validation: {', '.join(f'{name} {value:.3f}' for name, value in run.validation.items())}")

    # The same numbers again, from what is on disk: `limbeck evaluate OUT --split val`.
    print(f"measured again: accuracy {lb.evaluate_run(given.out, split='val')['accuracy']:.3f}")

    # `limbeck probe OUT`
    probed = lb.probe_run(given.out)
    for vision, by_language in probed.accuracy.items():
        shares = (f"{who} language {'-' if share is None else format(share, '.3f')}" for who, share in by_language.items())
        print(f"{vision} vision: {', '.join(shares)}")
    print(probed.reading())

    held_out = load_data(recipe(given)["data"], "val").records[0]
    question, expected = held_out.turns[0]
    said = answer(Path(given.out) / "student", Image.open(held_out.images[0]).convert("RGB"), question)
    print(f"{question!r}: the student says {said!r}, the data {expected!r}")


if __name__ == "__main__":
    try:
        main()
    except lb.BadInput as error:
        raise SystemExit(f"own_pair: {error}") from None
