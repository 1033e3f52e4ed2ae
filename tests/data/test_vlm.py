"""Encoding and collation: what is supervised, what is paired, and what the model then sees."""

from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from limbeck.data.embedded.digit_scenes import digit_scenes
from limbeck.data.records import VQARecord
from limbeck.data.vlm import IGNORE, ConversationEncoder, VQACollator, VQADataset, same_processing
from limbeck.errors import BadInput
from limbeck.models.tiny.digit_vlm import build, build_processor
from tests.data.processors import idefics3, llava_next, paligemma, qwen2_vl, qwen2_vl_model

OTHER_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>is the digit right?<user>{% endif %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<end>\n{% else %}<assistant> {% endif %}{% endfor %}"
)

FAMILIES = [build_processor, qwen2_vl, llava_next, idefics3]


def picture(width: int = 16, height: int = 16, shade: int = 0) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).point(lambda value: (value + shade) % 256).convert("RGB")


def record(name: str = "a", images: int = 1, turns: int = 1, answer: str = "7") -> VQARecord:
    asked = tuple((f"which digit is top {'left' if k % 2 else 'right'}?", answer) for k in range(turns))
    return VQARecord(name, tuple(picture(shade=40 * k) for k in range(images)), asked)


def messages(one: VQARecord) -> list[dict]:
    """A record as a chat, in transformers' words."""
    said = []
    for turn, (question, answer) in enumerate(one.turns):
        pictures = [{"type": "image"} for _ in one.images] if turn == 0 else []
        said.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return said


