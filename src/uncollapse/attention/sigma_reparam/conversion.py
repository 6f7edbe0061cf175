"""sigmaReparam for a whole model: put on, taken off, and what it refuses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from uncollapse.attention.sigma_reparam.batch import PowerBatch
from uncollapse.attention.sigma_reparam.checkpoints import parametrised
from uncollapse.attention.sigma_reparam.estimate import Start
from uncollapse.attention.sigma_reparam.layers import INIT_STD, attach, initialise
from uncollapse.attention.sigma_reparam.parametrization import GammaInit, SigmaReparam, SigmaTracker
from uncollapse.attention.sigma_reparam.selection import Site, sites_of
from uncollapse.errors import ConfigError, DataError


def apply_sigma_reparam(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    gamma_init: GammaInit = "spectral",
    keep_weights: bool = True,
    init_std: float | None = None,
    blocks: Mapping[str, int] | None = None,
    u_init: Start = "svd",
    n_power_iterations: int = 1,
    update_every: int = 1,
    batched: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put sigmaReparam on every linear and convolutional layer of a model, in place, and return the model.

    Linear layers, convolutions (each group of one has its own norm), the projections that `nn.MultiheadAttention`
    holds itself, and the transposed linear layer `Conv1D` of GPT-2. Not embeddings and not bare parameters of other
    modules. Nothing is changed if a layer is refused. Make the optimiser afterwards: there are new parameters.

    Args:
        include: patterns of layer names (`*`, `?`); one that names a module takes everything in it.
        exclude: patterns of what to leave alone, among the included.
        gamma_init: "spectral" (the function stays as it is), "one", or a number.
        keep_weights: False draws weights anew, normal with `init_std`, zero biases, as the official conversion does.
        init_std: 0.02 if not given; only for weights that are drawn anew.
        blocks: norms per layer, by pattern: `{"*.attn.qkv": 3, "*.self_attn": 3}` gives queries, keys and values their own.
        u_init, n_power_iterations, update_every: see `SigmaTracker`.
        batched: take the power steps of layers of one shape together: fewer calls, more copying; see `PowerBatch`.

    Raises:
        ConfigError: tied weights, quantised or odd layers among the included (names them), no layer to convert, a
            pattern that no layer matches, or an option out of range.
        DataError: a weight that is zero or not finite (names the layer).
    """
    if keep_weights and init_std is not None:
        raise ConfigError("apply_sigma_reparam: init_std is for new weights; give keep_weights=False with it")
    sites = sites_of(model, include, exclude, blocks or {})
    if not keep_weights:
        for layer in {id(site.layer): site.layer for site in sites}.values():
            initialise(layer, INIT_STD if init_std is None else init_std, generator)

    def reparam(site: Site) -> SigmaTracker:
        return SigmaReparam(
            site.weight,
            gamma_init=gamma_init,
            blocks=site.blocks,
            u_init=u_init,
            n_power_iterations=n_power_iterations,
            update_every=update_every,
            generator=generator,
        )

    return _converted(model, sites, reparam, batched=batched)


def track_sigma(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    blocks: Mapping[str, int] | None = None,
    update_every: int = 1,
    batched: bool = False,
) -> nn.Module:
    """Follow the spectral norms of a model's layers during training without changing it (official `stats_only`).

    Arguments and errors as in `apply_sigma_reparam`; read the norms with `spectral_norms`, take it off with `fuse`.
    """
    sites = sites_of(model, include, exclude, blocks or {})

    def tracker(site: Site) -> SigmaTracker:
        return SigmaTracker(site.weight, blocks=site.blocks, update_every=update_every)

    return _converted(model, sites, tracker, batched=batched)


def _converted(
    model: nn.Module, sites: Sequence[Site], make: Callable[[Site], SigmaTracker], *, batched: bool
) -> nn.Module:
    made = []
    for site in sites:
        try:
            made.append(make(site).train(model.training))
        except DataError as error:
            raise DataError(f"{site.layer_name or type(site.layer).__name__}.{site.name}: {error}") from error
    for site, tracker in zip(sites, made, strict=True):
        attach(site.layer, site.name, tracker)
    if batched:
        alike, new = defaultdict(list), {id(tracker) for tracker in made}
        for _, _, tracker, found in _parametrised(model):
            if id(tracker) in new:
                kind = tracker.v.shape[1], tracker.u.shape[1], found.original.dtype, found.original.device
                alike[kind].append((tracker, found))
        for members in alike.values():
            if len(members) > 1:
                PowerBatch(members)
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Take sigmaReparam off again, in place: plain layers whose weight is W_hat, with the same output in evaluation.

    Parameters of weights stay the same objects. Returns the model.

    Raises:
        ConfigError: nothing to take off, or another parametrisation on top.
    """
    found = list(_parametrised(model))
    if not found:
        raise ConfigError("fuse: this model has no layer with sigmaReparam; apply_sigma_reparam puts it on")
    for name, _, _, stack in found:
        if len(stack) > 1:
            raise ConfigError(f"fuse: {name} has another parametrisation too; remove that first")
    for full, layer, tracker, _ in found:
        name = full.rpartition(".")[2]
        tracker.eval()
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return model


@dataclass(frozen=True)
class SpectralNorms:
    """Norms of one weight, of each block; computed, not logged, so that none can overwrite another.

    Attributes:
        gamma: what the norm of W_hat is meant to be; None where norms are only tracked.
        sigma: estimate of the norm of W by power iteration, what W is divided by in an evaluation pass.
        raw: the norm of W, exact.
        norm: the norm of the weight that the layer computes with, exact.
    """

    gamma: Tensor | None
    sigma: Tensor
    raw: Tensor
    norm: Tensor

    @property
    def gap(self) -> Tensor:
        """norm / gamma, raw / sigma: at least 1, by how much power iteration lags behind."""
        return self.raw / self.sigma


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, SpectralNorms]:
    """The norms of every converted or tracked weight, by its name; takes a singular value decomposition for each.

    Raises:
        ConfigError: a model without any.
    """
    norms = {}
    for name, _, tracker, found in _parametrised(model):
        sigma, raw = tracker.norms(found.original)
        gamma = tracker.gamma.detach().clone() if isinstance(tracker, SigmaReparam) else None
        norm = raw if gamma is None else gamma * raw / sigma
        norms[name] = SpectralNorms(gamma, sigma, raw, norm)
    if not norms:
        raise ConfigError("spectral_norms: this model has no layer with sigmaReparam or track_sigma")
    return norms


def _parametrised(model: nn.Module) -> Iterator[tuple[str, nn.Module, SigmaTracker, ParametrizationList]]:
    """Every converted weight: its name in the model, its layer, and what computes it."""
    for layer_name, layer in model.named_modules():
        for name, tracker, found in parametrised(layer):
            yield f"{layer_name}.{name}".lstrip("."), layer, tracker, found
