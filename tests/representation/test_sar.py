"""Exact checks of SAR and Tent, numbered; all in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.representation.sar import SAM, SAR, Adaptation, NoAdaptation, Tent, collect_norm_params

F64 = torch.float64
INF = math.inf
seeds = st.integers(0, 10_000)
quick = settings(max_examples=15, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, rows: int = 12, features: int = 5) -> Tensor:
    return torch.randn(rows, features, generator=generator(seed), dtype=F64)


def perceptron(seed: int = 0, sharpness: float = 6.0) -> nn.Sequential:
    """Two LayerNorms, ten classes; a larger `sharpness` makes surer predictions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 10)
        ).to(F64)
    with torch.no_grad():
        net[-1].weight.mul_(sharpness)
    return net


def convolutional(norm: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).to(F64)
    return net


def images(seed: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 1, 5, 5, generator=generator(seed), dtype=F64)


def weights(adapted: Tent) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in adapted.adapted.values()])


def momentum(adapted: Tent) -> list[Tensor]:
    return [
        state["momentum_buffer"] for state in adapted.optimizer.state.values() if "momentum_buffer" in state
    ]


def full_entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def naive_step(
    net: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor], m: float | None, x: Tensor,
    *, lr: float, rho: float, margin: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor], float | None]:  # fmt: skip
    """One step of SAR, sample by sample and without touching the model; no reset."""

    def gradient(at: dict[str, Tensor], samples: list[int]) -> tuple[dict[str, Tensor], float]:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        loss = sum(full_entropy(functional_call(net, leaves, (x[i : i + 1],)))[0] for i in samples) / len(
            samples
        )
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), float(
            loss.detach()
        )

    def below(at: dict[str, Tensor], samples: list[int]) -> list[int]:
        e = full_entropy(functional_call(net, at, (x,)))
        return [i for i in samples if e[i] < margin]

    first = below(params, list(range(len(x))))
    if not first:
        return params, buffers, m
    g, _ = gradient(params, first)
    norm = math.sqrt(sum(float(v.square().sum()) for v in g.values()))
    away = {name: value + rho * g[name] / (norm + 1e-12) for name, value in params.items()}
    second = below(away, first)
    if not second:
        return params, buffers, m
    sharp, loss = gradient(away, second)
    buffers = {name: 0.9 * buffers[name] + v if buffers else v for name, v in sharp.items()}
    m = loss if m is None else 0.9 * m + 0.1 * loss
    return {name: value - lr * buffers[name] for name, value in params.items()}, buffers, m


def test_twenty_batches_against_the_naive_reference() -> None:
    net, margin, m = perceptron(), 0.4 * math.log(10), None
    adapted = SAR(copy.deepcopy(net), lr=0.05, skip_last=0.0, reset_threshold=-INF)
    params: dict[str, Tensor] = {name: p.detach().clone() for name, p in adapted.adapted.items()}
    buffers: dict[str, Tensor] = {}
    sizes = set()
    for seed in range(20):
        with torch.no_grad():
            expected = functional_call(net, params, (batch(seed),))
        torch.testing.assert_close(adapted(batch(seed)), expected, rtol=0, atol=1e-10)
        params, buffers, m = naive_step(
            net, params, buffers, m, batch(seed), lr=0.05, rho=0.05, margin=margin
        )
        sizes.add((adapted.stats.kept, adapted.stats.kept_twice))
        for name, value in params.items():
            torch.testing.assert_close(adapted.adapted[name].detach(), value, rtol=0, atol=1e-10)
        assert adapted.stats.moving_loss == pytest.approx(m, abs=1e-10)
    assert len(sizes) > 5
    assert any(first != second for first, second in sizes)


