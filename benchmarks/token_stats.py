"""Log-prob and differentiable entropy from an LM head, forward and backward, against TRL and verl."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Goal
from uncollapse.measure.statistics import Entropy, Logp
from uncollapse.measure.token_stats import token_stats

SUMMARY = (
    "`token_stats` against TRL's `selective_log_softmax` + `entropy_from_logits` on full logits, TRL's chunked LM head "
    "and verl's fused linear head (torch version). TRL calls the first on (batch, time, vocabulary); *flat* is the same "
    "code on (tokens, vocabulary), where its loop over rows runs over tokens and stays in the caches. "
    "Log-probability and entropy both carry gradient; hidden states and "
    "the LM head both receive one. *bare products* is the time of the four matrix products that recomputing needs."
)
ROWS, TIME, D, V = 8, 256, 576, 49152
TRL_FULL, TRL_FLAT, TRL_CHUNKED = "TRL full logits", "TRL full logits, flat", "TRL chunked head"
VERL, BARE = "verl fused linear", "bare products"
PEERS = (TRL_FULL, TRL_FLAT, TRL_CHUNKED, VERL)
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    out = token_stats(hidden, token, weight=weight)
    return out[Logp()], out[Entropy()]


def trl_heads() -> dict[str, Head]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, entropy_from_logits, selective_log_softmax

    def flat(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.t()
        return selective_log_softmax(logits, token), entropy_from_logits(logits)

    def full(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = flat(hidden.unflatten(0, (ROWS, -1)), weight, token.unflatten(0, (ROWS, -1)))
        return logp.flatten(), entropy.flatten()

    def chunked(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        size = _CHUNKED_LOGPROB_CHUNK_SIZE
        return ChunkedLogProbFunction.apply(hidden, weight, None, token, 1.0, size, None, 1.0, ("entropy",))[
            :2
        ]

    return {TRL_FULL: full, TRL_FLAT: flat, TRL_CHUNKED: chunked}


def verl_head() -> Head:
    """verl's own module, loaded by its file: importing the package would pull in Ray."""
    package = importlib.util.find_spec("verl")
    if package is None or not package.submodule_search_locations:
        raise ImportError("verl is not installed (pip install --no-deps verl==0.9.1)")
    path = Path(package.submodule_search_locations[0], "utils", "experimental", "torch_functional.py")
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"this verl has no {path.name}")
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    head = module.FusedLinearForPPO()
    return lambda hidden, weight, token: head(hidden, weight, token)


def heads() -> tuple[dict[str, Head], dict[str, str]]:
    """Everyone present, and why the others are absent."""
    present: dict[str, Head] = {OURS: ours}
    absent = {}
    for name, load in {"TRL": trl_heads, VERL: lambda: {VERL: verl_head()}}.items():
        try:
            present |= load()
        except ImportError as error:
            absent[name] = str(error)
    return present, absent


class Problem:
    """Inputs with logits as spread as a language model's, and fixed incoming gradients."""

    def __init__(self, n: int, d: int, v: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(n, d, generator=g)
        self.weight = torch.randn(v, d, generator=g) * (3 / d**0.5)
        self.token = torch.randint(0, v, (n,), generator=g)
        self.of_logp, self.of_entropy = torch.randn(2, n, generator=g)

    def run(self, head: Head) -> dict[str, Tensor]:
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.detach().requires_grad_()
        logp, entropy = head(hidden, weight, self.token)
        torch.autograd.backward([logp, entropy], [self.of_logp, self.of_entropy])
        assert hidden.grad is not None
        assert weight.grad is not None
        return {
            "logp": logp.detach(),
            "entropy": entropy.detach(),
            "grad_hidden": hidden.grad,
            "grad_weight": weight.grad,
        }

    def bare(self) -> None:
        logits = self.hidden @ self.weight.t()
        torch.mm(self.hidden, self.weight.t(), out=logits)  # no second allocation: as lean as it can be
        logits @ self.weight
        logits.t() @ self.hidden


def difference(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest absolute difference over the largest value, of values and gradients."""
    worst = 0.0
    for name, value in theirs.items():
        torch.testing.assert_close(
            mine[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=name
        )
        worst = max(worst, ((mine[name] - value).abs().max() / value.abs().max()).item())
    return worst


def fastest_peer(rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    peers = [row["time_over_ours"] for name, row in rows.items() if name in PEERS]
    return min(peers) if peers else None


def memory_share(rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    full = rows.get(TRL_FULL)
    return None if full is None else rows[OURS]["extra_peak_mb"] / full["extra_peak_mb"]


def case() -> Case:
    """The input at full size, and a small one to warm libraries up."""
    present, absent = heads()
    problem, small = Problem(ROWS * TIME, D, V), Problem(64, 32, 256)

    def check() -> dict[str, float]:
        mine = problem.run(ours)
        return {name: difference(mine, problem.run(head)) for name, head in present.items() if name != OURS}

    def on(which: Problem) -> dict[str, Callable[[], Any]]:
        return {name: (lambda head=head: which.run(head)) for name, head in present.items()} | {
            BARE: which.bare
        }

    return Case(
        size=f"{ROWS} x {TIME} tokens, d={D}, V={V}, float32",
        contestants=on(problem),
        warm_up=on(small),
        check=check,
        absent=absent,
        versions=("torch", "trl", "verl", "transformers"),
        goals=(
            Goal("time of the fastest peer over ours", fastest_peer, 1.15, True),
            Goal(
                "our time over that of the four bare products",
                lambda r: 1 / r[BARE]["time_over_ours"],
                1.15,
                False,
            ),
            Goal("our extra peak memory over that of TRL on full logits", memory_share, 0.1, False),
        ),
    )
