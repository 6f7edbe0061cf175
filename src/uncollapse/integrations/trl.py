"""Any recipe in TRL: a `GRPOTrainer` that a script reaches by changing two lines.

    from uncollapse.integrations.trl import GRPOTrainer       # instead of: from trl import GRPOTrainer
    trainer = GRPOTrainer(..., recipe="clip-cov")

Models, PEFT, accelerate, DeepSpeed, FSDP, vLLM, logging and data loading stay TRL's. The recipe takes the place of
TRL's advantages, loss, reduction and regularizers; options of `GRPOConfig` that ask for another one are refused.

Differs from TRL:
- Reductions run over all rows of an optimiser step on all processes (TRL's `dapo` loss divides by the tokens of the
  whole generation batch; its `grpo` loss averages per micro-batch first).
- A rollout is shuffled by groups, not by rows, so that the completions of a prompt stay in one optimiser step and can
  share it.
- Prompts are computed once per group, and rows that have left the batch take no part in generation.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import split_tensor_dict, use_adapter

from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations import trl_settings
from uncollapse.integrations.responses import response_columns
from uncollapse.integrations.rollout_dump import RolloutDump
from uncollapse.integrations.rounds import (
    LEFT_PADDED,
    check_groups,
    fill_dead,
    ordered,
    shuffled_groups,
    with_idle_rows,
)
from uncollapse.integrations.sampling import SamplingEngine
from uncollapse.integrations.scorer import Scorer
from uncollapse.policy.batch import Batch, Clock, Stat, Whose
from uncollapse.policy.config import resolve
from uncollapse.policy.metrics import rollout_metrics, rollout_stats, useful_rows
from uncollapse.policy.protocols import OfVocabulary
from uncollapse.policy.recipe import LossReport, Recipe
from uncollapse.policy.stages.samplers import DynamicSampler, PlainSampler
from uncollapse.policy.stats import Logp, Measured
from uncollapse.token_dump import TokenDump

STATE_FILE = "uncollapse_recipe.pt"


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with a recipe.

    Args:
        recipe: name of a registered recipe, path of a YAML file, or a `Recipe`. Group size and temperature are `num_generations` and
            `temperature` of the config, as in TRL, and replace those of the recipe's sampler.
        share_prompts: compute a prompt once for all completions of its group, in generation and in training, where the
            model supports it (`shares_prompts` tells). Results are the same up to rounding; off for comparisons.
        dump_tokens: a directory for a token dump of every rollout (`uncollapse.token_dump`); None for none.

    Everything else is an argument of TRL's trainer. Raises `ConfigError` for options that the recipe owns, for
    batch sizes that it cannot run on, and for a recipe that needs what TRL cannot provide.
    """

    generation_config: Any
    num_generations: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: trl.GRPOConfig | None = None,
        *more: Any,
        recipe: str | Recipe = "grpo",
        share_prompts: bool = True,
        dump_tokens: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        args = trl.GRPOConfig("uncollapse-grpo") if args is None else args
        chosen = copy.deepcopy(resolve(recipe))
        sampler = replace(chosen.sampler, samples=args.num_generations, temperature=args.temperature)  # type: ignore[type-var]
        self.recipe = replace(chosen, sampler=sampler)
        trl_settings.refuse(args, self.recipe)
        if args.process_index == 0:
            trl_settings.warn(args, self.recipe)
        reference = any(stat.whose == "ref" for stat in self.recipe.stats("rollout"))
        settings = copy.copy(args)
        # TRL holds a reference model only for its own KL penalty; the recipe's penalty replaces that.
        settings.beta = 1.0 if reference else 0.0
        super().__init__(model, reward_funcs, settings, *more, **options)
        if _samples_in_rounds(self.recipe):
            self._refuse_other_generation()
        self.recipe.check_vocabulary(self.model.config.get_text_config().vocab_size)
        if isinstance(self.recipe.sampler, OfVocabulary):
            self._show_vocabulary(self.recipe.sampler)
        self.beta = settings.beta = 0.0
        self._reads_reference = reference
        if self.aux_loss_enabled or getattr(self, "_is_vlm", False):
            raise ConfigError(
                "mixture-of-experts and vision-language models cannot run a recipe yet; use a dense text model"
            )
        bare = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._scorer = Scorer(bare, temperature=self.temperature, share_prompts=share_prompts)
        self._dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in bare.modules())
        if self.ref_model is not None:
            self._scorer.admit(self.accelerator.unwrap_model(self.ref_model))
        self._dump = None
        if dump_tokens is not None:
            dump = TokenDump(dump_tokens, temperature=self.temperature)
            self._dump = RolloutDump(dump, self._tokenizer, self.accelerator)
        self._rollouts = 0
        self._raw_rewards: Tensor | None = None
        self._prefixes: Sequence[Sequence[int]] | None = None
        self._old_stats: dict[Stat, Tensor] = {}
        self._buffered_inputs: list[dict[str, Any]] | None = None
        self._rollout: Batch | None = None
        self._drawn_tokens: Tensor = torch.zeros((), dtype=torch.long)
        self._window: Batch | None = None
        self._planned = True  # whether the window is, or waits for its forward pass

    def _show_vocabulary(self, sampler: OfVocabulary) -> None:
        decoded = self._tokenizer.batch_decode([[token] for token in range(len(self._tokenizer))])
        seeing = sampler.for_vocabulary(decoded, self._tokenizer.all_special_ids)
        self.recipe = replace(self.recipe, sampler=seeing)

    @property
    def shares_prompts(self) -> bool:
        """Whether prompts are computed once for all completions of their group."""
        return self._scorer.shares_prompts

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL's trainer does, and finish the last rollout."""
        output = super().train(*args, **kwargs)
        self._finish_rollout()
        return output

    # ---- rollout -------------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        if self._prefixes is not None:
            whole = [[*p, *ids] for p, ids in zip(self._prefixes, completion_ids_list, strict=True)]
            completions = self._with_prefix_texts(completions, whole)
            completion_ids_list = whole
        self._raw_rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._raw_rewards

    def _with_prefix_texts(self, completions: list[Any], whole: list[list[int]]) -> list[Any]:
        """Completions as reward functions expect them, with the prefix that they continue."""
        texts = self.processing_class.batch_decode(whole, skip_special_tokens=True)
        return [
            text if isinstance(completion, str) else [{**completion[0], "content": text}, *completion[1:]]
            for completion, text in zip(completions, texts, strict=True)
        ]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, *more = super()._tokenize_prompts(prompts)
        if self._prefixes is not None:
            ids = [[*prompt, *prefix] for prompt, prefix in zip(ids, self._prefixes, strict=True)]
            self._refuse_beyond_context(max(map(len, ids), default=0))
        return ids, *more

    def _refuse_beyond_context(self, begun: int) -> None:
        """Raise `DataError` if prompt, prefix and the longest continuation do not fit into the model."""
        context = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if context is not None and begun + self.max_completion_length > context:
            raise DataError(
                f"a prompt and the prefix it is continued from have {begun} tokens, and {self.max_completion_length} may "
                f"follow, but the model has room for {context}; limit what a branch keeps, for CURE with the sampler's "
                f"max_prompt_len={max(context - self.max_completion_length, 1)}, or lower max_completion_length"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._finish_rollout()
        clock = Clock(step=self._rollouts, total=self._planned_rollouts(), seed=self.args.seed)
        self._drawn_tokens = torch.zeros((), dtype=torch.long, device=self.accelerator.device)
        output, batch = self._sampled(inputs, clock)
        self._rollout = self._gathered(batch.with_stats(self._rollout_stats(output, batch.mask)))
        if not self._one_forward:
            self._prepare_rollout(self._rollout)
        output["row"] = batch.uid
        self._rollouts += 1
        return output

    def _prepare_rollout(self, batch: Batch) -> None:
        self._rollout = self.recipe.prepare(batch)
        drawn = self.accelerator.gather(self._drawn_tokens).sum()
        found = rollout_metrics(batch, self._rollout)
        found["sampler/tokens/per_useful"] = float(drawn / useful_rows(self._rollout).sum().clamp(min=1))
        for name, value in found.items():
            self._metrics["train"][name].append(value)

    @property
    def _one_forward(self) -> bool:
        """Whether a rollout is one micro-batch: its forward pass with gradient then gives the old statistics as well."""
        alone = self._generate_every() == 1 and not self._dropout
        return alone and not (self.use_vllm and self.vllm_importance_sampling_correction)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """TRL's measurement of the rollout it has just sampled: the recipe's old statistics, with no logits held."""
        if not self.model.training:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        cut = input_ids.shape[1] - logits_to_keep
        inputs = {
            "prompt_ids": input_ids[:, :cut], "prompt_mask": attention_mask[:, :cut],
            "completion_ids": input_ids[:, cut:], "completion_mask": attention_mask[:, cut:],
        }  # fmt: skip
        wanted = rollout_stats(self.recipe)
        self._old_stats = self._measured(model, inputs, attention_mask[:, cut:].bool(), _of(wanted, "old"))
        return self._old_stats[Logp("old")], None, None

    def _local_rows(self, count: int) -> Tensor:
        """Numbers of this process's rows in the rollout batch of all."""
        return self.accelerator.process_index * count + torch.arange(count, device=self.accelerator.device)

    def _sampled(self, inputs: list[dict[str, Any]], clock: Clock) -> tuple[dict[str, Any], Batch]:
        """TRL's generation batch of this process and its rows, sampled as the recipe's sampler says."""
        check_groups(inputs, self._local_rows(len(inputs)) // self.num_generations)
        sampler = self.recipe.sampler
        if isinstance(sampler, PlainSampler):
            output, reward = self._drawn(inputs)
            return output, self._local_batch(output, self._own(reward), clock)
        if isinstance(sampler, DynamicSampler):
            return self._dynamically_sampled(sampler, inputs, clock)
        return self._sampled_in_rounds(inputs, clock)

    def _drawn(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        """TRL's generation batch of these rows, and the rewards of all processes."""
        output = super()._generate_and_score_completions(rows)
        self._drawn_tokens += output["completion_mask"].sum()
        # Beside the tokens, so that rows sampled again bring their statistics along.
        output |= {_column(stat): value for stat, value in self._old_stats.items()}
        self._old_stats = {}
        return output, self._reward()

    def _own(self, values: Tensor) -> Tensor:
        """This process's share of what all processes have gathered."""
        return values[self._local_rows(len(values) // self.accelerator.num_processes)]

    def _dynamically_sampled(
        self, sampler: DynamicSampler, inputs: list[dict[str, Any]], clock: Clock
    ) -> tuple[dict[str, Any], Batch]:
        """As the sampler does, with dead groups counted over all processes."""
        processes = self.accelerator.num_processes
        output, reward, generated = fill_dead(
            self._drawn,
            self._shared,
            inputs,
            self.train_dataset,
            size=self.num_generations,
            rounds=sampler.rounds,
            clock=clock,
            rank=self.accelerator.process_index,
            processes=processes,
            pad_id=self._tokenizer.pad_token_id,
        )
        self._metrics["train"]["sampler/oversampling"].append(generated / (len(inputs) * processes))
        return output, self._local_batch(output, self._own(reward), clock)

    def _sampled_in_rounds(self, inputs: list[dict[str, Any]], clock: Clock) -> tuple[dict[str, Any], Batch]:
        """Let the sampler itself generate, continue and measure rows of this process, which hold whole groups."""

        def measure(output: Mapping[str, Any], mask: Tensor, stats: frozenset[Stat]) -> dict[Stat, Tensor]:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                return self._measured(self.model, output, mask, _of(stats, "old"))

        engine = SamplingEngine(
            generate=self._round,
            describe=self._local_batch,
            measure=measure,
            dataset=self.train_dataset,
            pad_id=self._tokenizer.pad_token_id,
        )
        sampler = self.recipe.sampler
        batch = self._filled_up(sampler(engine, inputs[:: self.num_generations], clock), len(inputs))
        output = engine.rows(batch)
        self._metrics["train"]["sampler/oversampling"].append(engine.generated / len(inputs))
        self._metrics["train"].pop("frac_reward_zero_std", None)  # TRL saw groups of one
        local = self._local_batch(output, batch.reward, clock)
        groups = int(self.accelerator.gather(batch.group.max()).max()) + 1
        given = {name: batch.columns[name] for name in getattr(sampler, "gives", ()) if name in batch.columns}
        given["group"] = batch.group + groups * self.accelerator.process_index
        taken = batch.mask.any(dim=1, keepdim=True)  # by no idle row
        return output, replace(local, mask=local.mask & taken).with_columns(**given)

    def _filled_up(self, batch: Batch, rows: int) -> Batch:
        """Idle rows after those on top of `rows`, so that processes and micro-batches get equally many of them."""
        extra = self.accelerator.gather(torch.tensor(len(batch) - rows, device=batch.mask.device))
        chunks = self.args.steps_per_generation
        wanted = -(-int(extra.max()) // chunks) * chunks
        missing = rows + wanted - len(batch)
        return with_idle_rows(batch, missing) if missing else batch

    def _round(
        self, rows: list[dict[str, Any]], temperature: float, prefixes: Sequence[Sequence[int]] | None
    ) -> tuple[dict[str, Any], Tensor]:
        """One round of a sampler: rows of any number, at any temperature, with or without prefixes."""
        settings, group = self.generation_config, self.num_generations
        self.generation_config = copy.copy(settings)
        self.generation_config.temperature = temperature
        self.num_generations = 1  # TRL's own advantages, which nobody reads, want whole groups
        self._prefixes = prefixes
        try:
            output, reward = self._drawn(rows)
        finally:
            self.generation_config, self.num_generations, self._prefixes = settings, group, None
        return output, self._own(reward)

    def _refuse_other_generation(self) -> None:
        """Raise `ConfigError` for ways of generating that know neither prefixes nor other temperatures."""
        name = type(self.recipe.sampler).__name__
        if (
            self.use_vllm
            or self.use_transformers_continuous_batching
            or self.rollout_func is not None
            or self.tools
        ):
            raise ConfigError(
                f"the sampler {name} continues answers or changes the temperature, which works with generation by "
                "transformers only; turn vLLM, continuous batching, tools and rollout functions off"
            )
        if "fresh_prompts" in self.recipe.sampler.needs and self.accelerator.num_processes > 1:
            raise ConfigError(
                f"the sampler {name} asks for fresh prompts, which processes would not do equally often; "
                "leave that out (rounds: 1) or use one process"
            )
        if self.args.per_device_train_batch_size * self.args.steps_per_generation % self.num_generations:
            raise ConfigError(
                f"the sampler {name} needs whole groups in each process; make per_device_train_batch_size * "
                f"steps_per_generation a multiple of num_generations={self.num_generations}"
            )

    def _shared(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a generation batch with the rows of all processes."""
        pad = self._tokenizer.pad_token_id
        return {
            name: self._whole(value, fill=pad if name.endswith("_ids") else 0, left=name in LEFT_PADDED)
            for name, value in sorted(output.items())
            if isinstance(value, Tensor) and value.ndim
        }

    def _local_batch(self, output: Mapping[str, Any], reward: Tensor, clock: Clock) -> Batch:
        mask = output["completion_mask"].bool()
        length = mask.sum(dim=1)
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        rows = self._local_rows(len(mask))
        ids = output["completion_ids"]
        columns: dict[str, Any] = {
            "ids": ids,
            "reward": reward,
            "group": rows // self.num_generations,
            "prompt_length": output["prompt_mask"].sum(dim=1),
            **response_columns(ids, length, ends=self.eos_token_ids, limit=self.max_completion_length),
        }
        if "importance_sampling_ratio" in output:
            columns["weight"] = output["importance_sampling_ratio"].expand_as(mask) * mask
        return Batch(uid=rows, mask=mask, columns=columns, clock=clock)

    def _reward(self) -> Tensor:
        """Weighted sum of the reward functions over all rows; NaN where none of them scored."""
        matrix = self._raw_rewards
        assert matrix is not None
        total = (matrix * self.reward_weights.to(matrix.device)[None]).nansum(dim=1)
        return total.masked_fill(torch.isnan(matrix).all(dim=1), torch.nan)

    def _rollout_stats(self, output: Mapping[str, Any], mask: Tensor) -> dict[Stat, Tensor]:
        """Statistics of the old and the reference policy; the old ones may be there already, or come with the loss."""
        wanted = rollout_stats(self.recipe)
        found = {stat: output[_column(stat)] * mask for stat in wanted if _column(stat) in output}
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            if not found and not self._one_forward:
                found = self._measured(self.model, output, mask, _of(wanted, "old"))
            if self._reads_reference:
                with self._reference() as reference:
                    found |= self._measured(reference, output, mask, _of(wanted, "ref"))
        return found

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The reference policy: a model of its own, or that of a PEFT run with its adapter disabled."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        bare = self.accelerator.unwrap_model(self.model)
        with use_adapter(bare, adapter_name="ref" if "ref" in bare.peft_config else None):
            yield self.model

    def _measured(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor, stats: list[Measured]
    ) -> dict[Stat, Tensor]:
        """Measure local rows, in pieces of the micro-batch's size unless gradient is needed."""
        rows = None if torch.is_grad_enabled() else self.args.per_device_train_batch_size
        with self.accelerator.autocast():
            return self._scorer(model, inputs, mask, stats, rows=rows)

    def _gathered(self, batch: Batch) -> Batch:
        """The batch of all processes, rows in the order of their numbers."""
        columns = {
            name: self._whole(value) if value.ndim else value for name, value in sorted(batch.columns.items())
        }
        stats = {stat: self._whole(value) for stat, value in sorted(batch.stats.items(), key=repr)}
        uid, mask = self._whole(batch.uid), self._whole(batch.mask)
        return replace(batch, uid=uid, mask=mask, columns=columns, stats=stats)

    def _whole(self, value: Tensor, *, fill: int = 0, left: bool = False) -> Tensor:
        """The rows of all processes, the shorter ones padded with `fill`."""
        if self.accelerator.num_processes == 1:
            return value
        if value.dtype == torch.bool:  # padding would turn it into integers on some processes only
            return self._whole(value.to(torch.uint8), left=left).bool()
        if value.ndim == 2:
            value = self.accelerator.pad_across_processes(value, dim=1, pad_index=fill, pad_first=left)
        gathered: Tensor = self.accelerator.gather(value)
        return gathered

    # ---- one optimiser step --------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % self._generate_every() == 0 or self._buffered_inputs is None:
            output = self._generate_and_score_completions(generation_batch)
            assert self._rollout is not None
            order = shuffled_groups(self._rollout, output["row"], self.args.steps_per_generation)
            self._buffered_inputs = split_tensor_dict(ordered(output, order), self.args.steps_per_generation)
        if self._step % self.args.gradient_accumulation_steps == 0 and not self._one_forward:
            self._plan_window()
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _plan_window(self) -> None:
        """Plan over the rows of all micro-batches, on all processes, up to the next optimiser step."""
        start = self._step % self.args.steps_per_generation
        assert self._buffered_inputs is not None
        accumulated = self._buffered_inputs[start : start + self.args.gradient_accumulation_steps]
        update = (self._step % self._generate_every()) // self.args.gradient_accumulation_steps
        rows = self.accelerator.gather(torch.cat([inputs["row"] for inputs in accumulated]))
        mini = self._open_window(rows, update)
        reads_now, is_old = self.recipe.has("minibatch"), update == 0 and not self._dropout
        self._planned = not reads_now or is_old or len(accumulated) > 1  # else its one forward pass tells
        if not self._planned:
            self._window = mini
            return
        if reads_now:
            mini = mini.old_as_now() if is_old else self._measured_now(mini, accumulated)
        self._window = self.recipe.plan(mini)

    def _open_window(self, rows: Tensor, update: int) -> Batch:
        """The rows of one optimiser step, by their numbers; their statistics are still to be measured."""
        rollout = self._rollout
        assert rollout is not None
        # Rows are known to the micro-batches by their number in the rollout; find them in the window.
        self._place = torch.full((len(rollout),), -1, dtype=torch.long, device=rows.device)
        self._place[rows] = torch.arange(len(rows), device=rows.device)
        return replace(rollout[rows], clock=replace(rollout.clock, update=update))

    def _measured_now(self, mini: Batch, accumulated: list[Any]) -> Batch:
        """The window with the current policy's statistics: one forward pass without gradient."""
        stats = _of(self.recipe.stats("plan"), "now")
        found: list[dict[Stat, Tensor]] = []
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            for inputs in accumulated:
                found.append(self._measured(self.model, inputs, self._rollout.mask[inputs["row"]], stats))  # type: ignore[union-attr]
        local = {stat: torch.cat([piece[stat] for piece in found]) for stat in stats}
        return mini.with_stats({stat: self.accelerator.gather(value) for stat, value in local.items()})

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        rollout = self._rollout
        assert rollout is not None
        wanted = self.recipe.stats("loss") | {Logp("now")}
        if self._one_forward or not self._planned:
            wanted |= self.recipe.stats("plan")
        if self._one_forward:
            wanted |= {stat.by("now") for stat in rollout_stats(self.recipe) if stat.whose == "old"}
        time, width = inputs["completion_ids"].shape[1], rollout.mask.shape[1]
        mask = self._counted(inputs)[:, :time]
        values = self._measured(model, inputs, mask, _of(wanted, "now"))
        if width > time:
            values = {
                stat: torch.nn.functional.pad(value, (0, width - time)) for stat, value in values.items()
            }
        if self._one_forward:
            self._prepare_and_plan(values, inputs["row"])
        elif not self._planned:
            self._plan_alone(values)
        window = self._window
        assert window is not None
        micro = window[self._place[inputs["row"]]]
        if self._dump is not None:
            self._dump.note(rollout, inputs["row"], micro, values[Logp("now")])
        report = self.recipe.loss(micro.with_stats(values))
        self._log_loss(report)
        # Data parallelism averages gradients over processes; the weight maps already span them all.
        return report.loss * self.accelerator.num_processes

    def _counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Tokens of the micro-batch that the loss may read."""
        if self._one_forward:
            return self._rollout.mask[inputs["row"]]  # type: ignore[union-attr]
        window = self._window
        assert window is not None
        return window.mask[self._place[inputs["row"]]]

    @torch.no_grad()
    def _prepare_and_plan(self, values: Mapping[Stat, Tensor], local: Tensor) -> None:
        """Prepare and plan a rollout that is one micro-batch, from the statistics of its forward pass with gradient."""
        rollout = self._rollout
        assert rollout is not None
        rows = self.accelerator.gather(local)
        order = torch.argsort(rows)  # of all processes' rows by their numbers, as the rollout has them
        found = {stat.by("old"): value[order] for stat, value in self._of_all(values).items()}
        self._prepare_rollout(rollout.with_stats(found))
        self._window = self.recipe.plan(self._open_window(rows, update=0).old_as_now())

    @torch.no_grad()
    def _plan_alone(self, values: Mapping[Stat, Tensor]) -> None:
        """Plan an optimiser step that is one micro-batch, from the statistics of its forward pass with gradient."""
        assert self._window is not None
        self._window = self.recipe.plan(self._window.with_stats(self._of_all(values)))
        self._planned = True

    def _of_all(self, values: Mapping[Stat, Tensor]) -> dict[Stat, Tensor]:
        """The statistics of the rows of all processes, in the order of `gather`."""
        ordered = sorted(values.items(), key=lambda pair: repr(pair[0]))
        return {stat: self.accelerator.gather(value.detach()) for stat, value in ordered}

    # ---- metrics -------------------------------------------------------------------------------------------

    def _log_loss(self, report: LossReport) -> None:
        """Add up what the micro-batches report; one number per optimiser step."""
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._sums: dict[str, Tensor] = {}
        for name, value in report.terms.items():
            self._sums[f"loss/{name}"] = self._sums.get(f"loss/{name}", 0) + torch.stack(
                [value, torch.zeros_like(value)]
            )
        for name, (total, weight) in report.metrics.items():
            self._sums[name] = self._sums.get(name, 0) + torch.stack([total, weight])
        if self.accelerator.sync_gradients:
            for name, pair in sorted(self._sums.items()):
                total, weight = self.accelerator.reduce(pair, reduction="sum").tolist()
                value = total if name.startswith("loss/") else total / max(weight, 1.0)
                self._metrics["train"][name].append(value)

    def _finish_rollout(self) -> None:
        """Let the recipe's memory see the last rollout, all of whose updates are done."""
        if self._rollout is not None:
            self.recipe.observe(self._rollout)
            if self._dump is not None:
                self._dump.write(self._rollout)
            self._rollout = None

    # ---- state ---------------------------------------------------------------------------------------------

    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _updates_per_rollout(self) -> int:
        return self._generate_every() // self.args.gradient_accumulation_steps

    def _planned_rollouts(self) -> int | None:
        steps = self.state.max_steps
        return -(-steps // self._updates_per_rollout()) if steps and steps > 0 else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step % self._updates_per_rollout():
            raise ConfigError(
                f"a checkpoint at optimiser step {self.state.global_step} would fall inside a rollout of "
                f"{self._updates_per_rollout()} steps and could not be resumed exactly; set save_steps to a multiple of it"
            )
        self._finish_rollout()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = (
                Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            state = {"rollouts": self._rollouts, **self.recipe.state_dict()}
            partial = folder / f"{STATE_FILE}.part"
            torch.save(state, partial)
            os.replace(partial, folder / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            raise ConfigError(
                f"{checkpoint} was not written with a recipe (no {STATE_FILE}); start a new run from its weights"
            )
        state = torch.load(path, weights_only=True)
        self._rollouts = int(state.pop("rollouts"))
        self.recipe.load_state_dict(state)


def _samples_in_rounds(recipe: Recipe) -> bool:
    return not isinstance(recipe.sampler, (DynamicSampler, PlainSampler))


def _column(stat: Stat) -> str:
    """Where a generation batch carries a statistic of its rows."""
    return f"statistics/{stat!r}"


def _of(stats: frozenset[Stat], whose: Whose) -> list[Measured]:
    """The statistics of one policy, in an order that all processes share."""
    return sorted((s for s in stats if isinstance(s, Measured) and s.whose == whose), key=repr)