# 1 ----------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=st.sampled_from([0.01, 1.0, 20.0]))
def test_01_gradient_of_the_entropy(seed: int, scale: float) -> None:
    z = (scale * batch(seed, 4, 7)).requires_grad_()
    e = shannon_entropy_from_logits(z)
    (found,) = torch.autograd.grad(e.sum(), z)
    logp = z.detach().log_softmax(-1)
    torch.testing.assert_close(found, -logp.exp() * (logp + e.detach()[:, None]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.zeros(4, dtype=F64), rtol=0, atol=1e-13)


def test_01_zero_at_uniform_and_one_hot_and_two_classes() -> None:
    for z in (torch.zeros(1, 9), torch.tensor([[800.0, 0.0, 0.0]])):
        leaf = z.to(F64).requires_grad_()
        (found,) = torch.autograd.grad(shannon_entropy_from_logits(leaf).sum(), leaf)
        assert found.abs().max() < 1e-15
    z = torch.linspace(-6, 6, 25, dtype=F64)
    leaf = torch.stack([z, torch.zeros_like(z)], -1).requires_grad_()
    (found,) = torch.autograd.grad(shannon_entropy_from_logits(leaf).sum(), leaf)
    p = z.sigmoid()
    torch.testing.assert_close(found[:, 0], -z * p * (1 - p), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(shannon_entropy_from_logits, (batch(0, 3, 4).requires_grad_(),))


# 2 ----------------------------------------------------------------------------------------------------------------


def test_02_without_its_parts_sar_is_tent() -> None:
    tent = Tent(perceptron(), lr=0.05)
    sar = SAR(perceptron(), lr=0.05, rho=0.0, margin=INF, reset_threshold=-INF, skip_last=0.0)
    for seed in range(20):
        torch.testing.assert_close(sar(batch(seed)), tent(batch(seed)), rtol=0, atol=1e-10)
    torch.testing.assert_close(weights(sar), weights(tent), rtol=0, atol=1e-10)
    assert (weights(tent) - weights(Tent(perceptron()))).norm() > 0.1


def test_02_tent_is_momentum_sgd_on_the_mean_entropy() -> None:
    net, tent = perceptron(), Tent(perceptron(), lr=0.05)
    optimizer = torch.optim.SGD(collect_norm_params(net, skip_last=0.0).values(), lr=0.05, momentum=0.9)
    for seed in range(5):
        tent(batch(seed))
        optimizer.zero_grad()
        full_entropy(net(batch(seed))).mean().backward()
        optimizer.step()
    other = torch.cat([p.detach().reshape(-1) for p in collect_norm_params(net, skip_last=0.0).values()])
    torch.testing.assert_close(weights(tent), other, rtol=0, atol=1e-12)


# 3 ----------------------------------------------------------------------------------------------------------------


def test_03_weights_come_back_exactly_from_the_perturbation() -> None:
    net = perceptron()
    before = [p.detach().clone() for p in net.parameters()]
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3)
    full_entropy(net(batch(0))).mean().backward()
    with sam.perturbed():
        assert all(p.grad is None for p in net.parameters())
        assert any((p != old).any() for p, old in zip(net.parameters(), before, strict=True))
        full_entropy(net(batch(0))).mean().backward()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    assert all(p.grad is not None for p in net.parameters())


def test_03_also_if_the_second_pass_fails() -> None:
    calls = []

    class Fragile(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return super().forward(x)

    net = Fragile(*perceptron())
    adapted = SAR(net, lr=0.1)
    before = weights(adapted)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapted(batch(0))
    assert torch.equal(weights(adapted), before)


# 4 ----------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, rho=st.floats(1e-4, 2.0))
def test_04_quadratic_loss(seed: int, rho: float) -> None:
    root = batch(seed, 4, 4)
    A, theta = root @ root.T, nn.Parameter(batch(seed + 1, 1, 4)[0])
    start = theta.detach().clone()
    sam = SAM(torch.optim.SGD([theta], lr=0.1), rho=rho)
    (0.5 * theta @ A @ theta).backward()
    with sam.perturbed() as norm:
        eps = theta.detach() - start
        (0.5 * theta @ A @ theta).backward()
    assert norm == pytest.approx(float((A @ start).norm()))
    assert eps.norm() == pytest.approx(rho, rel=1e-9)
    expected = A @ (start + rho * A @ start / (A @ start).norm())
    torch.testing.assert_close(theta.grad, expected, rtol=1e-9, atol=1e-12)


def test_04_norm_is_joint_and_zero_gradient_moves_nothing() -> None:
    params = [nn.Parameter(batch(k, 2, k + 1)) for k in range(3)]
    sam = SAM(torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 1.0}], lr=0.1), rho=0.2)
    before = [p.detach().clone() for p in params]
    sum(p.square().sum() for p in params).backward()
    with sam.perturbed():
        moved = torch.cat([(p.detach() - old).reshape(-1) for p, old in zip(params, before, strict=True)])
    assert moved.norm() == pytest.approx(0.2)
    for p in params:
        p.grad = torch.zeros_like(p)
    with sam.perturbed() as norm:
        assert norm == 0
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


# 5 ----------------------------------------------------------------------------------------------------------------


def test_05_the_margin_is_strict() -> None:
    x = batch(0)
    e = full_entropy(perceptron()(x))
    highest = float(shannon_entropy_from_logits(perceptron()(x)).detach().max())
    adapted = SAR(perceptron(), margin=highest)
    adapted(x)
    assert adapted.stats.kept == pytest.approx((len(e) - 1) / len(e))
    adapted = SAR(perceptron(), margin=math.nextafter(highest, INF))
    adapted(x)
    assert adapted.stats.kept == 1


@pytest.mark.parametrize("rows", [1, 6])
def test_05_nothing_reliable_changes_nothing(rows: int) -> None:
    adapted = SAR(perceptron(sharpness=0.01), lr=0.1)
    before, x = weights(adapted), batch(0, rows)
    expected = perceptron(sharpness=0.01)(x).detach()
    assert torch.equal(adapted(x), expected)
    assert torch.equal(weights(adapted), before)
    assert (adapted.stats.skipped_empty, adapted.stats.updates, adapted.stats.kept) == (1, 0, 0)
    assert math.isnan(adapted.stats.moving_loss)
    assert not momentum(adapted)


