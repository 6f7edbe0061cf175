"""Level `registry`: a recipe through verl's own advantage and loss calls equals the testbed."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("verl.trainer", reason="verl is not installed; run: make test-verl")

import numpy as np
from lab import Table, TableLab, moved_on
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding
from workers import LabWorkers, as_verl, lab_prompts

import uncollapse.integrations.verl as ours
from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations.verl import registries
from uncollapse.integrations.verl_levels import refusals
from uncollapse.policy.batch import Clock
from uncollapse.policy.registry import recipe, recipes
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stats import Entropy
from uncollapse.studies.testbeds.engine import LogitsEngine

PROMPTS, SAMPLES = [3, 0, 4, 1], 4
ABLE = [name for name, made in recipes().items() if not refusals(made)["registry"]]


def actor(name, **changes):
    settings = {
        "strategy": "fsdp", "rollout_n": SAMPLES, "ppo_micro_batch_size_per_gpu": 1,
        "policy_loss": PolicyLossConfig(loss_mode=f"uncollapse/{name}"),
        "loss_agg_mode": registries.AGGREGATION[registries.kind_of(recipe(name).mean)],
        "loss_scale_factor": TableLab().token_limit if name == "dr-grpo" else None,
    }  # fmt: skip
    return FSDPActorConfig(**(settings | changes))


def sampled(name, seed=0):
    made = replace(recipe(name), sampler=PlainSampler(SAMPLES))
    engine = LogitsEngine(TableLab(), Table(prompts=5))
    raw = made.sampler(engine, PROMPTS, Clock(seed=seed))
    return made, engine, engine.measure(raw, made.stats("rollout") | {Entropy("old")})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("micro", [1, 4, None])
@pytest.mark.parametrize("name", ABLE)
def test_through_verls_own_calls_the_loss_is_that_of_the_testbed(name, micro, ranks):
    made, engine, raw = sampled(name)
    data = as_verl(
        raw, lab_prompts(PROMPTS), order=torch.randperm(16, generator=torch.Generator().manual_seed(1))
    )
    data.batch["token_level_rewards"] = data.batch["token_level_scores"]
    moved_on(engine.policy)
    batch = made.prepare(raw)
    data.batch["old_log_probs"] = batch.old_logp[data.batch["uncollapse/row"]]
    data = compute_advantage(data, adv_estimator=f"uncollapse/{name}", config={})
    plan = made.plan(batch)
    report = made.loss(engine.measure(plan, made.stats("loss"), grad=True))
    report.loss.backward()
    expected = engine.policy.table.grad.clone()
    config = actor(name)

    class Workers(LabWorkers):
        """verl's `ppo_loss` asks for the totals of the step, which its engines gather."""

        def loss(self, model_output, data, dp_group=None):
            tu.assign_non_tensor(data, batch_num_tokens=int(plan.mask.sum()), global_batch_size=len(plan))
            return ppo_loss(config, model_output, data)

    workers = Workers(engine.policy, ranks=ranks, micro=micro, tokens=30)
    workers.set_loss_fn(workers.loss)
    inputs = left_right_2_no_padding(data.to_tensordict())
    tu.assign_non_tensor(
        inputs, mini_batch_size=len(plan), epochs=1, seed=0, dataloader_kwargs={"shuffle": False}, temperature=1.0
    )  # fmt: skip
    workers.update_actor(inputs)
    assert workers.losses[0] == pytest.approx(float(report.loss), abs=1e-10)
    torch.testing.assert_close(workers.gradients[0], expected, rtol=0, atol=1e-10)


def test_what_the_registries_cannot_express_is_refused_with_every_reason():
    made = refusals(recipe("adaptive-entropy"))["registry"]
    assert "it does not save the state of AdaptiveEntropy" in made
    assert any("weights" in reason for reason in refusals(recipe("clip-cov"))["registry"])
    with pytest.raises(ConfigError, match=r"'clip-cov' cannot run in verl's registries: .*weights"):
        ours.register_recipe(recipe("clip-cov"))


def test_all_able_recipes_are_registered_under_our_prefix_and_twice_is_once():
    assert {f"uncollapse/{name}" for name in ABLE} <= set(core_algos.POLICY_LOSS_REGISTRY)
    assert {f"uncollapse/{name}" for name in ABLE} <= set(core_algos.ADV_ESTIMATOR_REGISTRY)
    assert ours.register_all() == tuple(f"uncollapse/{name}" for name in ABLE)


@pytest.mark.parametrize("registry", [core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY])
def test_trap_a_taken_name_is_refused_where_verl_overwrites_in_silence(registry, monkeypatch):
    monkeypatch.setitem(registry, "uncollapse/mine", print)
    with pytest.raises(ConfigError, match="something else registered as 'uncollapse/mine'"):
        ours.register_recipe(replace(recipe("grpo"), name="mine"))
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "taken", print)
    core_algos.register_policy_loss("taken")(sorted)
    assert core_algos.POLICY_LOSS_REGISTRY["taken"] is sorted  # what verl itself does


def call(name, **changes):
    config = actor(name, **changes)
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=4, global_batch_size=2, loss_scale_factor=config.loss_scale_factor
    )
    table = torch.zeros(2, 6)
    mask = torch.ones(2, 6)
    return registries.RegistryLoss(recipe(name))(table, table, table, mask, config.loss_agg_mode, config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "grpo",
            {"loss_agg_mode": "token-mean"},
            "means actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
        ),
        ("grpo", {"entropy_coeff": 0.1}, r"actor.entropy_coeff=0.1: the recipe 'grpo' decides this"),
        ("cispo", {"clip_ratio_high": 0.3}, r"actor.clip_ratio_high=0.3"),
        ("dr-grpo", {"loss_scale_factor": None}, "divides by the token limit"),
    ],
)
def test_options_that_ask_for_another_loss_are_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        call(name, **changes)


def test_advantages_need_groups_and_scorable_rewards_and_know_no_step():
    estimate = core_algos.get_adv_estimator_fn("uncollapse/grpo")
    rewards, mask = torch.zeros(4, 3), torch.ones(4, 3)
    with pytest.raises(DataError, match="no uid"):
        estimate(rewards, mask)
    rewards[1, 2] = torch.nan
    with pytest.raises(DataError, match="1 of 4 rewards are NaN; level 'registry' cannot drop rows"):
        estimate(rewards, mask, index=np.array(["a", "a", "b", "b"]))

    class Timed:
        needs, gives, scope = frozenset({"reward"}), frozenset({"reward"}), "rollout"

        def __call__(self, batch):
            return {"reward": batch.reward * batch.clock.step}

    timed = registries.RegistryAdvantage(replace(recipe("grpo"), rewards=(Timed(),)))
    with pytest.raises(ConfigError, match="registries know no step"):
        timed(torch.zeros(4, 3), mask, index=np.array(["a", "a", "b", "b"]))


def test_entries_survive_pickling():
    for entry in (
        core_algos.POLICY_LOSS_REGISTRY["uncollapse/gspo"],
        core_algos.ADV_ESTIMATOR_REGISTRY["uncollapse/gspo"],
    ):
        assert pickle.loads(pickle.dumps(entry)) == entry
