"""From settings to a finished run: build model, data and trainer, train, and be able to go on after any end.

run = train(settings(recipe="clip-cov", model="tiny", task="modsum", steps=100, output="runs/clip-cov"))

Started by torchrun or accelerate, several processes train together: settings mean the same whatever their number, the
rows of a step are split over them.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from uncollapse import __version__
from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations.interrupts import Interrupted, StopRequest, stop_requests
from uncollapse.integrations.processes import Processes, join
from uncollapse.integrations.progress import Progress, Watch, unwatched
from uncollapse.integrations.quiet import quiet_libraries, stay_offline
from uncollapse.integrations.settings import SMALL, TrainConfig, read_settings
from uncollapse.policy.config.document import locate
from uncollapse.runs import CONFIG, DUMP, Run
from uncollapse.tasks.task import Row, Task

_MAY_CHANGE = frozenset(
    {"output", "steps", "checkpoint_every", "micro_batch", "share_prompts", "dump_tokens"}
)
"""Settings that a resumed run may change: none of them changes what a step does."""

_FULL_DISK = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


@dataclass(frozen=True)
class World:
    """What a run is made of: the model with its tokenizer, the task, rows to train on and rows held out."""

    model: Any
    tokenizer: Any
    task: Task
    rows: list[Row]
    held_out: list[Row]


def train(config: TrainConfig, *, progress: Watch = unwatched, resume: bool = False) -> Run:
    """Train as `config` says, in the run directory `config.output`.

    Metrics are appended as they come, checkpoints are complete or ignored. `resume` continues from the last
    checkpoint, or from the start if there is none yet; a run that is finished is returned as it is.

    Raises:
        Interrupted: after SIGINT or SIGTERM, when the step is done and its checkpoint written.
        DataError: the directory holds a run already (without `resume`) or none (with it); the disk is full.
        ConfigError: settings that cannot be honoured, or that are not those of the run to resume.
        MissingExtra: the training libraries are not installed.
    """
    processes = join()
    if resume:
        run, config, done = processes.from_first(lambda: _reopened(config))
        if done:
            return run
    world, config = processes.together(lambda: build(config, processes.count))
    if not resume:
        run = processes.from_first(
            lambda: Run.create(config.output, {**config.to_dict(), "versions": _versions()})
        )
    with stop_requests(lambda: progress(Progress(0, config.steps, {}, "stopping after this step"))) as stop:
        _run(config, world, run, stop, progress, processes)
    if stop.requested and not processes.from_first(lambda: finished(run)):
        raise Interrupted(run)
    return run


def settings_of(run: Run, **given: Any) -> TrainConfig:
    """The settings of a run as its directory has them, with `given` (flags, say) in their place."""
    known = {item.name for item in fields(TrainConfig)}
    stored = {name: value for name, value in run.config.items() if name in known}
    return read_settings(locate({**stored, "output": str(run.path)}, str(run.path / CONFIG)), **given)


def finished(run: Run) -> bool:
    """Whether the checkpoint after the last step is there; it is written after everything else."""
    settings, last = settings_of(run), last_checkpoint(run)
    return last is not None and _number(last) >= settings.steps * settings.updates


def last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint. One that a kill cut short lacks the recipe's state, which is written last."""
    from uncollapse.integrations.trl import STATE_FILE

    found = [path for path in run.checkpoints.glob("checkpoint-*") if (path / STATE_FILE).exists()]
    return max(found, key=_number, default=None)


