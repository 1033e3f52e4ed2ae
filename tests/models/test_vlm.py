"""The view over vision-language models, on a small real model of every family."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.models.vlm import VLM, check_visual, check_vocabulary
from tests.models.families import FAMILIES, IMAGE, PAD, build


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class Tokenizer:
    def __init__(self, **vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __len__(self) -> int:
        return len(self.vocabulary)


def hooks(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    return {
        path: (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for path, module in model.named_modules()
    }


def vision_calls(vlm: VLM) -> list[str]:
    """Grows by a name whenever a module with weights runs between the patch embedding and the projector."""
    calls: list[str] = []
    for path, module in vlm.model.named_modules():
        leaf = not list(module.children()) and list(module.parameters())
        if leaf and vlm.part_of(f"{path}.") == "vision" and not any(word in path for word in ("patch_embed", "pos_embed")):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    return calls


@torch.no_grad()
def test_read_and_head_are_the_ordinary_forward(name: str) -> None:
    model, inputs = build(name)
    expected = model(**inputs).logits  # also lets transformers install its own lasting hooks
    vlm, before, given = VLM(model), hooks(model), dict(inputs)
    widths = vlm.visual_widths
    reading = vlm.read({**inputs, "ids": ["a", "b"]})
    assert torch.equal(vlm.head(reading.hidden), expected)
    torch.testing.assert_close(vlm.head(reading.hidden[0, 2]), expected[0, 2], rtol=1e-5, atol=1e-5)  # one row: another kernel
    assert vlm.family == model.config.model_type
    assert vlm.vocab_size == expected.shape[-1]
    assert widths == tuple(level.shape[-1] for level in reading.visual)  # the config told what was then measured
    assert len(widths) == (2 if name == "qwen3_vl" else 1)
    assert hooks(model) == before
    assert inputs.keys() == given.keys()
    assert all(inputs[key] is given[key] for key in given)


@torch.no_grad()
def test_see_is_what_read_saw_and_the_language_model_does_not_run(name: str) -> None:
    model, inputs = build(name)
    vlm = VLM(model)
    expected = vlm.read(inputs).visual
    head = next(
        path
        for path, module in model.named_modules()
        if path.endswith(("language_model.norm", "text_model.norm", "embedding_norm"))
    )
    model.get_submodule(head).register_forward_hook(lambda *_: pytest.fail("the language model ran"))
    seen = vlm.see(inputs)
    assert all(map(torch.equal, seen, expected))


@torch.no_grad()
def test_project_gives_what_stands_at_the_placeholders(name: str) -> None:
    """Embedding the words and putting the projected features at the placeholders gives the language model's input."""
    model, inputs = build(name)
    vlm = VLM(model)
    reading = vlm.read(inputs)
    features = vlm.project(reading.visual, inputs, reading.replay)
    assert len(features) == (inputs["input_ids"] == IMAGE).sum()
    received: list[Tensor] = []
    language = model.model.get_submodule(vlm._language)
    language.register_forward_pre_hook(lambda _m, _a, kwargs: received.append(kwargs["inputs_embeds"]), with_kwargs=True)
    model(**inputs)
    embedded = vlm.embed(inputs["input_ids"])
    embedded[inputs["input_ids"] == IMAGE] = features
    assert torch.equal(embedded, received[0])


@torch.no_grad()
def test_own_visual_replayed_changes_nothing_and_the_vision_part_rests(name: str) -> None:
    model, inputs = build(name)
    vlm = VLM(model)
    reading = vlm.read(inputs)
    calls = vision_calls(vlm)
    again = vlm.read(inputs, visual=reading.visual, replay=reading.replay)
    replayed = vlm.read(inputs, replay=again.replay)  # a replay can be replayed, and knows its visual
    assert calls == []
    assert torch.equal(again.hidden, reading.hidden)
    assert torch.equal(replayed.hidden, reading.hidden)
    assert torch.equal(vlm.speak(inputs, reading.visual), reading.hidden)  # without a replay, the vision part runs
    assert calls


