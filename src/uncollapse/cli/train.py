"""`uncollapse train`: one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from cyclopts import Group, Parameter

from uncollapse.cli.output import note, say
from uncollapse.integrations.processes import leads

if TYPE_CHECKING:
    from uncollapse.integrations.settings import TrainConfig
    from uncollapse.runs import Run

_WHAT = Group("What to train", sort_key=1)
_HOW = Group("How long and how large", sort_key=2)
_LOOK = Group("How often to look", sort_key=3)


@Parameter(name="*")
@dataclass(frozen=True)
class Flags:
    """The settings of a run as flags; each has the same name in the YAML file and takes precedence over it.

    Attributes
    ----------
    model
        `tiny`, `smollm2-135m`, a Hub id or a directory. [tiny]
    task
        Task, as `uncollapse list tasks` gives it. [modsum]
    dataset
        JSONL, Parquet, CSV file or Hub id with `prompt` and `answer`, in place of a task.
    steps
        Rollouts to train for. [100]
    prompts
        Prompts per rollout; each gets as many completions as the recipe's sampler says. [16]
    updates
        Optimiser steps per rollout; with one, clips and KL-Cov have nothing to act on. [4]
    learning_rate
        Constant learning rate of AdamW. [by model size: 1e-3 tiny, 1e-5 small, 1e-6]
    max_tokens
        Limit on the tokens of a completion. [by model size: 48, 128, 512]
    micro_batch
        Rows per forward pass with gradient in each process: memory against speed, the result stays the same.
    share_prompts
        Compute a prompt once for all its completions, where the model supports it: faster, same result. [yes]
    checkpoint_every
        Steps between checkpoints; 0 for only the last. [a quarter of the steps]
    eval_every
        Steps between evaluations on held-out prompts; 0 for never. [a tenth of the steps]
    eval_prompts
        Held-out prompts.
    eval_samples
        Completions of each, for pass@k up to this k. [8]
    probe_every
        Steps between scorings of the same few texts; 0 for never.
    dump_tokens
        Write every sampled token as Parquet, so that `uncollapse diagnose --tokens` can say which spent the entropy.
    """

    model: Annotated[str | None, Parameter(group=_WHAT)] = None
    task: Annotated[str | None, Parameter(group=_WHAT)] = None
    dataset: Annotated[str | None, Parameter(group=_WHAT)] = None
    steps: Annotated[int | None, Parameter(group=_HOW)] = None
    prompts: Annotated[int | None, Parameter(group=_HOW)] = None
    updates: Annotated[int | None, Parameter(group=_HOW)] = None
    learning_rate: Annotated[float | None, Parameter(group=_HOW)] = None
    max_tokens: Annotated[int | None, Parameter(group=_HOW)] = None
    micro_batch: Annotated[int | None, Parameter(group=_HOW)] = None
    share_prompts: Annotated[bool | None, Parameter(group=_HOW)] = None
    checkpoint_every: Annotated[int | None, Parameter(group=_LOOK)] = None
    eval_every: Annotated[int | None, Parameter(group=_LOOK)] = None
    eval_prompts: Annotated[int | None, Parameter(group=_LOOK)] = None
    eval_samples: Annotated[int | None, Parameter(group=_LOOK)] = None
    probe_every: Annotated[int | None, Parameter(group=_LOOK)] = None
    dump_tokens: Annotated[bool | None, Parameter(group=_LOOK)] = None

    def given(self) -> dict[str, Any]:
        """The flags that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


def train(
    config: Path | None = None,
    /,
    *,
    recipe: Annotated[str | None, Parameter(group=_WHAT)] = None,
    seed: Annotated[int | None, Parameter(group=_HOW)] = None,
    output: str | None = None,
    flags: Flags = Flags(),
    resume: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train a model with a recipe and write a run directory with metrics, checkpoints and report.html.

    Examples: `uncollapse train --recipe clip-cov --model tiny --task modsum --output runs/clip-cov`;
    `uncollapse train run.yaml --seed 1`; after Ctrl-C or a kill `uncollapse train --resume --output runs/clip-cov`.

    Parameters
    ----------
    config
        YAML file with the same settings; flags take precedence.
    recipe
        Name of a recipe, or a YAML file that holds one (see `uncollapse recipe --help`). [grpo]
    seed
        Of everything that is drawn. [0]
    output
        Run directory, new unless --resume is given. [runs/train]
    resume
        Continue the run in --output from its last checkpoint.
    dry_run
        Print the resolved settings as YAML and stop.
    """
    from uncollapse.integrations.launch import settings_of
    from uncollapse.integrations.settings import settings, settings_from_file
    from uncollapse.runs import Run

    given = {**flags.given(), "recipe": recipe, "seed": seed, "output": output}
    if resume and config is None:
        made = settings_of(Run.open(output or "runs/train"), **{**given, "output": None})
    else:
        made = settings_from_file(config, **given) if config is not None else settings(**given)
    if dry_run:
        say(yaml.safe_dump(made.to_dict(), sort_keys=False, allow_unicode=True).rstrip())
        return 0
    run = run_once(made, resume=resume)
    say(f"report: {run.path / 'report.html'}")
    return 0


def run_once(config: TrainConfig, *, resume: bool) -> Run:
    """Train with live progress; the report is written at the end and when interrupted."""
    from uncollapse.cli.live import watching
    from uncollapse.integrations.launch import train as launch

    with reported(Path(config.output)), watching(f"{config.recipe.name} seed {config.seed}") as watch:
        return launch(config, progress=watch, resume=resume)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Write the report of a run or comparison after the block, also when it was interrupted, in the leading process."""
    from uncollapse import report
    from uncollapse.integrations.interrupts import Interrupted

    try:
        yield
    except Interrupted:
        if leads():
            note(f"report so far: {report.write(path)}")
        raise
    if leads():
        report.write(path)
