"""Recipes in TRL: equal to TRL's own loss, to the testbed, at any accumulation, and exact over a resume."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
import toy

from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations import offers
from uncollapse.integrations.trl import GRPOTrainer
from uncollapse.policy.batch import Batch
from uncollapse.policy.config import resolve
from uncollapse.policy.cure import CureSampler, TwoStageSampler
from uncollapse.policy.recipe import Weighted
from uncollapse.policy.registry import recipe, recipes
from uncollapse.policy.siren import Siren
from uncollapse.policy.stages.regularizers import KLPenalty
from uncollapse.studies.testbeds.engine import LogitsEngine
from uncollapse.token_dump import read_dump

pytestmark = pytest.mark.filterwarnings("ignore")

RUNS = [n for n, made in recipes().items() if not made.refusals(offers.TRL) and not made.split_dependent]
"""Every recipe that TRL runs, now and later; those marked as dependent on the split cannot be compared across splits."""


class Gradients(TrainerCallback):
    """Keeps the model before each optimiser step and its gradient."""

    def __init__(self):
        self.models, self.gradients = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.models.append({k: v.detach().clone() for k, v in model.state_dict().items()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])


def run(tmp_path, trainer_class=GRPOTrainer, model=None, *, scripted=True, **changes):
    extra = {
        key: changes.pop(key)
        for key in ("recipe", "reward", "peft_config", "share_prompts", "dump_tokens")
        if key in changes
    }
    reward = extra.pop("reward", toy.digit_share)
    keep = Gradients()
    trainer = trainer_class(
        model or toy.llama(),
        reward,
        toy.config(tmp_path, **({"max_grad_norm": 0.0} | changes)),
        train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(),
        callbacks=[keep],
        **extra,
    )
    if scripted:
        toy.scripted(trainer)
    trainer.train()
    return trainer, keep


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_plain_grpo_equals_the_loss_and_gradient_of_trl(tmp_path):
    ours, mine = run(tmp_path / "a", recipe="grpo")
    theirs, other = run(tmp_path / "b", trl.GRPOTrainer, loss_type="grpo")
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-6)
    for a, b in zip(mine.gradients[0], other.gradients[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "clip-cov", "kl-cov"])
def test_gradient_accumulation_changes_nothing(tmp_path, name):
    whole, a = run(tmp_path / "a", recipe=name, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    split, b = run(tmp_path / "b", recipe=name, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert losses(split) == pytest.approx(losses(whole), abs=1e-6)
    for x, y in zip(a.gradients[0], b.gradients[0], strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["grpo", "clip-cov", "kl-cov", "adaptive-entropy"])
@pytest.mark.parametrize("steps_per_generation", [1, 4])
def test_sharing_prompts_changes_nothing(tmp_path, name, steps_per_generation):
    changes = {
        "recipe": name, "scripted": False, "max_steps": 4, "steps_per_generation": steps_per_generation,
        "generation_kwargs": {"min_new_tokens": 6},
    }  # fmt: skip
    shared, a = run(tmp_path / "a", model=toy.llama(dtype=torch.float64), **changes)
    plain, b = run(tmp_path / "b", model=toy.llama(dtype=torch.float64), **changes, share_prompts=False)
    assert shared.shares_prompts
    assert not plain.shares_prompts
    assert losses(shared) == pytest.approx(losses(plain), abs=1e-6)
    for x, y in zip(a.models[-1].values(), b.models[-1].values(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


class Shuffled(GRPOTrainer):
    """A trainer whose data loader was taken from elsewhere: it knows nothing of groups."""

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(0))


def test_groups_of_different_prompts_are_an_error(tmp_path):
    with pytest.raises(DataError, match="group 0 holds different prompts"):
        run(tmp_path, Shuffled, recipe="grpo")


def test_a_rollout_of_several_updates_keeps_groups_whole(tmp_path):
    trainer, _ = run(tmp_path, Recording, recipe="grpo", steps_per_generation=4, max_steps=4)
    for window in trainer.windows:
        assert sorted(window.group.unique(return_counts=True)[1].tolist()) == [4, 4]
    order = [tuple(window.group.tolist()) for window in trainer.windows]
    assert order != sorted(order)


@pytest.mark.parametrize("name", RUNS)
def test_one_forward_pass_gives_what_two_give(tmp_path, name):
    """A rollout in one micro-batch takes its old statistics from the pass with gradient; in two, from a pass before."""
    one, a = run(tmp_path / "a", recipe=name, per_device_train_batch_size=16)
    two, b = run(tmp_path / "b", recipe=name, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    metrics = [
        {k: v for k, v in row.items() if "/" in k and "time" not in k} for row in one.state.log_history
    ]
    others = [{k: v for k, v in row.items() if "/" in k and "time" not in k} for row in two.state.log_history]
    for x, y in zip(metrics, others, strict=True):
        assert {k: v for k, v in x.items()} == pytest.approx({k: y[k] for k in x}, abs=2e-5, nan_ok=True)
    for x, y in zip(a.gradients[-1], b.gradients[-1], strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in RUNS if recipe(name).has("minibatch")])
def test_later_updates_plan_from_their_own_forward_pass_or_from_one_before(tmp_path, name):
    """A step of one micro-batch decides from its pass with gradient; one of two from a pass before. The same comes out."""
    common = {"recipe": name, "learning_rate": 1e-2, "max_steps": 4}
    own, a = run(tmp_path / "a", **common, per_device_train_batch_size=8, steps_per_generation=2)
    before, b = run(
        tmp_path / "b", **common, per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=2
    )  # fmt: skip
    assert losses(before) == pytest.approx(losses(own), abs=1e-6)
    for x, y in zip(a.gradients[-1], b.gradients[-1], strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"steps_per_generation": 4}, {"gradient_accumulation_steps": 2}])
def test_a_token_dump_holds_every_rollout(tmp_path, changes):
    trainer, _ = run(
        tmp_path, Recording, recipe="clip-cov", max_steps=4, dump_tokens=tmp_path / "dump", **changes
    )
    steps = list(read_dump(tmp_path / "dump"))
    assert [tokens.step for tokens in steps] == list(range(trainer._rollouts))
    last, mask = steps[-1], trainer.raw.mask
    assert len(last) == int(trainer.raw.columns["length"].sum())
    assert last.integer("token").tolist() == trainer.raw.columns["ids"][mask].tolist()
    rows = trainer.raw.uid[:, None].expand_as(mask)[mask]
    assert last.integer("uid").tolist() == rows.tolist()
    assert last.number("reward") == pytest.approx(trainer.raw.reward[rows].numpy())
    assert (last.number("entropy") > 0).all()
    assert set("".join(last.text)) <= set("0123456789+= <pad>eos")
    moved = np.abs(last.number("logp") - last.number("old_logp"))[last.mask]
    assert (moved.max() > 1e-5) == ("steps_per_generation" in changes)


@dataclass
class TransformersLab:
    """The logits of a transformers model, row by row and without padding."""

    token_limit: int = 6

    def logits(self, policy, prompts, ids):
        rows = []
        for prompt, row in zip(prompts, ids, strict=True):
            tokens = torch.cat([torch.tensor(prompt), row])[None]
            rows.append(policy(tokens).logits[0, len(prompt) - 1 : -1])
        return torch.stack(rows)

    def sample(self, policy, prompts, *, temperature, seed, given=None):
        raise NotImplementedError

    def reward(self, prompts, ids, mask):
        raise NotImplementedError

    def fresh_prompts(self, count, *, seed):
        raise NotImplementedError


class Recording(GRPOTrainer):
    """Keeps the raw rollout batch with the prompts of its rows."""

    def _sampled(self, inputs, clock):
        output, batch = super()._sampled(inputs, clock)
        prompts = [
            row[keep.bool()].tolist()
            for row, keep in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        self.raw = batch.with_columns(prompt=prompts)
        self.weights_then = copy.deepcopy(self.model.state_dict())
        return output, batch

    def _plan_window(self):
        super()._plan_window()
        self.windows = [*getattr(self, "windows", []), self._window]

    def _finish_rollout(self):
        self.last = self._rollout or getattr(self, "last", None)
        super()._finish_rollout()


@pytest.mark.parametrize("name", RUNS)
def test_conformance_with_the_testbed(tmp_path, name):
    method = recipe(name)
    branches = isinstance(method.sampler, CureSampler)
    if branches:  # every token of the toy's vocabulary has one character
        method = replace(method, sampler=replace(method.sampler, shortest=1, k=2))
    trainer, keep = run(
        tmp_path, Recording, toy.llama(dtype=torch.float64), recipe=method, gradient_accumulation_steps=2,
        steps_per_generation=4, per_device_train_batch_size=4, learning_rate=5e-2,
    )  # fmt: skip
    assert not branches or bool((trainer.raw.columns["cut"] > 0).any())
    # Float32 rewards come from TRL; everything else is float64.
    model = toy.llama(dtype=torch.float64)
    model.load_state_dict(trainer.weights_then)
    engine = LogitsEngine(TransformersLab(), model)
    batch = method.prepare(engine.measure(trainer.raw, method.stats("rollout")))
    for update, window in enumerate(trainer.windows):
        model.load_state_dict(keep.models[update])
        mini = replace(batch[window.uid], clock=window.clock)
        if method.has("minibatch"):
            mini = engine.measure(mini, method.stats("plan"))
        planned = method.plan(mini)
        for column, value in planned.columns.items():
            if column.startswith(("map/", "own/")) or column in ("advantage", "weight"):
                torch.testing.assert_close(
                    window.columns[column].double(), value.double(), atol=1e-9, rtol=1e-6
                )
        model.zero_grad()
        method.loss(engine.measure(planned, method.stats("loss"), grad=True)).loss.backward()
        for ours, reference in zip(keep.gradients[update], model.parameters(), strict=True):
            torch.testing.assert_close(ours, reference.grad, atol=1e-8, rtol=1e-5)


def plateau():
    """CURE until the second rollout, which is known by the rewards of both, so that a resume has to remember the first."""
    sampler = TwoStageSampler(k=2, shortest=1, switch_step=None, patience=1, gain=10.0)
    return replace(recipe("cure-two-stage"), name="plateau", sampler=sampler)


@pytest.mark.parametrize(
    "name",
    ["clip-cov", "adaptive-entropy", "siren", "aepo-arbitrary", pytest.param(plateau(), id="cure-two-stage")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    def train(folder, steps, resume=None):
        trainer = GRPOTrainer(
            toy.llama(), toy.digit_share,
            toy.config(folder, max_steps=steps, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
                       steps_per_generation=4),
            train_dataset=toy.prompts(), processing_class=toy.tokenizer(), recipe=name,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "cut", 2)
    resumed = train(tmp_path / "cut", 6, str(tmp_path / "cut" / "checkpoint-2"))
    assert resumed.recipe.state_dict() == whole.recipe.state_dict()
    remembers = bool(whole.recipe.state_dict()["stages"])
    assert (whole.recipe.state_dict() != resolve(name).state_dict()) == remembers
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run(tmp_path, recipe="grpo", save_strategy="steps", save_steps=2)
    other = GRPOTrainer(
        toy.llama(), toy.digit_share, toy.config(tmp_path, max_steps=4), train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(), recipe="adaptive-entropy",
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match="checkpoint is of recipe 'grpo', this run is of 'adaptive-entropy'"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.1}, "beta=0.1: the recipe 'grpo' decides this"),
        ({"loss_type": "dr_grpo"}, "loss_type='dr_grpo'"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, "must be a multiple of"),
    ],
)
def test_options_that_the_recipe_owns_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, recipe="grpo", **changes)


def warned_of(tmp_path, name, **changes):
    """What is said when a trainer is made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GRPOTrainer(
            toy.llama(), toy.digit_share, toy.config(tmp_path, **changes), train_dataset=toy.prompts(),
            processing_class=toy.tokenizer(), recipe=name,
        )  # fmt: skip
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"top_p": 0.9}, "top_p=0.9: "),
        ({"top_k": 20, "min_p": 0.1}, "top_k=20, min_p=0.1: "),
        ({"generation_kwargs": {"top_p": 0.5}}, "top_p=0.5: "),
    ],
)
def test_sampling_from_a_part_of_the_vocabulary_is_warned_of_where_the_whole_is_read(tmp_path, changes, told):
    said = [line for line in warned_of(tmp_path, "siren", **changes) if "the whole vocabulary" in line]
    assert len(said) == 1
    assert said[0].startswith(f"{told}the recipe 'siren' reads NucleusEntropy of the whole vocabulary")
    assert not any("vocabulary" in line for line in warned_of(tmp_path, "grpo", **changes))
    assert not any("vocabulary" in line for line in warned_of(tmp_path, "siren", top_k=0, top_p=1.0))


