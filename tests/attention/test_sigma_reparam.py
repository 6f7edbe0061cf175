"""Exact checks of sigmaReparam, numbered as in its specification; in float64 unless they say otherwise.

Checks 1 to 4 and 10, of the entropy bound, stand in tests/measure/test_attention.py.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from uncollapse.attention.sigma_reparam import (
    AttentionEntropyMonitor,
    NoNorm,
    SigmaReparam,
    SigmaReparamConv2d,
    SigmaReparamLinear,
    SigmaTracker,
    apply_sigma_reparam,
    conversion,
    estimate,
    fuse,
    plain_state_dict,
    remove_norms,
    spectral_norms,
    track_sigma,
)
from uncollapse.attention.sigma_reparam.estimate import power_step, rescaled, sigma_of, start_vector
from uncollapse.errors import ConfigError, DataError

F64 = torch.float64
seeds = st.integers(0, 10_000)
by_hand = pytest.mark.parametrize("large", [0, 1 << 30], ids=["written-out", "autograd"])
quick = settings(max_examples=20, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def linear(rows: int = 5, columns: int = 7, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(columns, rows).double()
    layer.weight.data.copy_(draw(rows, columns, seed=seed))
    return layer


class Net(nn.Module):
    """Two linear layers of one shape, one of another, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(self.second(self.first(x).tanh()).tanh())


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().double()


def images(seed: int = 0, rows: int = 3) -> Tensor:
    return draw(rows, 4, 5, 5, seed=seed)


def reparam(layer: nn.Module, name: str = "weight") -> SigmaReparam:
    return layer.parametrizations[name][0]


def steps_of(model: nn.Module, count: int = 3, lr: float = 0.05) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for seed in range(count):
        optimiser.zero_grad()
        model(images(seed)).square().sum().backward()
        optimiser.step()


def same(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- a naive reference -----------------------------------------------------------------------------------------


def naive_forward(weight: Tensor, gamma: Tensor, u: Tensor, blocks: int = 1) -> tuple[Tensor, list[Tensor]]:
    """One training pass, block by block, with autograd; returns W_hat and the new right vectors."""
    parts, vectors = [], []
    for part, g, old in zip(weight.flatten(1).chunk(blocks), gamma, u, strict=True):
        with torch.no_grad():
            v = part @ old.flatten()
            v = v / v.norm()
            new = part.T @ v
            new = new / new.norm()
        parts.append(g * part / (v @ part @ new))
        vectors.append(new)
    return torch.cat(parts).reshape(weight.shape), vectors


@by_hand
@pytest.mark.parametrize(("shape", "blocks"), [((5, 7), 1), ((6, 4), 3), ((6, 2, 3, 3), 2), ((4, 3, 2), 1)])
@pytest.mark.parametrize("u_init", ["svd", "random"])
def test_a_pass_is_that_of_the_naive_reference(shape, blocks, u_init, large, monkeypatch):
    monkeypatch.setattr(estimate, "_LARGE", large)
    weight = draw(*shape).requires_grad_()
    found = SigmaReparam(weight, blocks=blocks, u_init=u_init, gamma_init=1.7, generator=generator(3))
    hat, vectors = naive_forward(weight, found.gamma, found.u.clone(), blocks)
    upstream = draw(*shape, seed=9)
    wanted = torch.autograd.grad((hat * upstream).sum(), (weight, found.gamma))
    mine = found(weight)
    same(mine, hat.detach().requires_grad_())
    for got, want in zip(
        torch.autograd.grad((mine * upstream).sum(), (weight, found.gamma)), wanted, strict=True
    ):
        same(got, want)
    same(found.u[..., 0], torch.stack(vectors))


# ---- 5: the norm of the weight ---------------------------------------------------------------------------------


@quick
@given(seed=seeds, rows=st.integers(2, 9), columns=st.integers(2, 9))
def test_5_the_norm_is_gamma_after_enough_iterations(seed, rows, columns):
    weight = draw(rows, columns, seed=seed)
    found = SigmaReparam(
        weight, u_init="random", gamma_init=0.7, n_power_iterations=500, generator=generator(seed)
    )
    sigma = torch.linalg.svdvals(weight)
    tolerance = 1e-6 if sigma[1] / sigma[0] < 0.98 else 1e-2  # the rate is the gap between the two largest
    assert float(torch.linalg.matrix_norm(found(weight), 2)) == pytest.approx(0.7, rel=tolerance)


@quick
@given(seed=seeds, factor=st.floats(1e-3, 1e3), u_init=st.sampled_from(["svd", "random"]))
def test_5_the_scale_of_the_weight_does_not_matter(seed, factor, u_init):
    weight = draw(5, 7, seed=seed)
    one, other = (
        SigmaReparam(weight, u_init=u_init, gamma_init="one", generator=generator(seed)) for _ in range(2)
    )
    same(one(weight), other(factor * weight))


def test_5_conversion_leaves_the_function_as_it_is():
    for batched in (False, True):
        model = net()
        before = model(images())
        apply_sigma_reparam(model, batched=batched)
        same(model(images()), before)
        same(model.eval()(images()), before)
    single = Net()
    before = single(images().float())
    same(apply_sigma_reparam(single)(images().float()), before, atol=1e-6)


def test_gamma_starts_as_asked():
    weight = draw(5, 7)
    assert float(SigmaReparam(weight).gamma) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)))
    assert SigmaReparam(weight, gamma_init="one").gamma.tolist() == [1]
    assert SigmaReparam(weight, gamma_init=3).gamma.tolist() == [3]
    assert SigmaReparam(draw(6, 7), blocks=3).gamma.shape == (3,)


