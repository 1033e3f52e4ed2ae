"""examples/own_pair.py as a new user runs it: in a process of its own, on two small but real Qwen2.5-VL folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from limbeck.models.loading import ensure_torchvision

ensure_torchvision()

import tokenizers  # noqa: E402
import transformers  # noqa: E402

import limbeck  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
QUESTION = "What is the colour?"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # Qwen2.5-VL's, less its system prompt


def processor() -> transformers.Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor over a byte-level BPE tokenizer: one image token for 8x8 pixels."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([QUESTION, *COLOURS] * 10, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=4096, patch_size=4, merge_size=2),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def save_model(folder: Path, reader: Any, *, layers: int, width: int, rows: int) -> None:
    """A Qwen2.5-VL of random weights. rows: of its head; as with the real ones, the larger model pads its head further."""
    ids = reader.tokenizer.get_vocab()
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **{"vocab_size": rows, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers},
            **{"num_attention_heads": width // 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
            **{"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            **{"depth": layers, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": width, "num_heads": 4},
            **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
            **{"window_size": 16, "fullatt_block_indexes": [0]},
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(layers)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    reader.save_pretrained(folder)


def write_data(folder: Path, pictures: int = 12) -> None:
    """One-coloured PNGs of several sizes; half of the rows simple, half LLaVA conversations."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(pictures):
        name, colour = list(COLOURS.items())[number % 3]
        Image.new("RGB", (16 + 8 * (number % 2), 24), colour).save(folder / "images" / f"{number:02d}.png")
        if number % 2:
            rows.append({"image": f"{number:02d}.png", "question": QUESTION, "answer": name})
        else:
            said = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": name}]
            rows.append({"id": f"talk-{number}", "image": f"{number:02d}.png", "conversations": said})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    reader = processor()
    save_model(folder / "models" / "fresh", reader, layers=2, width=64, rows=384)
    save_model(folder / "models" / "small", reader, layers=1, width=32, rows=352)
    write_data(folder / "data")
    taught = {
        "method": {"name": "sft"},
        "student": {"source": "transformers", "name": str(folder / "models" / "fresh")},
        "data": {"source": "vqa-jsonl", "path": str(folder / "data" / "train.jsonl"), "images": str(folder / "data" / "images")},
        "train": {"steps": 40, "batch_size": 4, "lr": 3e-3},
    }
    limbeck.run(taught, out=folder / "teacher", quiet=True)
    (folder / "teacher" / "student").rename(folder / "models" / "large")
    return folder


def call(project: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--teacher", "models/large", "--student", "models/small", "--lr", "3e-3"]
    arguments += ["--data", "data/train.jsonl", "--images", "data/images"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "own_pair.py"), *arguments, *more],
        cwd=project, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_pair_of_ones_own_is_distilled_measured_probed_and_loaded(project):
    given = ("--out", "runs/own", "--epochs", "40", "--batch-size", "4", "--micro-batch-size", "2", "--val-fraction", "0.3")
    done = call(project, *given)
    assert done.returncode == 0, done.stderr
    run = project / "runs" / "own"
    assert {path.name for path in run.iterdir()} >= {"recipe.yaml", "metrics.jsonl", "checkpoints", "student", "result.json"}

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["terms"]["ce"]["raw"] for row in rows if "terms" in row]
    assert losses[-1] < losses[0] / 2
    validation = json.loads((run / "result.json").read_text())["validation"]
    assert f"measured again: accuracy {validation['accuracy']:.3f}" in done.stdout
    assert "student vision: teacher language" in done.stdout
    assert re.search(r"teacher vision: teacher language 1\.000, student language \d", done.stdout)
    said, expected = re.search(r"the student says '(\w+)', the data '(\w+)'", done.stdout).groups()
    assert said == expected

    model, report = transformers.AutoModelForImageTextToText.from_pretrained(run / "student", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.text_config.hidden_size == 32
    before = transformers.AutoModelForImageTextToText.from_pretrained(project / "models" / "small").state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("visual.blocks" in name for name in moved) and any("language_model" in name for name in moved)


def test_bad_input_is_one_line_and_writes_nothing(project):
    done = call(project, "--out", "runs/bad", "--student", "models/smal")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("own_pair: ")
    assert "Traceback" not in done.stderr
    assert not (project / "runs" / "bad").exists()
