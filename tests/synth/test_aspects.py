"""Questions from a chat endpoint, answers from a vision-language model, and what is left when either breaks off."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from PIL import Image

from limbeck.data.embedded.digit_scenes import digit_scenes
from limbeck.data.images import read_answers
from limbeck.errors import BadInput, LimbeckError
from limbeck.models.tiny import digit_vlm
from limbeck.models.vlm import VLM
from limbeck.synth import aspects
from limbeck.synth.aspects import (
    answer_questions,
    answer_token,
    parse_questions,
    read_questions,
    write_questions,
    yes_probability,
)
from limbeck.teachers.chat import Chat
from tests.synth.server import serving

pytest.importorskip("openai")

KEY = "sk-very-secret-0123456789"
CLASSES = ("cat", "dog", "bird")
ASKED = ["is there a 3 ?", "is the left digit the largest ?", "are there 2 digits ?"]
WORDS = {"yes": "yes", "no": "no", "demand": ""}


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM(*digit_vlm.build("digit-vlm-student", seed=3))


@pytest.fixture(scope="module")
def pictures() -> list:
    return [(record.id, record.images[0]) for record in digit_scenes("train", 7, seed=1)]


# Questions


def test_questions_are_written_and_chosen(key, caplog):
    caplog.set_level(logging.DEBUG)
    written = "Sure!\n1. Does it have wings?\n2) **Is it furry?**\n- Does it have wings ?\n\n* Is it indoors?\nI hope this helps."
    chosen = '```json\n["Is it indoors?", "is it furry", "Can it fly?", "Is it furry?"]\n```'
    with serving(written, chosen) as endpoint:
        chat = Chat("some-model", base_url=endpoint.url, key_variable="SOME_KEY", temperature=0.0)
        found = write_questions(chat, CLASSES, 60, candidates=5, select=2)
    assert found == ["Is it indoors?", "Is it furry?"]  # what it made up while choosing does not count
    (path, headers, first), (_, _, second) = endpoint.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (first["model"], first["temperature"]) == ("some-model", 0.0)
    prompt = first["messages"][0]["content"]
    assert all(part in prompt for part in ("cat, dog, bird", "60 pictures", "3 classes", "Write 5 questions"))
    assert "Does it have wings?\nIs it furry?\nIs it indoors?" in second["messages"][0]["content"]
    assert "Choose the 2" in second["messages"][0]["content"]
    assert KEY not in repr(chat)
    assert KEY not in caplog.text


def test_few_candidates_are_all_chosen():
    with serving("Is it red?\nIs it big?") as endpoint:
        chat = Chat("m", base_url=endpoint.url, key_variable="NOT_SET_ANYWHERE")
        assert write_questions(chat, CLASSES, 9, candidates=10, select=2) == ["Is it red?", "Is it big?"]
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Q1: Is it red?\n(2) Is it big? (Yes/No)", ["Is it red?", "Is it big?"]),
        ('{"questions": [{"question": "Is it red?"}, {"question": "IS IT  RED?"}]}', ["Is it red?"]),
        ("<think>Is it a trick?</think>\n> Has it 4 legs?", ["> Has it 4 legs?"]),
        ("10. Does the “7” have a bar?", ["Does the “7” have a bar?"]),
        ("3 legs or more?", ["3 legs or more?"]),
        ("Why?\nno questions here", []),
    ],
)
def test_parsing(text, found):
    assert parse_questions(text) == found


def test_what_a_chat_endpoint_can_do_wrong(key, monkeypatch):
    def ask(*replies: str | int, **options):
        with serving(*replies) as endpoint:
            chat = Chat("m", base_url=endpoint.url, key_variable="SOME_KEY", retries=0)
            return write_questions(chat, CLASSES, 9, **{"candidates": 4, "select": 1, **options})

    with pytest.raises(LimbeckError, match="AuthenticationError") as refused:
        ask(401)
    assert KEY not in str(refused.value) and "***" in str(refused.value)
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
    with pytest.raises(LimbeckError, match="wrote no question"):
        ask("I cannot do that.")
    with pytest.raises(LimbeckError, match="answered nothing"):
        ask("  ")
    with pytest.raises(LimbeckError, match="chose none of the 2"):
        ask("Is it red?\nIs it big?", "None of them.")
    with pytest.raises(BadInput, match="select is 5 of 4"):
        ask(select=5)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(BadInput, match="SOME_KEY holds no key"):
        Chat("m", key_variable="SOME_KEY")
    with pytest.raises(BadInput, match="at least two"):
        write_questions(Chat("m", base_url="http://127.0.0.1:9/v1"), ["cat"], 9)


def test_a_server_in_trouble_is_asked_again(key):
    with serving(503, "Is it red?") as endpoint:
        chat = Chat("m", base_url=endpoint.url, key_variable="SOME_KEY", retries=1)
        assert write_questions(chat, CLASSES, 9, candidates=1, select=1) == ["Is it red?"]
    assert len(endpoint.requests) == 2


def test_a_file_of_questions(tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("Is it red?\n\n  Is it big?\n")
    assert read_questions(file) == ["Is it red?", "Is it big?"]
    file.write_text("Is it red?\nIs it red?\n")
    with pytest.raises(BadInput, match="twice"):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(BadInput, match="no questions"):
        read_questions(file)
    with pytest.raises(BadInput, match="there is no file"):
        read_questions(tmp_path / "none.txt")


# Answers


def test_probability_of_yes():
    logits = torch.randn(6, 9, dtype=torch.bfloat16)
    p = yes_probability(logits, 2, 7)
    torch.testing.assert_close(p, logits[:, [2, 7]].float().softmax(-1)[:, 0])
    shifted = torch.randn(6, 9)
    torch.testing.assert_close(yes_probability(shifted + 3, 2, 7), yes_probability(shifted, 2, 7))
    shifted[:, 2] = shifted[:, 7]
    assert (yes_probability(shifted, 2, 7) == 0.5).all()


def test_answers_are_those_of_the_first_generated_token(vlm, pictures, tmp_path):
    out = tmp_path / "answers.json"
    seen = []
    answers = answer_questions(vlm, pictures, ASKED, out, batch_size=5, progress=lambda done, rate: seen.append(done), **WORDS)
    assert seen == list(range(1, 8))
    assert list(answers) == [name for name, _ in pictures]
    yes, no = (answer_token(vlm.processor.tokenizer, word) for word in ("yes", "no"))
    for name, image in pictures[:3]:
        for question, kept in zip(ASKED, answers[name], strict=True):
            text = f"<user><image>{question}<assistant>"
            inputs = vlm.processor(images=[image], text=[text], return_tensors="pt")
            generated = vlm.model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
            first = generated.logits[0][0]
            assert kept == pytest.approx((first[yes] - first[no]).sigmoid().item(), abs=1e-4)
    assert len({value for row in answers.values() for value in row}) > 3
    read = read_answers(str(out), answers)
    assert read.questions == tuple(ASKED)
    assert {name: list(row) for name, row in read.probabilities.items()} == answers
    assert [path.name for path in tmp_path.iterdir()] == ["answers.json"]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batches_do_not_change_answers(vlm, pictures, tmp_path, batch_size):
    few = pictures[:3]
    whole = answer_questions(vlm, few, [*ASKED, "what ?"], tmp_path / "a.json", batch_size=4, **WORDS)
    other = answer_questions(vlm, few, [*ASKED, "what ?"], tmp_path / "b.json", batch_size=batch_size, **WORDS)
    for name, row in whole.items():
        assert other[name] == pytest.approx(row, abs=2e-4)


def test_a_demand_stands_behind_every_question(vlm, pictures, tmp_path):
    one = pictures[:1]
    asked = answer_questions(vlm, one, ["is there a 3 ?"], tmp_path / "a.json", **{**WORDS, "demand": "yes or no ?"})
    spelled = answer_questions(vlm, one, ["is there a 3 ? yes or no ?"], tmp_path / "b.json", **WORDS)
    assert asked == spelled


def test_what_was_broken_off_goes_on(vlm, pictures, tmp_path, monkeypatch):
    whole = answer_questions(vlm, pictures, ASKED, tmp_path / "whole.json", batch_size=3, **WORDS)
    out, asked = tmp_path / "answers.json", []
    partial = tmp_path / "answers.json.partial.jsonl"
    own = aspects._asked

    def counted(encoder, name, *rest):
        asked.append(name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return own(encoder, name, *rest)

    monkeypatch.setattr(aspects, "_asked", counted)
    with pytest.raises(KeyboardInterrupt):
        answer_questions(vlm, pictures, ASKED, out, batch_size=3, **WORDS)
    assert not out.exists()
    assert len(partial.read_text().splitlines()) == 1 + 3
    with partial.open("a") as torn:
        torn.write('{"id": "digit-sc')  # a machine that lost its power
    with pytest.raises(BadInput, match="another model or to other questions"):
        answer_questions(vlm, pictures, ASKED[:2], out, **WORDS)
    with pytest.raises(BadInput, match="another model"):
        answer_questions(vlm, pictures, ASKED, out, made_by="another", **WORDS)
    assert answer_questions(vlm, pictures, ASKED, out, batch_size=3, **WORDS) == whole
    assert asked == [name for name, _ in pictures[:4]] + [name for name, _ in pictures[3:]]
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert not partial.exists()


def test_what_cannot_be_answered(vlm, pictures, tmp_path):
    out = tmp_path / "answers.json"
    with pytest.raises(BadInput, match="'Yes' is an unknown word"):
        answer_questions(vlm, pictures, ASKED, out)
    with pytest.raises(BadInput, match="'yes no' is 2 tokens"):
        answer_questions(vlm, pictures, ASKED, out, **{**WORDS, "no": "yes no"})
    with pytest.raises(BadInput, match="both 'yes'"):
        answer_questions(vlm, pictures, ASKED, out, **{**WORDS, "no": "yes"})
    with pytest.raises(BadInput, match="0 questions about 7 pictures"):
        answer_questions(vlm, pictures, [], out, **WORDS)
    with pytest.raises(BadInput, match="has no processor"):
        answer_questions(VLM(vlm.model), pictures, ASKED, out, **WORDS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="picture 'broken' cannot be read"):
        answer_questions(vlm, [("broken", b"no picture")], ASKED, out, **WORDS)
    with pytest.raises(BadInput, match="picture 'large' cannot be read"):
        answer_questions(vlm, [("large", lambda: Image.open(tmp_path / "missing.png"))], ASKED, tmp_path / "b.json", **WORDS)
    out.write_text("{}")
    with pytest.raises(BadInput, match="exists"):
        answer_questions(vlm, pictures, ASKED, out, **WORDS)
