"""Recipes: overrides, errors that say what is allowed, and the saved recipe that resolves to what it was."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.config import Config
from cluster.recipe import apply_overrides, json_schema, load_recipe, load_reward_section, resolve, save_resolved
from services.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
QA = ROOT / "recipes" / "cagsr-qa.yaml"


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(QA, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("gpus", "memory"), [(0, 0.8), (0.25, 0.2), (0.5, 0.4), (1, 0.8), (2, 0.8)])
def test_vllm_takes_its_share_of_what_an_actor_has_of_a_gpu(gpus: float, memory: float) -> None:
    mine = ["rollout.vllm.gpu_memory=0.8", "rollout.vllm.kv_cache_mib=512"]
    config = load_recipe(QA, [f"cluster.rollout_gpus={gpus}", *mine])
    section = config.actors_rollout
    assert section.vllm.gpu_memory == pytest.approx(memory)
    vllm = section.vllm.model_copy(update={"gpu_memory": 0.8})
    assert section.model_copy(update={"vllm": vllm}) == config.rollout


def test_vllm_on_a_part_of_a_gpu_has_to_be_told_how_much_it_may_keep() -> None:
    assert "rollout_gpus: 0.5 and rollout.vllm.kv_cache_mib: null" in complaint(
        "rollout.engine=vllm", "cluster.rollout_gpus=0.5"
    )
    load_recipe(QA, ["rollout.engine=vllm", "cluster.rollout_gpus=1"])


# ---- overrides


def test_overrides_are_laid_over_the_recipe_in_order() -> None:
    config = load_recipe(
        QA, ["learner.lr=2e-5", "run.steps=7", "run.steps=9", "salience.keywords=[sun, moon]", "data.system="]
    )
    assert config.learner.lr == 2e-5
    assert config.run.steps == 9
    assert config.salience.keywords == ("sun", "moon")
    assert config.data.system is None
    assert config.rollout == load_recipe(QA).rollout


def test_an_override_makes_the_sections_on_its_way_and_leaves_the_tree_alone() -> None:
    tree: dict[str, Any] = {"run": {"seed": 1}}
    assert apply_overrides(tree, ["learner.kl.coef=0.5", "run.name=a=b"]) == {
        "run": {"seed": 1, "name": "a=b"},
        "learner": {"kl": {"coef": 0.5}},
    }
    assert tree == {"run": {"seed": 1}}


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("xyz", min_size=1),
)
def test_what_is_set_is_what_stands_there(path: list[str], value: Any) -> None:
    written = yaml.safe_dump(value).removesuffix("...\n").strip()
    node: Any = apply_overrides({}, [f"{'.'.join(path)}={written}"])
    for key in path:
        node = node[key]
    assert node == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps", "'steps': must be KEY=VALUE, for example"),
        ("=3", "'=3': must be KEY=VALUE"),
        ("learner.lr=[1", "learner.lr: value '[1' is not YAML"),
        ("learner.lr.x=3", "learner.lr is no section, it has the value"),
    ],
)
def test_an_override_that_is_none(override: str, said: str) -> None:
    assert said in complaint(override)


# ---- unknown keys and values


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("lerner.lr=1", "unknown key 'lerner': did you mean 'learner'?"),
        ("learner.learning_rte=1", "unknown key 'learner.learning_rte': allowed: "),
        ("learner.kl.coeff=1", "unknown key 'learner.kl.coeff': did you mean 'learner.kl.coef'?"),
        ("data.columns.promt=q", "unknown key 'data.columns.promt': did you mean 'data.columns.prompt'?"),
        (
            "reward.sources.attention.presett=paper",
            "unknown key 'reward.sources.attention.presett': did you mean 'reward.sources.attention.preset'?",
        ),
        (
            "reward.sources.attention.options.spike_wieght=1",
            "did you mean 'reward.sources.attention.options.spike_weight'?",
        ),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(override: str, near: str) -> None:
    said = complaint(override)
    assert said.startswith(str(QA))
    assert near in said


def test_all_unknown_keys_are_named_at_once() -> None:
    said = complaint("lerner.lr=1", "run.sed=3", "policy.modle=x")
    assert all(key in said for key in ("'lerner'", "'run.sed'", "'policy.modle'"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.lr=abc", "learner.lr: value 'abc': "),
        ("run.seed=1.5", "run.seed: value 1.5: "),
        ("run.seed=-1", "run.seed: value -1: Input should be greater than or equal to 0"),
        ("policy.model=3", "policy.model: value 3: "),
        ("learner=3", "learner: value 3: "),
        ("run.trackers=[wanbd]", "value 'wanbd': Input should be 'tensorboard', 'wandb', 'mlflow' or 'trackio'"),
        ("rollout.engine=vlm", "rollout.engine: value 'vlm': Input should be "),
        ("reward.sources.attention.weight=heavy", "reward.sources.attention.weight: value 'heavy': "),
        ("reward.sources.other.kind=oracle", "reward.sources.other: "),
        ("rollout.top_p=0.5", "set truncation to 'replay'"),
        ("rollout.samples=1", "learner.advantage 'rloo'"),
        ("cluster.progress_s=90", "more than reward.worker.outage_s (120)"),
    ],
)
def test_a_value_that_is_not_allowed_names_key_value_and_what_is(override: str, said: str) -> None:
    assert said in complaint("learner.advantage=rloo", override)


def test_a_required_key_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"recipe: data: is required; policy: is required"):
        resolve({}, "recipe")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must be a mapping of sections (run, data, "),
        (b"- run", "must be a mapping of sections"),
        (b"run: [1", "not YAML"),
        (b"\xff\xfe\x00run", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


def test_the_reward_section_stands_alone_and_is_as_strict(tmp_path: Path) -> None:
    path = tmp_path / "reward.yaml"
    path.write_text("reward:\n  sources:\n    length: {kind: length, target: 9}\n")
    assert list(load_reward_section(path).sources) == ["length"]
    with pytest.raises(UserError, match=r"did you mean 'reward.sources.length.target'"):
        load_reward_section(path, ["reward.sources.length.tarket=3"])
    with pytest.raises(UserError, match=r"reward.sources.length.target: value 0: "):
        load_reward_section(path, ["reward.sources.length.target=0"])


# ---- the resolved recipe

KIND = "reward.sources.attention.kind=attention"  # some recipes name no source


def sources_of(config: Config) -> dict[str, Any]:
    return {name: getattr(source, "resolved", lambda: None)() for name, source in config.reward.sources.items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [KIND, "reward.sources.attention.preset=comparable"],
        [KIND, "reward.sources.attention.preset=comparable", "reward.sources.attention.options.per_token=true"],
        ["data.columns.prompt=q", "salience.keywords=[1st]", "data.template_options={day: 2024-01-01}"],
    ],
    ids=["as it is", "preset", "preset and option", "texts that YAML would read otherwise"],
)
def test_what_is_saved_resolves_to_the_same(recipe: Path, overrides: list[str], tmp_path: Path) -> None:
    config = load_recipe(recipe, overrides)
    saved = tmp_path / "config.yaml"
    save_resolved(config, saved)
    again = load_recipe(saved)
    assert again == config
    assert sources_of(again) == sources_of(config)
    assert again.reward.recipe_revision() == config.reward.recipe_revision()
    twice = tmp_path / "twice.yaml"
    save_resolved(again, twice)
    assert twice.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_what_is_saved_names_every_section_and_holds_plain_values(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_resolved(load_recipe(recipe), path)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(tree) == list(Config.model_fields)
    assert json.loads(json.dumps(tree)) == tree


def keys_without_a_description(model: type[BaseModel], path: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        found += [] if field.description else [f"{path}{name}"]
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += keys_without_a_description(part, f"{path}{name}.")
    return found


def test_every_key_says_what_it_is() -> None:
    assert keys_without_a_description(Config) == []


def test_the_schema_is_json_and_closed() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["required"] == ["data", "policy"]
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values() if part["type"] == "object")
    assert schema["$defs"]["RunSection"]["properties"]["groups_per_step"]["minimum"] == 1
