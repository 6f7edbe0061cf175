"""Digits under shifts: streams of corrupted test images, in random or class order, and small classifiers of clean ones.

The images of `digits`, upsampled to 16 x 16. A stream is what a deployed classifier meets: batches without labels, from
another distribution than it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, interpolate, pad

from uncollapse.studies.testbeds.digits import digits

SIDE = 16
Images = Float[Tensor, "image 1 16 16"]
Kind = Literal["conv", "mlp"]
Order = Literal["mixed", "by class"]


def noise(images: Images, severity: float, generator: torch.Generator) -> Images:
    """White noise of deviation `severity`."""
    return images + severity * torch.randn(images.shape, generator=generator)


def blur(images: Images, severity: float, generator: torch.Generator) -> Images:
    """A Gaussian blur, `severity` pixels wide, and a little noise."""
    reach = math.ceil(3 * severity)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / severity).square())
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    return noise(conv2d(pad(images, [reach] * 4), kernel), 0.05, generator)


def background(images: Images, severity: float, generator: torch.Generator) -> Images:
    """Half the contrast on a ramp from 0 to `severity`, in a random direction for each image."""
    angle = 2 * math.pi * torch.rand(len(images), 1, 1, 1, generator=generator)
    across = torch.linspace(-0.5, 0.5, SIDE)
    ramp = angle.cos() * across + angle.sin() * across[:, None]
    return 0.5 * images + severity * (0.5 + ramp)


CORRUPTIONS: dict[str, Callable[[Images, float, torch.Generator], Images]] = {
    "noise": noise,
    "blur": blur,
    "background": background,
}


@dataclass(frozen=True)
class ShiftedDigits:
    """Clean training images, clean test images and their classes."""

    train: Float[Tensor, "row 1 16 16"]
    train_class: Int[Tensor, " row"]
    test: Float[Tensor, "test 1 16 16"]
    test_class: Int[Tensor, " test"]

    @classmethod
    def make(cls, seed: int, *, test: int = 900) -> ShiftedDigits:
        """Half of the digits for training, half for the stream, split by `seed`."""
        found = digits(seed, test=test)

        def larger(images: Float[Tensor, "image 8 8"]) -> Images:
            return interpolate(images[:, None], size=SIDE, mode="bilinear", align_corners=False)

        return cls(larger(found.train), found.train_class, larger(found.test), found.test_class)

    def stream(
        self, severity: Mapping[str, float], order: Order, seed: int, *, passes: int = 1
    ) -> tuple[Images, Int[Tensor, " image"]]:
        """`passes` rounds through the test images, each corrupted and ordered anew.

        Args:
            severity: of each corruption that occurs; of several, each image gets one at random.
            order: `mixed`, random; `by class`, all images of one class after the other, the classes in random order.
            seed: of order and corruptions.
            passes: rounds.
        """
        generator = torch.Generator().manual_seed(seed)
        images, classes = [], []
        for _ in range(passes):
            rows = torch.randperm(len(self.test), generator=generator)
            if order == "by class":
                rank = torch.randperm(10, generator=generator)
                rows = rows[rank[self.test_class[rows]].argsort(stable=True)]
            kinds = [
                CORRUPTIONS[name](self.test[rows], amount, generator) for name, amount in severity.items()
            ]
            drawn = torch.randint(len(kinds), (len(rows),), generator=generator)
            images.append(torch.stack(kinds)[drawn, torch.arange(len(rows))])
            classes.append(self.test_class[rows])
        return torch.cat(images), torch.cat(classes)


def classifier(kind: Kind, seed: int) -> nn.Sequential:
    """Three layers with a norm each: convolutions of 8, 16, 32 channels with GroupNorm, or 96 units with LayerNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "mlp":
            layers: list[nn.Module] = [nn.Flatten()]
            for width in (SIDE * SIDE, 96, 96):
                layers += [nn.Linear(width, 96), nn.LayerNorm(96), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(96, 10))
        layers = []
        for before, after in ((1, 8), (8, 16), (16, 32)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.GroupNorm(4, after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, 10))


def trained(kind: Kind, data: ShiftedDigits, seed: int, *, epochs: int = 20) -> nn.Sequential:
    """A classifier of clean digits: Adam, learning rate 3e-3, batches of 64."""
    net = classifier(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(net(data.train[rows]), data.train_class[rows]).backward()
            optimizer.step()
    return net.eval()