def words(processor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("turns", [1, 4])
def test_the_tokens_are_those_of_the_whole_chat_at_once(make, turns):
    processor, one = make(), record(images=2, turns=turns)
    whole = processor(images=[list(one.images)], text=[processor.apply_chat_template(messages(one))], return_tensors="pt")
    sample = VQADataset([one], processor)[0]["student"]
    assert sample["input_ids"].tolist() == whole["input_ids"][0].tolist()
    for key in whole.keys() - {"input_ids"}:
        expected = whole[key][0] if whole[key].shape == whole["input_ids"].shape else whole[key]
        assert torch.equal(sample[key], expected), key


@pytest.mark.parametrize("make", FAMILIES)
def test_what_is_generated_from_is_the_chat_up_to_the_answer(make):
    processor, one = make(), record()
    rendered = processor.apply_chat_template(messages(one)[:1], add_generation_prompt=True)
    expected = processor(images=[list(one.images)], text=[rendered], return_tensors="pt")
    prompt = ConversationEncoder(processor).prompt(one, one.images)
    assert prompt.keys() == expected.keys()
    assert all(torch.equal(prompt[key], expected[key]) for key in expected)


def test_exactly_the_answers_and_their_ends_are_supervised():
    processor = build_processor()
    for one in digit_scenes("train", 50, questions=5):
        sample = VQADataset([one], processor)[0]["student"]
        supervised = sample["labels"] != IGNORE
        assert torch.equal(sample["labels"][supervised], sample["input_ids"][supervised])
        expected = [word for _, answer in one.turns for word in (*answer.split(), "<end>")]
        assert words(processor, sample["labels"][supervised]) == expected
        starts = supervised & ~supervised.roll(1)
        assert words(processor, sample["input_ids"][starts.roll(-1)]) == ["<assistant>"] * 5


@pytest.mark.parametrize("turns", [1, 3])
def test_student_and_teacher_are_paired_token_by_token_across_templates_and_patch_sizes(turns):
    student, teacher = build_processor(patch_size=4), build_processor(patch_size=2)
    teacher.chat_template = OTHER_TEMPLATE
    sample = VQADataset([record(turns=turns, answer="3 5 yes")], student, teacher)[0]
    ids = {side: sample[side]["labels"][sample[side]["labels"] != IGNORE].tolist() for side in ("student", "teacher")}
    assert ids["student"] == ids["teacher"]
    assert len(ids["student"]) == 4 * turns
    assert (sample["student"]["input_ids"] == student.image_token_id).sum() == 16
    assert (sample["teacher"]["input_ids"] == teacher.image_token_id).sum() == 64
    assert words(teacher, sample["teacher"]["input_ids"])[0:7] == ["<user>", "is", "the", "digit", "right", "?", "<user>"]


def test_another_end_of_turn_is_refused_by_name_and_token():
    student, teacher = build_processor(), build_processor()
    teacher.chat_template = teacher.chat_template.replace("<end>", "<user>")
    with pytest.raises(BadInput, match=r"record 'a': answer token 2 is '<end>' for the student, '<user>' for the teacher"):
        VQADataset([record()], student, teacher)


def test_another_number_of_answer_tokens_is_refused():
    student, teacher = build_processor(), build_processor()
    teacher.chat_template = teacher.chat_template.replace("<end>", "<end><end>")
    with pytest.raises(BadInput, match="2 tokens for the student, 3 for the teacher"):
        VQADataset([record()], student, teacher)


def test_a_teacher_that_reads_the_same_costs_nothing():
    student, teacher = build("digit-vlm-student")[1], build("digit-vlm-teacher")[1]
    assert same_processing(student, teacher)
    dataset = VQADataset([record()], student, teacher)
    assert dataset[0].keys() == {"id", "kind", "student"}
    assert VQACollator(student, teacher)([dataset[0]]).keys() == {"ids", "kinds", "student"}


def test_processors_differ_by_template_pixels_tokens_or_words():
    one = build_processor()
    template, pixels, vocabulary = build_processor(), build_processor(), build_processor()
    template.chat_template = OTHER_TEMPLATE
    pixels.image_processor.image_mean = [0.5] * 3
    vocabulary.tokenizer.add_tokens(["more"])
    for other in (template, pixels, vocabulary, build_processor(patch_size=2), qwen2_vl()):
        assert not same_processing(one, other)


def test_a_processor_without_template_asks_plainly_and_ends_in_eos():
    processor = build_processor()
    processor.chat_template = None
    sample = VQADataset([record(turns=2)], processor)[0]["student"]
    assert words(processor, sample["input_ids"])[16:] == (
        ["which", "digit", "is", "top", "right", "?", "7", "<end>", "which", "digit", "is", "top", "left", "?", "7", "<end>"]
    )
    assert words(processor, sample["labels"][sample["labels"] != IGNORE]) == ["7", "<end>"] * 2


def test_an_answer_that_nothing_would_end_is_refused():
    processor = build_processor()
    processor.chat_template = None
    processor.tokenizer.eos_token = None
    with pytest.raises(BadInput, match="nothing ends an answer"):
        VQADataset([record()], processor)


@pytest.mark.parametrize("in_template", [True, False])
def test_a_sequence_begins_once(in_template):
    processor = build_processor()
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<unk>"
    single = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", tokenizer.unk_token_id)])
    tokenizer.backend_tokenizer.post_processor = single
    if in_template:
        processor.chat_template = "<unk>" + processor.chat_template
    sample = VQADataset([record(turns=3)], processor)[0]["student"]
    assert words(processor, sample["input_ids"])[:2] == ["<unk>", "<user>"]
    assert (sample["input_ids"] == tokenizer.unk_token_id).sum() == 1


def test_a_template_that_drops_turns_is_refused():
    processor = build_processor()
    processor.chat_template = processor.chat_template.replace("in messages", "in messages[-2:]")
    with pytest.raises(BadInput, match="drops or reorders turns"):
        VQADataset([record(turns=2)], processor)


def test_batches_hold_the_samples_padded_on_the_right():
    student, teacher = build_processor(4), build_processor(2)
    dataset = VQADataset([record("a", turns=1), record("b", turns=3), record("c", images=0)], student, teacher)
    batch = VQACollator(student, teacher)([dataset[k] for k in range(3)])
    assert batch["ids"] == ["a", "b", "c"]
    for side in ("student", "teacher"):
        joined = batch[side]
        for row in range(3):
            sample = dataset[row][side]
            length = len(sample["input_ids"])
            for key, filler in (("input_ids", student.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", IGNORE)):
                assert torch.equal(joined[key][row, :length], sample[key])
                assert (joined[key][row, length:] == filler).all()
        assert torch.equal(joined["pixel_values"], torch.cat([dataset[row][side]["pixel_values"] for row in (0, 1)]))


def test_a_batch_is_to_a_model_what_its_samples_are():
    processor = qwen2_vl()
    torch.manual_seed(0)
    model = qwen2_vl_model(processor)
    records = [
        record("one", turns=2),
        VQARecord("two", (picture(32, 16), picture(24, 40, 90)), (("which digit is the largest?", "9"),)),
        record("none", images=0),
    ]
    dataset, collate = VQADataset(records, processor), VQACollator(processor)
    batch = collate([dataset[k] for k in range(3)])["student"]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8], [1, 10, 6]]
    with torch.no_grad():
        together = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        for row in range(3):
            sample = collate([dataset[row]])["student"]
            alone = model(**{key: value for key, value in sample.items() if key != "labels"}).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llava_next, idefics3])
