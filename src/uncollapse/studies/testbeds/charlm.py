"""The character-LM lab: a language model small enough to train in seconds that thinks before it answers, and wastefully.

The task is the running maximum: the prompt `a+b+c+d=` wants the largest digit. A response writes the running maxima
`s;s;s;`, re-checks them any number of times (`?s;s;s;`), ends its thinking (`!`), gives the answer and stops (`$`). The
supervised traces re-check 0 to 3 times without need and make errors, so the warmed-up model is right about four
times in five, too long, and has entropy to lose. Shortest response for four digits: 9 tokens, longest: 30.

The model is a plain decoder (2 layers, width 64, 4 heads, about 0.1 M parameters) from token ids, 17 with the padding,
to logits of the 16 others; rows may be padded on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from uncollapse.errors import DataError
from uncollapse.studies.testbeds.drawing import Given, draw_token

ALPHABET = "0123456789+=;?!$_"
"""Characters by id: digits, `+`, `=`, `;`, re-check, end of thinking, end of text, padding."""
SEMICOLON, RECHECK, END_OF_THINK, EOS, PAD = (ALPHABET.index(c) for c in ";?!$_")

MAX_CHECKS = 3
ERROR_RATE = 0.08
WARM_UP_STEPS = 220

_CONTEXT = 128
_Cache = list[tuple[Tensor, Tensor]]


class CharLM(nn.Module):
    """Decoder from ids to next-token logits; learned positions counted from the first token that is no padding."""

    def __init__(self, layers: int = 2, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Embedding(_CONTEXT, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PAD, bias=False)  # padding, the last character, is never predicted

    def forward(self, ids: Int[Tensor, "row time"]) -> Float[Tensor, "row time vocab"]:
        """Logits of the token after each position."""
        return self.extend(ids, ids != PAD, None)[0]

    def extend(
        self, ids: Int[Tensor, "row new"], seen: Bool[Tensor, "row time"], cache: _Cache | None
    ) -> tuple[Float[Tensor, "row new vocab"], _Cache]:
        """Logits of the `new` last positions, given keys and values of the earlier ones; `seen` marks real tokens."""
        new, total = ids.shape[1], seen.shape[1]
        if total > _CONTEXT:
            raise DataError(
                f"{total} tokens exceed the {_CONTEXT} positions of the character model; shorten the rows"
            )
        place = (seen.cumsum(1) - 1).clamp(min=0)[:, -new:]
        query = torch.arange(total - new, total, device=ids.device)[:, None]
        key = torch.arange(total, device=ids.device)[None, :]
        # a padded query sees itself, since a softmax over nothing is NaN
        visible = ((key <= query) & seen[:, None, :]) | (key == query)
        x = self.token(ids) + self.position(place)
        grown: _Cache = []
        for index, block in enumerate(self.blocks):
            x, kept = block(x, visible[:, None], None if cache is None else cache[index])
            grown.append(kept)
        return self.head(self.norm(x)), grown


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, visible: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows, new, width = x.shape
        q, k, v = self.qkv(self.norm_a(x)).view(rows, new, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, new, width))
        return x + self.down(F.gelu(self.up(self.norm_b(x)))), (k, v)


# ---- task ------------------------------------------------------------------------------------------------------


def make_prompts(
    generator: torch.Generator, count: int, *, digits: tuple[int, int] = (4, 4)
) -> list[tuple[int, ...]]:
    """Prompts `a+b+...=` as token ids, with a number of digits drawn uniformly from the closed range `digits`."""
    sizes = torch.randint(digits[0], digits[1] + 1, (count,), generator=generator).tolist()
    values = torch.randint(0, 10, (count, digits[1]), generator=generator).tolist()
    return [encode("+".join(map(str, row[:size])) + "=") for row, size in zip(values, sizes, strict=True)]


def make_rows(
    seed: int,
    count: int,
    *,
    digits: tuple[int, int] = (4, 4),
    checks: int = MAX_CHECKS,
    error_rate: float = ERROR_RATE,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Supervised rows (prompt, response) as token ids.

    A block writes the running maxima; every step is replaced by a random digit with probability `error_rate`, and
    later steps of the block build on it. 0 to `checks` more blocks follow, uniformly drawn; the last block's last
    value is the answer.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = make_prompts(generator, count, digits=digits)
    blocks = torch.randint(0, checks + 1, (count,), generator=generator).tolist()
    most = (checks + 1) * digits[1]
    slips = (torch.rand(count, most, generator=generator) < error_rate).tolist()
    wrong = torch.randint(0, 10, (count, most), generator=generator).tolist()
    rows = []
    for prompt, extra, slip, value in zip(prompts, blocks, slips, wrong, strict=True):
        numbers, text, best = prompt[0::2], [], 0
        for block in range(extra + 1):
            best = numbers[0]
            steps = []
            for index, number in enumerate(numbers[1:], start=block * digits[1]):
                best = value[index] if slip[index] else max(best, number)
                steps.append(f"{best};")
            text.append("".join(steps))
        rows.append((prompt, encode("?".join(text) + f"!{best}$")))
    return rows


def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text. Raises `DataError` for a character outside the alphabet."""
    unknown = sorted(set(text) - set(ALPHABET))
    if unknown:
        raise DataError(f"{text!r} has characters outside the alphabet {ALPHABET!r}: {''.join(unknown)!r}")
    return tuple(ALPHABET.index(c) for c in text)


