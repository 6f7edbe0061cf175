"""`uncollapse compare`: recipes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uncollapse.cli.catalogue import AsJson
from uncollapse.cli.output import as_json, note, say, table
from uncollapse.cli.train import Flags, reported
from uncollapse.integrations.processes import leads

if TYPE_CHECKING:
    from uncollapse.integrations.settings import TrainConfig
    from uncollapse.policy.recipe import Recipe
    from uncollapse.runs import Comparison


def compare(
    config: Path | None = None,
    /,
    *,
    recipes: str = "grpo,clip-cov,kl-cov",
    seeds: str = "0",
    output: str = "runs/compare",
    flags: Flags = Flags(),  # noqa: B008  (frozen)
    json_: AsJson = False,
) -> int:
    """Train several recipes with several seeds on the same task; print means with 95% intervals, write a report.

    Finished runs are skipped and started ones continue, so the same command again resumes a comparison.

    Examples: `uncollapse compare --recipes grpo,clip-cov,kl-cov --seeds 0,1,2 --task modsum --steps 100`;
    `uncollapse compare run.yaml --recipes grpo,mine.yaml --seeds 0,1,2`.

    Parameters
    ----------
    config
        YAML file with the settings that all runs share, as for `train`.
    recipes
        Names or YAML files, with commas between them.
    seeds
        Whole numbers, with commas between them. One seed gives no interval.
    output
        Directory of the comparison.
    """
    from uncollapse.integrations.settings import settings, settings_from_file
    from uncollapse.policy.config import resolve

    given = {**flags.given(), "output": output}
    base = settings_from_file(config, **given) if config is not None else settings(**given)
    made = [resolve(name) for name in _listed(recipes)]
    comparison = run_comparison(base, made, _numbers(seeds))
    if json_:
        as_json(comparison.summary())
    else:
        print_summary(comparison)
        say(f"report: {comparison.path / 'report.html'}")
    return 0


def run_comparison(base: TrainConfig, recipes: Sequence[Recipe], seeds: Sequence[int]) -> Comparison:
    """Run a comparison with live progress, write its summary and its report."""
    from contextlib import ExitStack

    from uncollapse.cli.live import watching
    from uncollapse.cli.summary import summarise
    from uncollapse.integrations.comparison import compare as launch
    from uncollapse.integrations.interrupts import Interrupted
    from uncollapse.integrations.progress import Progress

    with reported(Path(base.output)), ExitStack() as shown:
        current = shown.enter_context(watching(""))

        def following(recipe: str, seed: int, number: int, of: int) -> None:
            nonlocal current
            shown.close()
            current = shown.enter_context(watching(f"{recipe} seed {seed} ({number}/{of})"))

        def progress(event: Progress) -> None:
            current(event)

        try:
            comparison = launch(base, recipes, seeds, progress=progress, following=following)
        except Interrupted as error:
            error.args = ("interrupted; the same command again continues the comparison",)
            raise
    if leads():
        comparison.write_summary(summarise(comparison))
    return comparison


def print_summary(comparison: Comparison) -> None:
    """The table of a comparison: means over seeds, with 95 % intervals if there are several."""
    from uncollapse.cli.summary import COLUMNS, cell

    summary = comparison.summary() or {}
    rows = [
        [name, str(arm["seeds"]), *(cell(arm["last"].get(key)) for key, _ in COLUMNS)]
        for name, arm in summary.get("recipes", {}).items()
    ]
    table(["recipe", "seeds", *(label for _, label in COLUMNS)], rows)
    if any(arm["seeds"] == 1 for arm in summary.get("recipes", {}).values()):
        note("a single seed has no interval: differences may be chance")


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _numbers(text: str) -> list[int]:
    from uncollapse.errors import ConfigError

    try:
        return [int(item) for item in _listed(text)]
    except ValueError as error:
        raise ConfigError(f"--seeds takes whole numbers with commas between them, got {text!r}") from error