def test_05_the_momentum_mode_goes_on_with_gradient_0() -> None:
    adapted = SAR(perceptron(), lr=0.05, empty="momentum", skip_last=0.0, reset_threshold=-INF)
    adapted(batch(0))
    adapted(batch(1))
    before, buffers = weights(adapted), torch.cat([b.reshape(-1).clone() for b in momentum(adapted)])
    m = adapted.stats.moving_loss
    adapted.margin = 1e-9
    adapted(batch(2))
    torch.testing.assert_close(weights(adapted), before - 0.05 * 0.9 * buffers, rtol=0, atol=1e-14)
    assert adapted.stats.moving_loss == m


def test_05_nothing_left_at_the_perturbed_weights() -> None:
    x = batch(0, 1)
    margin = float(full_entropy(perceptron()(x))[0].detach()) + 1e-6  # SAM goes uphill, past it
    adapted = SAR(perceptron(), lr=0.05, margin=margin)
    before = weights(adapted)
    adapted(x)
    assert (adapted.stats.kept, adapted.stats.kept_twice, adapted.stats.skipped_empty) == (1, 0, 1)
    assert torch.equal(weights(adapted), before)


# 6 ----------------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """Logits of two classes whose entropy at theta = 0 is what the input says; theta is where the optimiser acts."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] + self.theta, torch.zeros_like(x[:, 0])], -1)


def with_entropy(wanted: float, classes: int = 2) -> Tensor:
    low, high = 0.0, 40.0
    for _ in range(200):
        z = (low + high) / 2
        e = float(full_entropy(torch.tensor([[z, 0.0]], dtype=F64))[0])
        low, high = (z, high) if e > wanted else (low, z)
    return torch.tensor([[z]], dtype=F64)


def given_sar(**options: Any) -> SAR:
    net = Given()
    options = {"rho": 0.0, "margin": INF, **options}
    return SAR(net, torch.optim.SGD([net.theta], lr=1e-30, momentum=0.9), **options)


def test_06_the_moving_average() -> None:
    adapted, seen = given_sar(reset_threshold=-INF), []
    for wanted in (0.6, 0.3, 0.06):
        adapted(with_entropy(wanted))
        seen.append(adapted.stats.moving_loss)
    assert seen == pytest.approx([0.6, 0.57, 0.519], abs=1e-9)
    spec = [1.0]
    for loss in (0.5, 0.1):
        spec.append(0.9 * spec[-1] + 0.1 * loss)
    assert spec == pytest.approx([1.0, 0.95, 0.865])


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_06_recovery(compat: Any) -> None:
    adapted = SAR(perceptron(), lr=0.3, skip_last=0.0, reset_threshold=0.4, compat=compat)
    start, x = weights(adapted), batch(0)
    while not adapted.stats.resets:
        before = weights(adapted), [b.clone() for b in momentum(adapted)], adapted.stats.moving_loss
        adapted(x)
        assert adapted.stats.batches < 200
    assert not torch.equal(before[0], start)
    assert torch.equal(weights(adapted), start)
    if compat == "fixed":
        assert not momentum(adapted)
        assert math.isnan(adapted.stats.moving_loss)
    else:
        assert all((b != 0).any() for b in momentum(adapted))
        assert 0.36 < adapted.stats.moving_loss < 0.4


def test_06_a_fresh_average_may_reset_again_and_the_test_is_strict() -> None:
    adapted = given_sar(reset_threshold=0.2)
    for _ in range(3):
        adapted(with_entropy(0.1))
        assert math.isnan(adapted.stats.moving_loss)
    assert adapted.stats.resets == 3
    probe = given_sar(reset_threshold=-INF)
    probe(with_entropy(0.2))
    exactly = probe.stats.moving_loss
    for threshold, resets in ((exactly, 0), (math.nextafter(exactly, 1), 1)):
        adapted = given_sar(reset_threshold=threshold)
        adapted(with_entropy(0.2))
        assert adapted.stats.resets == resets


def test_06_the_stale_average_resets_batch_after_batch() -> None:
    counts = {}
    for compat in ("fixed", "official"):
        adapted = given_sar(reset_threshold=0.2, compat=compat)
        for wanted in [0.05] + [0.25] * 20:
            adapted(with_entropy(wanted))
        counts[compat] = adapted.stats.resets
    stale, m = 1, 0.05
    while (m := 0.9 * m + 0.1 * 0.25) < 0.2:
        stale += 1
    assert counts == {"fixed": 1, "official": stale}
    assert stale == 14


def test_06_default_thresholds() -> None:
    for compat, wanted in (("fixed", 0.029 * math.log(2)), ("official", 0.2)):
        for shift, resets in ((0.99, 1), (1.01, 0)):
            adapted = given_sar(compat=compat)
            adapted(with_entropy(shift * wanted))
            assert adapted.stats.resets == resets
    assert 0.029 * math.log(1000) == pytest.approx(0.2, abs=1e-3)