def decode(ids: Sequence[int]) -> str:
    """The text of token ids, without padding."""
    return "".join(ALPHABET[i] for i in ids if i != PAD)


def score(prompts: Sequence[Sequence[int]], ids: Int[Tensor, "row time"]) -> Bool[Tensor, " row"]:
    """Whether each response ends its thinking, gives the largest digit of its prompt and stops right there."""
    best = torch.tensor([max(prompt[0::2]) for prompt in prompts], device=ids.device)
    wide = F.pad(ids, (0, 2), value=PAD)
    ends = wide == END_OF_THINK
    first = ends.int().argmax(1, keepdim=True)
    after = [wide.gather(1, (first + shift).clamp(max=wide.shape[1] - 1))[:, 0] for shift in (1, 2)]
    return ends.any(1) & (after[0] == best) & (after[1] == EOS)


# ---- model -----------------------------------------------------------------------------------------------------


def pad_left(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row time"]:
    """Rows as one tensor, padded on the left to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])


def pad_right(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row time"]:
    """Rows as one tensor, padded on the right to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [PAD] * (longest - len(row)) for row in rows])


def logits_of(
    model: nn.Module, prompts: Sequence[Sequence[int]], ids: Int[Tensor, "row time"]
) -> Float[Tensor, "row time vocab"]:
    """Logits that each token of the responses `ids` is drawn from; differentiable."""
    before = pad_left(prompts).to(ids.device)
    start = before.shape[1] - 1
    logits: Tensor = model(torch.cat([before, ids], 1))
    return logits[:, start : start + ids.shape[1]]


def warm_up(
    seed: int,
    *,
    steps: int = WARM_UP_STEPS,
    batch: int = 64,
    lr: float = 2e-3,
    digits: tuple[int, int] = (4, 4),
) -> CharLM:
    """A model trained on supervised rows from scratch; the same for the same arguments, kept in memory."""
    return copy.deepcopy(_warm_up(seed, steps, batch, lr, digits))


@lru_cache(maxsize=16)
def _warm_up(seed: int, steps: int, batch: int, lr: float, digits: tuple[int, int]) -> CharLM:
    return taught(seed, make_rows(seed, steps * batch, digits=digits), batch=batch, lr=lr)


