"""Each finding on the smallest log that shows it, and on the one beside it that does not."""

import numpy as np
import pytest

from uncollapse.diagnose.diagnosis import diagnose
from uncollapse.diagnose.finding import SEVERITIES, short, worst
from uncollapse.diagnose.findings import ALL
from uncollapse.diagnose.log import Log, Note

N = 120
T = np.linspace(0, 1, N)


def noise(seed=0, size=1.0):
    return size * np.random.default_rng(seed).standard_normal(N)


def made(notes=(), settings=None, other=None, **columns):
    """A healthy run with these columns changed or added; `a__b` stands for `a/b`, None leaves a column out."""
    plain = {
        "entropy/token/mean": 0.8 * np.exp(0.04 * noise(1)),
        "reward/mean": 0.2 + 0.5 * T + 0.03 * noise(2),
    } | {name.replace("__", "/"): values for name, values in columns.items()}
    kept = {
        name: np.asarray(values, dtype=np.float64) for name, values in plain.items() if values is not None
    }
    return Log("log", "made up", np.arange(1, N + 1), kept, other or {}, {}, settings or {}, tuple(notes))


def found(log):
    return {one.id: one for one in diagnose(log).findings}


def test_a_healthy_run_has_no_finding():
    assert found(made()) == {}


def test_collapse_is_severe_and_names_where_it_began():
    one = found(
        made(entropy__token__mean=0.8 * np.exp(-8 * np.clip(T - 0.4, 0, 0.5)) * np.exp(0.04 * noise()))
    )["entropy-collapse"]
    assert one.severity == "severe"
    assert one.since == pytest.approx(48, abs=6)
    assert "1.8 %" in one.statement or "1.9 %" in one.statement or "2" in one.statement
    assert [number.unit for number in one.evidence.numbers] == ["nats", "nats", "%"]


def test_collapse_while_pass_at_k_rises_is_called_learning_too():
    falling = 0.8 * np.exp(-1.1 * T) * np.exp(0.03 * noise())
    rising = {"eval__pass@8": 0.3 + 0.5 * T + 0.01 * noise(5), "eval__pass@1": 0.2 + 0.5 * T}
    alone, able = (
        found(made(entropy__token__mean=falling)),
        found(made(entropy__token__mean=falling, **rising)),
    )
    assert SEVERITIES.index(able["entropy-collapse"].severity) < SEVERITIES.index(
        alone["entropy-collapse"].severity
    )
    assert "pass@8 still rises" in able["entropy-collapse"].statement


def test_explosion_is_severe_when_the_reward_falls():
    rise = 0.3 * np.exp(1.1 * np.clip(T - 0.3, 0, None) / 0.7) * np.exp(0.03 * noise())
    reward = 0.5 - 0.4 * np.clip(T - 0.3, 0, None) + 0.01 * noise(3)
    assert found(made(entropy__token__mean=rise))["entropy-explosion"].severity == "warning"
    assert (
        found(made(entropy__token__mean=rise, reward__mean=reward))["entropy-explosion"].severity == "severe"
    )


def test_a_start_without_entropy_needs_a_second_witness():
    low = {"entropy__token__mean": 0.01 * np.exp(0.04 * noise())}
    alone = diagnose(made(**low))
    assert alone.state == "healthy"
    assert {one.id: one.severity for one in alone.findings} == {"low-entropy-start": "info"}
    witnessed = diagnose(made(**low, reward__zero_variance_groups=0.9 + 0 * T))
    assert witnessed.state == "collapsed"
    assert (
        found(made(**low, reward__zero_variance_groups=0.9 + 0 * T))["low-entropy-start"].severity == "severe"
    )
    assert "low-entropy-start" in found(made(**low, diversity__distinct=0.12 + 0 * T))


@pytest.mark.parametrize(
    ("values", "word"), [(400 * np.exp(0.03 * noise()), "sum"), (noise() - 1, "negative")]
)
def test_values_that_are_no_entropy_are_said(values, word):
    assert word in found(made(entropy__token__mean=values))["entropy-impossible"].statement


def test_ceiling_near():
    h = np.linspace(1.0, 0.05, N)
    reward = 0.9 - 0.25 * np.exp(h) + 0.004 * noise()
    assert found(made(entropy__token__mean=h, reward__mean=reward))["ceiling-near"].severity == "info"


