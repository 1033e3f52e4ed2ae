"""The documentation against the code: every key, flag and option is there, and what it shows runs."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import click
import pytest
import typer
import yaml
from pydantic import BaseModel

from limbeck.cli.main import app
from limbeck.data import loading
from limbeck.data.images import IMAGE_SOURCES
from limbeck.engine.config import Select, StageConfig, TrainConfig
from limbeck.engine.plan import Assumptions
from limbeck.engine.recipe import Arm, DataSpec, MethodSpec, ModelSpec, Recipe, load_recipe, shipped_recipes
from limbeck.evaluate.protocols import PROTOCOLS
from limbeck.methods.registry import BUILT_IN, hyper_parameters
from tests.examples.test_own_pair import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS: dict[str, click.Command] = {}
for _name, _command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
    COMMANDS |= {f"{_name} {part}": inner for part, inner in getattr(_command, "commands", {}).items()} or {_name: _command}
"""By what is typed after ``limbeck``; of a group, its parts."""

SHORTER = {
    "index.md": {"epochs=2": "steps=2"},
    "own-data.md": {"scenes=600": "scenes=60"},
    "python.md": {
        '"epochs": 2, "batch_size": 32': '"steps": 2, "batch_size": 8',
        '"--train.epochs", "1"': '"--train.steps", "1"',
    },
    "your-method.md": {
        "scenes=600": "scenes=16",
        "scenes=200": "scenes=8",
        "steps=50": "steps=2",
        "diagnose_every=10": "diagnose_every=1",
    },
}
"""What the tests run instead, page by page, to take seconds."""


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,3}} |\Z)", text(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no heading {heading!r}"
    return found[2]


def rows(markdown: str) -> dict[str, str]:
    """The tables' first two columns: `key` -> the second cell."""
    return {
        key: cell.strip().strip("`") for key, cell in re.findall(r"^\| `([^`|]+)` \| (`[^`]*`|[^|]*?) \|", markdown, re.MULTILINE)
    }


def blocks(page: str, language: str) -> Iterator[tuple[str, str]]:
    """(title, code) of the fenced blocks of a language."""
    for kind, title, code in FENCE.findall(text(page)):
        if kind == language:
            yield title, code


def plain(value: Any) -> Any:
    """A default as YAML would hold it."""
    if isinstance(value, BaseModel):
        return {name: plain(part) for name, part in value.model_dump(exclude_none=True).items()}
    return json.loads(json.dumps(value))


def check_table(markdown: str, defaults: dict[str, Any]) -> None:
    """The table has exactly these keys, with these defaults."""
    documented = rows(markdown)
    assert documented.keys() == defaults.keys()
    for key, default in defaults.items():
        if documented[key] == "required" or documented[key].startswith("see ["):
            continue
        assert yaml.safe_load(documented[key]) == plain(default), key


def fields(model: type[BaseModel]) -> dict[str, Any]:
    return {
        name: None if item.is_required() else item.get_default(call_default_factory=True)
        for name, item in model.model_fields.items()
    }


@pytest.mark.parametrize(
    ("heading", "model", "elsewhere"),
    [
        ("recipe", Recipe, ()),
        ("method", MethodSpec, ()),
        ("arm", Arm, ()),
        ("model", ModelSpec, ()),
        ("data", DataSpec, ()),
        ("vqa-jsonl and parquet", loading.Files, ("max_broken",)),
        ("hf", loading.Hub, ("max_broken",)),
        ("columns", loading.Columns, ()),
        ("digit-scenes", loading.DigitScenes, ("max_broken",)),
        ("train", TrainConfig, ()),
        ("select", Select, ()),
        ("stages", StageConfig, ()),
    ],
)
def test_every_key_of_a_recipe_is_documented_with_its_default(heading, model, elsewhere):
    keys = {name: default for name, default in fields(model).items() if name not in elsewhere}
    check_table(section("recipes.md", heading), keys)
    required = {name for name, item in model.model_fields.items() if item.is_required()}
    assert {key for key, cell in rows(section("recipes.md", heading)).items() if cell == "required"} == required


def test_every_data_source_and_shipped_recipe_is_documented():
    page = text("recipes.md")
    assert not [source for source in (*loading.SOURCES, *IMAGE_SOURCES) if f"`{source}`" not in page]
    assert not [name for name in shipped_recipes() if f"`{name}`" not in page]


@pytest.mark.parametrize("source", IMAGE_SOURCES)
def test_every_key_of_pictures_is_documented(source):
    page = text("images.md")
    assert not [key for key in IMAGE_SOURCES[source].settings.model_fields if f"`{key}`" not in page]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_documented_beside_an_example(name):
    assert any(parameter.param_type_name == "option" for parameter in COMMANDS[name].params)
    described = section("commands.md", f"limbeck {name}")
    assert f"limbeck {name}" in described
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":  # typer's options are not click.Option
            for flag in {*parameter.opts} - {"--help", "-h"}:
                assert re.search(rf"{flag}(?![\w-])", described), flag


def test_the_assumptions_of_a_plan_are_documented():
    check_table(
        section("commands.md", "limbeck run").partition("--plan.<name>")[2],
        {item.name: item.default for item in dataclasses.fields(Assumptions)},
    )


@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda entry: entry.name)
def test_every_method_has_a_page_with_its_options(entry):
    page = f"methods/{entry.name}.md"
    assert entry.paper.removeprefix("arXiv ") in text(page)
    options = rows(section(page, "Options"))
    hyper = hyper_parameters(entry.load())
    assert options.keys() == hyper.keys()
    for key, default in hyper.items():
        assert yaml.safe_load(options[key]) == plain(default), key
    assert text(page).count("## Gradient") == 1


