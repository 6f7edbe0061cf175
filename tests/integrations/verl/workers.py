"""verl's actor workers over the table lab: the same data through verl's own splitting, padding and bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from lab import Table, TableLab
from verl import DataProto
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.utils.py_functional import append_to_dict
from verl.workers.engine.utils import detach_tree, postprocess_batch_func, prepare_micro_batches

from uncollapse.integrations.verl.names import ROW, STATISTICS, output_name
from uncollapse.measure.statistics import Entropy, Logp
from uncollapse.measure.token_stats import token_stats_from_logits


def lab_prompts(numbers, seed=0):
    """The lab's prompts as tokens: the number, then a few that do not matter."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(0, 4, (len(numbers),), generator=generator).tolist()
    return [[number, *[5] * more] for number, more in zip(numbers, extra, strict=True)]


def as_verl(raw, prompts, *, order=None):
    """A sampled batch as verl's driver holds it: prompts padded on the left, responses on the right.

    `prompts` are the token ids of each group's, `order` is what balancing makes of the rows.
    """
    rows, group, width = len(raw), raw.group.tolist(), raw.ids.shape[1]
    wide = max(map(len, prompts)) + 2
    ids = torch.tensor([[0] * (wide - len(prompts[g])) + prompts[g] for g in group])
    left = torch.tensor([[0] * (wide - len(prompts[g])) + [1] * len(prompts[g]) for g in group])
    length = raw.columns["length"]
    right = (torch.arange(width)[None] < length[:, None]).long()
    attention = torch.cat([left, right], dim=1)
    scores = torch.zeros(rows, width, dtype=torch.float64)
    scores[torch.arange(rows), (length - 1).clamp(min=0)] = raw.reward
    tensors = {
        "prompts": ids, "responses": raw.ids, "input_ids": torch.cat([ids, raw.ids], dim=1), "attention_mask": attention,
        "position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0), "response_mask": raw.mask.long(),
        "token_level_scores": scores, ROW: torch.arange(rows),
    }  # fmt: skip
    uid = np.array([f"prompt-{g}" for g in group], dtype=object)
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": uid})
    data.meta_info["global_token_num"] = attention.sum(dim=1).tolist()
    return data if order is None else data[order]


@dataclass
class LabWorkers:
    """`compute_log_prob` and `update_actor` as verl's workers do them, the ranks one after the other."""

    policy: Table
    ranks: int = 1
    micro: int | None = 2
    tokens: int = 10_000
    rate: float = 0.0
    loss_fn: Any = None
    gradients: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    received: list = field(default_factory=list)

    def set_loss_fn(self, loss_fn):
        self.loss_fn = loss_fn

    def outputs(self, data):
        """Jagged over prompt and response: the value of token t stands at t - 1, as verl's engines give it."""
        asked = [Logp(), Entropy(), *tu.get_non_tensor_data(data, STATISTICS, ())]
        offsets = data["input_ids"].offsets().tolist()
        tokens = data["input_ids"].values()
        attention, wide = data["attention_mask"], data["prompts"].shape[1]
        noise = torch.Generator().manual_seed(len(tokens))
        pieces = {s: torch.randn(len(tokens), generator=noise, dtype=torch.float64) for s in asked}
        rows = []
        for row in range(len(offsets) - 1):
            start, before = offsets[row], int(attention[row, :wide].sum())
            response = tokens[start + before : offsets[row + 1]]
            logits = TableLab().logits(self.policy, [int(tokens[start])], response[None])[0]
            found = token_stats_from_logits(logits, response, stats=asked)
            rows.append((torch.arange(len(response)) + start + before - 1, found))
        places = torch.cat([place for place, _ in rows])
        full = {s: pieces[s].index_put((places,), torch.cat([found[s] for _, found in rows])) for s in asked}
        names = {Entropy()} if not tu.get_non_tensor_data(data, "calculate_entropy", False) else set()
        return {
            output_name(s): torch.nested.nested_tensor_from_jagged(v, data["input_ids"].offsets())
            for s, v in full.items()
            if s not in names
        }

    def _micro(self, data, least=None):
        tu.assign_non_tensor(
            data, use_dynamic_bsz=self.micro is None, max_token_len_per_gpu=self.tokens,
            micro_batch_size_per_gpu=self.micro,
        )  # fmt: skip
        return prepare_micro_batches(data, min_num_micro_batch=least)

    def _evenly(self, shares):
        """Micro-batches of every rank, equally many, as verl's ranks agree among themselves."""
        least = None
        while True:
            found = [self._micro(share, least) for share in shares]
            counts = {len(micro) for micro, _ in found}
            if len(counts) == 1:
                return found
            least = max(counts)

    def compute_log_prob(self, data):
        found = []
        for share in tu.chunk_tensordict(data, self.ranks):
            micro, places = self._micro(share)
            with torch.no_grad():
                parts = [{"model_output": self.outputs(m), "loss": 1.0, "metrics": {}} for m in micro]
            found.append(postprocess_batch_func(parts, places, share)["model_output"])
        whole = {
            name: torch.nested.as_nested_tensor(
                list(chain.from_iterable(part[name].unbind() for part in found)), layout=torch.jagged
            )
            for name in found[0]
        }
        return tu.get_tensordict(whole, {"metrics": {"mfu": 0.0}})

    def update_actor(self, data):
        self.received.append(data)
        rows, epochs = tu.get(data, "mini_batch_size"), tu.get(data, "epochs")
        assert rows % self.ranks == 0
        shares = [
            list(
                tu.make_iterator(
                    share, mini_batch_size=rows // self.ranks, epochs=epochs, seed=tu.get(data, "seed") + rank,
                    dataloader_kwargs=tu.get(data, "dataloader_kwargs"),
                )
            )
            for rank, share in enumerate(tu.chunk_tensordict(data, self.ranks))
        ]  # fmt: skip
        metrics: dict = {}
        for step in zip(*shares, strict=True):
            self.policy.zero_grad()
            reported, loss = [], 0.0
            for share in step:
                tu.assign_non_tensor(share, dp_size=self.ranks, batch_num_tokens=1)
            for share, (micro, places) in zip(step, self._evenly(step), strict=True):
                parts = []
                for m in micro:
                    value, found = self.loss_fn(model_output=self.outputs(m), data=m, dp_group=None)
                    (value / self.ranks).backward()
                    loss += float(value.detach()) / self.ranks
                    parts.append(
                        {"model_output": {}, "loss": float(value.detach()), "metrics": detach_tree(found)}
                    )
                reported.append(postprocess_batch_func(parts, places, share)["metrics"])
            self.gradients.append(self.policy.table.grad.clone())
            self.losses.append(loss)
            with torch.no_grad():
                self.policy.table -= self.rate * self.policy.table.grad
            gathered = {name: [one[name] for one in reported] for name in reported[0]}
            whole = {
                n: Metric.aggregate_dp(v) if isinstance(v[0], Metric) else v for n, v in gathered.items()
            }
            append_to_dict(metrics, {**whole, "grad_norm": 1.0, "lr": 1e-6})
        return tu.get_tensordict({}, {"metrics": metrics})
