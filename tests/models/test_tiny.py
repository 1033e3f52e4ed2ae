"""The tiny models are the real thing: they save, load, generate and learn like large ones."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from limbeck.data.embedded.digit_scenes import LAYOUTS, digit_scenes
from limbeck.data.vlm import VQACollator, VQADataset
from limbeck.errors import BadInput
from limbeck.models.tiny.digit_vlm import SIZES, WORDS, build

NAMES = sorted(SIZES)


def test_the_vocabulary_is_exactly_the_words_of_the_task():
    records = [record for layout in LAYOUTS for record in digit_scenes("train", 2000, questions=6, layout=layout)]
    text = " ".join(part for record in records for turn in record.turns for part in turn)
    assert set(re.findall(r"\w+|\?", text)) == set(WORDS)


def test_student_and_teacher_share_words_and_visual_width():
    teacher, teacher_processor = build("digit-vlm-teacher")
    student, student_processor = build("digit-vlm-student")
    assert teacher_processor.tokenizer.get_vocab() == student_processor.tokenizer.get_vocab()
    widths = [model.model.multi_modal_projector.linear_1.in_features for model in (teacher, student)]
    assert widths[0] == widths[1]
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters()) / 1.7


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_offline_and_computes_the_same(name, tmp_path):
    model, processor = build(name, seed=3)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded_processor) is type(processor)

    records = digit_scenes("val", 4)
    batches = [
        VQACollator(reader)([VQADataset(records, reader)[k] for k in range(4)])["student"]
        for reader in (processor, loaded_processor)
    ]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    torch.testing.assert_close(batches[0]["pixel_values"], batches[1]["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batches[1]).logits, model(**batches[0]).logits)


def test_a_picture_becomes_one_token_a_patch():
    for patch_size, tokens in ((8, 4), (4, 16), (2, 64)):
        model, processor = build("digit-vlm-student", patch_size=patch_size)
        sample = VQADataset(digit_scenes("val", 1), processor)[0]["student"]
        assert (sample["input_ids"] == processor.image_token_id).sum() == tokens
        pictures = model.get_image_features(sample["pixel_values"]).pooler_output
        assert pictures[0].shape == (tokens, model.config.text_config.hidden_size)


def test_weights_depend_on_the_seed_alone_and_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, other = build("digit-vlm-student", seed=1)[0], build("digit-vlm-student", seed=2)[0]
    assert torch.equal(torch.rand(3), expected)
    again = build("digit-vlm-student", seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_model_learns_to_say_what_it_is_shown_and_then_stops():
    model, processor = build("digit-vlm-student", seed=0)
    records = digit_scenes("train", 8)
    dataset = VQADataset(records, processor)
    batch = VQACollator(processor)([dataset[k] for k in range(len(records))])["student"]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    model.eval()
    for record in records:
        prompt = dataset.encoders["student"].prompt(record, record.images)
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(written) == f"{record.turns[0][1]} <end>"


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("digit-vlm-teachr", {}, "did you mean 'digit-vlm-teacher'"),
        ("digit-vlm-student", {"text_widht": 32}, "did you mean 'text_width'"),
        ("digit-vlm-student", {"text_width": 36}, "multiple of 8"),
        ("digit-vlm-student", {"patch_size": 5}, "divide the picture's 16 pixels"),
        ("digit-vlm-student", {"heads": 0}, "heads is 0; expected a whole number above 0"),
        ("digit-vlm-student", {"text_layers": "2"}, "text_layers is '2'; expected a whole number above 0"),
    ],
)
def test_wrong_names_and_sizes_are_refused_in_one_line(name, sizes, message):
    with pytest.raises(BadInput, match=message) as raised:
        build(name, **sizes)
    assert "\n" not in str(raised.value)
