"""What to do about a finding: our recipe, lines for the user's own trainer, the paper, and what speaks against it.

Every advice is a function of the facts, so that targets come from the run's own first steps. Names of TRL are fields of
`GRPOConfig` (1.16), names of verl are Hydra keys of its PPO trainer (0.9.1); tests hold both against lists of these
releases. An advice that a trainer has no setting for says so by having no lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from uncollapse.catalogue import papers
from uncollapse.diagnose.finding import ENTROPY, Facts, short

Setting = bool | int | float | str

TARGET = 0.5
"""Share of the starting entropy suggested as target: below the start, so that learning may spend some, and far above what
counts as spent. A judgement, not a measurement."""


@dataclass(frozen=True)
class Advice:
    """One thing to try.

    Args:
        id: what findings refer to.
        title: in the imperative.
        why: one or two sentences.
        recipe: name of our recipe that does it, or empty.
        trl: fields of TRL's `GRPOConfig` and their values.
        verl: Hydra keys of verl and their values.
        arxiv: papers behind it.
        caution: where it is known to fail or to backfire.
    """

    id: str
    title: str
    why: str
    recipe: str = ""
    trl: Mapping[str, Setting] = field(default_factory=lambda: MappingProxyType({}))
    verl: Mapping[str, Setting] = field(default_factory=lambda: MappingProxyType({}))
    arxiv: tuple[str, ...] = ()
    caution: str = ""

    @property
    def slugs(self) -> tuple[str, ...]:
        """Names of the papers that the catalogue knows."""
        return tuple(slug for slug, paper in papers().items() if paper.arxiv in self.arxiv)

    def trl_lines(self) -> str:
        """Arguments for `GRPOConfig(...)`, ready to paste; empty if there are none."""
        return "\n".join(f"{name}={value!r}," for name, value in self.trl.items())

    def verl_lines(self) -> str:
        """Overrides for verl's command line, ready to paste; empty if there are none."""
        return " \\\n".join(f"{name}={_hydra(value)}" for name, value in self.verl.items())

    def our_lines(self) -> str:
        """The change to a TRL script that runs our recipe; empty if there is none."""
        if not self.recipe:
            return ""
        return (
            "from uncollapse.integrations.trl import GRPOTrainer  # instead of trl's\n"
            f'trainer = GRPOTrainer(..., recipe="{self.recipe}")'
        )


def advise(ids: Iterable[str], facts: Facts) -> tuple[Advice, ...]:
    """The advice of these ids, each once, in their order, without what the run's settings say it does already.

    Unknown ids raise `KeyError`: findings name only what exists.
    """
    made = [ADVICE[name](facts) for name in dict.fromkeys(ids)]
    return tuple(one for one in made if not _done(one, facts))


def _done(one: Advice, facts: Facts) -> bool:
    """Whether the settings hold everything that an advice would set, or name its recipe."""
    settings = {key.replace("/", ".").lower(): value for key, value in facts.log.settings.items()}
    if one.recipe == one.id and settings.get("recipe", settings.get("recipe.name")) == one.recipe:
        return True
    for wanted in (one.trl, one.verl):
        held = [settings.get(name, settings.get(f"args.{name}", _ABSENT)) for name in wanted]
        if wanted and held == list(wanted.values()):
            return True
    return False


_ABSENT = object()


def _hydra(value: Setting) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _target(facts: Facts) -> float:
    """Suggested entropy in nats, two digits; 0 if the log has no entropy."""
    start = facts.course.start
    return float(f"{TARGET * start:.2g}") if start == start and start > 0 else 0.0


def _adaptive(facts: Facts) -> Advice:
    target = _target(facts)
    trl: dict[str, Setting] = {"use_adaptive_entropy": True}
    if target:
        trl["entropy_target"] = target
    trl["entropy_coef_max"] = 0.1
    told = (
        f"half of this run's start of {short(facts.course.start)} nats"
        if target
        else "half of the entropy of your first steps"
    )
    return Advice(
        "adaptive-entropy", "Steer the entropy towards a target",
        f"A bonus that grows only while the entropy is below its target; take {told}. TRL's default target of 0.2 nats suits few runs.",
        "adaptive-entropy", trl, {}, ("2505.22312",),
        "verl 0.9.1 has no such setting. The upper bound keeps the coefficient from growing for as long as the target is out of reach; "
        "0.1 is our judgement, TRL's default is 1.",
    )  # fmt: skip


