"""Records as training samples for vision-language models: prompt, pictures, and labels on the answers alone.

A sample may be encoded twice, for a student and for a teacher whose processor differs (other chat template, other number of image
tokens). Only the prompt up to the first answer goes through the processor, so that each family expands its own image tokens; answers
and later turns carry no image and are tokenised on their own and appended. So the supervised tokens are the same on both sides, and
the k-th supervised token of the student is paired with the k-th of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from limbeck.batch import predicting
from limbeck.data.records import VQARecord, open_image, read_header
from limbeck.errors import BadInput

IGNORE = -100  # the label of every token that is not an answer's

# What token_type_ids hold at appended tokens. PaliGemma's prefix (0) sees itself in both directions: an answer marked 0 would be
# seen by the words that are to predict it.
_APPENDED_TYPE = {"PaliGemmaProcessor": 1}
_LENGTHS_CHECKED = 16  # samples, the longest by far cheaper measure than encoding all of them
_IMAGE_AS_CHARACTERS = 2400  # in that measure: about 600 tokens
_IMAGE_AS_TOKENS = 600  # where a processor does not say
_WEIGHED = 256  # records whose text is tokenised to learn how many tokens a byte is
_PROBED_SIZES = [(16, 16), (64, 64), (512, 2048), (1024, 256), (1024, 1024)]  # do heights and widths change the number of tokens?
_HEADER_READERS = 8  # threads
_MEMO_SIZE = 16_384  # short texts and their token ids, in each encoder


@dataclass(frozen=True)
class _Turns:
    """A conversation's fixed text: what stands before and after each question, and what closes each answer."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    closing: str