def test_crops_that_differ_in_number_are_zero_padded(make):
    processor = make()
    records = [VQARecord(str(size), (picture(*size),), (("what?", "9"),)) for size in ((16, 16), (30, 30), (64, 16))]
    dataset = VQADataset(records, processor)
    each = [dataset[k]["student"]["pixel_values"] for k in range(3)]  # [1, crops, 3, 16, 16]
    joined = VQACollator(processor)([dataset[k] for k in range(3)])["student"]["pixel_values"]
    assert len({pixels.shape[1] for pixels in each}) > 1
    for row, pixels in enumerate(each):
        assert torch.equal(joined[row, : pixels.shape[1]], pixels[0])
        assert not joined[row, pixels.shape[1] :].any()


def test_the_prompt_of_paligemma_cannot_see_its_answers():
    sample = VQADataset([record(turns=2)], paligemma())[0]["student"]
    first_answer = (sample["labels"] != IGNORE).nonzero()[0]
    assert not sample["token_type_ids"][:first_answer].any()  # 0: a prefix that sees itself in both directions
    assert (sample["token_type_ids"][first_answer:] == 1).all()


def test_what_only_some_samples_have_is_zero_for_the_others():
    with_types = {"input_ids": torch.arange(3), "token_type_ids": torch.ones(3, dtype=torch.long), "labels": torch.arange(3)}
    without = {"input_ids": torch.arange(2), "labels": torch.arange(2)}
    samples = [{"id": "", "kind": "", "student": side} for side in (without, with_types)]
    assert VQACollator(build_processor())(samples)["student"]["token_type_ids"].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_record_longer_than_the_context_is_found_before_training():
    processor = build_processor()
    records = [record(f"short-{k}") for k in range(100)] + [record("long", answer="7 " * 40)]
    with pytest.raises(BadInput, match=r"record 'long' is 65 tokens long for the student \(41 of them answer\).* context of 50"):
        VQADataset(records, processor, max_length=50)
    assert len(VQADataset(records, processor, max_length=65)) == 101
    processor.tokenizer.model_max_length = 50
    with pytest.raises(BadInput, match="context of 50"):
        VQADataset(records, processor)


def test_a_picture_too_long_for_the_context_is_refused_when_it_is_reached():
    small = [record(f"small-{k}") for k in range(20)]
    dataset = VQADataset([*small, VQARecord("wide", (picture(64, 64),), (("what?", "9"),))], qwen2_vl(), max_length=30)
    assert len(dataset[0]["student"]["input_ids"]) < 30
    with pytest.raises(BadInput, match="record 'wide' is 72 tokens long"):
        dataset[20]


def test_a_picture_that_cannot_be_read_names_the_record():
    with pytest.raises(BadInput, match=r"record 'x' cannot be encoded: .*identify") as raised:
        VQADataset([VQARecord("x", (b"no picture",), (("what?", "9"),))], build_processor())
    assert "\n" not in str(raised.value)


def test_no_records_are_refused():
    with pytest.raises(BadInput, match="no records"):
        VQADataset([], build_processor())


@pytest.mark.parametrize("cache", [False, True])
def test_encoding_is_repeatable_and_survives_worker_processes(cache):
    processor = build_processor()
    dataset = VQADataset(digit_scenes("train", 6, questions=2), processor, cache=cache)
    here = VQACollator(processor)([dataset[k] for k in range(6)])
    (there,) = DataLoader(pickle.loads(pickle.dumps(dataset)), 6, collate_fn=VQACollator(processor), num_workers=1)
    assert here["ids"] == there["ids"]
    for key, value in here["student"].items():
        assert torch.equal(value, there["student"][key])
    assert (dataset[0] is dataset[0]) is cache