def _siren(facts: Facts) -> Advice:
    return Advice(
        "siren", "Hold the entropy of likely tokens at peak positions",
        "Pulls back to what it was on the first batch, without feeding the tail of the vocabulary. On our small language model it "
        "kept 0.24 of 1.4 nats at the paper's coefficient and 0.58 at a hundred times that, with three and six different right answers "
        "of eight, where GRPO kept 0.01 and one.",
        "siren", arxiv=("2509.25133",),
        caution="Its anchor is the first batch that it sees: a run continued after the fall holds the fallen entropy unless the stage is "
        "given a target. The paper's coefficient of 0.005 is weak for small batches; try 0.05 and 0.5.",
    )  # fmt: skip


def _aepo(facts: Facts) -> Advice:
    target = _target(facts)
    told = (
        f"half of this run's start is {target:g} nats"
        if target
        else "take half of the entropy of your first steps"
    )
    return Advice(
        "aepo-arbitrary", "Sample right answers hot or cold until a chosen entropy is reached",
        f"Holds the entropy that you name ({told}), where many different answers are right. Our small language model, asked for 0.5 nats on "
        "such a task, ended at 0.42 with the accuracy of GRPO and seven times its different right answers. In a recipe file: base: "
        f"aepo-arbitrary, sampler: {{tempered-sampler: {{target: {target or 0.5:g}, share: 0.25, alpha: 0.25}}}}.",
        "aepo-arbitrary", arxiv=("2510.08141",),
        caution="Where only a third of the answers was right, entropy did not follow the target. Samples more answers than it trains on: a step cost "
        "half as much again. At the paper's alpha of 1/64 it did nothing at our scale.",
    )  # fmt: skip


def _clip_cov(facts: Facts) -> Advice:
    return Advice(
        "clip-cov", "Clip-Cov: drop the gradient of a few high-covariance tokens",
        "Likely and rewarded tokens burn most of the entropy; a few of them lose their gradient.",
        "clip-cov", {}, {"actor_rollout_ref.actor.policy_loss.loss_mode": "clip_cov",
                         "actor_rollout_ref.actor.policy_loss.clip_cov_ratio": 0.0002,
                         "actor_rollout_ref.actor.clip_ratio": 1.0, "actor_rollout_ref.actor.clip_ratio_low": 1.0,
                         "actor_rollout_ref.actor.clip_ratio_high": 1.0},
        ("2505.22617",),
        "verl chooses the tokens within each micro-batch and at least one: below 5,000 tokens it drops more than asked. Users report "
        "collapse all the same after 80 steps (PRIME-RL/Entropy-Mechanism #20).",
    )  # fmt: skip


def _kl_cov(facts: Facts) -> Advice:
    return Advice(
        "kl-cov", "KL-Cov: hold high-covariance tokens near the old policy",
        "Penalises leaving the sampling policy at the tokens with the largest covariance.",
        "kl-cov", {}, {"actor_rollout_ref.actor.policy_loss.loss_mode": "kl_cov",
                       "actor_rollout_ref.actor.policy_loss.kl_cov_ratio": 0.002,
                       "actor_rollout_ref.actor.policy_loss.ppo_kl_coef": 1.0},
        ("2505.22617",),
        "Does nothing with one update per rollout. Users report an entropy surge at step 240 (PRIME-RL/Entropy-Mechanism #20).",
    )  # fmt: skip


def _clip_higher(facts: Facts) -> Advice:
    return Advice(
        "clip-higher", "Raise the upper clip bound",
        "Unlikely tokens with a good outcome may grow further before they are clipped.",
        "dapo", {"epsilon_high": 0.28}, {"actor_rollout_ref.actor.clip_ratio_high": 0.28}, ("2503.14476",),
        "Does nothing while no token is clipped, so not with one update per rollout.",
    )  # fmt: skip


def _bonus(facts: Facts) -> Advice:
    return Advice(
        "entropy-bonus", "A small fixed entropy bonus",
        "The oldest remedy, with verl's long-time coefficient.",
        "entropy-bonus", {"entropy_coef": 0.001}, {"actor_rollout_ref.actor.entropy_coeff": 0.001}, ("1602.01783",),
        "A fixed bonus is blind to where the entropy stands: runs with 0.001 have exploded (verl #2738, PR #781). Watch the first 50 steps.",
    )  # fmt: skip


def _more_updates(facts: Facts) -> Advice:
    return Advice(
        "more-updates", "Two updates per rollout",
        "Only when the policy has left the one that sampled do clip bounds and KL-Cov act. Not a remedy by itself.",
        "", {"num_iterations": 2}, {"actor_rollout_ref.actor.ppo_epochs": 2}, ("2505.22617",),
        "More updates per rollout also spend entropy faster and raise the KL.",
    )  # fmt: skip


