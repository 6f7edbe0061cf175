"""The classical regime as a control: few balanced classes, more features than classes, trained past zero error."""

from __future__ import annotations

import torch
from torch import nn

from uncollapse.measure import NC4Accumulator, StreamingNC
from uncollapse.studies.testbeds.digits import digits


def collapse_of_digits(
    seed: int, *, normalized: bool, epochs: int = 200, per_class: int = 100
) -> dict[str, float]:
    """Train a perceptron on `per_class` digits of each class; metrics on its training images.

    64 - 128 - 128 - 128 - 10, ReLU, with or without batch normalization, cross-entropy, SGD with momentum 0.9, weight decay 0.005,
    batches of 100, learning rate 0.05, divided by 10 after two thirds and after five sixths; chosen on seed 1000, which the
    study does not use.
    """
    data = digits(seed).of_counts((per_class,) * 10, seed)
    images, classes = data.train.flatten(1), data.train_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(*(_layer(width, normalized) for width in (64, 128, 128)))
        head = nn.Linear(128, 10)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.005)
    milestones = [2 * epochs // 3, 5 * epochs // 6]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(100):
            loss = nn.functional.cross_entropy(head(body(images[rows])), classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    body.eval()
    with torch.no_grad():
        features, unseen = body(images), body(data.test.flatten(1))
    weight, bias = head.weight.detach(), head.bias.detach()
    statistics = StreamingNC(*weight.shape, pooled_cov=True).update(features, classes)
    decided = NC4Accumulator(statistics.mean, statistics.count, weight, bias)
    held_out = NC4Accumulator(statistics.mean, statistics.count, weight, bias)
    return statistics.compute(weight).values | {
        "nc4": decided.update(features, classes).compute().full_head,
        "nc4/held_out": held_out.update(unseen, data.test_class).compute().full_head,
        "accuracy": held_out.compute().head_accuracy,
    }


def _layer(width: int, normalized: bool) -> nn.Module:
    between = nn.BatchNorm1d(128) if normalized else nn.Identity()
    return nn.Sequential(nn.Linear(width, 128), between, nn.ReLU())