# 7 ----------------------------------------------------------------------------------------------------------------


def test_07_sam_differs_from_sgd_by_the_hessian_to_first_order() -> None:
    lr, x, margin = 0.1, batch(3), 0.4 * math.log(10)
    net = perceptron().requires_grad_(False)
    kept = full_entropy(net(x)) < margin
    names = list(collect_norm_params(net, skip_last=0.0))
    shapes = [net.get_parameter(name).shape for name in names]
    flat = torch.cat([net.get_parameter(name).detach().reshape(-1) for name in names])

    def loss(theta: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in shapes])
        params = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return full_entropy(functional_call(net, params, (x,)))[kept].mean()

    g = torch.func.grad(loss)(flat)
    hessian = torch.autograd.functional.hessian(loss, flat)  # torch.func.hessian is wrong through LayerNorm
    residuals = []
    for rho in (1e-3, 1e-4):
        adapted = SAR(perceptron(), lr=lr, rho=rho, skip_last=0.0)
        adapted(x)
        assert adapted.stats.kept == adapted.stats.kept_twice == pytest.approx(float(kept.double().mean()))
        moved = weights(adapted) - (flat - lr * g)
        residuals.append((moved + lr * rho * hessian @ g / g.norm()).norm() / rho**2)
    assert residuals[0] == pytest.approx(float(residuals[1]), rel=0.02)
    assert residuals[0] > 0


# 8 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tent, SAR])
def test_08_only_norm_parameters_change(kind: type[Tent]) -> None:
    net = perceptron()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    adapted = kind(net, lr=0.05, skip_last=0.0)
    for seed in range(3):
        adapted(batch(seed))
    assert set(adapted.adapted) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    for name, p in net.named_parameters():
        chosen = name in adapted.adapted
        assert torch.equal(p, before[name]) != chosen
        assert p.requires_grad == chosen
        assert chosen or p.grad is None
    assert sum(p.numel() for p in adapted.adapted.values()) == 4 * 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(2), nn.LayerNorm(2)


class Vit(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.norm_pre = nn.LayerNorm(2)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.norm = nn.LayerNorm(2)


class ResNet(nn.Module):
    """The names and counts of norm layers of a ResNet."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(2)
        for stage, depth in enumerate(depths, start=1):
            rows = []
            for number in range(depth):
                row = nn.Sequential(*(nn.GroupNorm(1, 2) for _ in range(3)))
                if not number:
                    row.add_module("downsample", nn.Sequential(nn.Identity(), nn.GroupNorm(1, 2)))
                rows.append(row)
            setattr(self, f"layer{stage}", nn.Sequential(*rows))


class Nested(nn.Module):
    """An encoder behind embeddings, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"LayerNorm": nn.LayerNorm(2)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block() for _ in range(8))})


def layers(net: nn.Module, **options: Any) -> set[str]:
    return {name.rpartition(".")[0] for name in collect_norm_params(net, **options)}


def test_08_official_choice_of_layers() -> None:
    vit = layers(Vit(12))
    assert vit == {"norm_pre"} | {f"blocks.{b}.norm{n}" for b in range(9) for n in (1, 2)}
    for depths in ((2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)):
        net = ResNet(depths)
        every, found = layers(net, skip_last=0.0), layers(net)
        assert every - found == {name for name in every if name.startswith("layer4")}
    bert = layers(Nested())
    assert "embeddings.LayerNorm" in bert
    assert max(int(name.split(".")[2]) for name in bert if name.startswith("encoder")) == 5


def test_08_patterns_shares_and_small_models() -> None:
    assert layers(Vit(4), skip_last=0.0) == layers(Vit(4)) | {"blocks.3.norm1", "blocks.3.norm2", "norm"}
    assert layers(Vit(4), skip_last=0.0, skip=["blocks.*", "norm_pre"]) == {"norm"}
    assert layers(Vit(2)) == layers(Vit(2), skip_last=0.0) - {"norm"}
    assert len(layers(Vit(30), skip_last=0.1)) == 1 + 2 * 27
    assert layers(perceptron()) == layers(perceptron(), skip_last=0.0) == {"1", "4"}
    assert list(collect_norm_params(nn.LayerNorm(3))) == ["weight", "bias"]
    assert len(layers(Vit(3), skip_last=0.999)) == 1 + 2
    shared = nn.LayerNorm(2)
    assert len(collect_norm_params(nn.Sequential(shared, nn.Linear(2, 2), shared))) == 2


def test_08_norms_are_found_by_name_too() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    net = nn.Sequential(LlamaRMSNorm(), nn.InstanceNorm1d(2), nn.InstanceNorm1d(2, affine=True))
    assert list(collect_norm_params(net, skip_last=0.0)) == ["0.weight", "2.weight", "2.bias"]


