"""``limbeck synth``: what a teacher writes as data, one command a kind."""

from __future__ import annotations

from pathlib import Path

import typer

from limbeck.cli.output import print_json

app = typer.Typer(
    name="synth",
    help="Have a teacher write data that a student learns from.\n\nExample: limbeck synth questions makd --model gpt-4o --out q.txt",
    no_args_is_help=True,
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("questions", context_settings=OVERRIDES)
def questions(
    context: typer.Context,
    recipe: str = typer.Argument(
        help="A YAML file, or the name of a shipped recipe: its data's classes. Any key: --data.path ..."
    ),
    model: str = typer.Option(help="The language model's name at its endpoint."),
    out: Path = typer.Option(help="The file of questions, one a line."),
    base_url: str | None = typer.Option(None, help="Of an OpenAI-compatible endpoint, http://host:port/v1; default OpenAI's."),
    key_variable: str = typer.Option("OPENAI_API_KEY", help="The environment variable that holds the key."),
    candidates: int = typer.Option(100, help="Questions to write."),
    select: int = typer.Option(50, help="Questions to choose of them."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Have a language model write yes/no questions that tell a dataset's classes apart (makd, step 1). Read them before step 2.

    Example: limbeck synth questions makd --model gpt-4o --out q.txt
    """
    from limbeck.engine.synth import pictures_of
    from limbeck.errors import BadInput
    from limbeck.synth.aspects import write_questions
    from limbeck.teachers.chat import Chat

    if out.exists():
        raise BadInput(f"{out} exists: choose another file, or delete it")
    images = pictures_of(recipe, context.args)
    chat = Chat(model, base_url=base_url, key_variable=key_variable)
    written = write_questions(chat, images.classes, len(images.records), candidates=candidates, select=select)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(f"{question}\n" for question in written), encoding="utf-8")
    if json:
        print_json({"path": str(out), "questions": written})
        return
    print(
        f"{len(written)} questions: {out}\nask them: limbeck synth answers {recipe} --questions {out} --teacher ... --out answers.json"
    )


@app.command("answers", context_settings=OVERRIDES)
def answers(
    context: typer.Context,
    recipe: str = typer.Argument(
        help="A YAML file, or the name of a shipped recipe: its training pictures. The model that answers is its teacher: "
        "--teacher '{source: transformers, name: org/model, dtype: bfloat16}'. Any key: --data.shots null"
    ),
    questions: Path = typer.Option(help="A file of questions, one a line."),
    out: Path = typer.Option(help="The JSON file of answers, for data.answers. A call that was broken off goes on."),
    yes: str = typer.Option("Yes", help="The word that the model says yes with; one token."),
    no: str = typer.Option("No", help="The word that it says no with; one token."),
    demand: str | None = typer.Option(None, help="Put after each question; default 'Answer only Yes or No.'"),
    batch_size: int = typer.Option(16, help="Pairs of picture and question that the model reads at once."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
    quiet: bool = typer.Option(False, "--quiet", help="Warnings only on standard error."),
) -> None:
    """Have a vision-language model answer questions about every training picture, as probabilities of yes (makd, step 2).

    Example: limbeck synth answers makd --questions q.txt --teacher '{source: transformers, name: ./vlm}' --out answers.json
    """
    from limbeck.engine.synth import answer

    result = answer(
        recipe,
        context.args,
        questions=questions,
        out=out,
        words=(yes, no),
        demand=demand,
        batch_size=batch_size,
        quiet=quiet,
    )
    if json:
        print_json(result)
        return
    print(
        f"{result['pictures']} pictures, {result['questions']} questions: {out}\ntrain from it: limbeck run RECIPE --data.answers {out}"
    )
