"""From a recipe to data that a teacher writes: whose pictures, and who looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from limbeck.data.images import LabelledImages, load_images
from limbeck.data.views import presentation
from limbeck.engine.progress import Progress
from limbeck.engine.recipe import load_recipe
from limbeck.engine.task import load_teacher
from limbeck.errors import BadInput
from limbeck.models.vlm import VLM
from limbeck.synth.aspects import DEMAND, answer_questions, read_questions


def pictures_of(source: str, overrides: Sequence[str] = ()) -> LabelledImages:
    """The training pictures of a recipe, without the answers that it names. Raises `BadInput` as `load_recipe` and `load_images` do."""
    recipe = load_recipe(source, overrides)
    _, spec = presentation(recipe.data.model_dump(exclude={"max_length", "answers"}))
    return load_images(spec, "train")


def answer(
    source: str,
    overrides: Sequence[str] = (),
    *,
    questions: str | Path,
    out: str | Path,
    words: tuple[str, str] = ("Yes", "No"),
    demand: str | None = None,
    batch_size: int = 16,
    quiet: bool = False,
) -> dict[str, Any]:
    """Have a recipe's teacher, a vision-language model, answer questions about its training pictures; see `answer_questions`.

    words: what it says for yes and no. Returns the file's path and the numbers of pictures and questions.
    """
    recipe = load_recipe(source, overrides)
    if recipe.teacher is None:
        raise BadInput("who answers? Name a vision-language model: --teacher '{source: transformers, name: org/model}'")
    asked, images = read_questions(questions), pictures_of(source, overrides)
    teacher = load_teacher(recipe.teacher)
    if not isinstance(teacher, VLM):
        raise BadInput(
            f"teacher {recipe.teacher.name!r} is a {type(teacher).__name__}; a vision-language model answers questions"
        )
    teacher.model.to(PartialState().device)
    pictures, progress = [(record.id, record.image) for record in images.records], Progress(quiet)
    with progress.bar(len(pictures), 0):
        answers = answer_questions(
            teacher,
            pictures,
            asked,
            out,
            yes=words[0],
            no=words[1],
            demand=DEMAND if demand is None else demand,
            batch_size=batch_size,
            made_by=f"{recipe.teacher.source}:{recipe.teacher.name}",
            progress=lambda done, rate: progress.advance(done, {}, rate),
        )
    return {"path": str(out), "pictures": len(answers), "questions": len(asked)}