# 9 ----------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, shift=st.floats(-50, 50))
def test_09_order_of_samples_and_constants_do_not_matter(seed: int, shift: float) -> None:
    x = batch(seed)
    order = torch.randperm(len(x), generator=generator(seed))
    adapted = [
        SAR(perceptron(), lr=0.1, logits_of=f) for f in (lambda z: z, lambda z: z, lambda z: z + shift)
    ]
    for sar, rows in zip(adapted, (x, x[order], x), strict=True):
        sar(rows)
    for other in adapted[1:]:
        torch.testing.assert_close(weights(other), weights(adapted[0]), rtol=0, atol=1e-10)


@quick
@given(seed=seeds)
def test_09_unreliable_samples_do_not_matter(seed: int) -> None:
    x = batch(seed)
    kept = full_entropy(perceptron()(x)) < 0.4 * math.log(10)
    whole, part = SAR(perceptron(), lr=0.1), SAR(perceptron(), lr=0.1)
    whole(x)
    if kept.any():
        part(x[kept])
    torch.testing.assert_close(weights(whole), weights(part), rtol=0, atol=1e-12)


# 10 ---------------------------------------------------------------------------------------------------------------


def test_10_equal_entropies_below_the_margin_keep_the_batch() -> None:
    x = batch(0, 1).repeat(7, 1)
    one = float(full_entropy(perceptron()(x[:1]))[0].detach())
    adapted = SAR(perceptron(), rho=0.0, margin=one + 0.01, reset_threshold=-INF)
    adapted(x)
    assert (adapted.stats.kept, adapted.stats.kept_twice) == (1, 1)
    assert adapted.stats.moving_loss == pytest.approx(one)
    assert adapted.stats.entropy == pytest.approx(one)
    assert adapted.stats.prediction_entropy == 0


# the second pass on reliable rows --------------------------------------------------------------------------------


def passes(net: nn.Module) -> list[int]:
    sizes: list[int] = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_the_second_pass_runs_on_reliable_rows_alone_and_gives_the_same() -> None:
    class Coupled(nn.BatchNorm1d):
        """A BatchNorm that no data go through, so that all rows have to be taken."""

    small, full = perceptron(), perceptron()
    full.add_module("unused", nn.Sequential())
    full.unused.add_module("bn", Coupled(2).to(F64))
    full.unused.forward = lambda z: z
    sizes, all_sizes = passes(small), passes(full)
    options: dict[str, Any] = {"lr": 0.05, "skip_last": 0.0, "reset_threshold": -INF}
    a, b = SAR(small, **options), SAR(full, skip=["unused.bn"], **{**options})
    for seed in range(6):
        a(batch(seed))
        b(batch(seed))
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=1e-12)
    assert all_sizes == [12] * 12
    assert sizes[::2] == [12] * 6
    assert all(0 < size <= 12 for size in sizes[1::2])
    assert min(sizes[1::2]) < 12


# bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tent, SAR])
def test_a_batch_of_one(kind: type[Tent]) -> None:
    adapted = kind(perceptron(), lr=0.05)
    before = weights(adapted)
    for seed in range(30):
        assert adapted(batch(seed, 1)).shape == (1, 10)
    assert not torch.equal(weights(adapted), before)
    norm = kind(convolutional(nn.BatchNorm2d(4)))
    with pytest.raises(DataError, match="batch of one, but 1 is a BatchNorm"):
        norm(images(0, 1))


@pytest.mark.parametrize("kind", [Tent, SAR])
def test_samples_that_are_not_finite_are_left_out(kind: type[Tent]) -> None:
    good, bad = (kind(perceptron(), lr=0.05) for _ in range(2))
    for seed in range(4):
        x = batch(seed)
        spoilt = torch.cat([torch.full((1, 5), math.nan, dtype=F64), x, torch.full((1, 5), INF, dtype=F64)])
        expected, found = good(x), bad(spoilt)
        torch.testing.assert_close(found[1:-1], expected, rtol=0, atol=1e-12)
        assert not found[0].isfinite().any()
    torch.testing.assert_close(weights(good), weights(bad), rtol=0, atol=1e-12)
    assert bad.stats.nonfinite_samples == 8
    bad(torch.full((3, 5), math.nan, dtype=F64))
    torch.testing.assert_close(weights(good), weights(bad), rtol=0, atol=1e-12)
    assert (bad.stats.skipped_empty, bad.stats.batches) == (1, 5)


def test_not_finite_where_rows_cannot_be_taken_out() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.net(x) * scale

    x = batch(0)
    x[0] = math.nan
    adapted = Tent(Scaled(), lr=0.05)
    before = weights(adapted)
    adapted(x, torch.ones(10, dtype=F64))
    assert torch.equal(weights(adapted), before)
    assert adapted.stats.skipped_nonfinite == 1


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * INF

    for kind in (Tent, SAR):
        adapted = kind(perceptron(), lr=0.05, logits_of=Exploding.apply)
        before = weights(adapted)
        adapted(batch(0))
        assert torch.equal(weights(adapted), before)
        assert (adapted.stats.skipped_nonfinite, adapted.stats.updates) == (1, 0)


