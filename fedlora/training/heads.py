"""Classifier heads other than the one a model comes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fedlora.errors import ModelError

HEADS = ("classifier", "score", "classification_head")
SCALE = 16.0  # where the scale starts; cosines alone could not tell labels apart by more than e^2


class CosineLinear(nn.Linear):
    """``scale * cos(h, w_c)``: the length of a row cannot favour the labels that were trained last.

    There is no bias, and the scale is learned. A row of zeros points nowhere and gets the lowest cosine, -1.

    Source: Gidaris & Komodakis, 2018 (arXiv 1804.09458), eq. 5; LUCIR (Hou et al., 2019), eq. 3.
    """

    scale: nn.Parameter

    def __init__(self, plain: nn.Linear):
        """The rows of ``plain`` [C, d], in its precision and on its device."""
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(plain.weight.detach().clone())
        self.scale = nn.Parameter(torch.full((1,), SCALE, device=plain.weight.device, dtype=plain.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        cosines = linear(normalize(input, dim=-1), normalize(self.weight, dim=-1))
        return self.scale * cosines.masked_fill((self.weight == 0).all(dim=1), -1.0)


def put_cosine_head(model: Any) -> None:
    """Replace the last linear layer of a classifier's head, in place; do it before PEFT wraps the model.

    Raises:
        ModelError: for a model without such a head.
    """
    for name, child in model.named_children():
        if name not in HEADS:
            continue
        layers = [path for path, module in child.named_modules() if type(module) is nn.Linear]
        if layers and (last := child.get_submodule(layers[-1])).out_features == model.config.num_labels:
            path = f"{name}.{layers[-1]}".rstrip(".")
            model.set_submodule(path, CosineLinear(last))
            return
    raise ModelError(
        f"model.head: cosine replaces the last linear layer of a classifier, and {type(model).__name__} has none under"
        f" {', '.join(HEADS)}; leave model.head out"
    )
