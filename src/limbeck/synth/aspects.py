"""Questions about aspects that tell a dataset's classes apart, and a vision-language model's answers about every picture.

Multi-aspect Knowledge Distillation with Large Language Model, 2025, arXiv 2501.13341: a language model writes many yes/no questions and
chooses the best of them; a multimodal one answers each about every training picture, once, and how sure it is of "yes" is kept. The
method `makd` learns from these answers.

Differences: the authors' released script asks the bare question; their figure adds a demand to answer only Yes or No, and so does
`answer_questions`. Prompts are worded after the structure that they describe.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from limbeck.batch import supervised
from limbeck.data.records import ImageSource, VQARecord, open_image
from limbeck.data.vlm import ConversationEncoder, VQACollator
from limbeck.errors import BadInput, LimbeckError
from limbeck.models.vlm import VLM
from limbeck.teachers.chat import Chat

DEMAND = "Answer only Yes or No."
DIGITS = 4  # of a probability that is kept

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_BULLET = re.compile(r"^(?:[-*+•]|[(\[]?Q?\d+\s*[.):\]]+)\s*", re.IGNORECASE)


# Writing questions


def write_questions(chat: Chat, classes: Sequence[str], pictures: int, *, candidates: int = 100, select: int = 50) -> list[str]:
    """Have a language model write ``candidates`` yes/no questions and choose ``select`` of them.

    classes: their names; pictures: how many there are. Questions that say the same are kept once, so that there may be fewer.
    Raises `BadInput` for numbers or classes that leave nothing to ask, `LimbeckError` where the model writes or chooses no question.
    """
    if not 1 <= select <= candidates:
        raise BadInput(f"select is {select} of {candidates} candidates; expected at least 1 and at most all of them")
    if len(classes) < 2:
        raise BadInput(f"{len(classes)} class(es): questions that tell classes apart need at least two")
    written = parse_questions(chat.ask(writing_prompt(classes, pictures, candidates)))[:candidates]
    if not written:
        raise LimbeckError(f"{chat} wrote no question")
    if len(written) <= select:
        return written
    of_key = {_key(question): question for question in written}
    chosen = [
        of_key[key] for key in map(_key, parse_questions(chat.ask(choosing_prompt(classes, written, select)))) if key in of_key
    ]
    if not chosen:
        raise LimbeckError(f"{chat} chose none of the {len(written)} questions that it wrote")
    return chosen[:select]


def writing_prompt(classes: Sequence[str], pictures: int, count: int) -> str:
    """Asks for candidate questions."""
    return (
        f"A dataset has {pictures} pictures of {len(classes)} classes: {', '.join(classes)}.\n"
        f"Write {count} questions about a picture that can be answered by yes or no and whose answers help to tell these classes apart. "
        "Each question is about one clear and specific feature, distinct from those of the other questions. Cover what can be seen, "
        "what kind of thing it is, its surroundings, and abstract properties.\n"
        "Write one question on each line and nothing else."
    )


def choosing_prompt(classes: Sequence[str], questions: Sequence[str], count: int) -> str:
    """Asks for the best of the candidates."""
    listed = "\n".join(questions)
    return (
        f"These yes/no questions about a picture are to tell {len(classes)} classes apart: {', '.join(classes)}.\n\n{listed}\n\n"
        f"Choose the {count} questions that are most relevant, most distinct from one another and separate the classes best.\n"
        "Repeat the chosen questions word for word, one on each line and nothing else."
    )


def parse_questions(text: str) -> list[str]:
    """The questions in what a language model wrote: lines, numbered or not, or JSON; each once, in order."""
    text = _THOUGHT.sub("", text)
    fenced = _FENCED.search(text)
    body = fenced[1] if fenced else text
    try:
        lines = list(_strings(json.loads(body)))
    except ValueError:
        lines = body.splitlines()
    found: dict[str, str] = {}
    for line in lines:
        question = _cleaned(line)
        if len(question.split()) > 1:
            found.setdefault(_key(question), question)
    return list(found.values())


def read_questions(path: str | Path) -> list[str]:
    """The questions of a file, one a line; empty lines are left out. Raises `BadInput` for none, or for one that stands there twice."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInput(f"there is no file of questions {file}")
    questions = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not questions:
        raise BadInput(f"{file} holds no questions: expected one a line")
    twice = next((question for index, question in enumerate(questions) if question in questions[:index]), None)
    if twice is not None:
        raise BadInput(f"{file} asks {twice!r} twice")
    return questions


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _cleaned(line: str) -> str:
    """A line up to its last question mark, without number, bullet, quotation marks and emphasis; "" where it asks nothing."""
    line = line.replace("**", "").replace("`", "")
    line = _BULLET.sub("", line.strip()).lstrip("\"'“‘ ")
    return " ".join(line[: line.rfind("?") + 1].split())


def _key(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.casefold()))


# Answering them


def yes_probability(logits: Tensor, yes: int, no: int) -> Tensor:
    """P(yes) from the logits [..., V] of the first token of an answer: softmax over its two words, sigma(y - n), in float32. [...]"""
    return (logits[..., yes].float() - logits[..., no].float()).sigmoid()