def test_the_visual_switch_is_the_hybrid_model(name: str) -> None:
    """Teacher fed with the student's visual features == teacher with the student's vision weights, in value and gradient."""
    teacher, inputs = build(name)
    student, _ = build(name, seed=1)
    hybrid = copy.deepcopy(teacher)
    ours, theirs = VLM(student), VLM(teacher.requires_grad_(False))
    swapped = {key: value for key, value in student.state_dict().items() if ours.part_of(key) == "vision"}
    assert hybrid.load_state_dict(swapped, strict=False).unexpected_keys == []

    own = theirs.read(inputs)
    visual = ours.see(inputs)
    switched = theirs.head(theirs.read(inputs, visual=visual, replay=own.replay).hidden)
    expected = hybrid(**inputs).logits
    assert torch.equal(switched, expected)
    words = inputs["labels"] >= 0
    assert (switched - theirs.head(own.hidden))[words].abs().max() > 1e-2

    switched[words].float().logsumexp(-1).sum().backward()
    expected[words].float().logsumexp(-1).sum().backward()
    reached = {path for path, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached
    assert {ours.part_of(path) for path in reached} == {"vision"}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for path in reached:
        torch.testing.assert_close(student.get_parameter(path).grad, hybrid.get_parameter(path).grad, rtol=1e-5, atol=1e-6)


def test_parts_are_a_partition(name: str) -> None:
    model, _ = build(name)
    parts = VLM(model).parts()
    for path, _ in model.named_parameters():
        homes = [part for part, prefixes in parts.items() for prefix in prefixes if f"{path}.".startswith(f"{prefix}.")]
        assert homes == [VLM(model).part_of(path)]
    assert all(parts.values())
    assert "lm_head" in parts["language"]


@torch.no_grad()
def test_a_batch_without_images(name: str) -> None:
    model, inputs = build(name)
    vlm = VLM(model)
    text = {
        "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 5),
        "attention_mask": inputs["attention_mask"],
    }
    reading = vlm.read(text)
    assert reading.visual is None
    assert reading.replay is None
    assert torch.equal(vlm.head(reading.hidden), model(**text).logits)
    with pytest.raises(BadInput, match="no image among the inputs attention_mask, input_ids"):
        vlm.see(text)
    with pytest.raises(BadInput, match="takes nothing, for the batch holds no image"):
        vlm.read(text, visual=vlm.see(inputs))


@torch.no_grad()
def test_a_visual_that_does_not_fit_names_both_sizes(name: str) -> None:
    model, inputs = build(name)
    vlm = VLM(model)
    reading = vlm.read(inputs)
    before = hooks(model)
    level = reading.visual[-1]
    takes = r".* takes .*\[.*\], the visual given is \[.*\]: use a bridge"
    for wrong in (level[..., :-1], torch.cat([level, level], dim=-2), level[..., :-1, :]):
        for replay in (None, reading.replay):
            with pytest.raises(BadInput, match=takes):
                vlm.read(inputs, visual=(*reading.visual[:-1], wrong), replay=replay)
    with pytest.raises(BadInput, match=f"takes {len(reading.visual)} tensor.*given {len(reading.visual) + 1}"):
        vlm.read(inputs, visual=(*reading.visual, level))
    assert hooks(model) == before


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "lfm2_vl"])
def test_under_autocast_and_in_another_dtype(family: str) -> None:
    model, inputs = build(family)
    vlm = VLM(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reading = vlm.read(inputs)
        assert torch.equal(vlm.read(inputs, visual=reading.visual, replay=reading.replay).hidden, reading.hidden)
        assert torch.equal(vlm.head(reading.hidden), model(**inputs).logits)
    exact = vlm.read(inputs).visual
    half = VLM(model.to(torch.bfloat16))
    own = half.read(inputs)
    assert half.read(inputs, visual=exact, replay=own.replay).visual[0].dtype == torch.bfloat16  # cast to what it stands in for


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    """Both routes in one step: the student's own reading, and the frozen teacher fed with its visual features."""
    results = []
    for checkpointed in (False, True):
        teacher, inputs = build(family)
        student, _ = build(family, seed=1)
        student.train()
        if checkpointed:
            student.gradient_checkpointing_enable()
        ours, theirs = VLM(student), VLM(teacher.requires_grad_(False))
        replay = theirs.read(inputs).replay
        reading = ours.read(inputs)
        switched = theirs.read(inputs, visual=reading.visual, replay=replay)
        (ours.head(reading.hidden).logsumexp(-1).mean() + theirs.head(switched.hidden).logsumexp(-1).mean()).backward()
        results.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


class TestHead:
    def test_in_numbers(self) -> None:
        for family in ("llava", "paligemma"):
            model, inputs = build(family)
            vlm = VLM(model)
            head = vlm.head_spec()
            hidden = vlm.read(inputs).hidden
            logits = head.scale * nn.functional.linear(hidden, head.weight, head.bias)
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            torch.testing.assert_close(logits, vlm.head(hidden), rtol=1e-5, atol=1e-5)
            bent = family == "paligemma" and logits.abs().max() < 3.0  # transformers 5.10 does not bend them
            assert head.softcap == (3.0 if bent else None)

    def test_a_softcap_in_the_config_that_the_family_does_not_apply_is_not_believed(self) -> None:
        model, inputs = build("gemma3", text={"final_logit_softcapping": 3.0})
        vlm = VLM(model)
        assert vlm.head_spec().softcap is None
        assert torch.equal(vlm.head(vlm.read(inputs).hidden), model(**inputs).logits)

    def test_a_head_that_is_not_linear_is_refused(self) -> None:
        model, _ = build("llava")
        model.lm_head.register_forward_hook(lambda _m, _a, logits: logits.relu())
        with pytest.raises(BadInput, match="head of llava is not linear"):
            VLM(model).head_spec()


class TestRefusals:
    def test_a_text_only_model(self) -> None:
        config = transformers.Qwen2Config(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=50
        )
        with pytest.raises(BadInput, match=r"^qwen2 \(Qwen2ForCausalLM\) cannot .* no vision module and no projector"):
            VLM(transformers.Qwen2ForCausalLM(config))

    def test_a_family_with_a_visual_vocabulary(self) -> None:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
        text = {
            "model_type": "qwen2",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = transformers.Ovis2Config(
            vision_config={**vision, "image_size": 8, "patch_size": 4},
            text_config={**text, "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": PAD},
            hidden_size=16,
            vocab_size=50,
        )
        with pytest.raises(BadInput, match=r"^ovis2 .* it has no projector"):
            VLM(transformers.Ovis2ForConditionalGeneration(config))

    def test_no_transformers_model_at_all(self) -> None:
        with pytest.raises(
            BadInput, match=r"^Linear .* no vision module and no projector and no decoder-only language model and no head"
        ):
            VLM(nn.Linear(2, 2))


class TestVocabulary:
    def vlm(self, size: int, tokenizer: Tokenizer | None = None) -> VLM:
        return VLM(build("llava", vocabulary=size)[0], tokenizer)

    def test_one_size(self) -> None:
        assert check_vocabulary(self.vlm(100), self.vlm(100)) == 100
        assert check_vocabulary(self.vlm(100, Tokenizer(a=0, b=1)), self.vlm(100, Tokenizer(b=1, a=0))) == 100

    def test_one_size_but_other_strings(self) -> None:
        with pytest.raises(BadInput, match="token 'a' is 0 in one, 1 in the other"):
            check_vocabulary(self.vlm(100, Tokenizer(a=0, b=1)), self.vlm(100, Tokenizer(a=1, b=0)))
        with pytest.raises(BadInput, match="token 'c' is None in one, 2 in the other"):
            check_vocabulary(self.vlm(100, Tokenizer(a=0)), self.vlm(100, Tokenizer(a=0, c=2)))

    def test_padding_only(self) -> None:
        assert check_vocabulary(self.vlm(104, Tokenizer(a=0, b=1)), self.vlm(100, Tokenizer(a=0, b=1))) == 100

    def test_more_than_padding(self) -> None:
        words = {f"w{index}": index for index in range(102)}
        with pytest.raises(BadInput, match="student llava has 104 token ids, teacher llava 100, but their tokenizer uses 102"):
            check_vocabulary(self.vlm(104, Tokenizer(**words)), self.vlm(100, Tokenizer(**words)))

    def test_other_sizes_without_tokenizers(self) -> None:
        with pytest.raises(BadInput, match="104 token ids, teacher llava 100: without both tokenizers"):
            check_vocabulary(self.vlm(104), self.vlm(100, Tokenizer(a=0)))


def test_check_visual() -> None:
    wide, narrow = VLM(build("llava", vision_width=48)[0]), VLM(build("llava", vision_width=32)[0])
    deep = VLM(build("qwen3_vl")[0])
    assert check_visual(wide, wide) is None
    with pytest.raises(BadInput, match=r"student llava \[48\], teacher llava \[32\]; set `bridge: linear`"):
        check_visual(wide, narrow)
    with pytest.raises(BadInput, match=r"student llava feeds its projector at 1 level\(s\), teacher qwen3_vl at 2"):
        check_visual(narrow, deep)