@pytest.mark.parametrize(("end", "severity"), [(0.3, None), (0.6, "warning"), (0.95, "severe")])
def test_dead_groups(end, severity):
    one = found(made(reward__zero_variance_groups=0.1 + (end - 0.1) * T)).get("dead-groups")
    assert (one.severity if one else None) == severity


def test_plateau_and_fall():
    still = found(made(reward__mean=np.clip(T, 0, 0.4) + 0.01 * noise()))
    assert set(still) == {"reward-plateau"}
    fallen = found(made(reward__mean=0.2 + np.where(T < 0.6, T, 1.2 - T) + 0.01 * noise()))
    assert fallen["reward-fall"].severity == "warning"
    lost = found(made(reward__mean=0.2 + np.where(T < 0.5, T, 1.0 - T) + 0.01 * noise()))
    assert lost["reward-fall"].severity == "severe"


def test_hacking_by_held_out_reward_is_severe_by_length_alone_a_sign():
    held_out = np.where(
        np.arange(N) % 6 == 0, 0.2 + 0.3 * np.where(T < 0.4, T, 0.8 - T) + 0.005 * noise(), np.nan
    )
    one = found(made(eval__reward=held_out))["reward-hacking"]
    assert (one.severity, one.confidence) == ("severe", "high")
    assert one.advice[0] == "held-out"
    sign = found(made(length__mean=500 * (1 - 0.7 * T)))["reward-hacking"]
    assert (sign.severity, sign.confidence) == ("warning", "low")
    more = found(made(length__mean=500 * (1 - 0.7 * T), diversity__distinct=0.8 - 0.5 * T))["reward-hacking"]
    assert more.confidence == "medium"


def test_pass_at_k_apart():
    one = {"eval__pass@1": 0.3 + 0.3 * T + 0.005 * noise(), "eval__pass@8": 0.8 - 0.2 * T + 0.005 * noise(1)}
    assert found(made(**one))["pass-at-k"].title == "pass@8 falls while pass@1 rises"
    one["eval__pass@8"] = 0.7 + 0.2 * T
    assert "pass-at-k" not in found(made(**one))


def test_lengths_and_truncation():
    assert "length-collapse" in found(made(length__mean=300 * (1 - 0.6 * T)))
    assert (
        found(made(reward__mean=0.4 + 0.02 * noise(), length__mean=300 * (1 - 0.9 * T)))[
            "length-collapse"
        ].severity
        == "severe"
    )
    assert found(made(length__mean=300 * (1 + 2 * T)))["length-explosion"].severity == "info"
    assert found(made(length__truncated=0.05 + 0.25 * T))["truncation"].severity == "warning"
    assert found(made(length__truncated=0.05 + 0.7 * T))["truncation"].severity == "severe"
    assert "length-collapse" not in found(made(length__mean=300 * (1 - 0.3 * T)))


def test_clipping():
    assert "clip-heavy" in found(made(clip__ppo__frac=0.05 + 0.3 * T))
    assert "clip-heavy" not in found(
        made(clip__ppo__frac=0.05 + 0.3 * T, settings={"importance_sampling_level": "sequence"})
    )
    falling = 0.8 * np.exp(-1.5 * T) * np.exp(0.03 * noise())
    clips = {"clip__high__frac": 0.01 + 0 * T, "clip__low__frac": 0.0005 + 0 * T}
    assert "clip-upper-only" in found(made(entropy__token__mean=falling, **clips))
    assert "clip-upper-only" not in found(made(**clips))


def test_one_update_per_rollout_makes_kl_cov_inert_and_changes_the_advice():
    clips = {"clip__high__frac": 0 * T, "clip__low__frac": 0 * T, "kl__old__k3": 0 * T}
    assert found(made(**clips))["updates-inert"].severity == "info"
    used = found(made(**clips, settings={"recipe/name": "kl_cov"}))["updates-inert"]
    assert used.severity == "warning"
    assert "does nothing" in used.statement
    falling = 0.8 * np.exp(-1.5 * T) * np.exp(0.03 * noise())
    advice = found(made(entropy__token__mean=falling, **clips))["entropy-collapse"].advice
    assert "kl-cov" not in advice
    assert "clip-higher" not in advice
    moved = clips | {"kl__old__k3": 1e-3 + 0 * T}
    assert "updates-inert" not in found(made(**moved))