def taught(
    seed: int, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch: int = 64, lr: float = 2e-3
) -> CharLM:
    """A model trained from scratch on supervised rows (prompt, response), `batch` at a time, each once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharLM()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for start in range(0, len(rows), batch):
        prompts, responses = zip(*rows[start : start + batch], strict=True)
        ids = pad_right(responses)
        loss = F.cross_entropy(logits_of(model, prompts, ids).transpose(1, 2), ids, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def sample(
    model: CharLM,
    prompts: Sequence[Sequence[int]],
    uniform: Float[Tensor, "row limit"],
    *,
    temperature: float = 1.0,
    given: Given | None = None,
) -> tuple[Int[Tensor, "row time"], Bool[Tensor, "row time"], Float[Tensor, "row time"]]:
    """One response per prompt: ids, mask of real tokens (end of text included) and log-probabilities.

    Where tokens are `given` (ids, mask), they stand instead of drawn ones.

    `uniform` are numbers in [0, 1) that belong to the rows, one per token; their number is the token limit. Log-probs
    are those of the distribution that was sampled, at `temperature`. `time` is the longest response.
    """
    new = pad_left(prompts).to(uniform.device)
    seen, cache = new != PAD, None
    alive = torch.ones(len(new), dtype=torch.bool, device=new.device)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for place, number in enumerate(uniform.unbind(1)):
        logits, cache = model.extend(new, seen, cache)
        logp = (logits[:, -1] / temperature).log_softmax(-1)
        token = torch.where(alive, draw_token(logp.exp().cumsum(-1), number, place, given), PAD)
        columns.append(
            (token, alive, torch.where(alive, logp.gather(1, token.clamp(max=PAD - 1)[:, None])[:, 0], 0.0))
        )
        new, seen = token[:, None], torch.cat([seen, alive[:, None]], 1)
        alive = alive & (token != EOS)
        if not bool(alive.any()):
            break
    ids, mask, logps = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return ids, mask, logps


@dataclass(frozen=True)
class CharacterLab:
    """What worlds of the character model share: prompts are token ids, the policy a `CharLM`."""

    token_limit: int

    def sample(
        self,
        policy: Any,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        seed: int,
        given: Given | None = None,
    ) -> tuple[Int[Tensor, "row time"], Bool[Tensor, "row time"]]:
        """Ids and mask of one response per prompt."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), self.token_limit, generator=generator, dtype=torch.float64)
        ids, mask, _ = sample(policy, prompts, uniform, temperature=temperature, given=given)
        return ids, mask

    def logits(
        self, policy: Any, prompts: Sequence[Sequence[int]], ids: Int[Tensor, "row time"]
    ) -> Float[Tensor, "row time vocab"]:
        """Logits that each token was drawn from."""
        return logits_of(policy, prompts, ids)


@dataclass(frozen=True)
class CharLMLab(CharacterLab):
    """The lab for an engine; the reward is 1 for a right answer, else 0."""

    token_limit: int = 32
    digits: tuple[int, int] = (4, 4)

    def fresh_prompts(self, count: int, *, seed: int) -> list[tuple[int, ...]]:
        """Prompts of the lab's difficulty."""
        return make_prompts(torch.Generator().manual_seed(seed), count, digits=self.digits)

    def reward(
        self, prompts: Sequence[Sequence[int]], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """1 for a right and finished answer, else 0."""
        return score(prompts, ids).float()


@dataclass(frozen=True)
class Examination:
    """How a model does on fresh prompts: share of right answers, tokens per response, entropy per token (nats)."""

    accuracy: float
    length: float
    entropy: float


@torch.no_grad()
def examine(model: CharLM, seed: int, *, count: int = 512, limit: int = 32) -> Examination:
    """Sample `count` fresh four-digit prompts at temperature 1 and look."""
    lab = CharLMLab(token_limit=limit)
    prompts = lab.fresh_prompts(count, seed=seed)
    ids, mask = lab.sample(model, prompts, temperature=1.0, seed=seed)
    logp = logits_of(model, prompts, ids).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return Examination(
        accuracy=float(score(prompts, ids).double().mean()),
        length=float(mask.sum(1).double().mean()),
        entropy=float(entropy[mask].double().mean()),
    )
