"""Recipes as YAML: the round trip of every registered recipe, and one line for everything that can be wrong."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError, UnknownName
from uncollapse.policy.batch import Stat
from uncollapse.policy.config import load_recipes, options_of, recipe_to_dict, recipe_to_yaml, resolve
from uncollapse.policy.config.describe import describe
from uncollapse.policy.config.names import SLOTS, register_stage, stages
from uncollapse.policy.recipe import Recipe, Weighted
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.registry import recipe, recipes
from uncollapse.policy.schedules import Cosine, Linear
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stages.filters import DropDeadGroups
from uncollapse.policy.stages.regularizers import EntropyBonus, KLPenalty
from uncollapse.policy.stages.rewards import SoftOverlong
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import PPOClip

EVERYTHING = {"reward", "group", "ids", "length", "finished", "token_limit", "fresh_prompts", "other_logits"}
OFFERS = frozenset({*EVERYTHING, Stat})


def write(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_registered_recipe_survives_the_round_trip(name, tmp_path):
    made = recipe(name)
    path = write(tmp_path, recipe_to_yaml(made))
    assert resolve(path) == made
    assert resolve(recipe_to_dict(made)) == made


@pytest.mark.parametrize("name", sorted(recipes()))
def test_the_written_form_spells_out_every_option(name):
    data = recipe_to_dict(recipe(name))
    for slot in ("rewards", "filters", "advantage", "weights"):
        for stage, made in zip(data[slot], getattr(recipe(name), slot), strict=True):
            options = next(iter(stage.values())) if isinstance(stage, dict) else {}
            assert set(options) == set(options_of(type(made)))


numbers = st.floats(min_value=1e-6, max_value=1.0)
schedules = st.one_of(
    numbers,
    st.builds(Linear, start=numbers, end=numbers, steps=st.integers(1, 999)),
    st.builds(Cosine, start=numbers, end=numbers, steps=st.integers(1, 999)),
)
means = st.one_of(
    st.builds(
        Mean,
        levels=st.sampled_from([(), ("row",), ("trajectory", "turn")]),
        rows=st.sampled_from(["nonempty", "all"]),
    ),
    st.builds(Sum, divisor=st.one_of(st.none(), st.floats(1, 1e5)), per_row=st.booleans()),
)


@settings(max_examples=30, deadline=None)
@given(
    low=numbers,
    dual=st.one_of(st.none(), st.floats(1.5, 9)),
    mean=means,
    coef=schedules,
    own_mean=means,
    parts=st.sets(st.sampled_from(["policy", "tempered", "replay"]), min_size=1),
    estimator=st.sampled_from(["k1", "k2", "k3", "exact"]),
)
def test_any_combination_of_options_survives_the_round_trip(
    low, dual, mean, coef, own_mean, parts, estimator
):
    made = Recipe(
        name="made",
        paper="",
        summary="ä: # \"quotes\" and 'more'",
        sampler=PlainSampler(samples=3, temperature=0.7),
        filters=(DropDeadGroups(),),
        advantage=(GroupAdvantage(std=False, eps=low),),
        surrogate=PPOClip(low=low, high=low, dual=dual),
        mean=mean,
        regularizers=(
            Weighted(EntropyBonus(), coef=coef, mean=own_mean, parts=frozenset(parts)),
            Weighted(KLPenalty(estimator=estimator), coef=0.1),
        ),
    )
    again = resolve(yaml.safe_load(recipe_to_yaml(made)))
    assert again == made
    assert recipe_to_yaml(again) == recipe_to_yaml(made)


def test_base_bare_names_and_the_short_forms(tmp_path):
    path = write(
        tmp_path,
        """
name: mine
base: grpo
mean: [trajectory, turn]
filters: [drop-dead-groups]
surrogate: {ppo-clip: {high: 28e-2}}
regularizers:
  - entropy-bonus
  - {term: {kl-penalty: {estimator: k2}}, coef: {cosine: {steps: 200}}, mean: {levels: [row], rows: all}}
  - {term: entropy-bonus, coef: 1e-4, mean: {sum: {divisor: 3072}}}