def test_every_protocol_and_every_public_name_is_documented():
    import limbeck

    assert rows(section("evaluation.md", "Protocols")).keys() == PROTOCOLS.keys()
    told = text("python.md")
    undocumented = [name for name in limbeck.__all__ if f"lb.{name}" not in told and name not in ("__version__", "evaluate")]
    assert not undocumented


def shell_lines() -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(DOCS)), line.partition("  #")[0].strip())
        for page in PAGES
        for language in ("sh", "bash")
        for _, code in blocks(str(page.relative_to(DOCS)), language)
        for line in re.sub(r"\\\n\s*", "", code).splitlines()
        if line.startswith("limbeck ") and "--version" not in line
    ]


@pytest.mark.parametrize(("page", "line"), shell_lines())
def test_every_command_line_in_the_docs_is_one_that_limbeck_takes(page, line):
    _, name, *arguments = shlex.split(line)
    if name not in COMMANDS:
        name = f"{name} {arguments.pop(0)}"
    context = COMMANDS[name].make_context(name, list(arguments))
    if name not in ("run", "bench"):
        return
    recipe = context.params["recipe"].removesuffix(".yaml")
    overrides = [part for part in context.args if not part.startswith("--plan.")]
    if recipe in shipped_recipes() and len(overrides) == len(context.args) and "see-alike" not in line:
        load_recipe(recipe, overrides)


@pytest.mark.parametrize("page", [str(page.relative_to(DOCS)) for page in PAGES])
def test_yaml_in_the_docs_is_yaml_and_python_is_python(page):
    for _, code in blocks(page, "yaml"):
        if "--8<--" not in code:
            yaml.safe_load(code)
    for _, code in blocks(page, "python"):
        ast.parse(code)
    for included in re.findall(r'--8<-- "([^"]+)"', text(page)):
        assert (ROOT / included).is_file(), included


def run_blocks(page: str, *titles: str) -> dict[str, Any]:
    """Run a page's titled Python blocks in the current folder, in one namespace, shortened as `SHORTER` says."""
    shorter = SHORTER.get(page, {})
    found = [(title, code) for title, code in blocks(page, "python") if title and (not titles or title in titles)]
    assert found
    whole = "".join(code for _, code in found)
    assert all(old in whole for old in shorter if not titles), f"{page}: SHORTER names what is no longer there"
    namespace: dict[str, Any] = {"__name__": "docs"}
    for title, code in found:
        for old, new in shorter.items():
            code = code.replace(old, new)
        exec(compile(code, f"{page}:{title}", "exec"), namespace)
    return namespace


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["index.md", "concepts.md", "heads.md", "methods/compose.md"])
def test_blocks_of_plain_modules_run(page, here, capsys):
    namespace = run_blocks(page)
    if "run" in namespace:
        assert (namespace["run"].path / "student" / "model.safetensors").is_file()


def test_the_tutorial_and_the_python_page_run_from_one_folder(here, capsys):
    run_blocks("own-data.md", "make_toy_pair.py")
    shipped = yaml.safe_load((ROOT / "recipes" / "own-pair.yaml").read_text())
    (here / "own-pair.yaml").write_text(yaml.safe_dump(shipped))
    import limbeck

    shorter = ["--train.steps=2", "--train.batch_size=8", "--train.precision=fp32", "--train.gradient_checkpointing=false"]
    limbeck.run(here / "own-pair.yaml", out="runs/own", overrides=[*shorter, "--data.val_fraction=0.3"], quiet=True)
    run_blocks("own-data.md", "ask_student.py")

    namespace = run_blocks("python.md")
    assert namespace["result"]["paired"].keys() == {"sft", "kd"}
    assert (here / "shipped" / "model.safetensors").is_file()
    (here / "runs" / "first").is_dir()
    run_blocks("quick-start.md", "load_student.py")


def test_the_method_of_the_docs_is_found_by_its_entry_point_and_trains(here, monkeypatch, recipe, capsys):
    codes = dict(blocks("your-method.md", "python"))
    (here / "see_alike.py").write_text(codes["see_alike.py"])
    [(_, project)] = blocks("your-method.md", "toml")
    [target] = re.findall(r'^see-alike = "(.+)"', project, re.MULTILINE)
    installed = here / "see_alike-0.1.dist-info"  # what pip writes
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: see-alike\nVersion: 0.1\n")
    (installed / "entry_points.txt").write_text(f"[limbeck.methods]\nsee-alike = {target}\n")
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "see_alike", raising=False)

    import limbeck

    run_blocks("your-method.md", "try_it.py")
    assert "see-alike" in {entry.name for entry in limbeck.list_methods()}
    short = {**recipe, "method": {"name": "see-alike", "see": 0.5}, "evaluate": ["vqa-accuracy"]}
    finished = limbeck.run(short, out="runs/named", overrides=["--train.steps", "2"], quiet=True)
    terms = json.loads((finished.path / "metrics.jsonl").read_text().splitlines()[0])["terms"]
    assert terms.keys() == {"ce", "see"}
    assert terms["see"]["weight"] == 0.5
    with pytest.raises(limbeck.BadInput, match="did you mean 'see'"):
        limbeck.load_recipe({**short, "method": {"name": "see-alike", "seee": 1}})
    sys.modules.pop("see_alike", None)


def test_no_absolute_path_is_in_the_docs():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "recipes" / "own-pair.yaml"]:
        assert not re.search(r"(?<![\w.])/(work|tmp|home|root)/", page.read_text(encoding="utf-8")), page
