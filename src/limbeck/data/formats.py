"""Rows of users' files and datasets, and what a row must hold to become a record.

A row is either simple, ``{"image": "a.jpg", "question": "...", "answer": "..."}``, or a conversation as in LLaVA's data,
``{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}``.
"""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from limbeck.data.records import ImageSource, VQARecord
from limbeck.errors import BadInput
from limbeck.naming import nearest

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ARROW_BATCH = 1000  # rows that are turned into Python objects at a time


class BrokenRow(ValueError):
    """A row that cannot become a record; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """One row of a source: its number from 1, and its values or why they cannot be read."""

    number: int
    values: Mapping[str, Any] | None
    problem: str = ""


class Columns(BaseModel):
    """Which column holds what; None takes the first of `USUAL` that is there. ``image: "-"`` says that there are no pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str | None = None
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    conversations: str | None = None

    def found_in(self, present: Sequence[str], where: str) -> Columns:
        """These columns with every None resolved against those present.

        Raises `BadInput` naming the columns present and the nearest where one is missing that was asked for or that a record needs.
        """
        chosen: dict[str, str | None] = {}
        for name, usual in USUAL.items():
            asked = getattr(self, name)
            if asked not in (None, "-", *present):
                raise _absent(where, name, asked, present)
            chosen[name] = asked or next((column for column in usual if column in present), None)
        for name in ("question", "answer"):
            if chosen["conversations"] is None and chosen[name] is None:
                raise _absent(where, name, USUAL[name][0], present)
        if chosen["image"] is None and (near := get_close_matches("image", present, n=1, cutoff=0.5)):
            raise BadInput(
                f"{where}: no column 'image', but {near[0]!r}: set data.columns.image to it, or to '-' if there are no pictures"
            )
        return Columns(**chosen)


USUAL: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id"),
    "image": ("image", "images"),
    "question": ("question",),
    "answer": ("answer", "answers"),
    "conversations": ("conversations", "messages"),
}


@dataclass(frozen=True)
class StoredImage:
    """A picture inside an Arrow-backed dataset, fetched when called.

    dataset: a ``datasets.Dataset`` in the format "arrow" with the image column alone. place: position in the cell's list of pictures.
    """

    dataset: Any
    row: int
    place: int
    locate: Callable[[str], Path]

    def __call__(self) -> ImageSource:
        cell = self.dataset[self.row].column(0).to_pylist()[0]
        value = cell[self.place] if isinstance(cell, list) else cell
        if isinstance(value, Mapping):
            value = value["bytes"] or self.locate(value["path"])
        return value


@dataclass(frozen=True)
class ImageFolder:
    """The folder that image paths are relative to; paths that leave it are refused unless ``allow_outside``."""

    folder: Path
    allow_outside: bool = False

    def __call__(self, name: str) -> Path:
        clean = os.path.normpath(name)
        if not self.allow_outside and (os.path.isabs(clean) or clean.split(os.sep)[0] == os.pardir):
            raise BrokenRow(f"image path leaves the images folder: {name}")
        return self.folder / clean