""",
    )
    made = resolve(path)
    assert made.advantage == recipe("grpo").advantage
    assert made.surrogate == PPOClip(high=0.28)
    assert made.mean == Mean(("trajectory", "turn"))
    assert made.filters == (DropDeadGroups(),)
    first, second, third = made.regularizers
    assert first == Weighted(EntropyBonus())
    assert second == Weighted(KLPenalty(estimator="k2"), Cosine(steps=200), Mean(("row",), "all"))
    assert third == Weighted(EntropyBonus(), 1e-4, Sum(3072.0))  # YAML 1.1 reads 1e-4 as text


def test_a_file_may_hold_several_recipes(tmp_path):
    path = write(tmp_path, "- {name: a, base: grpo}\n- {name: b, base: dapo}\n")
    assert list(load_recipes(path)) == ["a", "b"]
    assert resolve(f"{path}:b").filters == recipe("dapo").filters
    with pytest.raises(ConfigError, match=r"holds 2 recipes; pick one as .*recipe.yaml:a"):
        resolve(path)
    with pytest.raises(ConfigError, match=r"unknown recipe 'c'"):
        resolve(f"{path}:c")


def test_resolve_takes_names_recipes_and_mappings():
    assert resolve("grpo") == recipe("grpo")
    made = recipe("dapo")
    assert resolve(made) is made
    with pytest.raises(UnknownName, match="did you mean kl-cov"):
        resolve("kl-cv")


GOOD = "surrogate: ppo-clip\nadvantage: [group-advantage]\nmean: token\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\nbase: grpo\nadvantage:\n  - group-advantage:\n      epps: 1\n",
            r"^recipe.yaml:5: advantage\[0\].group-advantage: unknown option 'epps'; did you mean eps\?$",
        ),
        (
            "name: x\nbase: grpo\nweigths: []\n",
            r"^recipe.yaml:3: unknown key 'weigths'; did you mean weights",
        ),
        ("name: x\nbase: kl-cv\n", r"^recipe.yaml:2: base: unknown recipe 'kl-cv'; did you mean kl-cov"),
        ("base: grpo\n", r"^recipe.yaml:1: a recipe needs a `name`"),
        (
            "name: x\nsurrogate: ppo-clip\n",
            r"recipe.yaml:1: a recipe without `base` needs `advantage`, `mean`",
        ),
        ("name: grpo\nbase: dapo\n", r"^recipe.yaml:1: name: 'grpo' is registered already with other stages"),
        (
            "name: x\nbase: grpo\nfilters: [drop-dead-group]\n",
            r"^recipe.yaml:3: filters\[0\]: unknown filters stage 'drop-dead-group'; did you mean drop-dead-groups",
        ),
        (
            "name: x\nbase: grpo\nfilters: [group-advantage]\n",
            r"no filters stage 'group-advantage'; 'group-advantage' belongs under advantage",
        ),
        (
            "name: x\nbase: grpo\nsurrogate: {ppo-clip: {low: abc}}\n",
            r"^recipe.yaml:3: surrogate.ppo-clip.low: expected a number, got 'abc'$",
        ),
        ("name: x\nbase: grpo\nsurrogate: {ppo-clip: {low: .nan}}\n", r"expected a number, got nan"),
        ("name: x\nbase: grpo\nsurrogate: {ppo-clip: {low: true}}\n", r"expected a number, got True"),
        (
            "name: x\nbase: grpo\nsurrogate:\n  ppo-clip:\n    low: -1\n",
            r"recipe.yaml:4: surrogate.ppo-clip: ppo-clip: low and high must be",
        ),
        (
            "name: x\nbase: grpo\nsampler: {plain-sampler: {samples: 8.5}}\n",
            r"expected a whole number, got 8.5",
        ),
        ("name: x\nbase: grpo\nadvantage: [{group-advantage: {std: 1}}]\n", r"expected true or false, got 1"),
        (
            "name: x\nbase: grpo\nadvantage: [{group-advantage: {needs: [a]}}]\n",
            r"unknown option 'needs'",
        ),
        ("name: x\nbase: grpo\nsurrogate: {ppo-clip: {scope: rollout}}\n", r"unknown option 'scope'"),
        (
            "name: x\nbase: grpo\nadvantage: [{group-advantage: {scope: minibach}}]\n",
            r"unknown value 'minibach'; did you mean minibatch",
        ),
        ("name: x\nbase: grpo\nadvantage: group-advantage\n", r"advantage has to be a list, got 'group-adv"),
        (
            "name: x\nbase: grpo\nrewards: [{a: 1, b: 2}]\n",
            r"expected a stage, .*got a mapping with 'a', 'b'",
        ),
        ("name: x\nbase: grpo\nmean: 3\n", r"recipe.yaml:3: mean: expected token, row"),
        ("name: x\nbase: grpo\nmean: {sum: {divisr: 3}}\n", r"mean.sum: unknown option 'divisr'"),
        (
            "name: x\nbase: grpo\nregularizers: [{term: entropy-bonus, parts: [polcy]}]\n",
            r"unknown part 'polcy'",
        ),
        ("name: x\nname: y\nbase: grpo\n", r"^recipe.yaml:2: name: this key is given twice"),
        ("name: x\nbase: [grpo\nmean: token\n", r"^recipe.yaml:\d: malformed YAML: "),
        ("name: x\n\tbase: grpo\n", r"^recipe.yaml:2: malformed YAML: "),
        ("name: &a [*a]\n", r"an alias refers to what contains it"),
        ("name: !!python/object/apply:os.system [ls]\n", r"expected text, got a list"),
        ("", r"a recipe has to be a mapping"),
        ("[]", r"no recipe in it"),
        ("{? [1] : 2}", r"a key has to be a plain word"),
        (f"name: x\n{GOOD}summary: 3\n", r"summary: expected text, got 3"),
    ],
)
def test_an_error_says_where_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere.yaml: No such file"):
        resolve(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        resolve(tmp_path / "binary.yaml")


def test_python_objects_are_not_made(tmp_path):
    path = write(tmp_path, "name: !!python/object/apply:os.getcwd []\nbase: grpo\n")
    with pytest.raises(ConfigError):
        resolve(path)


def test_a_stage_name_can_be_taken_once():
    @dataclasses.dataclass(frozen=True)
    class Mine(SoftOverlong):
        """A stage that nobody has named."""

    with pytest.raises(ConfigError, match="'ppo-clip' is registered already, for PPOClip"):
        register_stage("surrogate", "ppo-clip", Mine)
    with pytest.raises(ConfigError, match="PPOClip is registered already, as 'ppo-clip'"):
        register_stage("surrogate", "another", PPOClip)
    with pytest.raises(UnknownName, match="unknown slot 'surogate'; did you mean surrogate"):
        register_stage("surogate", "mine", Mine)
    register_stage("surrogate", "ppo-clip", PPOClip)
    with pytest.raises(ConfigError, match=r'Mine has no name.*register_stage\("rewards"'):
        recipe_to_dict(dataclasses.replace(recipe("grpo"), rewards=(Mine(),)))


@pytest.mark.parametrize("slot", SLOTS)
def test_every_named_stage_has_defaults_that_can_be_built(slot):
    for name, kind in stages(slot).items():
        assert name == name.lower().replace("_", "-")
        assert kind() == kind()


# ---- describe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_can_be_described(name):
    card = describe(recipe(name), engines={"all": OFFERS, "nothing": frozenset()})
    assert card.engines["all"] == ()
    assert card.engines["nothing"]
    assert [stage.slot for stage in card.stages].count("surrogate") == 1
    assert "Logp" in card.needs["old"]
    assert "Logp" in card.needs["now"]


def test_a_description_names_needs_memory_costs_and_what_is_inert():
    made = dataclasses.replace(recipe("grpo"), name="m", regularizers=(Weighted(KLPenalty(), 0.1),))
    card = describe(made, engines={}, updates=1)
    assert card.needs["ref"] == ("Logp",)
    assert any("reference model" in line for line in card.forwards)
    assert any("ppo-clip does nothing with one optimiser step" in line for line in card.warnings)
    assert not any("does nothing" in line for line in describe(made, engines={}, updates=4).warnings)
    adaptive = describe(recipe("adaptive-entropy"), engines={})
    assert [stage.name for stage in adaptive.stages if stage.memory] == ["adaptive-entropy"]
    off = dataclasses.replace(made, regularizers=(Weighted(EntropyBonus(), 0.0),))
    assert any("coefficient 0" in line for line in describe(off, engines={}).warnings)
