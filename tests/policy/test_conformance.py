"""One recipe, one loss: the same value and gradient at any split, row order and padding.

Recipes that decide per micro-batch, for parity with released code, are marked: for them the split is fixed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from lab import loss_and_gradient, moved_on, prepared

from uncollapse.policy.batch import Batch, _pad
from uncollapse.policy.registry import recipe, recipes


def padded(batch: Batch, extra: int) -> Batch:
    """The batch with masked columns appended, filled with what must never matter."""
    time = batch.mask.shape[1] + extra

    def grow(value):
        return (
            _pad(value, time)
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] > 1
            else value
        )

    return replace(
        batch,
        mask=_pad(batch.mask, time),
        columns={name: grow(value) for name, value in batch.columns.items()},
        stats={stat: _pad(value, time) for stat, value in batch.stats.items()},
    )


@pytest.mark.parametrize("name", recipes())
@given(seed=st.integers(0, 1000), pieces=st.integers(1, 7), extra=st.integers(0, 3))
@settings(max_examples=8)
def test_split_order_and_padding_change_nothing(name, seed, pieces, extra):
    method = recipe(name)
    engine, batch = prepared(method, seed=seed % 5)
    moved_on(engine.policy)
    loss, gradient = loss_and_gradient(engine, method, batch, [torch.arange(len(batch))])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch), generator=generator)
    other = padded(batch[order], extra)
    splits = torch.arange(len(batch)).chunk(1 if method.split_dependent else pieces)
    again, regained = loss_and_gradient(engine, method, other, splits)
    assert again == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(regained, gradient, rtol=0, atol=1e-12)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", recipes())
def test_an_all_masked_batch_has_zero_loss_and_gradient(name):
    method = recipe(name)
    engine, batch = prepared(method)
    empty = replace(batch, mask=torch.zeros_like(batch.mask))
    loss, gradient = loss_and_gradient(engine, method, empty, [torch.arange(len(batch))])
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", recipes())
@pytest.mark.filterwarnings("ignore:.*NaN")
def test_nan_rewards_leave_the_loss(name):
    method = recipe(name)
    engine, batch = prepared(method)
    nan = batch.reward.clone()
    nan[::3] = torch.nan
    raw = {
        k: v for k, v in batch.columns.items() if k not in ("advantage", "keep", "weight") and "/" not in k
    }
    fresh = method.prepare(replace(batch, columns={**raw, "reward": nan}))
    assert not fresh.mask[::3].any()
    loss, gradient = loss_and_gradient(engine, method, fresh, [torch.arange(len(batch))])
    assert torch.isfinite(gradient).all()
    assert loss == loss
