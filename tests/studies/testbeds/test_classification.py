"""Digits, hierarchies of Gaussians and the text of the standard library."""

from __future__ import annotations

import pytest
import torch

from uncollapse.errors import ConfigError, DataError
from uncollapse.studies.testbeds.digits import digits
from uncollapse.studies.testbeds.hierarchy import Hierarchy
from uncollapse.studies.testbeds.text import source_bytes


def test_digits_are_split_without_overlap_and_cut_to_counts():
    data = digits(3)
    assert data.train.shape == (1437, 8, 8)
    assert data.test.shape == (360, 8, 8)
    assert data.train.min() == 0
    assert data.train.max() == 1
    few = data.of_counts((3, 1, *[0] * 8), seed=0)
    assert few.train_class.tolist() == [0, 0, 0, 1]
    assert len(few.test) == 360
    with pytest.raises(ConfigError, match="class 2"):
        data.of_counts((0, 0, 1000), seed=0)


def test_siblings_are_closer_than_cousins():
    world = Hierarchy.make(0)
    x, y = world.draw(20000, torch.Generator().manual_seed(1))
    assert world.classes == 100
    assert x.shape == (20000, 64)
    assert y.unique().numel() == 100
    distance = torch.cdist(world.centres, world.centres)
    family = torch.arange(100) // 4
    same = (family[:, None] == family) & ~torch.eye(100, dtype=torch.bool)
    assert distance[same].mean() < 0.7 * distance[family[:, None] != family].mean()
    torch.testing.assert_close((x - world.centres[y]).std(), torch.tensor(1.0), atol=0.01, rtol=0)


def test_text_is_bytes_of_other_modules_for_training_than_held_out():
    train, held_out = source_bytes(100_000, 20_000)
    assert len(train) == 100_000
    assert len(held_out) == 20_000
    assert bytes(train[:300].tolist()).isascii()
    assert not torch.equal(train[:20_000], held_out)
    with pytest.raises(DataError, match="bytes"):
        source_bytes(10**10, 1)
