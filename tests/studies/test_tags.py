"""The lab of tagged answers."""

from __future__ import annotations

import torch

from uncollapse.studies.testbeds import tags
from uncollapse.studies.testbeds.charlm import decode, encode, pad_right


def test_the_reference_is_in_the_format_and_right() -> None:
    prompt = encode("3172=")
    assert tags.running_sums(prompt) == [3, 4, 1, 3]
    assert decode(tags.reference(prompt)) == "?3413;+3!$"


def test_format_and_answer_are_judged_apart() -> None:
    prompt = encode("3172=")
    texts = {
        "?3413;+3!$": (True, True),
        "?34133413;+3!$": (True, True),
        "?3413;+4!$": (True, False),
        "3413;+3!$": (False, True),
        "?;+3!$": (False, True),
        "?3413;+33!$": (False, False),
        "?3413;+3$": (False, False),
        "?3413;+3!": (False, False),
        "?3413;+3!3$": (False, False),
    }
    tidy, right = tags.score([prompt] * len(texts), pad_right([encode(t) for t in texts]))
    assert list(zip(tidy.tolist(), right.tolist(), strict=True)) == list(texts.values())
    ids = pad_right([encode("?3413;+3!$"), encode("?3413;+4!$"), encode("3$")])
    assert tags.TagsLab().reward([prompt] * 3, ids, ids != tags.PAD).tolist() == [20, 10, 0]


def test_supervised_rows_are_repeatable_and_as_faulty_as_asked() -> None:
    rows = tags.make_rows(0, 2000)
    assert rows == tags.make_rows(0, 2000)
    prompts, responses = zip(*rows, strict=True)
    tidy, right = tags.score(prompts, pad_right(responses))
    assert abs(float(tidy.double().mean()) - (1 - tags.DROP_RATE) ** 4) < 0.03
    assert 0.4 < float(right.double().mean()) < 0.65
    assert len(set(map(len, responses))) > 4
    clean = tags.make_rows(0, 50, drop_rate=0.0, slip_rate=0.0)
    prompts, responses = zip(*clean, strict=True)
    assert all(score.all() for score in tags.score(prompts, pad_right(responses)))
    assert max(map(len, responses)) < tags.TagsLab().token_limit


def test_an_examination_is_repeatable() -> None:
    model = tags.warm_up(0, steps=5)
    seen = tags.examine(model, 3, count=16)
    assert seen == tags.examine(model, 3, count=16)
    assert 0 <= seen.format <= 1
    assert 0 < seen.tags < 1
    assert torch.equal(tags.warm_up(0, steps=5).head.weight, model.head.weight)