def read_json(path: Path) -> Iterator[Row]:
    """The rows of a JSON-lines file, read line by line, or of a file that holds one JSON list. Raises `BadInput` without a file."""
    if not path.is_file():
        raise BadInput(f"there is no file {path}")
    with path.open("rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(start)
        while (first := file.read(1)).isspace():
            pass
        file.seek(start)
        if first == b"[":
            try:
                rows = json.load(file)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path} begins like a JSON list but is none: {error}") from error
            yield from (_row(number, values) for number, values in enumerate(rows, start=1))
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _row(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Row(number, None, f"unreadable JSON: {error}")


def read_arrow(dataset: Any, columns: Columns, locate: Callable[[str], Path]) -> Iterator[Row]:
    """The rows of a ``datasets.Dataset``; embedded pictures stay where they are and become `StoredImage`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    arrow = dataset.with_format("arrow")
    schema = dataset.features.arrow_schema
    stored = columns.image in dataset.column_names and not _holds_text(schema.field(columns.image).type, pa)
    pictures = arrow.select_columns([columns.image]) if stored else None
    wanted = set(columns.model_dump().values()) - ({columns.image} if stored else set())
    text = arrow.select_columns([name for name in dataset.column_names if name in wanted])
    for start in range(0, len(dataset), _ARROW_BATCH):
        stop = min(start + _ARROW_BATCH, len(dataset))
        rows = text[start:stop].to_pylist() if text.column_names else [{} for _ in range(start, stop)]
        if pictures is not None:
            cells = pictures[start:stop].column(0)
            is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
            counts = pc.list_value_length(cells) if is_list else pc.cast(cells.is_valid(), pa.int32())
            for row, count in enumerate(counts.to_pylist()):
                rows[row][columns.image] = tuple(StoredImage(pictures, start + row, k, locate) for k in range(count or 0))
        yield from (Row(start + offset + 1, values) for offset, values in enumerate(rows))


def to_record(row: Row, columns: Columns, locate: Callable[[str], Path]) -> VQARecord:
    """The record of a row. Raises `BrokenRow` with the reason."""
    if row.values is None:
        raise BrokenRow(row.problem)
    images = _images(row.values.get(columns.image) if columns.image else None, locate)
    if columns.conversations and row.values.get(columns.conversations) is not None:
        turns = _conversation(row.values[columns.conversations], len(images))
    else:
        turns = ((_question(row.values.get(columns.question or "")), _answer(row.values.get(columns.answer or ""))),)
    return VQARecord(row_id(row, columns), images, turns)


def row_id(row: Row, columns: Columns) -> str:
    """The row's own id, else its first picture's path, else "row-" and its number."""
    value = (row.values or {}).get(columns.id or "")
    return _picture(row, columns) or f"row-{row.number}" if value in (None, "") else encodable(str(value))


def row_group(row: Row, columns: Columns) -> str:
    """What rows that must not be torn apart have in common: the first picture's path as written, else the id."""
    return _picture(row, columns) or row_id(row, columns)


def encodable(name: str) -> str:
    """A name that can be hashed and stored: what of a file's name is no UTF-8 is written out, as ``\\udcfc``."""
    return name.encode(errors="backslashreplace").decode()


def _picture(row: Row, columns: Columns) -> str:
    cell = (row.values or {}).get(columns.image or "")
    first = cell[0] if isinstance(cell, list) and cell else cell
    return encodable(first) if isinstance(first, str) else ""


def _row(number: int, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(number, values)
    return Row(number, None, f"not a JSON object but {type(values).__name__}")


def _absent(where: str, name: str, column: str, present: Iterable[str]) -> BadInput:
    hint = nearest(column, present)
    columns = f"it has {', '.join(present)}; {hint} " if hint.startswith("did") else f"it has {', '.join(present) or 'none'}; "
    return BadInput(f"{where}: no column {column!r}; {columns}set data.columns.{name}")


def _holds_text(kind: Any, pa: Any) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _images(cell: Any, locate: Callable[[str], Path]) -> tuple[ImageSource, ...]:
    """The sources of an image cell: nothing, one path, a list of them, or what fetches them."""
    if cell is None or cell == "":
        return ()
    cells = cell if isinstance(cell, list | tuple) else [cell]
    if not all(isinstance(item, str | StoredImage) for item in cells):
        raise BrokenRow(f"image is neither a path nor a list of paths: {_short(cell)}")
    return tuple(locate(item) if isinstance(item, str) else item for item in cells)


def _conversation(messages: Any, images: int) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise BrokenRow(f"conversation is not a list of messages: {_short(messages)}")
    said = [(message.get("from", message.get("role")), message.get("value", message.get("content"))) for message in messages]
    roles = [_ROLES.get(str(speaker)) for speaker, _ in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        raise BrokenRow(f"conversation does not take turns of human and gpt: {[speaker for speaker, _ in said]}")
    texts = [_text(value) for _, value in said]
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if marks > images:
        raise BrokenRow(f"text speaks of {marks} images, the row has {images}")
    return tuple((_question(texts[k]), _answer(texts[k + 1])) for k in range(0, len(texts), 2))


def _text(content: Any) -> str:
    """A message's words; content may be a list of parts, as in OpenAI's format."""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str))
    if not isinstance(content, str):
        raise BrokenRow(f"a message without text: {_short(content)}")
    return content


def _question(value: Any) -> str:
    text = str(value or "").replace(IMAGE_MARK, "").strip()
    if not text:
        raise BrokenRow("empty question")
    return text


def _answer(value: Any) -> str:
    """An answer's words; of several annotators' (blank ones aside) the most frequent, the first of those where they tie."""
    if isinstance(value, list):
        given = [item.get("answer") if isinstance(item, Mapping) else item for item in value]
        texts = [str(item).strip() for item in given if item is not None]
        value = next((text for text, _ in Counter(filter(None, texts)).most_common(1)), None)
    if value is not None and not isinstance(value, str | int | float):
        raise BrokenRow(f"answer is neither text nor number: {_short(value)}")
    text = "" if value is None else str(value).strip()
    if not text:
        raise BrokenRow("empty answer")
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
