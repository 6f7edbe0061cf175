"""What the head of a running model reads, with the class that each feature belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from uncollapse.inspection.arguments import arguments_of, real_decoder_tokens, real_tokens
from uncollapse.inspection.features import head_of
from uncollapse.inspection.recomputation import recomputing

Classes = Int[Tensor, "*row"]

ClassSource: TypeAlias = Callable[[], Classes | None] | Literal["next_token"] | None
"""Where classes come from: a function that gives those of the current batch, the next token, or what the model is called with."""

Seen: TypeAlias = Callable[[Float[Tensor, "row feature"], Int[Tensor, " row"]], Any]


@contextmanager
def head_inputs(
    model: nn.Module,
    seen: Seen,
    *,
    classes: ClassSource = None,
    head: nn.Module | None = None,
    missed: Callable[[str], Any] | None = None,
) -> Iterator[None]:
    """Within the context, call `seen` with the features that the head reads and their classes, for every forward pass.

    Classes are what `classes()` gives. Without it, a causal language model, whose head is its output embeddings, has the next
    token (of the decoder, if there are two sides), padding and the last position left out; any other model has the argument
    `labels` of its forward pass. Negative classes (-100) are left out. Where there is one class a text and the head
    reads every token, the features are those at the position whose scores the model gives back.

    Args:
        classes: a function, or "next_token" for a causal language model that cannot be known as one.
        head: the layer that reads the features; `head_of(model)` if not given.
        missed: is told why a forward pass gave no features with classes.
    """
    head = head_of(model) if head is None else head
    reader = _HeadReader(model, head, seen, classes, missed or (lambda reason: None))
    with ExitStack() as stack:
        for handle in (
            model.register_forward_pre_hook(reader.begin, with_kwargs=True),
            head.register_forward_pre_hook(reader.read),
            head.register_forward_hook(reader.score),
            model.register_forward_hook(reader.end),
        ):
            stack.callback(handle.remove)
        yield


def is_causal_lm(model: nn.Module, head: nn.Module) -> bool:
    """Whether `model` is known to predict the next token with `head`: it can generate, and its output embeddings are the head."""
    embeddings, generates = (
        getattr(model, "get_output_embeddings", None),
        getattr(model, "can_generate", None),
    )
    return callable(embeddings) and embeddings() is head and callable(generates) and bool(generates())


class _HeadReader:
    """The hooks of one model and its head, and what they know of the forward pass that is running."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        seen: Seen,
        classes: ClassSource,
        missed: Callable[[str], Any],
    ) -> None:
        self._name, self._seen, self._missed = type(model).__name__, seen, missed
        self._given = classes if callable(classes) else None
        self._next_token = classes == "next_token" or is_causal_lm(model, head)
        self._two_sides = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._arguments: Mapping[str, Any] = {}
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._scores: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = arguments_of(model, args, kwargs)
        self._waiting = self._scores = None

    def read(self, head: nn.Module, args: tuple[Any, ...]) -> None:
        if recomputing() or not args or not isinstance(args[0], Tensor):
            return
        features = args[0].detach()
        named = self._given() if self._given is not None else None
        if named is None and not (self._next_token and not self._two_sides):
            labels = self._arguments.get("labels")
            named = labels if isinstance(labels, Tensor) else None
        if named is not None:
            self._read_classes(features, named)
        elif self._next_token:
            self._read_next_tokens(features)
        else:
            self._missed(
                f"{self._name} was given no classes, and is not known as a causal language model; pass labels= to its forward "
                'pass, or watch(classes=...) with a function that gives them or with "next_token"'
            )

    def score(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._waiting is not None and isinstance(output, Tensor):
            self._scores = output.detach()

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        waiting, scores = self._waiting, self._scores
        self._waiting = self._scores = None
        if waiting is None:
            return
        features, classes = waiting
        read = None if scores is None else _rows_given_back(features, scores, output)
        if read is None:
            self._missed(
                f"there is one class a text and {self._name}'s head reads every token; which one counts could not be seen in its output"
            )
        else:
            self._tell(read, classes)

    def _read_next_tokens(self, features: Tensor) -> None:
        name = "decoder_input_ids" if self._two_sides else "input_ids"
        ids = self._arguments.get(name)
        if ids is None and not self._two_sides:
            ids = next(iter(self._arguments.values()), None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2 or features.ndim != 3:
            self._missed(f"{self._name} was called without {name}, so that the next token is not known")
            return
        mask = (real_decoder_tokens if self._two_sides else real_tokens)(self._arguments)
        real = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None and mask.shape == ids.shape:
            real = mask
        kept = features.shape[1]
        if self._arguments.get("logits_to_keep") == kept:  # the head reads the last positions only
            ids, real = ids[:, -kept:], real[:, -kept:]
        if features.shape[:-1] != ids.shape:
            self._missed(
                f"the head of {self._name} read features of shape {tuple(features.shape)} for tokens of shape {tuple(ids.shape)}"
            )
            return
        inside = real[:, 1:] & real[:, :-1]
        self._seen(features[:, :-1][inside], ids[:, 1:][inside].to(features.device))

    def _read_classes(self, features: Tensor, classes: Tensor) -> None:
        if classes.is_floating_point():
            self._missed("the labels are floating-point numbers, not classes")
        elif classes.shape == features.shape[:-1]:
            self._tell(features, classes)
        elif features.ndim == 3 and classes.shape == features.shape[:1]:
            self._waiting = features, classes
        else:
            self._missed(
                f"classes of shape {tuple(classes.shape)} do not fit features of shape {tuple(features.shape)}"
            )

    def _tell(self, features: Float[Tensor, "*row feature"], classes: Int[Tensor, "*row"]) -> None:
        classes = classes.to(features.device)
        kept = classes >= 0
        self._seen(features[kept], classes[kept])


def _rows_given_back(
    features: Float[Tensor, "batch token feature"], scores: Tensor, output: Any
) -> Float[Tensor, "batch feature"] | None:
    """The features at the position of each text whose scores the model gives back; NaN where those are, None if it is not seen."""
    if scores.shape[:-1] != features.shape[:-1]:
        return None
    for given in _tensors(output):
        if given.shape != (len(scores), scores.shape[-1]):
            continue
        same = (scores.to(given) == given.detach()[:, None]).all(-1)
        found, place = same.any(1), same.int().argmax(1)
        broken = ~given.isfinite().all(-1)
        if bool((found | broken).all()):
            rows = features[torch.arange(len(place), device=place.device), place]
            return rows.masked_fill(~found[:, None], torch.nan)
    return None


def _tensors(output: Any) -> list[Shaped[Tensor, "..."]]:
    """The tensors that a model gave back, whatever it put them into."""
    if isinstance(output, Tensor):
        return [output]
    values = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, (tuple, list))
        else ()
    )
    return [value for value in values if isinstance(value, Tensor)]
