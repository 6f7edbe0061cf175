"""Samplers of several rounds in TRL: answers that are continued, rows at another temperature, rows on top."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import toy
from test_trl import Recording, run

from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations.trl import GRPOTrainer
from uncollapse.policy.batch import PARTS, join
from uncollapse.policy.cure import CureSampler
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler, dead_groups
from uncollapse.policy.stats import Entropy
from uncollapse.token_dump import read_dump

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Continuing:
    """One answer per prompt, and three that go on after its most uncertain token."""

    samples: int = 4
    temperature: float = 1.0
    needs: frozenset = field(default=frozenset({Entropy("old")}), init=False)
    gives: frozenset = field(default=frozenset({"cut"}), init=False)

    def __call__(self, engine, prompts, clock):
        first = engine.score(engine.generate(prompts, temperature=self.temperature, clock=clock))
        first = engine.measure(first, frozenset({Entropy("old")}))
        cut = first.stats[Entropy("old")].argmax(dim=1)
        prefixes = [row[:end].tolist() for row, end in zip(first.ids, cut.tolist(), strict=True)]
        repeated = [prompt for prompt in prompts for _ in range(3)]
        more = engine.generate(
            repeated, temperature=self.temperature, clock=replace(clock, update=1),
            prefixes=[prefix for prefix in prefixes for _ in range(3)],
        )  # fmt: skip
        both = join([first, engine.score(more)])
        group = torch.cat([torch.arange(len(prompts)), torch.arange(len(prompts)).repeat_interleave(3)])
        both = both.with_columns(group=group, cut=torch.cat([cut, cut.repeat_interleave(3)]))
        return both[group.argsort(stable=True)]


@dataclass(frozen=True)
class Hotter:
    """The first prompt again, at twice the temperature, as part `tempered` with half the weight."""

    samples: int = 4
    temperature: float = 1.0
    needs: frozenset = field(default=frozenset(), init=False)
    gives: frozenset = field(default=frozenset({"part", "scale"}), init=False)

    def __call__(self, engine, prompts, clock):
        batch = PlainSampler(self.samples, self.temperature)(engine, prompts, clock)
        hot = engine.score(engine.generate([prompts[0]] * self.samples, temperature=2.0, clock=clock))
        hot = hot.with_columns(group=torch.full((self.samples,), len(prompts)))
        part = torch.tensor([PARTS["policy"]] * len(batch) + [PARTS["tempered"]] * len(hot))
        return join([batch, hot]).with_columns(part=part, scale=torch.where(part == 0, 1.0, 0.5))


CONTINUING = replace(recipe("grpo"), name="continuing", sampler=Continuing())
HOTTER = replace(recipe("grpo"), name="hotter", sampler=Hotter())
WIDE = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 4}


class Watching(Recording):
    """Keeps what each round was asked for."""

    def _round(self, rows, temperature, prefixes):
        self.rounds = [*getattr(self, "rounds", []), (len(rows), temperature, prefixes)]
        return super()._round(rows, temperature, prefixes)


def test_continued_answers_have_their_prefix_in_the_prompt_and_are_judged_with_it(tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, **columns):
        seen.append((completions, completion_ids))
        return [float(len(ids) % 5) for ids in completion_ids]

    trainer, keep = run(tmp_path, Watching, recipe=CONTINUING, reward=reward, max_steps=1)
    assert [count for count, *_ in trainer.rounds] == [2, 6]
    raw, prefixes = trainer.raw, trainer.rounds[1][2]
    prompts = raw.columns["prompt"]
    for group in (0, 1):
        rows = (raw.group == group).nonzero()[:, 0].tolist()
        assert len(rows) == 4
        cut = int(raw.columns["cut"][rows[0]])
        parent = raw.ids[rows[0], :cut].tolist()
        for row in rows[1:]:
            assert prompts[row] == [*prompts[rows[0]], *parent]
    completions, ids = seen[1]
    assert all(whole[: len(p)] == p for whole, p in zip(ids, prefixes, strict=True))
    decoded = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    assert list(completions) == decoded
    logged = trainer.state.log_history[0]
    assert logged["sampler/oversampling"] == 1
    assert "frac_reward_zero_std" not in logged
    assert any(g is not None and g.abs().sum() > 0 for g in keep.gradients[0])


def test_rows_on_top_are_shared_out_to_the_steps_and_leave_the_metrics_alone(tmp_path):
    trainer, _ = run(tmp_path, Watching, recipe=HOTTER, **WIDE)
    plain, _ = run(tmp_path / "plain", recipe="grpo", **WIDE)
    assert trainer.rounds[1] == (4, 2.0, None)
    for window in trainer.windows:
        assert (window.columns["part"] == PARTS["tempered"]).sum() == 1
        assert (window.columns["part"] == PARTS["policy"]).sum() == 4
    first, same = trainer.state.log_history[0], plain.state.log_history[0]
    for name in ("reward/mean", "entropy/token/mean", "length/mean"):
        assert first[name] == pytest.approx(same[name])
    assert first["sampler/oversampling"] == 1.25
    useful = (
        1 - same["reward/zero_variance_groups"]
    )  # the hot rows scored alike and taught nothing, but had their tokens
    assert same["sampler/tokens/per_useful"] == pytest.approx(same["length/mean"] / useful)
    assert first["sampler/tokens/per_useful"] > same["sampler/tokens/per_useful"]
    assert trainer.generation_config.temperature == 1.0


def test_idle_rows_fill_up_what_the_micro_batches_could_not_share_equally(tmp_path):
    plain, a = run(tmp_path / "a", Recording, recipe=HOTTER, per_device_train_batch_size=8)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    filled, b = run(tmp_path / "b", Recording, recipe=HOTTER, **split)
    assert len(plain.last) == 12
    assert len(filled.last) == 16
    idle = ~filled.last.mask.any(dim=1)
    assert int(idle.sum()) == 4
    assert not filled.last.columns["scale"][idle].any()
    for x, y in zip(a.gradients[0], b.gradients[0], strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


CURE = replace(recipe("cure"), sampler=CureSampler(samples=4, k=5, shortest=1))


def test_cure_branches_within_the_limit_of_prompt_and_prefix(tmp_path):
    free, _ = run(tmp_path / "free", Watching, recipe=CURE, max_steps=1)
    limited = replace(CURE, sampler=replace(CURE.sampler, max_prompt_len=7))
    trainer, _ = run(tmp_path / "limited", Watching, recipe=limited, max_steps=1)
    for made, most in ((free, 8), (trainer, 7)):
        raw = made.raw
        cut, branch = raw.columns["cut"], raw.columns["branch"] > 0
        assert torch.equal(raw.columns["prompt_length"], torch.tensor([*map(len, raw.columns["prompt"])]))
        assert (cut[branch] > 0).any()
        assert int(raw.columns["prompt_length"][branch].max()) == most
        for row in branch.nonzero()[:, 0].tolist():
            parent = int(raw.group[row]) * 4
            kept = raw.ids[parent, : int(cut[row])].tolist()
            assert raw.columns["prompt"][row] == [*raw.columns["prompt"][parent], *kept]


def test_cure_branches_fresh_prompts_in_place_of_dead_groups(tmp_path):
    rounds = replace(CURE, sampler=replace(CURE.sampler, rounds=6))
    wide = {"max_steps": 1, "per_device_train_batch_size": 16}
    trainer, _ = run(tmp_path, Watching, recipe=rounds, reward=toy.odd_prompts_are_dead, **wide)
    raw = trainer.raw
    assert len(raw) == 16
    assert not dead_groups(raw).any()
    assert len(trainer.rounds) > 2
    branch = raw.columns["branch"] > 0
    assert (raw.columns["cut"][branch] > 0).any()
    for row in branch.nonzero()[:, 0].tolist():
        parent = int(raw.group[row]) * 4
        kept = raw.ids[parent, : int(raw.columns["cut"][row])].tolist()
        assert raw.columns["prompt"][row] == [*raw.columns["prompt"][parent], *kept]


def test_a_vocabulary_without_critical_tokens_is_warned_of(tmp_path):
    made = replace(CURE, sampler=CureSampler(samples=4))
    with pytest.warns(UserWarning, match="no token is critical"):
        trainer, _ = run(tmp_path, Watching, recipe=made, max_steps=1)
    assert not trainer.raw.columns["cut"].any()


def test_what_does_not_fit_into_the_model_is_refused(tmp_path):
    model = toy.llama()
    model.config.max_position_embeddings = 12
    with pytest.raises(DataError, match=r"6 may follow, but the model has room for 12.*max_prompt_len=6"):
        run(tmp_path, recipe=CURE, model=model, max_steps=1)


@pytest.mark.parametrize("rows", [1, 8])
def test_idle_rows_are_neither_counted_nor_dumped(tmp_path, rows):
    """Right throughout, one prompt of two answered again: all tempered answers are right and a third of the rows."""
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
    made = recipe("aepo-arbitrary")
    made = replace(made, sampler=replace(made.sampler, share=0.5, alpha=0.5))
    trainer, _ = run(
        tmp_path, Recording, recipe=made, reward=lambda completions, **_: [1.0] * len(completions),
        max_steps=1, dump_tokens=tmp_path / "dump", **split,
    )  # fmt: skip
    assert int((trainer.last.columns["part"] == PARTS["idle"]).sum()) == (4 if rows == 1 else 0)
    logged = trainer.state.log_history[0]
    assert logged["tempered/positive/frac"] == 1
    assert logged["tempered/rows/frac"] == pytest.approx(1 / 3)
    (tokens,) = read_dump(tmp_path / "dump")
    taken = trainer.last.columns["part"] != PARTS["idle"]
    assert sorted(set(tokens.integer("uid").tolist())) == trainer.last.uid[taken].tolist()
    assert np.isfinite(tokens.number("logp")[tokens.mask]).all()
    assert (tokens.number("weight")[tokens.mask] > 0).all()


def test_a_rollout_function_knows_no_prefixes(tmp_path):
    with pytest.raises(ConfigError, match="turn vLLM, continuous batching, tools and rollout functions off"):
        GRPOTrainer(
            toy.llama(), toy.digit_share, toy.config(tmp_path), train_dataset=toy.prompts(),
            processing_class=toy.tokenizer(), recipe=HOTTER, rollout_func=lambda prompts, trainer: {},
        )  # fmt: skip
