from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from limbeck.engine.recipe import ModelSpec, Recipe, load_recipe, parse_overrides, shipped_recipes
from limbeck.engine.task import data_specs, load_teacher
from limbeck.errors import BadInput


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"batchsize": 3}}, "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        ({"student": {"source": "tiny", "nmae": "x", "name": "y"}}, "unknown key 'student.nmae'; did you mean 'name'?"),
        ({"method": {"name": "switch-dk"}}, "unknown method 'switch-dk'; did you mean 'switch-kd'?"),
        ({"method": {"name": "switch-kd", "taau": 3}}, "no hyper-parameter 'taau'; did you mean 'tau'?"),
        ({"method": {"name": "switch-kd", "tau": -1}}, "tau must be positive, got -1"),
        ({"method": {"name": "switch-kd", "pairs": "flatt"}}, "'flat' or 'rows'"),
        ({"method": {"name": "switch-kd", "k_min": 2}}, "k_min must be at least 3"),
        ({"train": {"lr": "fast"}}, "train.lr: Input should be a valid number"),
        ({"train": {"lr": 0}}, "train.lr: Input should be greater than 0"),
        ({"train": {"batch_size": 10, "micro_batch_size": 4}}, "batch_size 10 is not a multiple of micro_batch_size 4"),
        ({"arms": ["sfd"]}, "unknown method 'sfd'; did you mean 'sft'?"),
        ({"data": {}}, "'data.source' is required"),
        ({"train": {"seed": -1}}, "train.seed: Input should be greater than or equal to 0"),
        ({"train": {"seed": 2**70}}, "train.seed: Input should be less than"),
        ({"train": {"betas": [0.9, 1.5]}}, "train.betas.1: Input should be less than 1"),
        ({"train": {"epochs": float("inf")}}, "train.epochs: Input should be a finite number"),
        ({"train": {"lr": float("inf")}}, "train.lr: Input should be a finite number"),
        ({"train": {"stages": [{"name": "a", "weights": {"kd": float("nan")}}]}}, "Input should be a finite number"),
        ({"cache": {"viewz": 2}}, "unknown key 'cache.viewz'; did you mean 'views'?"),
        ({"cache": {"views": 0}}, "cache.views: Input should be greater than 0"),
        ({"arms": [{"name": "x", "method": {"name": "sft"}, "nmae": 1}]}, "unknown key 'arms.0.nmae'; did you mean 'name'?"),
        ({"train": {"stages": [{"name": "a", "step": 1}]}}, "unknown key 'train.stages.0.step'; did you mean 'steps'?"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_says_what_is_right(recipe, change, message):
    with pytest.raises(BadInput) as error:
        load_recipe({**recipe, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_yaml_names_the_line(tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text("method: {name: sft\nstudent: 3\n")
    with pytest.raises(BadInput, match=r"broken.yaml, line 2: not readable as YAML"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadInput, match="not readable as YAML"):
        load_recipe(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(BadInput, match="a recipe is a mapping"):
        load_recipe(path)


def test_yaml_tags_never_construct_objects(tmp_path: Path):
    path = tmp_path / "evil.yaml"
    path.write_text("method: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(BadInput, match="not readable as YAML"):
        load_recipe(path)
    assert not (tmp_path / "pwned").exists()


def test_an_unknown_recipe_names_the_nearest_shipped_one():
    with pytest.raises(BadInput, match="did you mean 'switch-kd'"):
        load_recipe("switchkd")


def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(tmp_path: Path):
    assert "switch-kd" in shipped_recipes()
    for name in shipped_recipes():
        recipe = load_recipe(name)
        path = tmp_path / "again.yaml"
        path.write_text(recipe.dump())
        assert load_recipe(path) == recipe, name


def test_overrides_reach_any_depth(recipe):
    loaded = load_recipe(recipe, ["--train.lr", "3e-4", "--train.seed=7", "--method.tau", "2", "--evaluate", "[vqa-accuracy]"])
    assert loaded.train.lr == 3e-4
    assert loaded.train.seed == 7
    assert loaded.method.hyper["tau"] == 2
    assert loaded.evaluate == ("vqa-accuracy",)


@pytest.mark.parametrize("arguments", [["train.lr", "1"], ["--train.lr"]])
def test_a_malformed_override_is_refused(arguments):
    with pytest.raises(BadInput, match=r"--train.lr 3e-4"):
        parse_overrides(arguments)


@pytest.mark.parametrize("text", ["{name: compose", "!!python/object/apply:os.system [ls]"])
def test_an_override_that_is_no_yaml_is_named(text):
    with pytest.raises(BadInput, match=r"--method .*: not readable as YAML: ") as error:
        parse_overrides(["--method", text])
    assert "\n" not in str(error.value)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5}){0,2}", fullmatch=True), st.integers(), max_size=4))
def test_overrides_parse_what_they_print(values):
    arguments = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    assert dict(parse_overrides(arguments)) == values


def test_paths_are_relative_to_the_recipe_file(tmp_path: Path, recipe):
    folder = tmp_path / "project"
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "config.json").write_text("{}")
    recipe["data"] = {"source": "vqa-jsonl", "path": "train.jsonl", "images": "pictures"}
    recipe["student"] = {"source": "transformers", "name": "student"}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(folder / "r.yaml")
    assert loaded.data.model_extra["path"] == str(folder / "train.jsonl")
    assert loaded.data.model_extra["images"] == str(folder / "pictures")
    assert loaded.student.name == str(folder / "student")


def test_a_hub_name_stays_a_hub_name(recipe):
    recipe["student"] = {"source": "transformers", "name": "org/student"}
    recipe["data"] = {"source": "hf", "path": "org/data"}
    loaded = load_recipe(recipe)
    assert loaded.student.name == "org/student"
    assert loaded.data.model_extra["path"] == "org/data"


def test_a_folder_that_only_bears_a_models_name_is_no_model(tmp_path: Path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digit-vlm-student" / "checkpoints").mkdir(parents=True)
    (tmp_path / "digit-vlm-student" / "recipe.yaml").touch()  # a run of that name
    recipe["student"] = {"source": "tiny", "name": "digit-vlm-student"}
    assert load_recipe(recipe).student.name == "digit-vlm-student"
    (tmp_path / "digit-vlm-student" / "limbeck.json").touch()
    assert load_recipe(recipe).student.name == str(tmp_path / "digit-vlm-student")


def test_a_tilde_is_the_home_folder(tmp_path: Path, recipe, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "home" / "model" / "config.json").touch()
    recipe["data"] = {"source": "vqa-jsonl", "path": "~/train.jsonl"}
    recipe["student"] = {"source": "transformers", "name": "~/model", "weights": "~/w.safetensors"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "cache": "~/cache"}))
    loaded = load_recipe(tmp_path / "r.yaml")
    found = (loaded.data.model_extra["path"], loaded.student.name, loaded.student.weights, loaded.cache)
    assert found == tuple(str(tmp_path / "home" / name) for name in ("train.jsonl", "model", "w.safetensors", "cache"))


def test_what_looks_like_a_date_is_text(tmp_path: Path, recipe):
    recipe["data"] = {"source": "vqa-jsonl", "path": "2024-01-01"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe).replace("'2024-01-01'", "2024-01-01"))
    assert load_recipe(tmp_path / "r.yaml").data.model_extra["path"] == str(tmp_path / "2024-01-01")
    assert parse_overrides(["--data.path", "2024-01-01"]) == [("data.path", "2024-01-01")]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "a", "data": {"scenes": 50}}, "stage 'a': its data is a whole `data`: 'source' is required"),
        (
            {"name": "train", "data": {"source": "digit-scenes", "scenes": 8}},
            "what the data of all stages is called: name this stage otherwise",
        ),
    ],
)
def test_data_of_a_stage_that_is_not_clear_is_refused(recipe, stage, message):
    recipe["train"] = {"stages": [stage, {"name": "b"}]}
    with pytest.raises(BadInput, match=message):
        data_specs(load_recipe(recipe))


def test_a_teachers_options_reach_its_recipe_as_they_were(monkeypatch):
    asked = []
    monkeypatch.setattr("limbeck.engine.run.trained_once", lambda name, overrides: asked.extend(parse_overrides(overrides)))
    options = {
        "data.digits": None,
        "train.select": {"metric": "accuracy"},
        "train.lr": 1e-05,
        "data.layout": "pair",
        "train.compile": "none",
    }
    load_teacher(ModelSpec(source="recipe", name="digit-scenes-teacher", options=options))
    assert dict(asked) == {**options, "train.lr": "1e-05"}  # pydantic makes it the number


def test_an_arm_keeps_everything_but_the_method(recipe):
    loaded: Recipe = load_recipe(recipe)
    arm = loaded.with_method("sft")
    assert arm.method.name == "sft"
    assert arm.method.hyper == {}
    assert arm.model_dump(exclude={"method"}) == loaded.model_dump(exclude={"method"})
