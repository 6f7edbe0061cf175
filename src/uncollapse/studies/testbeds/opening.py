"""opening: modsum with a rule for the first token, so that a right answer has to begin right.

The sum of the tokens modulo V equals the prompt's target, as in modsum, and the first token has the parity of the prompt.
Half of the tokens are wrong from the start, and nothing that follows mends it. Largest entropy with reward 1:
((T-2) log V + log(V/2)) / T per token, for even V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.studies.testbeds.modsum import ModSum, ModSumLab, Table


@torch.no_grad()
def state_values(task: ModSum, table: Table) -> Float[Tensor, "prompt position1 state"]:
    """Probability of the right sum from each running sum before position 0, ..., T: exact, by recursion from the end."""
    here = torch.arange(task.vocab, device=table.device)
    after = (here[:, None] + here[None, :]) % task.vocab  # the sum that a token (column) leads to
    prompt = torch.arange(task.prompts, device=table.device)
    value = torch.nn.functional.one_hot(task.targets(prompt), task.vocab).to(table.dtype)
    values = [value]
    for position in reversed(range(task.length)):
        value = (table[:, position].softmax(-1) * value[:, after]).sum(-1)
        values.append(value)
    return torch.stack(values[::-1], 1)


def opens_right(prompt: Int[Tensor, "*row"], token: Int[Tensor, "*row"]) -> Bool[Tensor, "*row"]:
    """Whether a first token has its prompt's parity."""
    return (prompt - token) % 2 == 0


@torch.no_grad()
def opening_reward(task: ModSum, table: Table) -> Float[Tensor, " prompt"]:
    """Probability of an answer that opens right and has the right sum, per prompt; exact."""
    prompt, token = torch.arange(task.prompts), torch.arange(task.vocab)
    opens = opens_right(prompt[:, None].expand(-1, task.vocab), token.expand(task.prompts, -1))
    # before the first token the sum is 0, after it the token itself
    return (table[:, 0, 0].softmax(-1) * state_values(task, table)[:, 1] * opens).sum(-1)


class OpeningLab(ModSumLab):
    """The task for an engine."""

    def reward(
        self, prompts: Sequence[int], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """1 for a right answer that opens right, else 0."""
        return super().reward(prompts, ids, mask) * opens_right(torch.tensor(prompts), ids[:, 0])
