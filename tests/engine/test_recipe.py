from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from limbeck.engine.recipe import Recipe, load_recipe, parse_overrides, shipped_recipes
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


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5}){0,2}", fullmatch=True), st.integers(), max_size=4))
def test_overrides_parse_what_they_print(values):
    arguments = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    assert dict(parse_overrides(arguments)) == values


def test_paths_are_relative_to_the_recipe_file(tmp_path: Path, recipe):
    folder = tmp_path / "project"
    (folder / "student").mkdir(parents=True)
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


def test_an_arm_keeps_everything_but_the_method(recipe):
    loaded: Recipe = load_recipe(recipe)
    arm = loaded.with_method("sft")
    assert arm.method.name == "sft"
    assert arm.method.hyper == {}
    assert arm.model_dump(exclude={"method"}) == loaded.model_dump(exclude={"method"})