@pytest.mark.parametrize("name", ["gtpo", "lp-reg-on-policy"])
def test_several_updates_of_a_recipe_for_one_are_warned_of(tmp_path, name):
    said = "is for one optimiser step per rollout batch"
    assert any(said in line for line in warned_of(tmp_path, name, steps_per_generation=2))
    assert not any(said in line for line in warned_of(tmp_path, name))


def test_a_target_above_the_entropy_of_the_model_is_refused(tmp_path):
    siren = recipe("siren")
    weighted = replace(siren.regularizers[0], term=Siren(target=50.0))
    with pytest.raises(ConfigError, match="target is 50 nats, but the entropy over"):
        run(tmp_path, recipe=replace(siren, regularizers=(weighted,)))


def test_a_reference_policy_is_there_when_a_penalty_reads_it_and_only_then(tmp_path):
    from peft import LoraConfig

    penalised = replace(
        recipe("grpo"), name="grpo-kl", regularizers=(Weighted(KLPenalty("ref", "k3"), coef=0.1),)
    )
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    trainer, keep = run(tmp_path, recipe=penalised, peft_config=lora)
    first = next(row for row in trainer.state.log_history if "loss/KLPenalty" in row)
    assert first["loss/KLPenalty"] > 0  # the adapter is not zero at the start, so it differs from its base
    assert any(g is not None and g.abs().sum() > 0 for g in keep.gradients[0])
    plain, _ = run(tmp_path / "plain", recipe="grpo")
    assert plain.ref_model is None


