from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sklearn")

from uncollapse.measure.attention import attention_entropy
from uncollapse.studies.sigma_reparam import DRAWN, STUDY, experiment
from uncollapse.studies.sigma_reparam.experiment import QUICK, octaves
from uncollapse.studies.sigma_reparam.mechanism import growth
from uncollapse.studies.sigma_reparam.training import ARMS, train
from uncollapse.studies.sigma_reparam.transformer import (
    Shape,
    Trunk,
    digits_task,
    loss_of,
    patches,
    text_task,
)

SHAPE = Shape(width=8, heads=2, layers=2, tokens=16)


def test_every_arm_is_drawn() -> None:
    assert set(DRAWN) == set(ARMS)


def test_patches_are_two_by_two() -> None:
    image = torch.arange(64.0).view(1, 8, 8)
    assert patches(image)[0, 0].tolist() == [0, 1, 8, 9]
    assert patches(image)[0, 5].tolist() == [18, 19, 26, 27]


@pytest.mark.parametrize("make", [digits_task, text_task])
@pytest.mark.parametrize("trunk", [Trunk(), Trunk(pre_norm=True), Trunk(qk_norm=True), Trunk(softcap=0.5)])
def test_the_net_is_a_transformer(make, trunk: Trunk) -> None:
    task = make(SHAPE, 3, 0)
    net = task.build(trunk)
    net.draw(torch.Generator().manual_seed(0))
    inputs, targets = task.batch(torch.Generator().manual_seed(1))
    logits = net(inputs)
    assert float(loss_of(logits, targets).detach()) == pytest.approx(task.floor, abs=3)
    x, entropies = net.embed(inputs) + net.place, []
    for i, (part, mlp) in enumerate(zip(net.attention, net.mlp, strict=True)):
        q, k, v = part.qkv(net.norms[2 * i](x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        q, k = part.q_norm(q), part.k_norm(k)
        scores = q @ k.mT / 2
        if trunk.softcap:
            scores = trunk.softcap * (scores / trunk.softcap).tanh()
        causal = make is text_task
        mask = torch.ones(16, 16, dtype=torch.bool).tril() if causal else torch.ones(16, 16, dtype=torch.bool)
        scores = scores.masked_fill(~mask, -torch.inf)
        entropies.append(attention_entropy(attn=scores.softmax(-1)).mean())
        if not trunk.softcap:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            torch.testing.assert_close(mixed, scores.softmax(-1) @ v)
        x = x + part.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + mlp(net.norms[2 * i + 1](x))
    x = net.norms[-1](x)
    torch.testing.assert_close(net.head(x if causal else x.mean(1)), logits)
    assert net.entropy(inputs) == pytest.approx(float(torch.stack(entropies).mean().detach()), rel=1e-5)


def test_training_is_repeatable_and_arms_start_alike() -> None:
    task = digits_task(SHAPE, 8, 0)
    runs = [train(task, ARMS["plain"], 1e-3, 0, 3, every=2) for _ in range(2)]
    assert runs[0] == runs[1]
    for arm in ("warm-up", "sigma"):
        other = train(task, ARMS[arm], 1e-3, 0, 1)
        assert other["entropy"][0] == pytest.approx(runs[0]["entropy"][0], rel=1e-5)
        assert other["train"][0] == pytest.approx(runs[0]["train"][0], rel=1e-5)
    assert runs[0]["gap"] is None
    assert train(task, ARMS["sigma-one"], 1e-3, 0, 3)["gap"] >= 1


def test_a_run_that_explodes_is_counted_as_lost() -> None:
    run = train(digits_task(SHAPE, 8, 0), ARMS["plain"], 1e6, 0, 20, every=1)
    assert run["accuracy"] < 0.5
    assert run["loss"] > math.log(10)
    assert math.isfinite(run["lowest"])


def test_the_arms_are_what_they_say() -> None:
    built = {name: digits_task(SHAPE, 2, 0).build(arm.trunk) for name, arm in ARMS.items()}
    norms = {name: sum(isinstance(m, nn.LayerNorm) for m in net.modules()) for name, net in built.items()}
    assert norms["pre-ln"] == 5
    assert norms["qk-norm"] == 4
    assert not any(norms[name] for name in norms if name not in ("pre-ln", "qk-norm"))
    for name in ("sigma", "spectral-norm"):
        net = copy.deepcopy(built[name])
        ARMS[name].convert(net)
        assert sum(hasattr(m, "parametrizations") for m in net.modules()) == 2 + 4 * SHAPE.layers


def test_octaves_count_trainable_rates_against_the_best_arm() -> None:
    def run(accuracy: float) -> list[dict[str, float]]:
        return [{"accuracy": accuracy, "loss": 1.0}]

    runs = {
        "sigma": {1e-3: run(0.9), 1e-2: run(0.89), 1e-1: run(0.5)},
        "plain": {1e-3: run(0.8), 1e-2: run(0.1), 1e-1: run(0.1)},
    }
    assert octaves("digits", runs, 0) == {"sigma": 2, "plain": 0}
    texts = {"sigma": {1e-3: [{"loss": 2.0}]}, "plain": {1e-3: [{"loss": 2.2}]}}
    assert octaves("text", texts, 0) == {"sigma": 1, "plain": 1}


def test_growth_of_one_weight() -> None:
    narrow, wide = (growth(width, 0, 20) for width in (64, 256))
    assert wide["plain"] / narrow["plain"] == pytest.approx(2, rel=0.35)
    for one in (narrow, wide):
        assert one["exact"] == pytest.approx(1.1, abs=0.15)
        assert one["gamma"] == pytest.approx(1.1, abs=0.15)
        assert one["one"] > one["exact"]


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(QUICK.digits, arms=("plain", "pre-ln", "sigma"), rates=(1e-3, 1e6))
    monkeypatch.setattr(experiment, "QUICK", replace(QUICK, digits=tiny, text=replace(tiny, seeds=2)))
    monkeypatch.setattr(
        "uncollapse.studies.sigma_reparam.DRAWN", {"plain": "k-", "pre-ln": "C0--", "sigma": "C1-"}
    )
    left_out, elsewhere = set(ARMS) - set(tiny.arms), ("growth/gamma/", "growth/one/")  # and other widths
    smoke(
        STUDY,
        lambda name: (
            "/failure/" in name or name.startswith(elsewhere) or bool(left_out & set(name.split("/")))
        ),
    )