def test_the_start_vector_is_the_first_right_singular_vector():
    for rows, columns in ((5, 7), (7, 5), (6, 6)):
        matrix = draw(2, rows, columns)
        exact = torch.linalg.svd(matrix).Vh[:, 0]
        found = start_vector(matrix, "svd")[..., 0]
        same(torch.linalg.vecdot(found, exact).abs(), torch.ones(2, dtype=F64))


# ---- 6: gradients ----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_6_gradient_identities(seed):
    weight = draw(4, 6, seed=seed).requires_grad_()
    found = SigmaReparam(weight, u_init="random", gamma_init=0.6, generator=generator(seed))
    v, u, sigma = (x[0] for x in power_step(weight.detach()[None], found.u))
    g = draw(4, 6, seed=seed + 1)
    by_weight, by_gamma = torch.autograd.grad((found(weight) * g).sum(), (weight, found.gamma))
    inner = (g * weight.detach()).sum()
    same(by_gamma[0], (inner / sigma).squeeze())
    same(by_weight, (0.6 / sigma) * (g - (inner / sigma) * v @ u.T))
    assert float((by_weight * weight.detach()).sum()) == pytest.approx(0, abs=1e-11)


@by_hand
def test_6_finite_differences_with_frozen_vectors_to_second_order(large, monkeypatch):
    monkeypatch.setattr(estimate, "_LARGE", large)
    weight, gamma = draw(2, 3, 4).requires_grad_(), draw(2, seed=1).requires_grad_()
    v, u, _ = power_step(weight.detach(), draw(2, 4, 1, seed=2))

    def frozen(w: Tensor, g: Tensor) -> Tensor:
        return rescaled(w.flatten(0, 1), g, sigma_of(w.detach(), v, u), v, u)

    assert torch.autograd.gradcheck(frozen, (weight, gamma))
    assert torch.autograd.gradgradcheck(frozen, (weight, gamma))


def test_6_finite_differences_through_the_exact_vector():
    weight = draw(4, 5).requires_grad_()

    def exact(w: Tensor) -> Tensor:
        return SigmaReparam(w.detach(), gamma_init="one")(w)

    assert torch.autograd.gradcheck(exact, (weight,), atol=1e-6)


def test_6_weights_grow_only_and_slowly_under_sgd():
    layer = apply_sigma_reparam(linear())
    original = layer.parametrizations.weight.original
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01)
    before = float(original.detach().norm())
    for seed in range(5):
        optimiser.zero_grad()
        layer(draw(3, 7, seed=seed)).square().sum().backward()
        gradient = original.grad.norm()
        optimiser.step()
        after = float(original.detach().norm())
        assert after**2 == pytest.approx(before**2 + float(0.01 * gradient) ** 2, rel=1e-12)
        before = after


def test_func_transforms_give_the_same_gradient():
    layer = apply_sigma_reparam(linear()).eval()
    x = draw(3, 7)
    layer(x).square().sum().backward()
    parameters = dict(layer.named_parameters())

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, given, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, parameter in parameters.items():
        same(each[name].sum(0), parameter.grad)


