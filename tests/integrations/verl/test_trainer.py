"""verl's own `fit` with our trainer: real loop, real data flow, with stand-ins for the rollout and the worker group."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl.trainer", reason="verl is not installed; run: make test-verl")

import numpy as np
from hydra import compose, initialize_config_module
from lab import Table, TableLab
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.utils import Role
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn
from workers import LabWorkers, as_verl, lab_prompts

from uncollapse.errors import ConfigError, DataError, UnknownName
from uncollapse.integrations.verl.batches import rollout_batch
from uncollapse.integrations.verl.driver import Driver
from uncollapse.integrations.verl.loss import RecipeLoss
from uncollapse.integrations.verl.main import settle
from uncollapse.integrations.verl.names import ROW
from uncollapse.integrations.verl.trainer import STATE_FILE, RecipeTrainer
from uncollapse.policy.batch import Clock
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.studies.testbeds.engine import LogitsEngine

SAMPLES, PROMPTS = 4, 4


def configured(*overrides, name="clip-cov", folder="unused"):
    fixed = [
        f"uncollapse.recipe={name}", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.rollout.n={SAMPLES}", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "trainer.logger=[]",
        "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.total_epochs=9", "trainer.device=cpu",
        f"trainer.default_local_dir={folder}", "data.max_response_length=6", "data.dataloader_num_workers=0", "trainer.save_freq=2", "data.shuffle=false",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2", "trainer.n_gpus_per_node=1",
    ]  # fmt: skip
    with initialize_config_module("uncollapse.integrations.verl.config", version_base=None):
        return compose("uncollapse", overrides=[*fixed, *overrides])


class Tokens:
    eos_token_id = pad_token_id = 0

    def __len__(self):
        return 7


class Prompts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"dummy_tensor": torch.tensor([index]), "number": index % 5, "index": index}


class Rollout:
    """Answers from the lab's policy, in the layout of verl's agent loop, their rewards with them."""

    def __init__(self, policy):
        self.policy = policy

    def generate_sequences(self, data):
        numbers = data.non_tensor_batch["number"].tolist()
        made = PlainSampler(1)
        engine = LogitsEngine(TableLab(), self.policy)
        raw = made(engine, numbers, Clock(step=data.meta_info["global_steps"], seed=7))
        out = as_verl(raw, lab_prompts(numbers))
        scores = out.batch.pop("token_level_scores")
        out.batch.pop(ROW)
        rest = {"rm_scores": scores, "multi_modal_inputs": np.array([{}] * len(raw), dtype=object)}
        tensors = {**out.batch.to_dict(), "rm_scores": rest["rm_scores"]}
        found = DataProto.from_dict(
            tensors=tensors, non_tensors={"multi_modal_inputs": rest["multi_modal_inputs"]}
        )
        found.meta_info["timing"] = {}
        return found


class Connected(LabWorkers):
    """A worker group with verl's bookkeeping; its checkpoint is the policy."""

    def __init__(self, *more, **options):
        super().__init__(*more, **options)
        self._dispatch_info = {"actor": list(range(self.ranks))}

    def save_checkpoint(self, path, remote, step, max_ckpt_to_keep=None):
        self.saved = copy.deepcopy(self.policy.state_dict())

    def load_checkpoint(self, path, del_local_after_load=False):
        self.policy.load_state_dict(self.saved)


def trainer_of(config, ranks=1, saved=None):
    settle(config)
    made = RecipeTrainer(
        config, Tokens(), {Role.ActorRollout: None},
        SimpleNamespace(get_n_gpus=lambda: 1), train_dataset=Prompts(), val_dataset=Prompts(), collate_fn=collate_fn,
    )  # fmt: skip
    policy = Table(prompts=5)
    made.actor_rollout_wg = Connected(policy, ranks=ranks, rate=0.5)
    if saved is not None:
        made.actor_rollout_wg.saved = saved
    made.async_rollout_manager = Rollout(policy)
    reference = LabWorkers(Table(prompts=5, seed=1))
    made.ref_policy_wg = SimpleNamespace(compute_ref_log_prob=reference.compute_log_prob)
    made.checkpoint_manager = SimpleNamespace(update_weights=lambda *a: None, sleep_replicas=lambda: None)
    made.connect()
    return made


