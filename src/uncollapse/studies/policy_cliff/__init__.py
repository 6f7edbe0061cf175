"""Reproduction of "The Policy Cliff: A Theoretical Analysis of Reward-Policy Maps in Large Language Models" (2507.20150).

A: cliff and slope on a token tree. B: the exact stability radius on random MDPs. C: the exact Lipschitz constant
against temperature. D: two equally right formats, trained by GRPO with and without an entropy bonus, and with and
without a bonus on one format. The paper has no experiment with seeds; claims, steps and seeds here were fixed before the
run, those of D after a calibration on seeds 1000 to 1003, which the study does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.policy.policy_cliff import soft_policy_bound, tanh_bound
from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.policy_cliff.experiment import (
    BONUS,
    COEFFICIENT,
    EPS,
    GAMMA,
    LARGER,
    TREE_ALPHA,
    measure,
)
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(measured: Measurements) -> Figure:
    """The four parts, one panel each."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7.5), layout="constrained")
    (tree, radius), (smooth, formats) = canvas.subplots(2, 2)
    for name, label in (("answers", "hard, uniform over answers"), ("tokens", "hard, uniform over tokens")):
        tree.loglog(EPS, measured.details["tree"][name], "o-", label=label)
    tree.loglog(EPS, measured.details["tree"]["soft"], "o-", label=f"temperature {TREE_ALPHA:g}")
    tree.loglog(EPS, [tanh_bound(eps, TREE_ALPHA) for eps in EPS], "k:", label="tanh bound")
    tree.set(title="A: bonus on one of 10 right answers", xlabel="bonus", ylabel="policy change (TV)")
    gains = np.asarray(measured.details["gains"])
    radius.hist(gains, bins=np.geomspace(1, max(2.0, gains.max()), 30))
    radius.set(
        title="B: exact radius against the textbook bound", xlabel="ratio", ylabel="MDPs", xscale="log"
    )
    rows = measured.details["lipschitz"]
    alphas = [float(alpha) for alpha in rows]
    smooth.loglog(alphas, [row["constant"] for row in rows.values()], "o-", label="exact, mean over MDPs")
    smooth.loglog(
        alphas,
        [soft_policy_bound(1e-9, a, GAMMA) / 1e-9 for a in alphas],
        "k:",
        label=r"$1 / (2 \alpha (1 - \gamma))$",
    )
    smooth.set(title="C: Lipschitz constant of the soft policy", xlabel="temperature", ylabel="TV per reward")
    shares = measured.details["formats"]
    names = [name for name in shares if name.endswith(("/0", f"/{BONUS:g}"))]
    for at, name in enumerate(names):
        formats.plot(np.full(len(shares[name]), at), shares[name], "o", alpha=0.5)
    formats.set(title="D: share of format 0 after training, by seed", ylabel="share", ylim=(-0.05, 1.05))
    formats.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    for axis in (tree, smooth):
        axis.legend(fontsize=8)
    return canvas


def _response(name: str, words: str) -> Claim:
    response = f"formats/{name}-entropy/response"
    return Claim(
        id=f"D-slope-{name}",
        paper_says="With an entropy term the policy is Lipschitz in the reward: a small bonus moves it little.",
        measured=f"Change of the share of a format by a bonus of {BONUS:g} on it, GRPO with entropy coefficient "
        f"{COEFFICIENT:g}, {words}, paired by seed; the threshold is the soft optimum's tanh bound.",
        criterion=Bound(response, "<=", round(tanh_bound(BONUS, COEFFICIENT), 4)),
        effect=response,
    )


