"""An audit in a few numbers and a paragraph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uncollapse.policy.policy_cliff.audit import RewardAudit


@dataclass(frozen=True)
class AuditSummary:
    """Counts of prompts, and means or quantiles over the comparable ones (NaN if there are none).

    `tolerance`: rewards of a prompt that are closer are tied; the smallest and the largest of the prompts, which differ
    where it grows with the rewards.
    `comparable`: with at least two different scored answers; of these `tied` have several best answers (`flat` those that
    give every answer the same reward) and `flipped` have a unique winner that a change within `shift` can overtake or tie.
    `tie_median`, `tie_largest`: size of the ties. `flip_median`: smallest reward change that moves an untied winner.
    `hard_*`, `soft_*`: TV that a change within `shift` can reach, without and with temperature `alpha`; `bound` holds for
    the latter. `given_up`: best minus expected reward at that temperature, mean. `hard_entropy`, `soft_entropy`: mean
    entropy of the laws over the sampled answers (nats).
    """

    alpha: float
    shift: float
    tolerance: tuple[float, float]
    prompts: int
    comparable: int
    tied: int
    flat: int
    flipped: int
    tie_median: float
    tie_largest: int
    answers_median: float
    flip_median: float
    hard_mean: float
    hard_worst: float
    soft_mean: float
    soft_worst: float
    bound: float
    given_up: float
    hard_entropy: float
    soft_entropy: float


def summarise(audit: RewardAudit) -> AuditSummary:
    """The audit in numbers."""
    there, tied = audit.comparable, audit.tied & audit.comparable
    untied = there & ~tied
    ties = audit.ties[tied]
    return AuditSummary(
        alpha=audit.alpha,
        shift=audit.shift,
        tolerance=(_of(np.min, audit.tolerance[there]), _of(np.max, audit.tolerance[there])),
        prompts=len(there),
        comparable=int(there.sum()),
        tied=int(tied.sum()),
        flat=int((audit.ties == audit.answers)[tied].sum()),
        flipped=int((untied & (audit.hard_tv > 0)).sum()),
        tie_median=_of(np.median, ties),
        tie_largest=int(ties.max()) if len(ties) else 0,
        answers_median=_of(np.median, audit.answers[there]),
        flip_median=_of(np.median, audit.flip[untied]),
        hard_mean=_of(np.mean, audit.hard_tv[there]),
        hard_worst=_of(np.max, audit.hard_tv[there]),
        soft_mean=_of(np.mean, audit.soft_tv[there]),
        soft_worst=_of(np.max, audit.soft_tv[there]),
        bound=audit.bound,
        given_up=_of(np.mean, (audit.best - audit.expected)[there]),
        hard_entropy=_of(np.mean, np.log(audit.ties[there])),
        soft_entropy=_of(np.mean, audit.entropy[there]),
    )


def verdict(found: AuditSummary) -> str:
    """What the numbers say, in a paragraph."""
    if not found.comparable:
        return "Nothing can be said: no prompt has two different scored answers. Give several completions for each prompt."
    said = [_ties(found)]
    untied = found.comparable - found.tied
    if untied:
        said.append(
            f"Of the {untied:,} with one best answer, {found.flipped:,} can change it within a reward change of "
            f"{found.shift:g}; the median needs {found.flip_median:.3g}."
        )
    said.append(
        f"A change of {found.shift:g} can move the optimal policy by {found.hard_mean:.2g} in total variation (mean over "
        f"prompts); at temperature {found.alpha:g} by {found.soft_mean:.2g}, and never by more than {found.bound:.2g}, for "
        f"{found.given_up:.2g} of reward."
    )
    if found.tied:
        said.append(
            "Decide the ties on purpose, with a further reward term, or keep them open with an entropy or KL term; the "
            "bound is the regularised optimum's, not that of an entropy bonus in a policy-gradient loss."
        )
    return " ".join(said)


def _ties(found: AuditSummary) -> str:
    if not found.tied:
        return f"All {found.comparable:,} comparable prompts have one best answer among those sampled."
    return (
        f"{found.tied:,} of {found.comparable:,} comparable prompts ({found.tied / found.comparable:.0%}) have more than one "
        f"best answer (median {found.tie_median:g}, most {found.tie_largest:,}): there the reward does not decide, and any "
        f"further term, however small, does; {found.flat:,} of them reward every answer alike."
    )


def _of(statistic: object, values: np.ndarray) -> float:
    return float(statistic(values)) if len(values) else float("nan")  # type: ignore[operator]