def answer_token(tokenizer: Any, word: str) -> int:
    """The id of a word that is one token. Raises `BadInput` where it is not."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        known = "an unknown word" if ids == [tokenizer.unk_token_id] else f"{len(ids)} tokens"
        raise BadInput(
            f"the answer {word!r} is {known} for this model, and one token is compared: name the words that it answers with "
            "(--yes, --no), such as 'yes' or ' Yes'"
        )
    return int(ids[0])


def answer_questions(
    vlm: VLM,
    pictures: Sequence[tuple[str, ImageSource]],
    questions: Sequence[str],
    out: str | Path,
    *,
    yes: str = "Yes",
    no: str = "No",
    demand: str = DEMAND,
    batch_size: int = 16,
    made_by: str = "",
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, list[float]]:
    """Ask a vision-language model every question about every picture, and keep how sure it is of yes.

    pictures: (id, picture). yes, no: the words that it answers with, one token each. demand: put after each question. batch_size: pairs of
    picture and question that it reads at once. made_by: what the answers come from, such as the model's name; answers of something else are
    not continued. progress: called with the number of pictures that are done, and how many a second are.

    Writes {"questions": [...], "answers": {id: [Q]}} as JSON, which ``data.answers`` reads, and returns the answers. Pictures that are done
    stand in ``<out>.partial.jsonl`` meanwhile, so that a call that was broken off goes on where it was.
    Raises `BadInput` for no questions or pictures, words that are not one token, an output that exists, a partial one of other questions,
    and a picture that cannot be read.
    """
    out = Path(out)
    if vlm.processor is None:
        raise BadInput(f"{vlm!r} has no processor: nothing can be shown to it")
    if not questions or not pictures:
        raise BadInput(f"{len(questions)} questions about {len(pictures)} pictures: there is nothing to answer")
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}; expected at least 1")
    if out.exists():
        raise BadInput(f"{out} exists: choose another file, or delete it")
    encoder, collate = ConversationEncoder(vlm.processor), VQACollator(vlm.processor)
    tokens = answer_token(encoder.tokenizer, yes), answer_token(encoder.tokenizer, no)
    if tokens[0] == tokens[1]:
        raise BadInput(f"yes and no are both {yes!r} to this model")

    head = {"questions": list(questions), "yes": yes, "no": no, "demand": demand, "made_by": made_by}
    partial = out.with_name(f"{out.name}.partial.jsonl")
    done = _continued(partial, head)
    waiting = [picture for picture in pictures if picture[0] not in done]
    vlm.model.eval()
    began, together = time.perf_counter(), max(1, batch_size // len(questions))
    with partial.open("a", encoding="utf-8") as lines:
        for start in range(0, len(waiting), together):
            some = waiting[start : start + together]
            samples = [sample for name, image in some for sample in _asked(encoder, name, image, questions, demand, yes)]
            batches = (collate(samples[first : first + batch_size]) for first in range(0, len(samples), batch_size))
            answered = torch.cat([_probabilities(vlm, batch["student"], *tokens) for batch in batches]).view(len(some), -1)
            for (name, _), row in zip(some, answered.tolist(), strict=True):
                done[name] = [round(value, DIGITS) for value in row]
                lines.write(json.dumps({"id": name, "answers": done[name]}) + "\n")
            lines.flush()
            if progress is not None:
                progress(len(done), (start + len(some)) / (time.perf_counter() - began))
    answers = {name: done[name] for name, _ in pictures}
    whole = out.with_name(f"{out.name}.whole")
    whole.write_text(json.dumps({"questions": list(questions), "answers": answers}), encoding="utf-8")
    os.replace(whole, out)
    partial.unlink()
    return answers


def _asked(
    encoder: ConversationEncoder, name: str, image: ImageSource, questions: Sequence[str], demand: str, yes: str
) -> Iterator[dict[str, Any]]:
    """A sample for each question about one picture; that it is answered by yes only marks where the answer begins."""
    try:
        opened = open_image(image)
        for question in questions:
            record = VQARecord(name, (image,), ((f"{question} {demand}".strip(), yes),))
            yield {"id": name, "kind": "", "student": encoder(record, [opened])}
    except Exception as error:  # image decoders and processors raise all kinds
        raise BadInput(f"picture {name!r} cannot be read: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error


@torch.no_grad()
def _probabilities(vlm: VLM, inputs: Mapping[str, Any], yes: int, no: int) -> Tensor:
    """P(yes) [B] where each sample's answer begins."""
    inputs = send_to_device(dict(inputs), next(vlm.model.parameters()).device)
    rows, columns = supervised(inputs)[0]
    first = torch.cat([rows.new_ones(1, dtype=torch.bool), rows[1:] != rows[:-1]])  # of each row's positions, in reading order
    hidden = vlm.read(inputs).hidden[rows[first], columns[first]]  # [B, D]
    return yes_probability(vlm.head(hidden), yes, no).cpu()


def _continued(partial: Path, head: Mapping[str, Any]) -> dict[str, list[float]]:
    """What a partial file holds already; begins one where there is none. A line that was broken off is cut away."""
    if not partial.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return {}
    text = partial.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    try:
        first, *rows = [json.loads(line) for line in whole.splitlines()] or [None]
        done = {row["id"]: row["answers"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{partial} is damaged ({type(error).__name__}: {error}): delete it to begin anew") from error
    if first != head:
        raise BadInput(f"{partial} holds answers of another model or to other questions: delete it, or choose another output")
    if whole != text:
        partial.write_text(whole, encoding="utf-8")
    return done