def test_models_without_norm_layers() -> None:
    plain = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4))
    with pytest.raises(
        ConfigError, match=r"Sequential has no normalisation.*\*BatchNorm\*, \*LayerNorm\*.*optimizer="
    ):
        SAR(plain)
    assert NoAdaptation(plain)(torch.randn(2, 5)).shape == (2, 4)
    adapted = Tent(plain, torch.optim.Adam(plain[2].parameters(), lr=0.01))
    adapted(torch.randn(6, 5, generator=generator(0)))
    assert set(adapted.adapted) == {"2.weight", "2.bias"}
    assert not plain[0].weight.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SAR(perceptron(), margin=0.0), ConfigError, "margin is 0.0"),
        (lambda: SAR(perceptron(), rho=-1.0), ConfigError, "rho is -1.0"),
        (lambda: SAR(perceptron(), ema_decay=1.0), ConfigError, "ema_decay is 1.0"),
        (lambda: SAR(perceptron(), reset_threshold=math.nan), ConfigError, "reset_threshold is NaN"),
        (lambda: SAR(perceptron(), lr=0.0), ConfigError, "lr is 0.0"),
        (lambda: Tent(perceptron(), steps=0), ConfigError, "steps is 0"),
        (lambda: Tent(perceptron(), skip_last=1.0), ConfigError, "skip_last is 1.0"),
        (lambda: Tent(perceptron(), skip=["layer9*"]), ConfigError, "fits 'layer9\\*'; there are 1, 4"),
        (lambda: Tent(perceptron(), skip=["*"]), ConfigError, "leave no layer of 1, 4"),
        (
            lambda: Tent(nn.Sequential(nn.Linear(5, 1), nn.LayerNorm(1)))(torch.ones(3, 5)),
            DataError,
            "two or more",
        ),
        (lambda: Tent(perceptron())(), DataError, "no batch of inputs"),
        (lambda: Tent(perceptron(), logits_of=lambda z: z[0])(batch(0)), DataError, "shape \\(10,\\)"),
        (lambda: NoAdaptation(nn.LSTM(5, 2))(torch.ones(3, 5)), DataError, "returned tuple.*logits_of="),
        (
            lambda: Tent(perceptron(), torch.optim.SGD(perceptron(2).parameters(), lr=0.1)),
            ConfigError,
            "parameters that the model does not have",
        ),
    ],
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_options_that_an_optimiser_replaces_are_refused() -> None:
    for option in ({"lr": 0.1}, {"skip_last": 0.0}, {"skip": ["1"]}):
        net = perceptron()
        with pytest.raises(ConfigError, match="optimizer= already says"):
            SAR(net, torch.optim.SGD(net.parameters(), lr=0.1), **option)


@pytest.mark.parametrize(("option", "value"), [("empty", "stop"), ("compat", "old")])
def test_words_that_are_no_option(option: str, value: Any) -> None:
    with pytest.raises((ConfigError, TypeError)):
        SAR(perceptron(), **{option: value})


