"""A transformer small enough to train a few hundred times, for images and for text, in every arm of the study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from uncollapse.measure.attention import attention_entropy


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer: width, heads, layers, tokens."""

    width: int = 32
    heads: int = 4
    layers: int = 6
    tokens: int = 16


@dataclass(frozen=True)
class Trunk:
    """What an arm changes in the trunk: layer norms before each part, layer norms on queries and keys, capped logits."""

    pre_norm: bool = False
    qk_norm: bool = False
    softcap: float | None = None


class Attention(nn.Module):
    """Multi-head attention with its logits written out; keeps their entropy (nats) where it is asked to."""

    def __init__(self, shape: Shape, trunk: Trunk, causal: bool) -> None:
        super().__init__()
        self.heads, self.softcap = shape.heads, trunk.softcap
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        head = shape.width // shape.heads
        self.q_norm, self.k_norm = (nn.LayerNorm(head) if trunk.qk_norm else nn.Identity() for _ in range(2))
        self.mask: Bool[Tensor, "query key"] | None = None
        if causal:
            self.mask = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril()
        self.watched = False
        self.entropy: float = torch.nan

    def forward(self, x: Float[Tensor, "row token width"]) -> Float[Tensor, "row token width"]:
        """Attend."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = self.q_norm(q) @ self.k_norm(k).mT * q.shape[-1] ** -0.5
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.watched:
            mask = None if self.mask is None else self.mask[None, None]
            self.entropy = float(attention_entropy(logits=logits.detach(), mask=mask).mean())
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask, -torch.inf)
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Residual trunk without norms, unless the arm has them; `embed` and `head` are the task's."""

    def __init__(
        self, shape: Shape, trunk: Trunk, embed: nn.Module, outputs: int, *, causal: bool, pooled: bool
    ) -> None:
        super().__init__()
        self.embed, self.pooled = embed, pooled
        self.place = nn.Parameter(torch.empty(shape.tokens, shape.width))
        self.attention = nn.ModuleList(Attention(shape, trunk, causal) for _ in range(shape.layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(
                nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
            )
            for _ in range(shape.layers)
        )
        norms = [
            nn.LayerNorm(shape.width) if trunk.pre_norm else nn.Identity()
            for _ in range(2 * shape.layers + 1)
        ]
        self.norms = nn.ModuleList(norms)
        self.head = nn.Linear(shape.width, outputs)

    def draw(self, generator: torch.Generator) -> None:
        """Weights as PyTorch draws them (uniform, up to 1/sqrt(inputs)), tokens and places normal, zero biases; norms stay.

        The official 0.02 is made for widths of hundreds: at 32 it is a fifth of this, and nets without norms do not start.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        nn.init.normal_(self.place, generator=generator)

    def forward(self, x: Tensor) -> Float[Tensor, "row ..."]:
        """Logits of each row, or of each of its tokens."""
        x = self.embed(x) + self.place
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * layer](x))
            x = x + mlp(self.norms[2 * layer + 1](x))
        x = self.norms[-1](x)
        return self.head(x.mean(1) if self.pooled else x)

    def entropy(self, batch: Tensor) -> float:
        """Attention entropy on a batch, mean over layers, heads and rows, in nats."""
        watched = [module for module in self.attention if isinstance(module, Attention)]
        for module in watched:
            module.watched = True
        was = self.training
        with torch.no_grad():
            self.eval()(batch)
        self.train(was)
        for module in watched:
            module.watched = False
        return sum(module.entropy for module in watched) / len(watched)


def patches(images: Float[Tensor, "row 8 8"]) -> Float[Tensor, "row 16 4"]:
    """The 16 patches of 2 x 2 pixels of each image."""
    return images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)


@dataclass(frozen=True)
class Task:
    """Data and net of a domain: `batch` draws inputs and targets, `build` the net of a trunk, `held_out` is measured.

    `floor` is a loss that no learning is needed for.
    """

    shape: Shape
    build: Callable[[Trunk], Transformer]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    floor: float


def digits_task(shape: Shape, rows: int, seed: int) -> Task:
    """Ten classes of real digits, as 16 patches."""
    from uncollapse.studies.testbeds.digits import digits

    data = digits(seed)
    spread = data.train.std()
    inputs, classes = patches(data.train / spread), data.train_class

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(inputs), (rows,), generator=generator)
        return inputs[index], classes[index]

    def build(trunk: Trunk) -> Transformer:
        return Transformer(shape, trunk, nn.Linear(4, shape.width), 10, causal=False, pooled=True)

    return Task(
        shape,
        build,
        batch,
        (patches(data.test / spread), data.test_class),
        torch.log(torch.tensor(10.0)).item(),
    )


def text_task(shape: Shape, rows: int, seed: int, *, train: int = 1_000_000, held_out: int = 32) -> Task:
    """The next byte of the standard library's sources; `held_out` windows of other modules are measured."""
    from uncollapse.studies.testbeds.text import source_bytes

    text, other = source_bytes(train, 200_000)
    counts = torch.bincount(text, minlength=256).double()
    unigram = torch.special.entr(counts / counts.sum()).sum().item()

    def windows(data: Int[Tensor, " byte"], start: Int[Tensor, " row"]) -> tuple[Tensor, Tensor]:
        index = start[:, None] + torch.arange(shape.tokens + 1)
        return data[index[:, :-1]], data[index[:, 1:]]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return windows(text, torch.randint(len(text) - shape.tokens - 1, (rows,), generator=generator))

    def build(trunk: Trunk) -> Transformer:
        return Transformer(shape, trunk, nn.Embedding(256, shape.width), 256, causal=True, pooled=False)

    start = torch.randint(
        len(other) - shape.tokens - 1, (held_out,), generator=torch.Generator().manual_seed(seed)
    )
    return Task(shape, build, batch, windows(other, start), unigram)


def loss_of(logits: Float[Tensor, "*row outcome"], target: Int[Tensor, "*row"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, nats."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())
