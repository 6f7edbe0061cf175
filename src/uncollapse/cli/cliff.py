"""`uncollapse cliff`: how firmly rewards decide, from a table of scored completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from uncollapse.cli.catalogue import AsJson
from uncollapse.cli.output import as_json, note, say, table
from uncollapse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from uncollapse.cli.reward_table import RewardTable
    from uncollapse.policy.policy_cliff import RewardAudit
    from uncollapse.policy.policy_cliff.verdict import AuditSummary

_WIDTH = 60
"""Characters of a prompt in the table."""

_Pairs = Parameter(consume_multiple=True, negative="")


def cliff(
    path: Path,
    /,
    *,
    weights: Annotated[tuple[str, ...], _Pairs] = (),
    temperature: Annotated[float, Parameter(name=("--temperature", "--alpha"))] = 0.1,
    shift: float = 0.01,
    tolerance: float | None = None,
    top: int = 10,
    enumerated: Annotated[bool, Parameter(negative="")] = False,
    map_: Annotated[tuple[str, ...], Parameter(name="--map", consume_multiple=True, negative="")] = (),
    json_: AsJson = False,
) -> None:
    """Say how firmly rewards decide: prompts with several best answers, and how small a reward change flips a winner.

    Reads a table with one row per scored completion (CSV, TSV, JSONL, JSON, Parquet, or a directory of such files as TRL
    and verl write them): a prompt, a completion, one or more rewards. Also token dumps and run directories of ours. No
    model is needed and nothing is trained; answers that were not sampled are not seen. A completion that has some of
    several rewards counts with those that it has, as where each domain has its own.

    Examples: `uncollapse cliff completions.parquet`; `uncollapse cliff scored.jsonl --weights correct=1 format=0.1`;
    `uncollapse cliff runs/today/token-dump --shift 0.05 --temperature 0.01`.

    Parameters
    ----------
    path
        The table, or a directory that holds some.
    weights
        Rewards that are added up, and their weights, as NAME=NUMBER; by default the column `reward` or `score`, else
        every column with such a word in its name, with weight 1.
    temperature
        Of the regularised policy, in reward per nat: a KL or entropy coefficient.
    shift
        The reward change to guard against, in units of the weighted reward.
    tolerance
        Weighted rewards of a prompt that are closer than this are tied; by default a millionth of what is added up, and at
        least 1e-6, since trainers keep rewards in float32.
    top
        Number of prompts to list, worst first.
    enumerated
        The rows list the answers instead of sampling them: weigh each by its log-probability, the column `logp`.
    map_
        Columns with names of their own, as KNOWN=NAME, where KNOWN is prompt, completion or logp.
    """
    from uncollapse.cli.reward_table import read_rewards

    if top < 0:
        raise ConfigError(f"--top takes a number of prompts from 0, got {top}")
    by_name = _weights(weights)
    scored = read_rewards(path, tuple(by_name), _names(map_))
    used = by_name or dict.fromkeys(scored.names, 1.0)
    found, grid = _audits(scored, list(used.values()), temperature, shift, tolerance, enumerated)
    for line in scored.notes:
        note(f"{path}: {line}")
    if json_:
        as_json(_plain(_record(scored, used, found, grid, top)))
    else:
        _print(scored, used, found, grid, top)


def _audits(
    scored: RewardTable,
    weights: Sequence[float],
    temperature: float,
    shift: float,
    tolerance: float | None,
    enumerated: bool,
) -> tuple[RewardAudit, list[AuditSummary]]:
    """The audit at the temperature asked for, and summaries over the grid."""
    from uncollapse.policy.policy_cliff import audit_completions
    from uncollapse.policy.policy_cliff.profile import ALPHAS
    from uncollapse.policy.policy_cliff.verdict import summarise

    if enumerated and scored.logp is None:
        raise DataError(
            f"{scored.source} has no column logp with a number in every row; --enumerated needs one"
        )

    def audit(alpha: float) -> RewardAudit:
        return audit_completions(
            scored.prompt,
            scored.rewards,
            weights,
            alpha,
            shift=shift,
            answer=scored.answer,
            base_logp=scored.logp if enumerated else None,
            tolerance=tolerance,
            prompts=len(scored.prompts),
        )

    found = audit(temperature)
    others = [alpha for alpha in ALPHAS if not math.isclose(alpha, temperature)]
    made = {alpha: audit(alpha) for alpha in others} | {temperature: found}
    return found, [summarise(made[alpha]) for alpha in sorted(made)]


def _print(
    scored: RewardTable,
    weights: Mapping[str, float],
    found: RewardAudit,
    grid: Sequence[AuditSummary],
    top: int,
) -> None:
    from uncollapse.cli.reward_table import shown
    from uncollapse.policy.policy_cliff.verdict import verdict

    here = next(one for one in grid if one.alpha == found.alpha)
    reward = " + ".join(name if w == 1 else f"{w:g} {name}" for name, w in weights.items())
    said = f"{len(scored.prompt):,} completions of {here.prompts:,} prompts"
    if scored.unscored:
        said += f", {scored.unscored:,} without a score left out"
    if scored.partly_scored:
        said += f", {scored.partly_scored:,} with a reward missing: what they have is added up"
    say(f"{shown(scored.source, 200)}   {said}")
    say(f"reward: {shown(reward, 200)}")
    if here.comparable:
        least, most = here.tolerance
        grows = f" to {most:.3g}, where rewards are large" if most > least else ""
        say(f"tied: answers of a prompt whose rewards are within {least:.3g}{grows}")
    say("")
    say(verdict(here))
    if not here.comparable:
        return
    say("")
    say(f"What temperature buys: policy change (TV) that a reward change of {found.shift:g} can make")
    table(
        ["temperature", "moved: mean", "worst", "at most", "reward given up", "entropy (nats)"],
        [_temperature(None, here), *(_temperature(one.alpha, one) for one in grid)],
    )
    worst = _worst(found, top)
    if worst:
        say("")
        table(
            ["best answers", "flips at", "hard moves", f"at {found.alpha:g}", "prompt"],
            [
                [
                    f"{found.ties[i]} of {found.answers[i]}",
                    f"{found.flip[i]:.3g}",
                    f"{found.hard_tv[i]:.2f}",
                    f"{found.soft_tv[i]:.2f}",
                    shown(scored.prompts[i], _WIDTH),
                ]
                for i in worst
            ],
            title="Worst prompts first",
        )


def _worst(found: RewardAudit, top: int) -> list[int]:
    """The prompts to list; of one with a single answer there is nothing to say."""
    order = found.worst_first()
    return [int(i) for i in order[found.comparable[order]][:top]]


def _temperature(alpha: float | None, one: AuditSummary) -> list[str]:
    """A row of the grid; None is the hard policy."""
    if alpha is None:
        numbers = (one.hard_mean, one.hard_worst, float(one.shift > 0), 0.0, one.hard_entropy)
    else:
        numbers = (one.soft_mean, one.soft_worst, one.bound, one.given_up, one.soft_entropy)
    return ["0" if alpha is None else f"{alpha:g}", *(f"{number:.3g}" for number in numbers)]


def _record(
    scored: RewardTable,
    weights: Mapping[str, float],
    found: RewardAudit,
    grid: Sequence[AuditSummary],
    top: int,
) -> dict[str, Any]:
    from uncollapse.cli.reward_table import shown
    from uncollapse.policy.policy_cliff.verdict import verdict

    here = next(one for one in grid if one.alpha == found.alpha)
    return {
        "schema": 1,
        "source": scored.source,
        "weights": dict(weights),
        "notes": scored.notes,
        "completions": len(scored.prompt),
        "unscored": scored.unscored,
        "partly_scored": scored.partly_scored,
        "verdict": verdict(here),
        "summary": asdict(here),
        "temperatures": [asdict(one) for one in grid],
        "worst": [
            {
                "prompt": shown(scored.prompts[i], 200),
                "completions": int(found.completions[i]),
                "answers": int(found.answers[i]),
                "ties": int(found.ties[i]),
                "ties_by_reward": dict(zip(scored.names, found.ties_by_reward[i].tolist(), strict=True)),
                "tolerance": float(found.tolerance[i]),
                "best": float(found.best[i]),
                "gap": float(found.gap[i]),
                "flip": float(found.flip[i]),
                "outside_gap": float(found.outside_gap[i]),
                "hard_tv": float(found.hard_tv[i]),
                "soft_tv": float(found.soft_tv[i]),
                "soft_tv_exact": bool(found.exact[i]),
                "expected": float(found.expected[i]),
                "entropy": float(found.entropy[i]),
            }
            for i in _worst(found, top)
        ],
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _weights(pairs: Sequence[str]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        name, equals, number = pair.rpartition("=")
        try:
            if not (name and equals):
                raise ValueError
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"--weights takes NAME=NUMBER, such as format=0.1; got {pair!r}") from None
    return found


def _names(pairs: Sequence[str]) -> dict[str, str]:
    from uncollapse.cli.reward_table import COLUMNS

    found = {}
    for pair in pairs:
        known, _, name = pair.partition("=")
        if known not in COLUMNS or not name:
            raise ConfigError(
                f"--map takes KNOWN=NAME, where KNOWN is one of {', '.join(COLUMNS)}; got {pair!r}"
            )
        found[known] = name
    return found