def _fewer_updates(facts: Facts) -> Advice:
    return Advice("fewer-updates", "One update per rollout", "The policy then cannot leave the one that sampled.", "",
                  {"num_iterations": 1}, {"actor_rollout_ref.actor.ppo_epochs": 1}, ("1707.06347",),
                  "Clip bounds and KL-Cov then have no effect.")  # fmt: skip


def _drop_bonus(facts: Facts) -> Advice:
    return Advice(
        "drop-bonus", "Remove or bound what raises the entropy",
        "Set a fixed bonus to zero first; steer towards a target if you still need one.",
        "grpo", {"entropy_coef": 0.0, "use_adaptive_entropy": False}, {"actor_rollout_ref.actor.entropy_coeff": 0}, ("2505.22312",),
        "If there is no bonus, look at cut-off answers and at the mismatch between trainer and sampler.",
    )  # fmt: skip


def _overlong(facts: Facts) -> Advice:
    longest = facts.series("length/max", 1) or facts.series("length/mean", 1)
    limit = int(2 ** max(int(longest.end) - 1, 1).bit_length()) if longest else 0
    trl: dict[str, Setting] = {"mask_truncated_completions": True}
    verl: dict[str, Setting] = {}
    if limit:
        trl["max_completion_length"] = limit
        verl["data.max_response_length"] = limit
    return Advice(
        "overlong", "Give answers room, or leave cut ones out",
        "A cut answer is scored for the limit, not for what it says: leave it out of the loss, raise the limit, or shape the reward "
        "near the limit as DAPO does.",
        "dapo", trl, verl, ("2503.14476",),
        "Leaving cut answers out also removes the pressure to be brief."
        + (" The limit shown is the next power of two above this run's answers." if limit else ""),
    )  # fmt: skip


def _smaller_steps(facts: Facts) -> Advice:
    rate = facts.series("lr", 1)
    half = float(f"{0.5 * float(rate.value.max()):.2g}") if rate is not None and rate.value.max() > 0 else 0.0
    return Advice(
        "smaller-steps", "Smaller steps",
        f"Half the learning rate{f' (this run peaked at {short(2 * half)})' if half else ''} is the cheapest test of instability.", "",
        {"learning_rate": half} if half else {}, {"actor_rollout_ref.actor.optim.lr": half} if half else {}, (),
        "Slows learning as well; a test, not a cure.",
    )  # fmt: skip


def _mismatch(facts: Facts) -> Advice:
    return Advice(
        "correct-mismatch", "Correct for the sampler",
        "Weight every token by the ratio of the two policies, cut at an upper bound, and look for the cause: dtype, temperature, weights "
        "that were not synchronised.",
        "", {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
             "vllm_importance_sampling_clip_max": 2.0},
        {"algorithm.rollout_correction.rollout_is": "token", "algorithm.rollout_correction.rollout_is_threshold": 2.0}, (),
        "Hides a defect where the two should agree to rounding.",
    )  # fmt: skip


def _clip_gradient(facts: Facts) -> Advice:
    found = facts.series("grad/norm", 5)
    usual = float(f"{found.smooth.mean() * 2:.1g}") if found is not None and found.smooth.mean() > 0 else 1.0
    return Advice(
        "clip-gradient", "Clip the gradient near its usual size",
        "A bound of about twice the usual norm stops a single batch from moving the policy far.", "",
        {"max_grad_norm": usual}, {"actor_rollout_ref.actor.optim.clip_grad": usual}, (),
        "Spikes with a cause (a broken batch, NaN rewards) come back; find it.",
    )  # fmt: skip


def _reference(facts: Facts) -> Advice:
    return Advice(
        "kl-to-reference", "Hold the policy near the reference",
        "A KL penalty bounds how far the policy can go.", "", {"beta": 0.04},
        {"actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_coef": 0.001,
         "actor_rollout_ref.actor.kl_loss_type": "low_var_kl"}, ("2402.03300",),
        "0.04 is the GRPO paper's, 0.001 verl's default; both may be too strong late in a long run.",
    )  # fmt: skip


def _gspo(facts: Facts) -> Advice:
    return Advice(
        "gspo", "Ratio and clip per sequence",
        "Token ratios are noisy in long answers and mixture-of-experts models; GSPO clips whole answers.", "gspo",
        {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"actor_rollout_ref.actor.policy_loss.loss_mode": "gspo", "actor_rollout_ref.actor.clip_ratio_low": 0.0003,
         "actor_rollout_ref.actor.clip_ratio_high": 0.0004}, ("2507.18071",),
        "Its clip bounds are a thousand times smaller than PPO's: keep them together with the ratio.",
    )  # fmt: skip