class ConversationEncoder:
    """Turns records into one family's model inputs by its own processor and chat template.

    processor: a transformers processor with a ``tokenizer``. Without a chat template the prompt is ``<image>``, a line break, the
        question and a line break, and the answer ends in the end-of-sequence token.

    Raises `BadInput` where an answer would have no end: the template closes it by nothing and the tokenizer has no ``eos_token``.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._turns: dict[tuple[int, int], _Turns] = {}
        self._memo: dict[str, list[int]] = {}
        closing = self._layout(1, 1).closing
        if not closing and self.tokenizer.eos_token_id is None:
            raise BadInput(
                f"{type(processor).__name__}: nothing ends an answer; give it a chat template that closes the assistant's turn, "
                "or a tokenizer with an eos_token"
            )
        self.closing_ids = self._tokenise(closing) if closing else [self.tokenizer.eos_token_id]

    def prompt(self, record: VQARecord, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the processor makes of everything up to the first answer; also what to generate from.

        Returns its tensors with the leading batch dimension of 1: ``input_ids`` [1, T], ``attention_mask`` [1, T],
        ``pixel_values`` and whatever else the family needs.
        """
        layout = self._layout(len(images), len(record.turns))
        # A space before the answer is dropped: generation prompts end without it, and sentencepiece words carry their own.
        text = (layout.before[0] + record.turns[0][0].strip() + layout.after[0]).rstrip(" ")
        bos = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        encoded = self.processor(images=[list(images)] if images else None, text=[text], return_tensors="pt", **options)
        return {key: value for key, value in encoded.items() if key != "labels"}

    def __call__(self, record: VQARecord, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """One sample: ``input_ids``, ``attention_mask``, ``labels`` [T], other tensors as the family's processor gives them.

        ``labels`` holds the tokens of the answers and what closes each of them, `IGNORE` elsewhere.
        """
        encoded = self.prompt(record, images)
        prompt_ids = encoded["input_ids"]  # [1, T0]
        layout = self._layout(len(images), len(record.turns))

        ids: list[int] = []
        labels: list[int] = []
        for turn, (question, answer) in enumerate(record.turns):
            if turn:
                # The text before a later question begins with the closing of the answer before it, which stands there already.
                text = layout.before[turn].removeprefix(layout.closing) + question.strip() + layout.after[turn]
                asked = self._tokenise(text.rstrip(" "))
                ids += asked
                labels += [IGNORE] * len(asked)
            answered = self._tokenise(answer.strip()) + self.closing_ids
            ids += answered
            labels += answered

        fill = _APPENDED_TYPE.get(type(self.processor).__name__, 0)
        sample = {}
        for key, value in encoded.items():
            appended = {"input_ids": ids, "attention_mask": [1] * len(ids)}.get(key, [fill] * len(ids))
            is_sequence = value.shape == prompt_ids.shape
            sample[key] = torch.cat([value[0], value.new_tensor(appended)]) if is_sequence else value
        sample["labels"] = torch.cat([torch.full_like(prompt_ids[0], IGNORE), prompt_ids.new_tensor(labels)])
        return sample

    def rough_lengths(self, records: Sequence[VQARecord]) -> list[float]:
        """About how many tokens each record has. Text counts by its bytes, pictures as the processor says of their sizes: headers are
        read where the size matters, nothing is decoded.

        Raises `BadInput`, naming the record, where a header cannot be read.
        """
        sizes = [sum(len(part.encode()) for turn in record.turns for part in turn) for record in records]
        weighed = range(0, len(records), max(1, len(records) // _WEIGHED))
        tokens = sum(len(self._tokenise(part)) for index in weighed for turn in records[index].turns for part in turn)
        rate = tokens / max(1, sum(sizes[index] for index in weighed))
        return [
            self._fixed(record) + rate * size + pictured
            for record, size, pictured in zip(records, sizes, self._pictured(records), strict=True)
        ]

    def _fixed(self, record: VQARecord) -> int:
        """Tokens of the conversation's fixed text."""
        layout = self._layout(len(record.images), len(record.turns))
        return sum(len(self._tokenise(text)) for text in (*layout.before, *layout.after)) + len(self.closing_ids)

    def _pictured(self, records: Sequence[VQARecord]) -> list[int]:
        """Image tokens of each record, by what processors tell servers such as vLLM; `_IMAGE_AS_TOKENS` a picture where they do not."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return [_IMAGE_AS_TOKENS * len(record.images) for record in records]
        everywhere = set(count(image_sizes=_PROBED_SIZES).num_image_tokens)
        if len(everywhere) == 1:
            return [len(record.images) * each for each in everywhere for record in records]
        with ThreadPoolExecutor(_HEADER_READERS) as readers:
            measured = list(readers.map(_heights_and_widths, records))
        counts = iter(count(image_sizes=[size for found in measured for size in found]).num_image_tokens)
        return [sum(islice(counts, len(found))) for found in measured]

    def _tokenise(self, text: str) -> list[int]:
        if text not in self._memo:
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            self._memo[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._memo[text]

    def _layout(self, images: int, turns: int) -> _Turns:
        if (images, turns) not in self._turns:
            render = _by_template if getattr(self.processor, "chat_template", None) else _plain
            self._turns[images, turns] = render(self.processor, images, turns)
        return self._turns[images, turns]


class VQADataset(Dataset[dict[str, Any]]):
    """Visual question-answering records, encoded when they are asked for and always in the same way.

    records: what to ask and answer.
    student_processor, teacher_processor: transformers processors; where the teacher's is missing or does the same as the
        student's, samples hold the student's side only.
    max_length: the most tokens a sample may have, e.g. the model's ``max_position_embeddings``; None takes the tokenizers' own
        ``model_max_length`` where they know one. The longest samples are checked at once, the others when they are reached.
    cache: keep encoded samples in memory; for small data that is read many times.

    Raises `BadInput` for no records, and as `check` does.
    """

    def __init__(
        self,
        records: Sequence[VQARecord],
        student_processor: Any,
        teacher_processor: Any | None = None,
        *,
        max_length: int | None = None,
        cache: bool = False,
    ) -> None:
        if not records:
            raise BadInput("there are no records to make a dataset of")
        self.records = records
        self.encoders = {"student": ConversationEncoder(student_processor)}
        if teacher_processor is not None and not same_processing(student_processor, teacher_processor):
            self.encoders["teacher"] = ConversationEncoder(teacher_processor)
        limits = [encoder.tokenizer.model_max_length for encoder in self.encoders.values()]
        self.max_length = min(limits) if max_length is None else max_length
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None
        self.check(self.max_length)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def typical(self) -> list[int]:
        """Two samples to try models on: with a picture, where any has one."""
        pictured = (index for index, record in enumerate(self.records) if record.images)
        return list(islice(pictured, 2)) or list(range(min(2, len(self))))

    @cached_property
    def lengths(self) -> list[float]:
        """About how many tokens each sample has, over both sides, by which batches of like length are made
        (`ConversationEncoder.rough_lengths`)."""
        sides = [encoder.rough_lengths(self.records) for encoder in self.encoders.values()]
        return [sum(lengths) for lengths in zip(*sides, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``id``, ``kind``, ``student`` and, where the teacher's processor differs, ``teacher``: see `ConversationEncoder`.

        Raises `BadInput`, naming the record, where it cannot be encoded, is longer than ``max_length``, or does not give
        student and teacher the same supervised tokens.
        """
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        sample = self._encode(self.records[index])
        _refuse_longer(sample, self.max_length)
        if self._cache is not None:
            self._cache[index] = sample
        return sample

    def check(self, limit: int) -> None:
        """Encode the samples with the most text and pictures, and refuse one of more than ``limit`` tokens.

        Raises `BadInput` naming the record, its length and the limit. A sample that is long for another reason than these, e.g.
        one huge picture of a family with variable resolution, is refused when it is reached.
        """
        for index in nlargest(_LENGTHS_CHECKED, range(len(self)), key=lambda index: _rough_size(self.records[index])):
            _refuse_longer(self[index], limit)

    def _encode(self, record: VQARecord) -> dict[str, Any]:
        sample: dict[str, Any] = {"id": record.id, "kind": record.kind}
        try:
            images = [open_image(image) for image in record.images]
            for side, encoder in self.encoders.items():
                sample[side] = encoder(record, images)
        except Exception as error:  # image decoders and processors raise all kinds
            raise BadInput(f"record {record.id!r} cannot be encoded: {_one_line(error)}") from error
        if "teacher" in sample:
            self._refuse_unpaired(sample)
        return sample

    def _refuse_unpaired(self, sample: Mapping[str, Any]) -> None:
        student, teacher = (_supervised(sample[side]) for side in ("student", "teacher"))
        if student == teacher:
            return
        differ = next((k for k, pair in enumerate(zip(student, teacher, strict=False)) if pair[0] != pair[1]), None)
        if differ is None:
            what = f"{len(student)} tokens for the student, {len(teacher)} for the teacher"
        else:
            words = [
                repr(encoder.tokenizer.decode([ids[differ]]))
                for encoder, ids in zip(self.encoders.values(), (student, teacher), strict=True)
            ]
            what = f"answer token {differ + 1} is {words[0]} for the student, {words[1]} for the teacher"
        raise BadInput(
            f"record {sample['id']!r}: {what}; tokens are compared one to one, so both need the same vocabulary and the same "
            "end of turn: give both processors one tokenizer, or chat templates that close the assistant's turn alike"
        )


class VQACollator:
    """Joins samples of a `VQADataset` to a batch: ``ids``, ``kinds``, ``student`` and, where samples have it, ``teacher``.

    In each side, ``input_ids``, ``attention_mask``, ``labels`` and what else runs along the tokens become [B, T], padded on the
    right; everything else (``pixel_values``, ``image_grid_thw`` ...) is concatenated along its first dimension, other dimensions
    zero-padded to the largest (numbers of crops that differ). ``predicting``: see `limbeck.batch.supervised`.
    """

    def __init__(self, student_processor: Any, teacher_processor: Any | None = None) -> None:
        processors = {"student": student_processor, "teacher": teacher_processor}
        self.pad_ids = {side: _pad_id(processor) for side, processor in processors.items() if processor is not None}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these samples, in their order."""
        batch: dict[str, Any] = {"ids": [sample["id"] for sample in samples], "kinds": [sample["kind"] for sample in samples]}
        for side in ("student", "teacher"):
            if side in samples[0]:
                batch[side] = _join([sample[side] for sample in samples], self.pad_ids[side])
                batch[side]["predicting"] = predicting(batch[side]["labels"])
        return batch


def same_processing(one: Any, other: Any) -> bool:
    """Whether two processors turn every record into the same tensors: class, settings, chat template and vocabulary agree."""
    return one is other or (
        type(one) is type(other)
        and one.chat_template == other.chat_template
        and one.to_dict() == other.to_dict()
        and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    )


def _by_template(processor: Any, images: int, turns: int) -> _Turns:
    """Render the chat template once around stand-ins and cut it there."""
    asked, answered = [f"<<question {turn}>>" for turn in range(turns)], [f"<<answer {turn}>>" for turn in range(turns)]
    messages = []
    for turn in range(turns):
        pictures = [{"type": "image"}] * images if turn == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": asked[turn]}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answered[turn]}]})
    rest = processor.apply_chat_template(messages, tokenize=False)
    pieces = []
    for stand_in in (text for pair in zip(asked, answered, strict=True) for text in pair):
        piece, found, rest = rest.partition(stand_in)
        if not found:
            raise BadInput(f"the chat template of {type(processor).__name__} drops or reorders turns of a conversation")
        pieces.append(piece)
    return _Turns(tuple(pieces[0::2]), tuple(pieces[1::2]), rest.rstrip())


def _plain(processor: Any, images: int, turns: int) -> _Turns:
    token = getattr(processor, "image_token", "<image>")
    return _Turns((f"{token}\n" * images, *["\n"] * (turns - 1)), ("\n",) * turns, "")


def _join(samples: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    lengths = [len(sample["input_ids"]) for sample in samples]
    fills = {"input_ids": pad_id, "labels": IGNORE}
    joined = {}
    for key in dict.fromkeys(key for sample in samples for key in sample):
        if any(key in sample and sample[key].shape == sample["input_ids"].shape for sample in samples):
            example = next(sample[key] for sample in samples if key in sample)
            joined[key] = example.new_full((len(samples), max(lengths)), fills.get(key, 0))
            for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
                if key in sample:
                    joined[key][row, :length] = sample[key]
        else:
            joined[key] = _concatenate([sample[key] for sample in samples if key in sample])
    return joined


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Along dimension 0; the others zero-padded at their ends to the largest."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    joined = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *shape)
    start = 0
    for tensor in tensors:
        joined[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        start += len(tensor)
    return joined


def _supervised(side: Mapping[str, Tensor]) -> list[int]:
    return side["labels"][side["labels"] != IGNORE].tolist()


def _refuse_longer(sample: Mapping[str, Any], limit: int) -> None:
    for side in ("student", "teacher"):
        length = len(sample[side]["input_ids"]) if side in sample else 0
        if length > limit:
            answers = len(_supervised(sample[side]))
            raise BadInput(
                f"record {sample['id']!r} is {length} tokens long for the {side} ({answers} of them answer), longer than the context "
                f"of {limit}: shorten it, leave it out, use smaller pictures, or raise max_length if the model allows it"
            )


def _heights_and_widths(record: VQARecord) -> list[tuple[int, int]]:
    try:
        sizes = [read_header(image).size for image in record.images]
    except Exception as error:  # image decoders raise all kinds
        raise BadInput(f"record {record.id!r} cannot be encoded: {_one_line(error)}") from error
    return [(height, width) for width, height in sizes]


def _rough_size(record: VQARecord) -> int:
    return len(record.images) * _IMAGE_AS_CHARACTERS + sum(len(question) + len(answer) for question, answer in record.turns)


def _pad_id(processor: Any) -> int:
    tokenizer = processor.tokenizer
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if found is None else found


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