# ---- 7: where one step is exact --------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_7_rank_one_and_orthogonal_weights_need_one_step(seed):
    a, b = draw(4, seed=seed), draw(6, seed=seed + 1)
    found = SigmaReparam(torch.outer(a, b), u_init="random", generator=generator(seed))
    assert float(found.sigma) == pytest.approx(float(a.norm() * b.norm()), rel=1e-9)
    q = torch.linalg.qr(draw(5, 5, seed=seed)).Q
    assert float(SigmaReparam(q, u_init="random", generator=generator(seed)).sigma) == pytest.approx(
        1, abs=1e-12
    )


# ---- 8: fuse, evaluation, checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_8_fuse_bakes_in_what_evaluation_computes(dtype):
    model = apply_sigma_reparam(net().to(dtype))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(3):
        model(images(seed).to(dtype)).square().sum().backward()
        optimiser.step()
    x = images().to(dtype)
    wanted = model.eval()(x)
    same(model(x), wanted, atol=0)
    held = model.first.parametrizations.weight.original
    baked = plain_state_dict(model.state_dict())
    fuse(model.train())
    assert type(model.first) is nn.Linear
    assert model.first.weight is held
    same(model(x), wanted, atol=1e-6 if dtype == torch.float32 else 1e-12)
    plain = Net().to(dtype)
    plain.load_state_dict(baked)
    same(plain(x), wanted, atol=1e-6 if dtype == torch.float32 else 1e-12)
    plain.load_state_dict(model.state_dict())


def test_8_a_state_dict_keeps_u_and_gamma():
    model = apply_sigma_reparam(net())
    steps_of(model)
    state = copy.deepcopy(model.state_dict())
    other = apply_sigma_reparam(net(1), update_every=2)
    other.load_state_dict(state)
    same(reparam(other.first).u, reparam(model.first).u, atol=0)
    same(other.eval()(images()), model.eval()(images()), atol=0)
    same(other.train()(images()), model.train()(images()), atol=1e-12)