def _cispo(facts: Facts) -> Advice:
    return Advice(
        "cispo", "Clip the weight, not the update",
        "Every token keeps its gradient, also the rare ones that PPO would clip first.", "cispo",
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"actor_rollout_ref.actor.policy_loss.loss_mode": "cispo"}, ("2506.13585",),
        "Nothing bounds the ratio from below.",
    )  # fmt: skip


def _dynamic(facts: Facts) -> Advice:
    return Advice(
        "dynamic-sampling", "Sample until groups differ, or larger groups",
        "Groups of equal rewards are dropped and replaced; larger groups are less often unanimous.", "dapo", {"num_generations": 16},
        {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "reward", "actor_rollout_ref.rollout.n": 16},
        ("2503.14476",), "Costs generation time, the more the easier the prompts; TRL has larger groups only.",
    )  # fmt: skip


def _no_length_bias(facts: Facts) -> Advice:
    return Advice(
        "no-length-bias", "Take length out of the loss",
        "The mean per answer weighs the tokens of short right answers more and of long wrong ones less.", "dr-grpo",
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-sum-norm", "algorithm.norm_adv_by_std_in_grpo": False}, ("2503.20783",),
    )  # fmt: skip


def _held_out(facts: Facts) -> Advice:
    return Advice(
        "held-out", "Measure on held-out prompts, several answers each",
        "Training reward alone cannot tell learning from hacking; pass@k on held-out prompts can.", "",
        {"eval_strategy": "steps", "eval_steps": 20, "num_generations_eval": 8},
        {"trainer.test_freq": 20, "actor_rollout_ref.rollout.val_kwargs.n": 8, "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
         "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0}, (),
    )  # fmt: skip


def _log_entropy(facts: Facts) -> Advice:
    return Advice(
        "log-entropy", "Log the entropy",
        "TRL logs `entropy` by itself with GRPO; verl logs `actor/entropy` when it is told to compute it.", "",
        {}, {"actor_rollout_ref.actor.calculate_entropy": True},
    )  # fmt: skip


def _hotter(facts: Facts) -> Advice:
    return Advice(
        "hotter-sampling", "Sample at temperature 1 without cutting the tail",
        "A low temperature, top-p or top-k makes every answer the same before training has begun.", "",
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        {"actor_rollout_ref.rollout.temperature": 1.0, "actor_rollout_ref.rollout.top_p": 1.0, "actor_rollout_ref.rollout.top_k": -1}, (),
        "A model that is certain at temperature 1 needs another starting point, not another setting.",
    )  # fmt: skip


def _plain(name: str, title: str, why: str, caution: str = "") -> Callable[[Facts], Advice]:
    return lambda facts: Advice(name, title, why, caution=caution)


def _roll_back(facts: Facts) -> Advice:
    entropy = facts.series(ENTROPY, 1)
    rest = "" if entropy is None else " Entropy that is gone does not come back by changing the recipe alone."
    return Advice("roll-back", "Go back to a checkpoint before the fall",
                  f"Continue from the last checkpoint before the marked step, with the changes below.{rest}")  # fmt: skip


ADVICE: Mapping[str, Callable[[Facts], Advice]] = MappingProxyType(
    {
        "adaptive-entropy": _adaptive,
        "siren": _siren,
        "aepo-arbitrary": _aepo,
        "clip-cov": _clip_cov,
        "kl-cov": _kl_cov,
        "clip-higher": _clip_higher,
        "entropy-bonus": _bonus,
        "more-updates": _more_updates,
        "fewer-updates": _fewer_updates,
        "drop-bonus": _drop_bonus,
        "overlong": _overlong,
        "smaller-steps": _smaller_steps,
        "correct-mismatch": _mismatch,
        "clip-gradient": _clip_gradient,
        "kl-to-reference": _reference,
        "gspo": _gspo,
        "cispo": _cispo,
        "dynamic-sampling": _dynamic,
        "no-length-bias": _no_length_bias,
        "held-out": _held_out,
        "log-entropy": _log_entropy,
        "hotter-sampling": _hotter,
        "harder-prompts": _plain(
            "harder-prompts",
            "Prompts that are neither solved nor hopeless",
            "Leave out prompts that every answer solves and add harder ones; where nothing is solved, easier ones first.",
        ),
        "read-answers": _plain(
            "read-answers",
            "Read fifty answers with the highest reward",
            "From the first and the last steps, side by side. No metric tells hacking from learning as surely.",
        ),
        "roll-back": _roll_back,
    }
)
"""Every advice by its id."""