# state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NoAdaptation, Tent, SAR])
def test_one_interface(kind: type[Adaptation]) -> None:
    adapted = kind(perceptron())
    with torch.inference_mode():
        first = adapted(batch(0))
    assert torch.equal(first, perceptron()(batch(0)).detach())
    assert not first.requires_grad
    with torch.no_grad():
        adapted(batch(1))
    assert adapted.stats.batches == 2
    assert adapted.stats.entropy == pytest.approx(
        float(full_entropy(adapted.model(batch(1))).mean().detach()), abs=0.1
    )
    adapted.reset()
    assert all(
        torch.equal(p, q) for p, q in zip(adapted.model.parameters(), perceptron().parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", [Tent, SAR])
def test_reset_brings_back_weights_and_optimiser(kind: type[Tent]) -> None:
    adapted, fresh = kind(perceptron(), lr=0.05), kind(perceptron(), lr=0.05)
    for seed in range(4):
        adapted(batch(seed))
    adapted.reset()
    assert torch.equal(weights(adapted), weights(fresh))
    for seed in range(3):
        adapted(batch(seed))
        fresh(batch(seed))
    assert torch.equal(weights(adapted), weights(fresh))
    episodic = kind(perceptron(), lr=0.05, episodic=True)
    first = episodic(batch(0))
    episodic(batch(1))
    assert torch.equal(episodic(batch(0)), first)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("kind", [Tent, SAR])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(
    kind: type[Tent], dtype: Any, tmp_path: Any
) -> None:
    adapted = kind(perceptron().to(dtype), lr=0.05)
    source = weights(adapted)
    for seed in range(4):
        adapted(batch(seed).to(dtype))
    torch.save(adapted.state_dict(), tmp_path / "state.pt")
    # what is wrapped again has adapted weights already, as after a restart from a checkpoint of the model
    resumed = kind(copy.deepcopy(adapted).release(), lr=0.05)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(4, 7):
        adapted(batch(seed).to(dtype))
        resumed(batch(seed).to(dtype))
    assert torch.equal(weights(resumed), weights(adapted))
    if isinstance(adapted, SAR):
        assert resumed.stats.moving_loss == adapted.stats.moving_loss
    resumed.reset()
    assert torch.equal(weights(resumed), source)
    assert not momentum(resumed)
    with pytest.raises(DataError, match=r"is of parameters 1\.weight.*the same options"):
        kind(perceptron(), skip=["1"], skip_last=0.0).load_state_dict(adapted.state_dict())


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_a_reset_leaves_a_schedule_alone(compat: Any) -> None:
    adapted = SAR(perceptron(), lr=1.0, compat=compat)
    adapted.optimizer.param_groups[0]["lr"] = 0.1
    adapted.reset()
    assert adapted.optimizer.param_groups[0]["lr"] == 0.1


def test_steps_repeat_the_update() -> None:
    twice, once = Tent(perceptron(), lr=0.05, steps=2), Tent(perceptron(), lr=0.05)
    once(batch(0))
    expected = once(batch(0))
    assert torch.equal(twice(batch(0)), expected)
    assert torch.equal(weights(twice), weights(once))
    assert (twice.stats.batches, twice.stats.updates) == (1, 2)


def test_batch_norm_takes_the_statistics_of_the_batch_until_released() -> None:
    net = convolutional(nn.BatchNorm2d(4)).train()
    net.append(nn.Dropout(0.5))
    net[1].running_mean.fill_(0.7)
    net[0].requires_grad_(False)
    reference = copy.deepcopy(net)
    reference[5].eval()
    mean = net[1].running_mean.clone()
    adapted = SAR(net, lr=0.01, margin=INF)
    adapted.train()
    torch.testing.assert_close(adapted(images(0)), reference(images(0)).detach(), rtol=0, atol=1e-12)
    assert not net[5].training
    back = adapted.release()
    assert back is net
    assert torch.equal(net[1].running_mean, mean)
    assert net[1].track_running_stats
    assert net[5].training
    assert [p.requires_grad for p in net.parameters()] == [False] * 2 + [True] * 4


def test_a_copy_adapts_on_its_own() -> None:
    adapted = SAR(perceptron(), lr=0.05)
    adapted(batch(0))
    twin = copy.deepcopy(adapted)
    before = weights(adapted)
    for seed in range(1, 4):
        twin(batch(seed))
    assert torch.equal(weights(adapted), before)
    for seed in range(1, 4):
        adapted(batch(seed))
    assert torch.equal(weights(adapted), weights(twin))


def test_half_precision_measures_in_float32() -> None:
    adapted = Tent(perceptron().to(torch.bfloat16), lr=0.05)
    adapted(batch(0).to(torch.bfloat16))
    assert adapted.stats.updates == 1
    assert 0 < adapted.stats.entropy < math.log(10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Tent, SAR])
def test_half_precision_follows_float32_at_a_small_rate(kind: type[Tent], dtype: torch.dtype) -> None:
    half = perceptron().to(dtype)
    single = copy.deepcopy(half).float()
    made = kind(half, skip_last=0.0), kind(single, skip_last=0.0)
    start = weights(made[1])
    for seed in range(30):
        x = batch(seed, 64).to(dtype)
        made[0](x)
        made[1](x.float())
    moved, expected = (weights(one) - start for one in made)
    assert (moved != 0).all()
    assert float((moved - expected).norm() / expected.norm()) < 0.1
    assert made[0].stats.updates == 30
    made[0].reset()
    assert torch.equal(weights(made[0]), start)
    back = made[0].release()
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert torch.equal(back(x), copy.deepcopy(back)(x))
    assert back(x).dtype == dtype


def test_half_precision_of_a_shared_layer_and_given_optimisers() -> None:
    norm = nn.LayerNorm(5)
    outer = nn.Sequential(norm, nn.Linear(5, 5), norm, nn.Linear(5, 3)).bfloat16()
    outer[2] = nn.LayerNorm(5).bfloat16()
    outer[2].weight = norm.weight
    held = [norm.weight, outer[3].weight]
    optimizer = torch.optim.SGD(held, lr=1e-2, momentum=0.9)
    for p in held:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    adapted = Tent(outer, optimizer)
    assert {state.dtype for state in momentum(adapted)} == {torch.float32}
    before = weights(adapted)
    assert adapted(batch(0).bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in held} == {torch.float32}
    assert (weights(adapted) != before).all()
    copy.deepcopy(adapted).release()
    assert held[0].dtype == torch.float32
    adapted.release()
    assert {p.dtype for p in outer.parameters()} == {torch.bfloat16}
    outer(batch(0).bfloat16())


def test_sam_perturbs_in_half_precision_as_far_as_there_are_numbers() -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    sam = SAM(torch.optim.SGD([p], lr=0.1), rho=0.5)
    p.grad = torch.full_like(p, 5000.0)  # whose norm is no number of float16
    with sam.perturbed() as norm:
        assert float(norm) == pytest.approx(5000 * math.sqrt(1000))
        assert float(p.detach().float().norm()) == pytest.approx(0.5, rel=1e-2)


def test_sam_trains_with_a_closure_and_saves_its_state() -> None:
    net = perceptron()
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), rho=0.05)

    def closure() -> Tensor:
        loss = full_entropy(net(batch(0))).mean()
        loss.backward()
        return loss

    losses = [float(sam.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < losses[0]
    other = SAM(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
    other.load_state_dict(sam.state_dict())
    assert all(torch.equal(other.optimizer.state[p]["momentum_buffer"], sam.optimizer.state[p]["momentum_buffer"])
               for p in net.parameters())  # fmt: skip


# language models --------------------------------------------------------------------------------------------------


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Bigrams(nn.Module):
    """Next-token logits from each token alone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(30, 8).to(F64), nn.Linear(8, 30).to(F64)
        self.norm = nn.RMSNorm(8).to(F64)
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Output:
        return Output(self.head(self.norm(self.embed(input_ids))))


def test_tokens_are_samples_and_padding_is_none() -> None:
    ids = torch.randint(30, (4, 9), generator=generator(0))
    mask = torch.arange(9) < torch.tensor([[9], [5], [1], [0]])
    padded, flat = SAR(Bigrams(), lr=0.05, skip_last=0.0), SAR(Bigrams(), lr=0.05, skip_last=0.0)
    for _ in range(3):
        logits = padded(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        flat(input_ids=ids[mask][:, None])
        assert logits.shape == (4, 9, 30)
        assert padded.stats.kept == pytest.approx(flat.stats.kept)
        assert padded.stats.kept_twice == pytest.approx(flat.stats.kept_twice)
    assert 0 < flat.stats.kept < 1
    torch.testing.assert_close(weights(padded), weights(flat), rtol=0, atol=1e-12)


def test_an_attention_mask_counts_by_position_as_by_name() -> None:
    ids = torch.randint(30, (4, 9), generator=generator(0))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [1], [0]])).long()
    by_name, by_place = SAR(Bigrams(), lr=0.05, skip_last=0.0), SAR(Bigrams(), lr=0.05, skip_last=0.0)
    for _ in range(3):
        by_name(input_ids=ids, attention_mask=mask)
        by_place(ids, mask)
    assert by_name.stats == by_place.stats
    assert torch.equal(weights(by_name), weights(by_place))


class Scaled(nn.Module):
    """Logits in classes' units of their own: `scale` has an entry per feature, and may be as long as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        assert len(scale) == x.shape[1]
        return self.body(x * scale)


def test_a_tensor_as_long_as_the_batch_need_not_have_rows() -> None:
    x, scale = batch(0, rows=5), torch.linspace(1, 3, 5, dtype=F64)
    guessed = SAR(Scaled(), lr=0.05)
    with pytest.raises(AssertionError):
        guessed(x, scale)  # some rows are not reliable
    ends = []
    for named, call in ((("x",), (x, scale)), ((), (x, scale))):
        adapted = SAR(Scaled(), lr=0.05, row_wise=named)
        adapted(*call)
        adapted(x=call[0], scale=call[1])
        assert 0 < adapted.stats.kept < 1
        ends.append(weights(adapted))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
    with pytest.raises(DataError, match="'y', which is no tensor of 5 rows"):
        SAR(Scaled(), row_wise=["y"])(x, scale)
    with pytest.raises(ConfigError, match="a list of names"):
        SAR(Scaled(), row_wise="x")


@pytest.mark.parametrize("kind", [NoAdaptation, Tent, SAR])
def test_an_empty_batch_changes_nothing(kind: type[Adaptation]) -> None:
    adapted = kind(perceptron())
    adapted(batch(0))
    before, figures = copy.deepcopy(adapted.model.state_dict()), copy.copy(adapted.stats)
    assert adapted(batch(0)[:0]).shape == (0, 10)
    assert adapted.stats.updates == figures.updates
    assert adapted.stats.entropy == figures.entropy
    assert all(torch.equal(value, before[name]) for name, value in adapted.model.state_dict().items())


def test_a_language_model_of_the_zoo() -> None:
    pytest.importorskip("transformers")
    from uncollapse import models

    model, tokenizer = models.load("tiny")
    adapted = SAR(model, lr=0.01)
    assert len(adapted.adapted) == 4
    assert all("layernorm" in name for name in adapted.adapted)
    inputs = tokenizer(["Compute 12 + 7.", "ab"], return_tensors="pt", padding=True)
    first = adapted(**inputs)
    second = adapted(**inputs)
    assert first.shape == (*inputs["input_ids"].shape, 100)
    assert not torch.equal(first, second)
    assert 0 < adapted.stats.kept_twice <= adapted.stats.kept < 1
    assert adapted.stats.updates == 2
