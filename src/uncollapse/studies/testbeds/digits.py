"""Handwritten digits: the 1,797 real images of 8 x 8 pixels that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError


@dataclass(frozen=True)
class Digits:
    """Training and test images, pixels from 0 to 1, with their classes 0 to 9."""

    train: Float[Tensor, "row 8 8"]
    train_class: Int[Tensor, " row"]
    test: Float[Tensor, "test 8 8"]
    test_class: Int[Tensor, " test"]

    def of_counts(self, counts: tuple[int, ...], seed: int) -> Digits:
        """Training images cut down to `counts[k]` of class k, chosen by `seed`.

        Raises:
            ConfigError: more images of a class than there are.
        """
        generator = torch.Generator().manual_seed(seed)
        kept = []
        for k, count in enumerate(counts):
            rows = (self.train_class == k).nonzero()[:, 0]
            if count > len(rows):
                raise ConfigError(f"digits: {count} images of class {k} asked for, there are {len(rows)}")
            kept.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
        index = torch.cat(kept)
        return Digits(self.train[index], self.train_class[index], self.test, self.test_class)


def digits(seed: int = 0, *, test: int = 360, dtype: torch.dtype = torch.float32) -> Digits:
    """All digits, `test` of them held out by a shuffle with `seed`.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the digits come with scikit-learn; pip install 'uncollapse[science]'") from error
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(found.images, dtype=dtype)[order] / 16
    classes = torch.as_tensor(found.target, dtype=torch.long)[order]
    return Digits(images[test:], classes[test:], images[:test], classes[:test])