def test_8_plain_checkpoints_load_into_a_converted_model():
    source = net(1)
    model = apply_sigma_reparam(net(), gamma_init="one")
    plain = source.state_dict()
    kept = dict(plain)
    model.load_state_dict(plain)
    assert set(plain) == set(kept)
    same(model.eval()(images()), source(images()))
    same(model.train()(images()), source(images()))
    twice = fuse(copy.deepcopy(model))
    twice.load_state_dict(kept)
    same(twice(images()), source(images()))
    wrong = kept | {"first.weight": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(wrong)
    with pytest.raises(DataError, match=r"first.weight of the checkpoint: the weight is zero"):
        model.load_state_dict(kept | {"first.weight": torch.zeros(6, 6).double()})


def test_checkpoints_leave_other_parametrisations_alone():
    model = net()
    spectral_norm(model.head)
    apply_sigma_reparam(model, exclude=["head"])
    state = plain_state_dict(model.state_dict())
    assert "head.parametrizations.weight.original" in state
    assert "first.weight" in state
    tracked = track_sigma(net())
    same(plain_state_dict(tracked.state_dict())["first.weight"], tracked.first.weight, atol=0)


# ---- 9: graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("update_every", [1, 2])
@by_hand
def test_9_two_forward_passes_then_one_backward(batched, update_every, large, monkeypatch):
    monkeypatch.setattr(estimate, "_LARGE", large)
    model = apply_sigma_reparam(net(), batched=batched, update_every=update_every, u_init="random")
    start = copy.deepcopy(model)
    (model(images(0)) - model(images(1))).square().sum().backward()
    reference = copy.deepcopy(start)
    first, second = reference(images(0)), reference(images(1))
    wanted = torch.autograd.grad((first - second).square().sum(), list(reference.parameters()))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        same(parameter.grad, gradient)


def test_batched_steps_are_the_steps_one_by_one():
    one, other = (apply_sigma_reparam(net(), batched=batched) for batched in (False, True))
    assert reparam(other.first).batch is reparam(other.second).batch
    assert reparam(other.head).batch is None
    for model in (one, other):
        steps_of(model)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        same(a, b)
    copied = copy.deepcopy(other)
    assert reparam(copied.first).batch.members[0][0] is not reparam(other.first).batch.members[0][0]
    steps_of(copied)
    steps_of(other)
    same(copied.first.weight, other.first.weight)


def test_a_batch_serves_layers_that_are_reached_late_or_are_frozen():
    model = apply_sigma_reparam(net(), batched=True)
    model.first(draw(2, 6))
    handed = reparam(model.second).handed
    assert handed is not None
    assert reparam(model.first).handed is None
    original = model.second.parametrizations.weight.original
    with torch.no_grad():
        original.add_(draw(6, 6, seed=4))
    v, u, sigma = reparam(model.second).estimate(original)
    same(sigma, sigma_of(original.detach()[None], v, u))
    model.second.eval()
    kept = reparam(model.second).u.clone()
    model.first(draw(2, 6))
    same(reparam(model.second).u, kept, atol=0)


def test_update_every_counts_training_passes():
    weight = draw(6, 6)
    found = SigmaReparam(weight, u_init="random", update_every=3, generator=generator(1))
    hats = [found(weight).detach() for _ in range(7)]
    vectors = found.u.clone()
    for micro in (1, 2, 4, 5):
        same(hats[micro], hats[micro - 1])
    assert not torch.allclose(hats[2], hats[3])
    found.eval()
    same(found(weight), found(weight), atol=0)
    same(found.u, vectors, atol=0)


COMPILED = """
import copy, torch
from torch import nn
from uncollapse.attention.sigma_reparam import apply_sigma_reparam

torch.manual_seed(0)
for batched, update_every, width in ((False, 1, 200), (True, 1, 6), (True, 2, 200), (False, 2, 6)):
    plain = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).double()
    model = apply_sigma_reparam(plain, batched=batched, update_every=update_every, u_init="random")
    other = copy.deepcopy(model)
    for one, call in ((model, model), (other, torch.compile(other, backend="aot_eager", fullgraph=True))):
        optimiser = torch.optim.SGD(one.parameters(), lr=0.01)
        for step in range(4):
            x = torch.randn(3, width, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimiser.zero_grad()
            call(x).square().sum().backward()
            optimiser.step()
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    torch.compiler.reset()
"""


def test_a_compiled_model_trains_the_same():
    """In a process of its own: what checks shapes at run time here is nothing that a compiler can trace."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_data_parallel_model_takes_two_forward_passes(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = apply_sigma_reparam(net(), u_init="random", generator=generator(1))
        other = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        (parallel(images(0)) - parallel(images(1))).square().sum().backward()
        (other(images(0)) - other(images(1))).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        same(a.grad, b.grad)
    same(reparam(model.first).u, reparam(other.first).u)


def test_checkpointed_activations_see_the_weight_of_their_forward_pass():
    layer = apply_sigma_reparam(linear(), u_init="random", generator=generator(2))
    other = copy.deepcopy(layer)
    x = draw(3, 7)
    checkpoint(lambda given: layer(given).tanh(), x, use_reentrant=False).sum().backward()
    other(x).tanh().sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        same(a.grad, b.grad)
    same(reparam(layer).u, reparam(other).u, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_hand
def test_autocast_leaves_power_iteration_in_full_precision(dtype, large, monkeypatch):
    monkeypatch.setattr(estimate, "_LARGE", large)
    layer = apply_sigma_reparam(linear().float(), u_init="random", generator=generator(2))
    other = copy.deepcopy(layer)
    x = draw(3, 7).float()
    with torch.autocast("cpu", dtype):
        out = layer(x)
        hat = layer.weight
        assert out.dtype == dtype
        out.float().sum().backward()
    assert hat.dtype == torch.float32
    other(x)
    same(hat, other.weight, atol=1e-6)
    same(reparam(other).u, reparam(layer).u, atol=1e-6)
    assert reparam(layer).gamma.grad.isfinite().all()


@by_hand
def test_half_precision_weights_keep_their_dtype(large, monkeypatch):
    monkeypatch.setattr(estimate, "_LARGE", large)
    model = apply_sigma_reparam(net().bfloat16())
    x = images().bfloat16()
    model(x).float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    norms = spectral_norms(model)["first.weight"]
    assert float(norms.norm) == pytest.approx(float(norms.gamma), rel=2e-2)


# ---- logging ---------------------------------------------------------------------------------------------------


def test_logged_numbers_are_apart_and_true():
    model = apply_sigma_reparam(net(), u_init="random", generator=generator(3))
    steps_of(model, 5)
    found = spectral_norms(model)
    assert set(found) == {"conv.weight", "first.weight", "second.weight", "head.weight"}
    for name, norms in found.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert reparam(layer).sigma.data_ptr() != reparam(layer).gamma.data_ptr()
        blocks = reparam(layer).blocks
        raw = layer.parametrizations.weight.original.detach().flatten(1)
        same(norms.raw, torch.stack([torch.linalg.matrix_norm(part, 2) for part in raw.chunk(blocks)]))
        hat = layer.eval().weight.detach().flatten(1)
        same(norms.norm, torch.stack([torch.linalg.matrix_norm(part, 2) for part in hat.chunk(blocks)]))
        same(norms.gap, norms.norm / norms.gamma)
        assert (norms.gap >= 1 - 1e-12).all()
        assert (norms.sigma <= norms.raw + 1e-12).all()
    assert found["conv.weight"].gamma.shape == (2,)


def test_tracking_changes_nothing():
    model, other = net(), track_sigma(net(), batched=True)
    for one in (model, other):
        steps_of(one)
    same(model(images()), other(images()))
    norms = spectral_norms(other)["first.weight"]
    assert norms.gamma is None
    same(norms.norm, norms.raw)
    assert float(reparam(other.first).sigma) == pytest.approx(float(norms.raw), rel=0.05)
    fuse(other)
    same(model(images()), other(images()))


# ---- conversion ------------------------------------------------------------------------------------------------


def test_layers_that_are_born_with_it():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = SigmaReparamLinear(400, 300, init_multiplier=0.5, dtype=F64)
        conv = SigmaReparamConv2d(4, 8, (3, 3), groups=2, sigma={"gamma_init": "one"}, dtype=F64)
    assert float(wide.parametrizations.weight.original.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not wide.bias.any()
    assert reparam(conv).blocks == 2
    assert reparam(conv).gamma.tolist() == [1, 1]
    assert conv(images()).shape == (3, 8, 3, 3)
    assert isinstance(fuse(conv), nn.Conv2d)


def test_each_group_of_a_convolution_has_its_norm():
    conv = apply_sigma_reparam(nn.Conv2d(4, 6, 3, groups=2).double(), gamma_init="one")
    for part in conv.weight.detach().flatten(1).chunk(2):
        assert float(torch.linalg.matrix_norm(part, 2)) == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 7}])
def test_multi_head_attention(options):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True, **options)}).double()
    attention = model["attn"]
    q, k, v = (
        draw(2, 5, 8),
        draw(2, 5, options.get("kdim", 8), seed=1),
        draw(2, 5, options.get("vdim", 8), seed=2),
    )
    before = attention(q, k, v)[0]
    apply_sigma_reparam(model, blocks=None if options else {"attn": 3})
    same(attention(q, k, v)[0], before)
    names = {"in_proj_weight"} if not options else {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    assert set(attention.parametrizations) == names
    if not options:
        assert reparam(attention, "in_proj_weight").gamma.shape == (3,)
    attention(q, k, v)[0].sum().backward()
    assert all(p.grad is not None for p in attention.parameters())
    same(fuse(model)["attn"](q, k, v)[0], before)


class Counted(SigmaReparam):
    """Counts its power steps."""

    def estimate(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = self.u.clone()
        found = super().estimate(weight)
        self.steps = getattr(self, "steps", 0) + (not torch.equal(before, self.u))
        return found


@pytest.mark.parametrize("update_every", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 7}])
def test_multi_head_attention_takes_one_step_a_pass(options, update_every, monkeypatch):
    monkeypatch.setattr(conversion, "SigmaReparam", Counted)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options).double()
    apply_sigma_reparam(attention, u_init="random", update_every=update_every, generator=generator(1))
    inputs = [draw(2, 5, options.get(width, 8), seed=1) for width in ("", "kdim", "vdim")]
    copied = copy.deepcopy(attention)
    for passes in range(1, 7):
        attention(*inputs)
        steps = {name: found[0].steps for name, found in attention.parametrizations.items()}
        steps["out_proj"] = reparam(attention.out_proj).steps
        assert set(steps.values()) == {-(-passes // update_every)}, passes
    weight = next(iter(attention.parametrizations))
    getattr(attention, weight)  # no pass
    assert reparam(attention, weight).steps == 6 // update_every
    checkpoint(lambda: attention(*inputs)[0], use_reentrant=False).sum().backward()
    assert reparam(attention, weight).steps == 6 // update_every + 1
    getattr(attention, weight)
    assert reparam(attention, weight).steps == 6 // update_every + 1
    before = reparam(copied, weight).u.clone()
    copied.eval()(*inputs)
    assert torch.equal(reparam(copied, weight).u, before)
    copied.train()(*inputs)
    assert reparam(copied, weight).steps == 1
    assert type(fuse(attention)) is nn.MultiheadAttention


def test_transformer_encoder_of_torch_with_and_without_norms():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).double()
    x, padding = draw(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    before = encoder(x)
    apply_sigma_reparam(encoder, blocks={"*.self_attn": 3})
    same(encoder(x), before)
    with torch.no_grad():
        same(encoder.eval()(x), before.detach())  # its fused path
    remove_norms(encoder)
    assert not [m for m in encoder.modules() if isinstance(m, nn.LayerNorm)]
    with torch.no_grad():
        wanted = encoder.train()(x, src_key_padding_mask=padding)
        same(encoder.eval()(x, src_key_padding_mask=padding), wanted, atol=1e-9)
    with pytest.raises(ConfigError, match="norm"):
        remove_norms(encoder)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_of_every_kind_are_removed(dims):
    batch, instance = (getattr(nn, f"{kind}Norm{dims}d") for kind in ("Batch", "Instance"))
    model = nn.Sequential(
        batch(4), instance(4, affine=True), instance(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)
    )
    remove_norms(model)
    assert all(type(layer) is NoNorm for layer in model)


def test_a_transposed_linear_layer_of_gpt2():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(5, 7).double()
    x = draw(3, 7)
    before = layer(x)
    same(apply_sigma_reparam(layer)(x), before)
    with pytest.raises(ConfigError, match="transposed"):
        apply_sigma_reparam(
            nn.ModuleDict({"attn": transformers.pytorch_utils.Conv1D(6, 6)}), blocks={"attn": 3}
        )


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "vocab_size": 20}
    config = transformers.LlamaConfig(**sizes, intermediate_size=12, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double()
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    with pytest.raises(ConfigError, match=r"lm_head is tied to model.embed_tokens.weight"):
        apply_sigma_reparam(model)
    apply_sigma_reparam(model, exclude=["lm_head"])
    same(model(ids).logits, before)
    assert len(spectral_norms(model)) == 7
    with AttentionEntropyMonitor(model) as monitor:
        model(ids, attention_mask=torch.ones_like(ids))
    assert set(monitor.entropy) == {"model.layers.0.self_attn"}
    remove_norms(fuse(model))
    assert not [name for name, _ in model.named_parameters() if "norm" in name]


def test_a_converted_model_is_saved_for_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "vocab_size": 20}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=12))
    apply_sigma_reparam(model, u_init="random", generator=generator()).eval()
    model.save_pretrained(tmp_path, state_dict=plain_state_dict(model.state_dict()))
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(6)[None]
    same(loaded(ids).logits, model(ids).logits, atol=1e-6)


def test_names_choose_layers():
    model = apply_sigma_reparam(net(), include=["first", "con*"], exclude=["conv"])
    assert [name for name, m in model.named_modules() if parametrize.is_parametrized(m)] == ["first"]
    nested = apply_sigma_reparam(nn.ModuleDict({"a": net(), "b": net()}), include=["a"], exclude=["a.head"])
    assert set(spectral_norms(nested)) == {"a.conv.weight", "a.first.weight", "a.second.weight"}
    for wrong in ({"include": ["nosuch*"]}, {"exclude": ["nosuch"]}, {"blocks": {"nosuch": 2}}):
        with pytest.raises(ConfigError, match="nosuch"):
            apply_sigma_reparam(net(), **wrong)


def test_new_weights_are_drawn_when_asked():
    model = nn.Linear(400, 300).double()
    apply_sigma_reparam(model, keep_weights=False, init_std=0.1, generator=generator())
    assert float(model.parametrizations.weight.original.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert not model.bias.any()
    attention = nn.MultiheadAttention(16, 2).double()
    apply_sigma_reparam(attention, keep_weights=False, gamma_init="one", generator=generator())
    assert float(attention.parametrizations.in_proj_weight.original.detach().std()) == pytest.approx(
        0.02, rel=0.1
    )
    with pytest.raises(ConfigError, match="keep_weights"):
        apply_sigma_reparam(net(), init_std=0.1)


def test_frozen_layers_stay_frozen():
    model = net()
    model.first.weight.requires_grad_(False)
    apply_sigma_reparam(model)
    model(images()).sum().backward()
    assert not reparam(model.first).gamma.requires_grad
    assert model.first.parametrizations.weight.original.grad is None


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def old_style() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3)))


def eight_bit() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer)


class QuantLinear(nn.Module):
    qweight = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (tied, "head is tied to embed.weight"),
        (eight_bit, "0 is quantised"),
        (lambda: nn.Sequential(QuantLinear(), nn.Linear(2, 2)), "0 is quantised"),
        (lambda: nn.Sequential(nn.LSTM(3, 3)), "0 is a layer of another kind .LSTM"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "ConvTranspose2d"),
        (lambda: nn.Sequential(nn.Bilinear(3, 3, 3)), "Bilinear"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0 is not initialised"),
        (lambda: nn.Sequential(nn.Linear(3, 3, device="meta")), "meta"),
        (lambda: nn.Sequential(spectral_norm(nn.Linear(3, 3))), "parametrised already ._SpectralNorm"),
        (lambda: apply_sigma_reparam(net()), "parametrised already ._*SigmaReparam|parametrised already"),
        (old_style, "without a weight of its own"),
        (lambda: nn.Sequential(nn.ReLU()), "nothing to convert; looked for Linear"),
    ],
)
def test_what_is_refused_by_name(model, words):
    with pytest.raises(ConfigError, match=words):
        apply_sigma_reparam(model())


def test_a_refusal_says_what_to_do_and_changes_nothing():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 3), "net": net()})
    with pytest.raises(ConfigError, match=r"exclude=\['lstm'\]"):
        apply_sigma_reparam(model)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    apply_sigma_reparam(model, exclude=["lstm"])
    shared = nn.Sequential(nn.Linear(3, 3))
    shared.append(shared[0])  # the same layer twice is one layer
    assert set(spectral_norms(apply_sigma_reparam(shared))) == {"0.weight"}


def test_bad_weights_and_options():
    for value, word in ((0.0, "zero"), (torch.nan, "not finite")):
        model = net()
        nn.init.constant_(model.second.weight, value)
        with pytest.raises(DataError, match=f"second.weight.*{word}"):
            apply_sigma_reparam(model)
        assert not parametrize.is_parametrized(model.first)
    weight = draw(4, 6)
    for wrong in (
        {"blocks": 3}, {"blocks": 0}, {"gamma_init": -1.0}, {"n_power_iterations": 0}, {"update_every": 0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            SigmaReparam(weight, **wrong)
    with pytest.raises(ConfigError, match="blocks"):
        apply_sigma_reparam(net(), blocks={"head": 2})
    for call in (fuse, spectral_norms):
        with pytest.raises(ConfigError, match="no layer"):
            call(net())
    doubled = apply_sigma_reparam(linear())
    parametrize.register_parametrization(doubled, "weight", nn.Identity())
    with pytest.raises(ConfigError, match="another"):
        fuse(doubled)


def test_repr_says_what_it_is():
    assert "5 x 7, blocks=1" in repr(SigmaTracker(draw(5, 7)))


# ---- the monitor -----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two attention layers, the second of which a factor sharpens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.sharp = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        return x + self.second(self.sharp * x, x, x, need_weights=False)[0]


def test_the_monitor_follows_heads_and_says_which_collapse():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pair().double()
    x = draw(2, 6, 8)
    with AttentionEntropyMonitor(model, window=3) as monitor:
        with pytest.raises(ConfigError, match="no attention"):
            monitor.collapsed()
        model(x)
        calm = monitor.scalars()
        assert monitor.collapsed() == []
        model.sharp = 1e4
        model(x)
        flags = monitor.collapsed()
        assert {(flag.layer, flag.head, flag.reason) for flag in flags} == {
            ("second", 0, "low"),
            ("second", 1, "low"),
        }
        assert all(flag.normalized < 0.05 < 0.8 < flag.highest for flag in flags)
        assert monitor.scalars()["attention/collapsed/frac"] == 0.5
        assert monitor.scalars()["attention/entropy/mean"] < calm["attention/entropy/mean"]
        model.sharp = 5.0
        for _ in range(3):
            model(x)
        assert monitor.passes == 5
        assert not [flag for flag in monitor.collapsed() if flag.reason == "low"]
        assert (monitor.lowest["second"] < 0.05).all()
        assert (monitor.lowest["first"] > 0.5).all()
        assert (monitor.normalized["second"] < monitor.normalized["first"]).all()
        assert monitor.entropy["first"].shape == (2,)
    model(x)
    assert monitor.passes == 5


class Checkpointed(Pair):
    """The same, attention computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_the_monitor_leaves_out_what_checkpointing_computes_again():
    x = draw(2, 6, 8).requires_grad_()
    scalars = []
    for kind in (Pair, Checkpointed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind().double()
        with AttentionEntropyMonitor(model) as monitor:
            for sharp in (
                1.0,
                1e4,
            ):  # the calls of a backward pass would be counted with the next forward pass
                model.sharp = sharp
                model(x).sum().backward()
        assert monitor.passes == 2
        scalars.append(monitor.scalars())
    assert scalars[0] == scalars[1]
    assert scalars[1]["attention/collapsed/frac"] == 0.5


def test_the_monitor_sees_padding_however_the_mask_is_given():
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x, padding = draw(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    found = []
    for call in (
        lambda: attention(x, x, x, padding),
        lambda: attention(x, x, x, key_padding_mask=padding),
        lambda: attention(x, x, x),
    ):
        with AttentionEntropyMonitor(attention) as monitor:
            call()
        found.append(monitor.scalars()["attention/entropy/mean"])
    assert found[0] == found[1] != found[2]


def test_the_monitor_goes_on_after_a_pass_without_a_row_of_two_keys():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pair().double()
    x = draw(2, 6, 8)
    with AttentionEntropyMonitor(model) as monitor:
        model(x)
        calm = monitor.normalized
        model(x[:, :1])
        assert math.isnan(monitor.scalars()["attention/normalized_entropy/min"])
        assert monitor.scalars()["attention/entropy/mean"] == 0
        assert monitor.collapsed() == []
        assert all(torch.equal(monitor.normalized[layer], calm[layer]) for layer in calm)
        assert all(torch.equal(monitor.lowest[layer], calm[layer]) for layer in calm)
        same(monitor.entropy["first"], calm["first"] * math.log(6) / 2)
        model.sharp = 5.0
        model(x)
        flags = monitor.collapsed()
        assert {(flag.layer, flag.reason) for flag in flags} == {("second", "drop")}
        assert all(flag.highest == float(calm["second"][flag.head]) for flag in flags)


def test_the_monitor_counts_attention_that_is_not_finite():
    model, x = Pair().double(), draw(2, 6, 8)
    with AttentionEntropyMonitor(model) as monitor:
        model(x)
        assert monitor.scalars()["attention/nonfinite/frac"] == 0
        x[1] = torch.nan
        model(x)
        one = monitor.scalars()
        assert one["attention/nonfinite/frac"] == 0.5
        assert math.isfinite(one["attention/entropy/mean"])
        model(x * torch.nan)
        two = monitor.scalars()
        assert two["attention/nonfinite/frac"] == 1
        assert math.isnan(two["attention/normalized_entropy/mean"])
        assert all(value.isfinite().all() for value in monitor.normalized.values())
        assert monitor.collapsed() == []


def test_a_pass_that_fails_is_not_counted_with_the_next():
    model, x = Pair().double(), draw(2, 6, 8)
    with AttentionEntropyMonitor(model) as monitor:
        model(x)
        calm = monitor.scalars()
        model.sharp = 1e4
        stop = model.register_forward_hook(lambda *rest: 1 / 0, prepend=True)
        with pytest.raises(ZeroDivisionError):
            model(x)
        stop.remove()
        model.sharp = 1.0
        model(x)
        assert monitor.scalars() == calm


def test_the_monitor_sees_a_drop_and_skips_passes():
    model = Pair().double()
    with AttentionEntropyMonitor(model, threshold=0.0, drop=0.3, every=2) as monitor:
        for sharp in (1.0, 1e4, 1e3):
            model.sharp = sharp
            model(draw(2, 6, 8))
        assert {(flag.layer, flag.reason) for flag in monitor.collapsed()} == {("second", "drop")}
        assert [known.tolist() for known in monitor._known.values()] == [[[2, 2], [2, 2]]] * 2
    for wrong in ({"threshold": 2.0}, {"drop": 0.0}, {"window": 1}, {"every": 0}):
        with pytest.raises(ConfigError, match="AttentionEntropyMonitor"):
            AttentionEntropyMonitor(model, **wrong)
