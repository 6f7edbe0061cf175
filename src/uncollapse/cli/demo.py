"""`uncollapse demo`: a collapse and its remedies, in minutes on two cores."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from uncollapse.cli.output import note, say

if TYPE_CHECKING:
    from uncollapse.runs import Comparison

SCALE = (
    "At this scale the remedies need other numbers than in the papers (fractions of a fifth instead of a fifth of a "
    "percent, say): a step here has a few hundred tokens, not a million. The recipes are in {path}."
)


def demo(*, output: str = "runs/demo", seed: int = 0, steps: int = 40) -> int:
    """Watch a small language model lose its entropy under GRPO, and remedies keep it; writes a report.

    Trains the packaged model `tiny` on `modsum` (write five digits whose sum ends in a given digit; there are 10,000
    right answers to each prompt, so a policy that is always right need not be sure). A few minutes on two cores.

    Example: `uncollapse demo`

    Parameters
    ----------
    output
        Directory of the comparison. If the demo was run there already, its results are shown.
    seed
        Of everything that is drawn; the same for all recipes.
    steps
        Rollouts per recipe.
    """
    from uncollapse.cli.compare import print_summary, run_comparison
    from uncollapse.integrations.settings import settings
    from uncollapse.policy.config import load_recipes

    with resources.as_file(resources.files("uncollapse.cli").joinpath("demo.yaml")) as path:
        recipes = list(load_recipes(path).values())
        note(SCALE.format(path=path))
    base = settings(model="tiny", task="modsum", output=output, steps=steps, **SETTINGS)
    comparison = run_comparison(base, recipes, [seed])
    print_summary(comparison)
    say("")
    for line in in_words(comparison):
        say(line)
    say("")
    say(f"report: {Path(comparison.path, 'report.html')}")
    return 0


SETTINGS = {
    "prompts": 16,
    "updates": 2,
    "learning_rate": 1e-3,
    "max_tokens": 8,
    "eval_every": 10,
    "eval_prompts": 32,
    "checkpoint_every": 0,
    "probe_every": 4,
}
"""What keeps the demo to minutes; the number of rows decides how long a step takes."""


def in_words(comparison: Comparison) -> list[str]:
    """What happened, one sentence a recipe, from the numbers of the runs alone."""
    from uncollapse.report.series import arms_of_comparison
    from uncollapse.report.words import lost, moved, percent

    lines = []
    for arm in arms_of_comparison(comparison):
        entropy = [arm.first("entropy/token/mean"), arm.last("entropy/token/mean")]
        reward = [arm.first("reward/mean"), arm.last("reward/mean")]
        if None in entropy or None in reward:
            continue
        before, after = (e.mean for e in entropy if e is not None)
        share = lost(before, after)
        change = "" if share is None else f", {percent(abs(share))} {'lost' if share >= 0 else 'gained'}"
        rewards = (r.mean for r in reward if r is not None)
        lines.append(f"{arm.name}: entropy {moved(before, after)} nats{change}; reward {moved(*rewards)}.")
    return lines