@pytest.mark.parametrize("name", ["grpo", "clip-cov", "adaptive-entropy", "kl-cov", "reference"])
def test_verls_own_fit_trains_the_same_with_one_rank_and_two(tmp_path, name):
    policies = []
    if name == "reference":
        name = tmp_path / "reference.yaml"
        name.write_text("name: reference\nbase: dr-grpo\nregularizers:\n  - {term: kl-penalty, coef: 0.1}\n")
    for ranks in (1, 2):
        config = configured(
            "trainer.total_training_steps=3",
            "uncollapse.level=trainer",
            name=name,
            folder=tmp_path / str(ranks),
        )
        made = trainer_of(config, ranks)
        made.fit()
        assert made.global_steps == 4
        assert len(made.actor_rollout_wg.gradients) == 6
        policies.append(made.actor_rollout_wg.policy.table.detach())
    torch.testing.assert_close(*policies, rtol=0, atol=1e-10)
    assert (policies[0] - Table(prompts=5).table).abs().max() > 1e-3


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    steered = tmp_path / "steered.yaml"
    steered.write_text(
        "name: steered\nbase: grpo\nregularizers:\n  - {term: {adaptive-entropy: {target: 5.0, step: 0.1}}}\n"
    )

    def run(steps, folder, saved=None, resume="disable"):
        more = [f"trainer.total_training_steps={steps}", f"trainer.resume_mode={resume}"]
        made = trainer_of(configured(*more, name=steered, folder=folder), saved=saved)
        made.total_training_steps = 6  # what schedules read; the run below is cut off
        made.driver.total = 6
        made.config.trainer.total_epochs = steps // 2
        made.fit()
        return made

    whole = run(6, tmp_path / "whole")
    cut = run(4, tmp_path / "cut")
    assert (tmp_path / "cut" / "global_step_4" / STATE_FILE).exists()
    resumed = run(6, tmp_path / "cut", saved=cut.actor_rollout_wg.saved, resume="auto")
    assert resumed.recipe.state_dict() == whole.recipe.state_dict() != cut.recipe.state_dict()
    torch.testing.assert_close(
        resumed.actor_rollout_wg.policy.table, whole.actor_rollout_wg.policy.table, rtol=0, atol=0
    )


