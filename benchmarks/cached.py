"""Many runs over one model in one process: what never changes is computed once.

Only layers above the frozen ones carry adapters here. Without dropout everything below is a function of the text alone,
and most of the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.training.model import Base
from orchestrator.pools.local import LocalPool


class Below(nn.Module):
    """Embeddings and frozen lower layers as one, which computes every text once.

    Equal to the whole model up to rounding.
    """

    def __init__(self, embeddings: nn.Module, layers: Iterable[nn.Module]):
        super().__init__()
        self.embeddings, self.below = embeddings, nn.ModuleList(layers)
        self._known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        texts = [row[row != 0] for row in input_ids]  # 0 is BERT's padding
        keys = [text.numpy().tobytes() for text in texts]
        unknown: dict[int, dict[bytes, Tensor]] = {}  # by length, so that nothing is padded
        for key, text in zip(keys, texts, strict=True):
            if key not in self._known:
                unknown.setdefault(len(text), {})[key] = text
        for group in unknown.values():
            hidden = self.embeddings(torch.stack([*group.values()]))
            for layer in self.below:
                hidden = layer(hidden)
            self._known |= {key: states.clone() for key, states in zip(group, hidden, strict=True)}
        return nn.utils.rnn.pad_sequence([self._known[key] for key in keys], batch_first=True)


class Passed(nn.Module):
    """In the place of a layer that ``Below`` has taken."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def shorten(base: Base, frozen: int) -> Base:
    """A BERT whose lower layers, ``frozen`` of them, are computed once per text."""
    bert = base.model.bert
    bert.embeddings = Below(bert.embeddings, bert.encoder.layer[:frozen])
    for i in range(frozen):
        bert.encoder.layer[i] = Passed()
    bert.encoder.layer[-1].attention.forward = partial(_of_first, bert.encoder.layer[-1].attention)
    return base


def _of_first(attention: Any, hidden: Tensor, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    """A last layer's attention for the first token, which is all that the head reads."""
    heads = attention.self
    first = hidden[:, :1]

    def split(projected: Tensor) -> Tensor:
        return projected.unflatten(2, (-1, heads.attention_head_size)).transpose(1, 2)

    query, key, value = split(heads.query(first)), split(heads.key(hidden)), split(heads.value(hidden))
    mask = mask if mask is None else mask[:, :, :1]
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=heads.scaling)
    return attention.output(mixed.transpose(1, 2).flatten(2), first), None


class SharedPool(LocalPool):
    """A pool over a runtime that outlives it."""

    def __init__(self, config: RunConfig, runtime: ClientRuntime):
        super().__init__(config, lambda *_: runtime)