def build(config: TrainConfig, processes: int = 1) -> tuple[World, TrainConfig]:
    """Load model and data; the settings come back with every default decided for so many processes."""
    import torch

    from uncollapse import models

    stay_offline(config.model, config.dataset, packaged=tuple(models.model_names()))
    quiet_libraries()
    model, tokenizer = models.load(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    config = config.resolved(parameters, processes)
    if parameters < SMALL:
        # A toy's products are too small to share: two threads take three times as long.
        torch.set_num_threads(1)
    style = "chat" if tokenizer.chat_template else "plain"
    task = _task(config)
    rows = task.rows(config.rows, split="train", seed=config.seed, style=style)
    if len(rows) < config.prompts:
        raise DataError(
            f"{config.dataset or config.task} has {len(rows)} rows, fewer than the {config.prompts} prompts of a step; "
            "give more data or fewer prompts"
        )
    # Held-out prompts are the same for every seed, so that seeds and recipes are compared on the same ones.
    held_out = task.rows(config.eval_prompts or 0, split="test", seed=0, style=style)
    return World(model, tokenizer, task, rows, held_out), config


def _task(config: TrainConfig) -> Task:
    from uncollapse import tasks

    if config.dataset is not None:
        return tasks.from_dataset(config.dataset, map=config.columns)
    assert config.task is not None
    return tasks.task(config.task)


def _run(
    config: TrainConfig, world: World, run: Run, stop: StopRequest, progress: Watch, processes: Processes
) -> None:
    trainer = processes.together(lambda: _trainer(config, world, run, stop, progress, processes))
    checkpoint = processes.from_first(lambda: last_checkpoint(run))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:
        if not any(sign in str(error) for sign in _FULL_DISK) or isinstance(error, DataError):
            raise processes.alone(error) from error.__cause__
        raise DataError(
            f"the disk is full: a file below {run.path} could not be written; make room and continue with --resume"
        ) from error


def _trainer(
    config: TrainConfig, world: World, run: Run, stop: StopRequest, progress: Watch, processes: Processes
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback

    from uncollapse.integrations.evaluation import Sampler
    from uncollapse.integrations.recorder import Recorder
    from uncollapse.integrations.stopping import StopBetweenRollouts
    from uncollapse.integrations.trl import GRPOTrainer

    temperature = config.recipe.sampler.temperature
    assert config.max_tokens is not None
    sampler = Sampler(world.model, world.tokenizer, temperature, config.max_tokens)
    recorders = (
        [Recorder(run, config, world.task, sampler, world.held_out, progress)] if processes.leads else []
    )
    trainer = GRPOTrainer(
        world.model,
        reward_funcs=world.task.reward,
        args=_arguments(config, run, processes.count),
        train_dataset=Dataset.from_list(world.rows),
        processing_class=world.tokenizer,
        recipe=config.recipe,
        share_prompts=config.share_prompts,
        dump_tokens=run.path / DUMP if config.dump_tokens else None,
        # In this order: the row of a step is written before the run may stop.
        callbacks=[*recorders, StopBetweenRollouts(stop, config.updates, processes)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: TrainConfig, run: Run, processes: int) -> Any:
    import torch
    from trl import GRPOConfig

    gpu = torch.cuda.is_available()
    micro = config.micro_batch
    assert micro is not None
    every = config.checkpoint_every or config.steps
    return GRPOConfig(
        output_dir=str(run.checkpoints),
        max_steps=config.steps * config.updates,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.update_rows // (micro * processes),
        steps_per_generation=config.rollout_rows // (micro * processes),
        num_generations=config.samples,
        temperature=config.recipe.sampler.temperature,
        max_completion_length=config.max_tokens,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        seed=config.seed,
        logging_steps=config.updates,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=every * config.updates,
        save_total_limit=2,
        use_cpu=not gpu,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )


def _reopened(config: TrainConfig) -> tuple[Run, TrainConfig, bool]:
    """The run that is in the directory, its settings with those that may change, and whether it is finished."""
    run = Run.open(config.output)
    config = _same_run(run, config)
    run = _restated(run, config)
    return run, config, finished(run)


def _same_run(run: Run, config: TrainConfig) -> TrainConfig:
    """The stored settings with what may change taken from `config`. Raises `ConfigError` for another recipe or task."""
    stored = settings_of(run)
    if stored.recipe != config.recipe:
        same_name = stored.recipe.name == config.recipe.name
        raise ConfigError(
            f"{run.path} is a run of recipe {stored.recipe.name!r}, "
            + ("with other options than given now" if same_name else f"not {config.recipe.name!r}")
            + "; resume with the recipe that wrote it or choose another output"
        )
    for item in fields(TrainConfig):
        wanted, was = getattr(config, item.name), getattr(stored, item.name)
        if item.name not in _MAY_CHANGE and wanted is not None and wanted != was:
            raise ConfigError(
                f"{run.path} was started with {item.name} {was!r}, not {wanted!r}; resume with that or choose another output"
            )
    changed = {name: getattr(config, name) for name in _MAY_CHANGE if getattr(config, name) is not None}
    return replace(stored, **changed)


def _restated(run: Run, config: TrainConfig) -> Run:
    """The run with its configuration rewritten where the resumed one differs, such as in the number of steps."""
    if settings_of(run) == config:
        return run
    text = yaml.safe_dump({**run.config, **config.to_dict()}, sort_keys=False, allow_unicode=True)
    run.write_text(CONFIG, text)
    return Run.open(run.path)


def _number(checkpoint: Path) -> int:
    text = checkpoint.name.rpartition("-")[2]
    return int(text) if text.isdigit() else -1


def _versions() -> dict[str, str]:
    versions = {"uncollapse": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "trl"):
        versions[name] = metadata.version(name)
    return versions