def test_an_unscorable_row_is_named_and_leaves_the_loss(tmp_path):
    def sometimes(prompts, completions, **columns):
        return [None if i == 5 else float(len(text)) for i, text in enumerate(completions)]

    with pytest.warns(UserWarning, match=r"1 of 8 rewards are NaN \(rows 5\)"):
        trainer, keep = run(tmp_path, recipe="grpo", reward=sometimes, max_steps=1)
    assert not trainer._window.mask[trainer._window.uid == 5].any()
    assert all(torch.isfinite(g).all() for g in keep.gradients[0] if g is not None)


def test_dynamic_sampling_replaces_dead_groups(tmp_path):
    trainer, _ = run(tmp_path, recipe="dapo", reward=toy.odd_prompts_are_dead, per_device_train_batch_size=16)
    logged = [row for row in trainer.state.log_history if "sampler/oversampling" in row]
    assert logged[0]["sampler/oversampling"] > 1
    assert logged[0]["reward/zero_variance_groups"] < 0.5


def test_the_whole_divergence_of_lp_reg_acts_in_trl(tmp_path):
    made = recipe("lp-reg-on-policy")
    pulled, bare = (
        replace(made, surrogate=replace(made.surrogate, rho=1.0, kappa=0.65, beta=beta))
        for beta in (1.0, 0.0)
    )
    (_, with_term), (_, without) = (
        run(tmp_path / str(at), recipe=one, max_steps=1) for at, one in enumerate((pulled, bare))
    )
    pairs = list(zip(with_term.gradients[0], without.gradients[0], strict=True))
    assert all(torch.isfinite(a).all() for a, _ in pairs)
    assert any(not torch.allclose(a, b) for a, b in pairs)


def test_gpt2_with_absolute_positions_and_padding(tmp_path):
    trainer, _ = run(tmp_path, Recording, toy.gpt2(), recipe="grpo", max_steps=1)
    model = toy.gpt2()
    model.load_state_dict(trainer.weights_then)
    engine = LogitsEngine(TransformersLab(), model)
    raw: Batch = trainer.raw
    method = recipe("grpo")
    reference = engine.measure(raw, method.stats("rollout")).stats
    for stat in method.stats("rollout"):
        torch.testing.assert_close(trainer.last.stats[stat], reference[stat], atol=1e-5, rtol=1e-5)