def test_a_checkpoint_without_a_recipes_state_is_refused(tmp_path):
    config = configured("trainer.resume_mode=auto", name="adaptive-entropy", folder=tmp_path)
    made = trainer_of(config, saved=Table(prompts=5).state_dict())
    (tmp_path / "global_step_2").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    with pytest.raises(DataError, match=f"no {STATE_FILE}"):
        made._load_checkpoint()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["actor_rollout_ref.actor.entropy_coeff=0.1"],
            ConfigError,
            "entropy_coeff=0.1: the recipe 'clip-cov' decides",
        ),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov"], ConfigError, "loss_mode=clip_cov"),
        (["actor_rollout_ref.actor.shuffle=true"], ConfigError, "shuffle=True"),
        (["actor_rollout_ref.actor.use_kl_loss=true"], ConfigError, "reads no reference policy"),
        (["algorithm.use_kl_in_reward=true"], ConfigError, "use_kl_in_reward"),
        (["critic.enable=true"], ConfigError, "without a critic"),
        (["actor_rollout_ref.rollout.n=1"], ConfigError, "rollout.n to 2 or more"),
        (["+trainer.use_legacy_worker_impl=enable"], ConfigError, "use_legacy_worker_impl=enable"),
        (["uncollapse.level=registry"], ConfigError, "at level 'registry': .*its loss receives no weights"),
        (["uncollapse.level=hybrid"], UnknownName, "unknown level of verl 'hybrid'"),
        (["uncollapse.recipe=clip-cof"], UnknownName, "did you mean clip-cov"),
        (
            ["uncollapse.recipe=dapo"],
            ConfigError,
            "same number of answers, which DynamicSampler does not keep to",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(overrides, error, message):
    with pytest.raises(error, match=message):
        settle(configured(*overrides))


def test_the_level_is_chosen_and_verls_options_are_set_to_agree():
    plain = configured(name="dr-grpo")
    assert settle(plain) == "registry"
    assert (
        plain.algorithm.adv_estimator
        == plain.actor_rollout_ref.actor.policy_loss.loss_mode
        == "uncollapse/dr-grpo"
    )
    assert plain.actor_rollout_ref.actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert plain.actor_rollout_ref.actor.loss_scale_factor == 6
    module = OmegaConf.select(plain, "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES")
    assert module.startswith("uncollapse.integrations.verl,")
    assert settle(configured(name="clip-cov")) == "trainer"


def test_a_target_that_no_distribution_over_the_vocabulary_has_is_refused_before_workers_start(tmp_path):
    file = tmp_path / "high.yaml"
    file.write_text(
        "name: high\nbase: siren\nregularizers:\n  - {term: {siren: {target: 2}}, coef: 0.1, mean: {levels: [row], rows: all}}\n"
    )
    with pytest.raises(ConfigError, match=r"the entropy over 7 tokens is at most 1\.946"):
        trainer_of(configured(name=str(file)))


def test_recipes_from_yaml_run_in_the_trainer_and_at_the_engine_level(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nbase: grpo\nregularizers:\n  - {term: kl-penalty, coef: 0.1}\n")
    config = configured(name=str(file))
    assert settle(config) == "trainer"
    assert config.actor_rollout_ref.actor.use_kl_loss is True
    file.write_text("name: mine\nbase: grpo\n")
    assert settle(configured(name=str(file))) == "trainer"
    with pytest.raises(ConfigError, match="knows recipes by name"):
        settle(configured("uncollapse.level=registry", name=str(file)))
    engine = configured("uncollapse.level=engine", "actor_rollout_ref.actor.strategy=fsdp2")
    assert settle(engine) == "engine"
    assert (
        engine.actor_rollout_ref.actor.strategy == "uncollapse_fsdp2" == engine.actor_rollout_ref.ref.strategy
    )
    from verl.utils.config import omega_conf_to_dataclass

    assert omega_conf_to_dataclass(engine.actor_rollout_ref.actor).engine.strategy == "uncollapse_fsdp2"


# ---- traps -------------------------------------------------------------------------------------------------


def test_trap_verl_has_no_legacy_worker_left_that_could_rescale_the_loss():
    with pytest.raises(ModuleNotFoundError):
        __import__("verl.workers.actor")


def test_trap_an_engine_name_that_is_taken():
    from verl.workers.engine import EngineRegistry

    from uncollapse.integrations.verl.engine import RecipeEngine

    assert EngineRegistry.get_engine_cls("language_model", "uncollapse_fsdp2") is RecipeEngine
    with pytest.raises(AssertionError, match="already"):
        EngineRegistry.register("language_model", "uncollapse_fsdp2", "cpu")(RecipeEngine)


def test_trap_workers_shuffle_per_rank_so_planned_steps_are_sent_unshuffled():
    made = trainer_of(configured(), ranks=2)
    made.global_steps = 1
    made.recipe = made.driver.recipe
    batch = rollout(made)
    made._compute_old_log_prob(batch)
    made._update_actor(batch)
    for sent in made.actor_rollout_wg.received:
        assert tu.get(sent, "dataloader_kwargs") == {"shuffle": False}
        assert tu.get(sent, "epochs") == 1
        assert tu.get(sent, "mini_batch_size") == len(sent) == tu.get(sent, "global_batch_size")


def rollout(made):
    batch = next(iter(made.train_dataloader))
    data = DataProto.from_single_dict(batch)
    data.meta_info["global_steps"] = 1
    data = data.repeat(SAMPLES, interleave=True)
    out = made.async_rollout_manager.generate_sequences(data)
    out.batch["token_level_scores"] = out.batch.pop("rm_scores")
    out.non_tensor_batch["uid"] = np.repeat([f"u{i}" for i in range(PROMPTS)], SAMPLES).astype(object)
    return out


def test_random_choices_and_rows_do_not_depend_on_verls_balancing():
    gradients = []
    for order in (0, 1):
        made = trainer_of(configured(name="clip-cov"))
        made.global_steps = 1
        batch = rollout(made)
        batch.batch[ROW] = torch.arange(len(batch))
        batch.reorder(torch.randperm(len(batch), generator=torch.Generator().manual_seed(order)))
        made._compute_old_log_prob(batch)
        made._update_actor(batch)
        gradients.append(torch.stack(made.actor_rollout_wg.gradients))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_wrong_groups_are_refused_before_they_become_another_method():
    made = trainer_of(configured())
    batch = rollout(made)
    batch.batch[ROW] = torch.arange(len(batch))
    uid = batch.non_tensor_batch["uid"]
    arguments = {"samples": SAMPLES, "ends": (0,), "clock": Clock(), "stats": {}}
    with pytest.raises(DataError, match=r"a group has \d+ rows where rollout.n is 4"):
        rollout_batch(batch.batch, np.where(np.arange(16) == 3, "u1", uid), **arguments)
    with pytest.raises(DataError, match="not next to each other"):
        rollout_batch(batch.batch, np.tile([f"u{i}" for i in range(4)], 4), **arguments)


def test_rejected_tokens_and_importance_weights_of_verls_rollout_correction_are_kept():
    made = trainer_of(configured())
    batch = rollout(made)
    batch.batch[ROW] = torch.arange(len(batch))
    batch.batch["response_mask"][2] = 0
    batch.batch["rollout_is_weights"] = torch.full(batch.batch["responses"].shape, 0.5, dtype=torch.float64)
    found = rollout_batch(
        batch.batch, batch.non_tensor_batch["uid"], samples=SAMPLES, ends=(0,), clock=Clock(), stats={}
    )  # fmt: skip
    assert not found.mask[2].any()
    assert set(found.columns["weight"][found.mask].tolist()) == {0.5}
    assert int(found.columns["length"][2]) > 0


def test_the_loss_is_picklable_and_says_which_statistic_is_missing():
    loss = RecipeLoss(recipe("adaptive-entropy"))
    again = pickle.loads(pickle.dumps(loss))
    assert again.stats == loss.stats
    made = trainer_of(configured(name="entropy-bonus"))
    made.global_steps = 1
    batch = rollout(made)
    made._compute_old_log_prob(batch)
    made._update_actor(batch)
    data = made.actor_rollout_wg.received[0]
    outputs = made.actor_rollout_wg.outputs(data)
    value, metrics = pickle.loads(pickle.dumps(made.actor_rollout_wg.loss_fn))(
        outputs, tu.assign_non_tensor(data, dp_size=1)
    )
    assert torch.isfinite(value)
    assert any(name.startswith("loss/") for name in metrics)
    with pytest.raises(ConfigError, match="gave no entropy"):
        made.actor_rollout_wg.loss_fn({"log_probs": outputs["log_probs"]}, data)


@pytest.mark.parametrize(
    ("rows", "ranks", "message"),
    [(3, 2, "cannot be shared equally by 2"), (5, 1, "no multiple of the 5 rows")],
)
def test_sizes_that_do_not_divide_are_refused(rows, ranks, message):
    method = replace(recipe("grpo"), sampler=PlainSampler(SAMPLES))
    engine = LogitsEngine(TableLab(), Table(prompts=5))
    raw = method.sampler(engine, [0, 1, 2], Clock())
    workers = LabWorkers(engine.policy)
    workers.set_loss_fn(RecipeLoss(method))

    def train():
        driver = Driver(method, workers, None, SAMPLES, 1.0, rows, ranks, (0,))
        data = as_verl(raw, lab_prompts([0, 1, 2]))
        driver.record(data)
        driver.update(data, step=0)

    with pytest.raises(ConfigError, match=message):
        train()