STUDY = Study(
    slug="policy-cliff",
    claims=(
        Claim(
            id="A-cliff",
            paper_says="Where n optimal answers tie, an arbitrarily small reward change moves the policy by a jump.",
            measured="Largest deviation of the TV jump from (n - 1) / n over bonuses 1e-6 to 0.1, token tree, n = 10 of 81.",
            criterion=Bound("tree/hard/error", "<=", 1e-9),
            effect="tree/hard/tv",
        ),
        Claim(
            id="A-slope",
            paper_says="Entropy regularisation makes the policy Lipschitz in the reward.",
            measured="Log-log slope of TV against the bonus between 1e-6 and 1e-3 at temperature 0.2; largest TV / tanh bound.",
            criterion=AllOf(
                (
                    Bound("tree/soft/slope", ">=", 0.98),
                    Bound("tree/soft/slope", "<=", 1.02),
                    Bound("tree/soft/bound-ratio", "<=", 1.0),
                )
            ),
            effect="tree/soft/slope",
        ),
        Claim(
            id="B-radius",
            paper_says="A unique optimal policy is locally constant in the reward (how far is derived here).",
            measured="Share of 200 random MDPs whose policy changes at 1 + 1e-6 of the exact radius; none may at 1 - 1e-6, "
            "nor under 200 random sign changes at 0.999 of it.",
            criterion=AllOf(
                (
                    Bound("radius/outside", ">=", 1.0),
                    Bound("radius/inside", "<=", 0.0),
                    Bound("radius/random", "<=", 0.0),
                )
            ),
            effect="radius/outside",
        ),
        Claim(
            id="C-lipschitz",
            paper_says="TV of the soft policy is at most |dR| / (2 alpha (1 - gamma)).",
            measured="Largest exact local constant over that bound on random MDPs and five temperatures; the constant agrees with "
            "finite differences to 1e-4 and no random direction exceeds it by more.",
            criterion=AllOf(
                (
                    Bound("lipschitz/bound-ratio", "<=", 1.0),
                    Bound("lipschitz/error", "<=", 1e-4),
                    Bound("lipschitz/excess", "<=", 1e-4),
                )
            ),
            effect="lipschitz/bound-ratio",
        ),
        Claim(
            id="D-spread",
            paper_says="Ties make what training arrives at arbitrary; entropy regularisation makes it stable.",
            measured="Spread over 10 seeds of the share of one of two equally right formats, GRPO without over with entropy "
            "coefficient 0.1; exact permutation test.",
            criterion=AllOf(
                (
                    Bound("formats/grpo/spread-ratio", ">=", 3.0, by="value"),
                    Bound("formats/grpo/spread-p", "<", 0.01),
                )
            ),
            effect="formats/grpo/spread-ratio",
        ),
        Claim(
            id="D-tie-break",
            paper_says="A small additional reward breaks the tie and decides what is learnt.",
            measured=f"Share of seeds in which the format with a bonus of {BONUS:g} wins, GRPO without entropy term.",
            criterion=Bound(f"formats/grpo/{BONUS:g}/format-0-wins", ">=", 1.0),
            effect=f"formats/grpo/{BONUS:g}/format-0-wins",
        ),
        _response("grpo", "advantages divided by the group's deviation"),
        _response("centred", "advantages centred only"),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "radius-gain",
            "Exact radius over the textbook bound (1 - gamma) gap / 2, mean over MDPs.",
            ("radius/gain",),
        ),
        Observation(
            "frontier",
            "What temperature buys and costs on random MDPs: exact constant, return lost, entropy (nats); share of MDPs whose "
            "constant is smaller at 0.01 than at 0.1, where 1 / alpha says the opposite.",
            (
                *(
                    f"lipschitz/{name}-{alpha}"
                    for name in ("constant", "loss", "entropy")
                    for alpha in ("0.01", "0.03", "0.1", "0.3", "1")
                ),
                "lipschitz/flat-when-cold",
            ),
        ),
        Observation(
            "centred-control",
            "The same with advantages that are not divided by the group's deviation.",
            (
                "formats/centred/spread-ratio",
                "formats/centred/spread-p",
                f"formats/centred/{BONUS:g}/format-0-wins",
            ),
        ),
        Observation(
            "bonus-slope",
            "Share of the favoured format against the bonus, with entropy coefficient 0.1; 1 / (1 + exp(-bonus / 0.1)) is the "
            "soft optimum's.",
            tuple(
                f"formats/{name}-entropy/{bonus:g}/share"
                for name in ("grpo", "centred")
                for bonus in (0.0, BONUS, *LARGER)
            ),
        ),
    ),
    limits=(
        "Trees and MDPs small enough to solve, and a tabular policy with one format habit for all prompts, not language "
        "models. The theorems speak of the regularised optimum; part D measures an entropy bonus in a policy-gradient loss."
    ),
)
