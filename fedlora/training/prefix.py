"""The frozen layers below the lowest adapted one: what they make of a row never changes, so it is computed once.

Without dropout, the input of the first adapted layer is a function of the row alone. It is kept in memory and stands
in for those layers in every later epoch, round and evaluation. Every row is computed by itself, whatever batch it comes
in: a run that is resumed with an empty memory comes to the same bytes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLACE = re.compile(r"(?P<stack>.+?)\.(?P<index>\d+)\.")
_TOLERANCE = 1e-4  # of the largest output: rounding alone


class _ReachedError(Exception):
    """Carries the input of the first adapted layer out of the model."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class FrozenPrefix:
    """The lower layers of one model, and what they made of the rows it has seen.

    Args:
        backbone: what is called with ``input_ids`` and ``attention_mask``.
        layers: its layers up to and with the first adapted one; a layer takes hidden states [n, T, d] and returns them.
        budget: bytes that are kept; rows beyond are computed every time.
        still: whether the model has no dropout at all.
        writes: whether the model may be asked to go on writing, which needs the layers themselves.
    """

    def __init__(self, backbone: nn.Module, layers: Iterable[nn.Module], budget: float, still: bool, writes: bool):
        *lower, self._first = layers
        self._backbone, self._still, self._writes = backbone, still, writes
        self._budget, self._known = budget, dict[bytes, Tensor]()
        self._names = list(inspect.signature(backbone.forward).parameters)
        self._hidden: Tensor | None = None
        self._reaching = False
        self._undo: list[Callable[[], None]] = []
        for number, layer in enumerate(lower):
            self._replace(layer, number)
        handles = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True),
            backbone.register_forward_hook(self._after, always_call=True),
            self._first.register_forward_pre_hook(self._at_first, with_kwargs=True),
        ]
        self._undo += [handle.remove for handle in handles]

    @property
    def rows(self) -> int:
        """How many are kept."""
        return len(self._known)

    def remove(self) -> None:
        """Give the model its own layers back."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _replace(self, layer: Any, number: int) -> None:
        own = layer.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._hidden is None:
                return own(hidden, *args, **kwargs)
            return self._hidden if number == 0 else hidden

        layer.forward = forward
        self._undo.append(lambda: delattr(layer, "forward"))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._reaching:
            return
        self._hidden = None  # whatever stopped the pass before this one
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if not self._serves(given):
            return
        ids, mask = given["input_ids"], given["attention_mask"].bool()
        texts = [row[seen] for row, seen in zip(ids.cpu(), mask.cpu(), strict=True)]
        rows = [self._of(text, ids.device) for text in texts]
        hidden = rows[0].new_zeros(*ids.shape, rows[0].shape[-1])
        hidden[mask] = torch.cat(rows)
        self._hidden = hidden

    def _after(self, *_: Any) -> None:
        if not self._reaching:
            self._hidden = None

    def _at_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._reaching:
            raise _ReachedError(args[0] if args else kwargs["hidden_states"])

    def _serves(self, given: Mapping[str, Any]) -> bool:
        tensors = {name for name, value in given.items() if torch.is_tensor(value)}
        usual = tensors == {"input_ids", "attention_mask"} and given.get("past_key_values") is None
        goes_on = self._writes and given.get("use_cache") is not False
        return usual and not goes_on and (self._still or not self._first.training)

    @torch.no_grad()
    def _of(self, text: Tensor, device: torch.device) -> Tensor:
        """What the layers below make of one row [T]: [T, d]."""
        key = text.numpy().tobytes()
        found = self._known.get(key)
        if found is None:
            ids = text[None].to(device)
            try:
                self._reaching = True
                self._backbone(input_ids=ids, attention_mask=torch.ones_like(ids))
                raise AssertionError("the first adapted layer was not reached")
            except _ReachedError as reached:
                found = reached.hidden[0].clone()
            finally:
                self._reaching = False
            size = found.numel() * found.element_size()
            if size <= self._budget:
                self._budget -= size
                self._known[key] = found
        return found


def put_prefix(
    model: Any, sites: Collection[str], saved: Collection[str], budget: float, tokens: int, writes: bool
) -> FrozenPrefix | None:
    """Let rows pass the frozen lower layers of a model once; None where there are none, or where it cannot be done.

    Whether the model comes to the same is tried on two rows of unequal length.

    Args:
        model: a base without adapters.
        sites: paths of the modules that get adapters.
        saved: names of modules that are trained in full; none of them may lie in the lower layers.
        budget: bytes.
        tokens: of all rows, at most. If what is made of them does not fit, nothing is kept: rows that pass the layers
            one by one every time take longer than in batches.
        writes: whether it is a language model.
    """
    found = _lower_layers(model, sites, saved)
    width = getattr(model.config, "hidden_size", 0) * next(model.parameters()).element_size()
    if found is None or not tokens or tokens * max(width, 1) > budget:
        return None
    backbone, layers = found
    still = not any(isinstance(module, nn.Dropout) and module.p for module in model.modules()) and not any(
        value for name, value in model.config.to_dict().items() if "drop" in name and isinstance(value, float | int)
    )
    device = next(model.parameters()).device
    ids = torch.tensor([[5, 6, 7], [8, 9, 9]], device=device)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
    was_training = model.training
    model.eval()
    prefix = None
    try:
        with torch.no_grad():
            asked = {"input_ids": ids, "attention_mask": mask, **({"use_cache": False} if writes else {})}
            before = model(**asked).logits
            prefix = FrozenPrefix(backbone, layers, budget, still, writes)
            after = model(**asked).logits
        if writes:  # what stands after the end of a row says nothing
            before, after = before[mask.bool()], after[mask.bool()]
        apart, largest = float((before - after).abs().max()), float(before.abs().max().clamp(min=1e-6))
        alike = prefix.rows == len(ids) and apart <= _TOLERANCE * largest
    except Exception:  # noqa: BLE001 - an architecture that is built otherwise is simply run as it is
        alike = False
    finally:
        model.train(was_training)
    if not alike and prefix is not None:
        prefix.remove()
    return prefix if alike else None


def _lower_layers(
    model: nn.Module, sites: Collection[str], saved: Collection[str]
) -> tuple[nn.Module, list[nn.Module]] | None:
    """The backbone, and its layers up to the lowest adapted one; None where that is the first, or not one stack, or
    where something below it is trained."""
    places = [_PLACE.match(site) for site in sites]
    stacks = {place["stack"] for place in places if place}
    if len(stacks) != 1 or not all(places):
        return None
    (stack,) = stacks
    lowest = min(int(place["index"]) for place in places if place)
    backbone, layers = model.get_submodule(stack.partition(".")[0]), model.get_submodule(stack)
    if not lowest or backbone is layers or not isinstance(layers, nn.ModuleList):
        return None
    below = {id(module) for layer in list(layers)[:lowest] for module in layer.modules()}
    for child in backbone.children():  # in the order of the model: what stands before the stack is below it
        if any(module is layers for module in child.modules()):
            break
        below |= {id(module) for module in child.modules()}
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    if any(name in saved and id(module) in below for name, module in named):
        return None
    return backbone, list(layers)[: lowest + 1]
