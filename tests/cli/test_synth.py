"""``limbeck synth`` as a user meets it: questions from an endpoint, then answers from a model."""

from __future__ import annotations

import json

import pytest
import yaml

from limbeck.models.loading import quiet_bars
from limbeck.models.tiny import digit_vlm
from tests.synth.server import serving

pytest.importorskip("openai")

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def pictures(tmp_path):
    """A recipe over twelve 16x16 pictures of two classes, whose answers are not there yet."""
    from PIL import Image

    for name, shade in (("dark", 40), ("light", 200)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(6):
            Image.new("L", (16, 16), shade + number).save(folder / f"{number}.png")
    recipe = {
        "method": {"name": "compose", "objectives": ["ce"]},
        "student": {"source": "tiny", "name": "mlp"},
        "data": {"source": "imagefolder", "path": "data", "shots": 2, "answers": "answers.json"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def answerer(tmp_path):
    folder = tmp_path / "vlm"
    with quiet_bars():
        for part in digit_vlm.build("digit-vlm-student", seed=3):
            part.save_pretrained(folder)
    return f"{{source: transformers, name: {folder}}}"


def test_help_shows_examples(limbeck):
    for command in ((), ("questions",), ("answers",)):
        status, out, _ = limbeck("synth", *command, "--help")
        assert status == 0
        assert "Example: limbeck synth" in out


def test_from_classes_to_answers(limbeck, pictures, answerer, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    with serving("1. is there a 3 ?\n2. is there a row ?\n3. are there many ?", "is there a row ?\nare there many ?") as endpoint:
        endpoint_flags = ("--model", "m", "--base-url", endpoint.url, "--key-variable", "SOME_KEY")
        status, out, error = limbeck(
            "synth",
            "questions",
            pictures,
            *endpoint_flags,
            "--candidates",
            4,
            "--select",
            2,
            "--out",
            "q.txt",
            "--data.shots",
            "null",
        )
    assert (status, error) == (0, "")
    assert "2 questions: q.txt" in out
    assert (tmp_path / "q.txt").read_text() == "is there a row ?\nare there many ?\n"
    assert "12 pictures of 2 classes: dark, light" in endpoint.requests[0][2]["messages"][0]["content"]

    asking = (
        "synth",
        "answers",
        pictures,
        "--questions",
        "q.txt",
        "--teacher",
        answerer,
        "--yes",
        "yes",
        "--no",
        "no",
        "--demand",
        "",
    )
    status, out, error = limbeck(*asking, "--out", "answers.json", "--json", "--quiet", "--data.shots", "null")
    assert (status, error) == (0, "")
    assert json.loads(out) == {"path": "answers.json", "pictures": 12, "questions": 2}
    kept = json.loads((tmp_path / "answers.json").read_text())
    assert kept["questions"] == ["is there a row ?", "are there many ?"]
    assert len(kept["answers"]) == 12 and "dark/0.png" in kept["answers"]
    assert not any(KEY in path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())

    status, out, _ = limbeck(*asking, "--out", "few.json", "--json")
    assert json.loads(out)["pictures"] == 4  # as the recipe draws them


def test_refusals(limbeck, pictures, answerer, tmp_path):
    questions = tmp_path / "q.txt"
    questions.write_text("is there a 3 ?\n")

    def refused(*arguments: object, says: str, status: int = 2) -> None:
        found, _, error = limbeck("synth", *arguments, "--out", tmp_path / "out")
        assert found == status
        assert error.count("\n") == 1 and error.startswith("limbeck: ") and says in error
        assert not (tmp_path / "out").exists()

    asking = ("answers", pictures, "--questions", questions)
    refused(*asking, says="who answers?")
    refused(*asking, "--teacher", answerer, says="the answer 'Yes' is an unknown word")
    refused(*asking, "--teacher", "{source: tiny, name: mlp, classes: 2}", says="a vision-language model answers questions")
    refused("answers", pictures, "--questions", tmp_path / "none", "--teacher", answerer, says="no file of questions")
    refused("questions", pictures, "--model", "m", "--key-variable", "NOT_SET_ANYWHERE", says="NOT_SET_ANYWHERE holds no key")
    with serving("no.") as endpoint:
        refused("questions", pictures, "--model", "m", "--base-url", endpoint.url, says="wrote no question", status=1)
