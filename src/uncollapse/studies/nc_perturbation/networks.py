"""Real features: MLPs on digits, trained layer by layer (part D), and with weight decay moved around (part E)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.measure.neural_collapse import nc_metrics
from uncollapse.representation.nc_perturbation import one_hot, predict_layerwise_nc1
from uncollapse.studies.testbeds.digits import digits

Loss: TypeAlias = Literal["mse", "ce"]

WIDTH = 64
BATCH = 128
DECAY = 5e-4
"""Weight decay of every layer unless an arm says otherwise (the paper's)."""
ARMS: dict[str, tuple[float, float, float]] = {
    "baseline": (1.0, 1.0, 1.0),
    "feature-double": (2.0, 2.0, 1.0),
    "feature-zero": (0.0, 0.0, 1.0),
    "head-double": (1.0, 1.0, 2.0),
    "head-zero": (1.0, 1.0, 0.0),
    "last-double": (1.0, 2.0, 1.0),
    "last-zero": (1.0, 0.0, 1.0),
    "placebo": (1.01, 1.01, 1.0),
}
"""Factors on the decay of the earlier hidden layers, of the last hidden layer and of the head.

`last` moves one layer against one (the head), where `feature` moves three; `placebo` moves as good as nothing, so what it
changes is what any change of the arithmetic does.
"""


def mse(logits: Float[Tensor, "row class"], y: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Mean over samples of half the squared distance to the unit vector of the class, as in the theory."""
    return 0.5 * (logits - one_hot(y, logits.shape[1], logits.dtype)).square().sum(1).mean()


def cross_entropy(logits: Float[Tensor, "row class"], y: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats."""
    return nn.functional.cross_entropy(logits, y)


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "ce": cross_entropy}


def batches(samples: int, steps: int, generator: torch.Generator) -> Iterator[Int[Tensor, " row"]]:
    """`steps` mini-batches of epochs shuffled anew; what does not fill a batch waits for the next epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(samples, generator=generator)
        yield order[:BATCH]
        order = order[BATCH:]


def sgd(
    parameters: list[nn.Parameter] | list[Tensor], steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.MultiStepLR]:
    """Learning rate 0.05, divided by 10 after one and two thirds of the steps, momentum 0.9 (the paper's); no decay."""
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 3, 2 * steps // 3])


def linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """He initialisation from the generator, biases 0."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    nn.init.kaiming_normal_(layer.weight, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


# ---- D: layer by layer ---------------------------------------------------------------------------------------------


def layerwise_trial(seed: int, depth: int, steps: int) -> dict[str, Any]:
    """Collapse of the pixels and after each of `depth` layers, each trained with a fresh head on the frozen ones below.

    `nc1` and `nc1-quotient` (NC1~) of training images, NC1~ of the others (`test`) and of training images after layers
    that were never trained (`random`); `steps` and `predicted` read the trained layers as implicit steps.
    """
    data = digits(seed)
    x, y = data.train.flatten(1), data.train_class
    unseen, chance = data.test.flatten(1), x
    generator = torch.Generator().manual_seed(seed)
    seen = [x]
    course: dict[str, Any] = {"nc1": [], "nc1-quotient": [], "test": [], "random": []}

    def look() -> None:
        found = nc_metrics(x, y)
        course["nc1"].append(found.nc1_pinv)
        course["nc1-quotient"].append(found.nc1_quotient)
        course["test"].append(nc_metrics(unseen, data.test_class).nc1_quotient)
        course["random"].append(nc_metrics(chance, y).nc1_quotient)

    look()
    for _ in range(depth):
        layer = nn.Sequential(linear(x.shape[1], WIDTH, generator), nn.ReLU())
        with torch.no_grad():
            other = linear(chance.shape[1], WIDTH, generator)
            chance = other(chance).relu()
        whole = nn.Sequential(layer, linear(WIDTH, 10, generator, bias=False))
        optimizer, schedule = sgd([*whole.parameters()], steps)
        optimizer.param_groups[0]["weight_decay"] = DECAY
        for rows in batches(len(x), steps, generator):
            optimizer.zero_grad()
            mse(whole(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            error = float((whole(x).argmax(1) != y).double().mean())
            x, unseen = layer(x), layer(unseen)
        seen.append(x)
        look()
    found = predict_layerwise_nc1(seen, y)
    return course | {"error": error, "steps": list(found.steps), "predicted": list(found.predicted)}


# ---- E: weight decay -----------------------------------------------------------------------------------------------


def decay_trial(loss: Loss, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """NC1, NC1~ and NC2 of the last hidden layer of a trained MLP, and its training error, in each of `ARMS`.

    Three hidden layers; the head has a bias with cross-entropy and none with MSE, as in the paper. `seed` decides data,
    weights and batches, so the arms of one seed differ in the weight decay alone. They are trained side by side, one batched
    product for all, each with its own loss and gradient.
    """
    data = digits(seed)
    x, y = data.train.flatten(1), data.train_class
    generator = torch.Generator().manual_seed(seed)
    factors = torch.tensor([ARMS[arm] for arm in ARMS])[:, [0, 0, 1, 2], None, None] * DECAY
    layers = [linear(x.shape[1] if k == 0 else WIDTH, 10 if k == 3 else WIDTH, generator) for k in range(4)]
    weights = [_repeated(layer.weight.T) for layer in layers]
    biases = [_repeated(layer.bias[None]) for layer in layers]
    if loss == "mse":
        biases[3].requires_grad_(False)  # stays 0
    parameters = [
        (p, factors[:, k]) for pair in (weights, biases) for k, p in enumerate(pair) if p.requires_grad
    ]

    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        h = rows.expand(len(ARMS), -1, -1)
        for w, b in zip(weights[:3], biases[:3], strict=True):
            h = torch.baddbmm(b, h, w).relu()
        return h, torch.baddbmm(biases[3], h, weights[3])

    optimizer, schedule = sgd([p for p, _ in parameters], steps)
    for rows in batches(len(x), steps, generator):
        optimizer.zero_grad()
        logits = forward(x[rows])[1]
        # the mean over all arms, times their number: the sum of their own mean losses
        (len(ARMS) * LOSSES[loss](logits.flatten(0, 1), y[rows].repeat(len(ARMS)))).backward()
        with torch.no_grad():
            for p, decay in parameters:
                assert p.grad is not None
                p.grad.add_(decay * p)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        h, logits = forward(x)
    return {arm: _look(h[at], logits[at], y) for at, arm in enumerate(ARMS)}


def _repeated(value: Tensor) -> Tensor:
    return value.detach().expand(len(ARMS), -1, -1).clone().requires_grad_()


def _look(h: Tensor, logits: Tensor, y: Tensor) -> dict[str, float]:
    found = nc_metrics(h, y)
    assert found.nc1_pinv is not None
    return {
        "nc1": found.nc1_pinv,
        "nc1-quotient": found.nc1_quotient,
        "nc2": found.nc2_etf_means,
        "error": float((logits.argmax(1) != y).double().mean()),
    }