@pytest.mark.parametrize(
    ("columns", "severity"),
    [
        ({"mismatch__logp__mean": 0.01 + 0 * T}, None),
        ({"mismatch__logp__mean": 0.01 + 0.07 * T}, "warning"),
        ({"mismatch__logp__mean": 0.01 + 0.4 * T}, "severe"),
        ({"mismatch__kl__mean": 0.01 + 0.1 * T}, "warning"),
        ({"mismatch__ratio__mean": 1 + 0.02 * noise()}, None),
        ({"mismatch__ratio__mean": 1 - 0.2 * T}, "warning"),
        ({"mismatch__ratio__mean": 1 + 0.5 * T}, "severe"),
    ],
)
def test_mismatch(columns, severity):
    one = found(made(**columns)).get("mismatch")
    assert (one.severity if one else None) == severity


def test_kl_blow_up_is_growth_not_size():
    assert "kl-blow-up" not in found(made(kl__ref__mean=0.5 * T))
    assert (
        found(made(kl__ref__mean=0.02 + 0.3 * np.clip(T - 0.7, 0, None) / 0.3))["kl-blow-up"].severity
        == "warning"
    )
    assert (
        found(made(kl__ref__mean=0.02 + 3 * np.clip(T - 0.7, 0, None) / 0.3))["kl-blow-up"].severity
        == "severe"
    )
    assert "kl-blow-up" not in found(made(kl__old__k3=1e-8 + 0.005 * (T > 0.9)))


def test_gradient_spikes_are_marked_where_they_are():
    norm = np.exp(0.2 * noise())
    assert "gradient-spikes" not in found(made(grad__norm=norm))
    norm[[30, 60, 90]] *= 40
    one = found(made(grad__norm=norm))["gradient-spikes"]
    assert one.severity == "warning"
    assert one.evidence.marks == (31, 61, 91)
    dead = np.where(np.arange(N) % 4 == 0, 1.0, 0.0)  # dead groups: most steps have no gradient at all
    assert "gradient-spikes" not in found(made(grad__norm=dead))


def test_nan_that_lasts_is_severe():
    note = Note("nonfinite", "values that are not finite: loss (3)", (40, 41, 42))
    passing, lost = 0.1 + 0 * T, np.where(T < 0.8, 0.1, np.nan)
    assert found(made([note], loss__total=passing))["nan-steps"].severity == "warning"
    one = found(made([note], loss__total=lost))["nan-steps"]
    assert one.severity == "severe"
    assert "the run is lost" in one.statement
    assert "nan-steps" not in found(made(loss__total=lost))


def test_what_a_log_lacks_is_said():
    one = found(made(entropy__token__mean=None, other={"actor_h": noise()}))["no-entropy"]
    assert "--map entropy=NAME" in one.statement
    assert one.advice == ("log-entropy",)
    assert set(found(made([Note("unmapped", "no entropy")], entropy__token__mean=None))) == {"no-entropy"}
    log = made()
    few = Log("log", "x", log.step[:5], {name: values[:5] for name, values in log.columns.items()})
    assert found(few)["log-short"].evidence.numbers[0].value == 5


@pytest.mark.parametrize("kind", ["broken", "duplicate", "gap", "mixed", "reset", "thinned", "unmapped"])
def test_every_note_of_a_reader_is_a_finding(kind):
    one = found(made([Note(kind, "something was odd", (7,)), Note(kind, "again", (9,))]))[f"log-{kind}"]
    assert one.statement == "Something was odd. (1 more of this kind.)"
    assert one.since == 7


def test_findings_are_registered_once_and_sorted_by_severity():
    assert len(set(ALL)) == len(ALL)
    log = made(
        length__truncated=0.05 + 0.7 * T,
        length__mean=300 * (1 + 2 * T),
        reward__zero_variance_groups=0.1 + 0.5 * T,
    )
    severities = [SEVERITIES.index(one.severity) for one in diagnose(log).findings]
    assert severities == sorted(severities, reverse=True)
    assert worst(diagnose(log).findings) == "severe"
    assert worst(()) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.12345, "0.123"),
        (12345.6, "12,346"),
        (1e-9, "1.0e-09"),
        (float("nan"), "unknown"),
        (float("-inf"), "-infinite"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text
