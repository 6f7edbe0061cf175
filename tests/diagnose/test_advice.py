"""Advice names only what exists: our recipes, fields of TRL's config, keys of verl's."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from uncollapse.catalogue import papers
from uncollapse.diagnose.advice import ADVICE, TARGET, advise
from uncollapse.diagnose.diagnosis import diagnose
from uncollapse.diagnose.finding import Facts
from uncollapse.diagnose.log import Log
from uncollapse.diagnose.phases import Course
from uncollapse.studies.testbeds import logs

VERL = set(Path(__file__).with_name("verl-0.9.1-keys.txt").read_text(encoding="utf-8").split())


def facts(start=0.83, **columns):
    named = {name.replace("__", "/"): np.full(30, value) for name, value in columns.items()}
    return Facts(Log("", "", np.arange(30), named), Course(start, ()), None, None)


EVERY = [
    ADVICE[name](one)
    for name in ADVICE
    for one in (facts(), facts(start=float("nan")), facts(lr=1e-6, grad__norm=0.4, length__mean=300.0))
]


def test_ids_are_their_keys():
    assert {name: make(facts()).id for name, make in ADVICE.items()} == {name: name for name in ADVICE}


def test_recipes_are_registered():
    from uncollapse.policy.registry import recipes

    assert {one.recipe for one in EVERY if one.recipe} <= set(recipes())
    assert {
        "grpo",
        "dr-grpo",
        "dapo",
        "gspo",
        "cispo",
        "entropy-bonus",
        "adaptive-entropy",
        "clip-cov",
        "kl-cov",
        "siren",
        "aepo-arbitrary",
    } == {one.recipe for one in EVERY if one.recipe}


def test_names_for_trl_are_fields_of_its_config():
    trl = pytest.importorskip("trl")
    fields = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}
    for one in EVERY:
        assert set(one.trl) <= set(fields), one.id


def test_values_for_trl_are_accepted_by_its_config(tmp_path):
    trl = pytest.importorskip("trl")
    for one in EVERY:
        given = {name: value for name, value in one.trl.items() if name != "eval_strategy"}
        rest = {
            "per_device_train_batch_size": 16,
            "output_dir": str(tmp_path),
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
        }
        made = trl.GRPOConfig(**rest, **given)
        assert {name: getattr(made, name) for name in given} == given


def test_names_for_verl_are_keys_of_its_config():
    for one in EVERY:
        assert set(one.verl) <= VERL, one.id


def test_loss_modes_for_verl_are_those_of_the_release():
    known = {"vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"}
    modes = {str(value) for one in EVERY for name, value in one.verl.items() if name.endswith("loss_mode")}
    assert modes <= known


def test_papers_are_arxiv_ids_and_the_catalogue_knows_some():
    for one in EVERY:
        assert all(re.fullmatch(r"\d{4}\.\d{4,5}", paper) for paper in one.arxiv)
        assert set(one.slugs) <= set(papers())
    assert ADVICE["clip-cov"](facts()).slugs == ("entropy-mechanism",)


def test_the_target_comes_from_the_run_and_is_left_out_without_one():
    assert ADVICE["adaptive-entropy"](facts(start=0.83)).trl["entropy_target"] == pytest.approx(
        TARGET * 0.83, rel=0.03
    )
    assert "entropy_target" not in ADVICE["adaptive-entropy"](facts(start=float("nan"))).trl


def test_lines_can_be_pasted():
    one = ADVICE["gspo"](facts())
    assert eval(f"dict({one.trl_lines()})") == dict(one.trl)
    pairs = [line.rstrip(" \\").split("=", 1) for line in one.verl_lines().splitlines()]
    assert [name for name, _ in pairs] == list(one.verl)
    assert all(line.endswith("\\") for line in one.verl_lines().splitlines()[:-1])
    assert ADVICE["held-out"](facts()).verl_lines().count("do_sample=true") == 1


def test_every_finding_asks_for_advice_that_exists_and_each_is_given_once():
    for kind in logs.kinds():
        found = diagnose(logs.make(kind, logs.TUNING[0]).log)
        wanted = [name for one in found.findings for name in one.advice]
        assert [one.id for one in found.advice] == list(dict.fromkeys(wanted))
    assert advise([], facts()) == ()


def test_remedies_that_are_known_to_backfire_say_so():
    for name in ("entropy-bonus", "clip-cov", "kl-cov", "adaptive-entropy", "clip-higher", "more-updates"):
        assert ADVICE[name](facts()).caution


def test_what_a_run_does_already_is_not_advised():
    log = logs.make("slow-collapse", 0).log
    plain = [one.id for one in diagnose(log).advice]
    held = {"entropy_coef": 0.001, "recipe/name": "clip-cov", "actor_rollout_ref.actor.clip_ratio_high": 0.28}
    left = [one.id for one in diagnose(dataclasses.replace(log, settings=held)).advice]
    assert set(plain) - set(left) == {"entropy-bonus", "clip-cov", "clip-higher"}
    other = diagnose(dataclasses.replace(log, settings={"entropy_coef": 0.5})).advice
    assert [one.id for one in other] == plain
