"""A classifier head made of class means: what the server remembers, and the rows it writes.

The hooks themselves run in local training, see ``fedlora.continual.prototypes``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy
from fedlora.aggregation.extras import require_watched
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, described
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo, TrainPlan

METRICS = ("cosine", "euclidean", "mahalanobis")
HEADS = ("classifier", "score", "classification_head", "head")
REACH = 4.0  # a feature is at most so many times as long as the longest mean


@WRAPPERS.register("prototypes")
class Prototypes(Wrapper):
    """The last layer of the head is not trained: the server makes it of the mean feature of every label.

    Nearest-class-mean is a linear head, so scoring and the exported adapter need to know nothing of it. Every client
    sends the mean features of its own rows and each label's share of them; a label nobody has met loses to every one
    that has been met. The first round in which a label is met makes its mean, so adapters learn of it from the next.

    Args:
        metric: cosine, or euclidean or mahalanobis, which need a head with a bias. Mahalanobis is linear discriminant
            analysis: distances in units of the covariance that features have around their label's mean, for which
            every client sends a matrix [d, d] more.
        scale: of the logits.
        memory: share of what earlier rounds saw of a label that still counts where a round sees it again; 0 takes
            the last round that saw it alone, 1 all of them, which is right where features do not drift. The covariance
            is one for all labels, and forgets as large a share of itself as the labels together forget.
        shrinkage: share of the mean variance in the covariance, which may be singular without; mahalanobis alone.
        rows: at most so many of a client's rows are looked at, drawn anew in every round; default all.
        head: path of the head's last layer; default what is trained in full under a usual name of a head.
    """

    name = "prototypes"
    equation = (
        "m_c = sum_k n_k s_kc m_kc / sum_k n_k s_kc;  cosine: w_c = scale m_c / |m_c|, b_c = 0;"
        "  euclidean: w_c = scale m_c, b_c = -scale |m_c|^2 / 2"
        "  mahalanobis: w_c = scale S^-1 m_c, b_c = -scale m_c^T S^-1 m_c / 2, S pooled within labels"
    )
    source = (
        "FedNCM (Legate et al., 2023, arXiv 2306.03937); class means as in iCaRL (Rebuffi et al., 2017);"
        " mahalanobis: streaming LDA (Hayes and Kanan, 2020, arXiv 1909.01520)"
    )

    def __init__(
        self,
        inner: Strategy,
        metric: str = "cosine",
        scale: float = 1.0,
        memory: float = 0.5,
        shrinkage: float = 0.1,
        rows: int | None = None,
        head: str | None = None,
    ):
        super().__init__(inner)
        if metric not in METRICS:
            raise ConfigError(f"strategy: prototypes.metric is {' or '.join(METRICS)}, not {metric}")
        if not (scale > 0 and 0 <= memory <= 1 and 0 < shrinkage <= 1 and (rows is None or rows >= 1)):
            raise ConfigError(
                "strategy: prototypes needs scale > 0, memory from 0 to 1, shrinkage above 0 up to 1 and rows of at"
                f" least 1, not {scale}, {memory}, {shrinkage} and {rows}"
            )
        if inner.traits.personal:
            raise ConfigError(
                f"strategy: prototypes makes one head for all, and {described(inner)} keeps heads on the clients; use"
                " flexlora, zero_pad, fedit or head_only"
            )
        require_watched(self.name, inner, "class means", "leave one of them out")
        self.metric, self.scale, self.memory, self.rows, self.head = metric, scale, memory, rows, head
        self.shrinkage, self.pooled = shrinkage, metric == "mahalanobis"
        self.traits = replace(
            inner.traits, exact=False, linear=False, idempotent=False, weighted=False, writes_head=True
        )
        self.traffic = inner.traffic.with_extras(dense=True)
        if self.pooled:
            self.traffic = self.traffic.with_extras(dense=True)

    def plan(self, ctx: RoundContext, client: ClientInfo, state: State) -> TrainPlan:
        return super().plan(ctx, client, state).adding("prototypes", rows=self.rows or 0)

    def broadcast(self, client: ClientInfo, ctx: RoundContext, state: State) -> Mapping[str, Tensor]:
        path = self.place(ctx.adapter.dense)
        weight = ctx.adapter.dense[f"{path}.weight"]
        room = {"means": torch.zeros(weight.shape), "shares": torch.zeros(len(weight))}
        if self.pooled:
            room["covariance"] = torch.zeros(weight.shape[1], weight.shape[1])
        sent = {f"prototypes/{path}/{name}": tensor for name, tensor in room.items()}
        return {**super().broadcast(client, ctx, state), **sent}

    def redistribute(self, adapter: AdapterState, client: ClientInfo, ctx: RoundContext, state: State) -> AdapterState:
        handed = super().redistribute(adapter, client, ctx, state)
        if "means" in state:
            return handed
        # before there are means the head is one drawn at random, which no adapter should be trained towards
        path = self.place(handed.dense)
        zeros = {n: torch.zeros_like(t) for n, t in handed.dense.items() if n in (f"{path}.weight", f"{path}.bias")}
        return replace(handed, dense={**handed.dense, **zeros})

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        outcome = super().aggregate(updates, ctx, state)
        path = self.place(ctx.adapter.dense)
        size = ctx.adapter.dense[f"{path}.weight"].shape
        channel = f"prototypes/{path}"
        sums, rows = gather(updates, channel, size)
        means, mass = self._remembered(sums, rows, state)
        kept = {**outcome.state, "means": means.float(), "rows": mass.float()}
        if self.pooled:
            kept["covariance"] = self._pooled(updates, channel, sums, rows, state)
        dense = {**outcome.adapter.dense, **self._written(path, means, mass > 0, outcome.adapter.dense, kept)}
        told = {**outcome.metrics, "labels_with_a_mean": int((mass > 0).sum())}
        return replace(outcome, adapter=replace(outcome.adapter, dense=dense), state=kept, metrics=told)

    def freeze(self, adapter: AdapterState, ctx: RoundContext, state: State) -> State:
        # a freeze leaves the function of the model as it is, and with it every mean
        kept = {name: state[name] for name in ("means", "rows", "covariance") if name in state}
        return {**super().freeze(adapter, ctx, state), **kept}

    def place(self, dense: Mapping[str, Tensor]) -> str:
        """Path of the head's last layer among the tensors trained in full.

        Raises:
            ConfigError: if there is none, it cannot be told, or the metric does not fit it.
        """
        path = self.head or find_head(dense)
        weight = dense.get(f"{path}.weight")
        if weight is None or weight.ndim != 2:
            raise ConfigError(
                f"strategy: prototypes.head is {path}, and no linear layer of that name is trained in full (these are:"
                f" {_listed(dense)})"
            )
        if self.metric != "cosine" and f"{path}.bias" not in dense:
            raise ConfigError(
                f"strategy: prototypes.metric: {self.metric} needs a bias, and {path} has none; use cosine"
            )
        return path

    def _remembered(self, sums: Tensor, rows: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Mean [C, d] of every label and the rows [C] it stands for, this round's included, in float64."""
        old, mass = state.get("means"), state.get("rows")
        if not isinstance(old, Tensor) or not isinstance(mass, Tensor):
            old, mass = torch.zeros_like(sums), torch.zeros_like(rows)
        old, mass, seen = old.double(), mass.double(), rows > 0
        before = self.memory * mass
        mixed = (before[:, None] * old + sums) / (before + rows).clamp(min=1e-30)[:, None]
        return torch.where(seen[:, None], mixed, old), torch.where(seen, before + rows, mass)

    def _pooled(
        self, updates: Sequence[Contribution], channel: str, sums: Tensor, rows: Tensor, state: State
    ) -> Tensor:
        """The covariance [d, d] around the means of labels, of all rows that these stand for.

        What a round saw of a label scatters around a mean of its own; how far that is from the one before belongs to
        the scatter too. Of the old scatter as much is left as of the rows it stands for.
        """
        round_means = sums / rows.clamp(min=1e-30)[:, None]
        scatter = gather_scatter(updates, channel, round_means)
        old, means, mass = (state.get(name) for name in ("covariance", "means", "rows"))
        if not (isinstance(old, Tensor) and isinstance(means, Tensor) and isinstance(mass, Tensor)):
            return (scatter / rows.sum().clamp(min=1e-30)).float()
        before = torch.where(rows > 0, self.memory * mass.double(), mass.double())
        apart = round_means - means.double()
        shared = before * rows / (before + rows).clamp(min=1e-30)  # 0 where only one of them has the label
        scatter = scatter + before.sum() * old.double() + apart.T @ (shared[:, None] * apart)
        return (scatter / (before + rows).sum().clamp(min=1e-30)).float()

    def _written(
        self, path: str, means: Tensor, seen: Tensor, dense: Mapping[str, Tensor], state: State
    ) -> dict[str, Tensor]:
        """The head's last layer, by name."""
        covariance = state.get("covariance")
        if self.pooled and isinstance(covariance, Tensor):
            spread = shrunk(covariance.double(), self.shrinkage)
            weight, bias = nearest_mean_head(means, seen, self.metric, self.scale, spread)
        else:
            weight, bias = nearest_mean_head(means, seen, self.metric, self.scale)
        like = dense[f"{path}.weight"]
        if f"{path}.bias" in dense:
            return {f"{path}.weight": weight.to(like), f"{path}.bias": bias.to(like)}
        if f"{path}.scale" not in dense:  # a cosine head gives a row of zeros the lowest score by itself
            weight = among_the_seen(weight, seen)
        return {f"{path}.weight": weight.to(like)}


def gather(updates: Sequence[Contribution], channel: str, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sums of features [C, d] and rows [C] of every label over all clients, in float64.

    A client has as many rows as it registered, whatever shares it claims, and its aggregation weight, which says the
    same once more, plays no part. One of weight zero is left out.
    """
    sums, rows = torch.zeros(*size, dtype=torch.float64), torch.zeros(size[0], dtype=torch.float64)
    for means, own, _ in _claims(updates, channel):
        sums += own[:, None] * means
        rows += own
    return sums, rows


def gather_scatter(updates: Sequence[Contribution], channel: str, means: Tensor) -> Tensor:
    """Scatter [d, d] of all clients' features around the round's mean of their label, in float64.

    What a client's rows scatter around its own means, and these around everybody's; the two add up exactly. A matrix
    that is no covariance counts as the nearest one.

    Args:
        means: [C, d] over all clients.
    """
    total = torch.zeros(means.shape[1], means.shape[1], dtype=torch.float64)
    for theirs, own, extras in _claims(updates, channel):
        apart = theirs - means
        total += apart.T @ (own[:, None] * apart)
        if (covariance := extras.get(f"{channel}/covariance")) is not None:
            values, vectors = torch.linalg.eigh((covariance.double() + covariance.double().T) / 2)
            total += own.sum() * (vectors * values.clamp(min=0)) @ vectors.T
    return total


def _claims(updates: Sequence[Contribution], channel: str) -> Iterator[tuple[Tensor, Tensor, Mapping[str, Tensor]]]:
    """Of every client that counts: its means [C, d], the rows [C] it may claim of each label, and all it sent."""
    for update in updates:
        means, shares = update.extras.get(f"{channel}/means"), update.extras.get(f"{channel}/shares")
        if update.weight > 0 and means is not None and shares is not None:
            claimed = shares.double().clamp(min=0)
            yield means.double(), claimed / claimed.sum().clamp(min=1) * update.client.num_examples, update.extras


def shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """The covariance [d, d] with a share of its mean variance in all directions, so that it can be inverted."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    variance = covariance.diagonal().mean()
    return (1 - shrinkage) * covariance + shrinkage * (variance if variance > 0 else 1.0) * eye


def nearest_mean_head(
    means: Tensor, seen: Tensor, metric: str, scale: float, covariance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The linear head whose largest logit is that of the nearest mean, by angle or by distance.

    Args:
        means: [C, d].
        seen: [C], which labels have one.
        covariance: [d, d], positive definite, whose distance is meant where there is one; the plain one without.

    Returns:
        weight [C, d], bias [C]. A label without a mean has a row of zeros, and a bias below all that a feature up to
        ``REACH`` times as long as the longest mean can score elsewhere. Zeros where no label has a mean.
    """
    if not seen.any():
        return torch.zeros_like(means), torch.zeros_like(means[:, 0])
    means = torch.where(seen[:, None], means, 0.0)
    lengths = torch.linalg.vector_norm(means, dim=1)
    if metric == "cosine":
        weight, bias = scale * means / lengths.clamp(min=1e-12)[:, None], torch.zeros_like(lengths)
    else:
        # -|h - m|^2 / 2 = m h - |m|^2 / 2 - |h|^2 / 2, and the last term is the same for every label
        directions = means if covariance is None else torch.linalg.solve(covariance, means.T).T
        weight, bias = scale * directions, -scale / 2 * (directions * means).sum(dim=1)
    steepest = torch.linalg.vector_norm(weight, dim=1).max()
    lowest = -REACH * lengths.max() * steepest + bias.min() - scale
    return weight, torch.where(seen, bias, lowest)


def among_the_seen(weight: Tensor, seen: Tensor) -> Tensor:
    """Rows [C, d] for a head without a bias: a label without a mean gets the mean of the other rows.

    Zeros would score above every label at more than a right angle; a mean of scores is never above the largest.
    """
    return torch.where(seen[:, None], weight, weight[seen].mean(dim=0)) if seen.any() else weight


def find_head(dense: Mapping[str, Tensor]) -> str:
    """Path of the last linear layer of a head among tensors trained in full.

    Raises:
        ConfigError: if there is none, or several and no name tells.
    """
    paths = [name.removesuffix(".weight") for name, t in dense.items() if name.endswith(".weight") and t.ndim == 2]
    found = sorted(path for path in paths if set(path.split(".")) & set(HEADS))
    if len(found) > 1:
        found = [path for path in found if path.endswith(".out_proj")] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(
            "strategy: prototypes makes the head of a classifier, and nothing of one is trained in full (these are:"
            f" {_listed(dense)}); give rows of text and label, and keep the head among lora.modules_to_save"
        )
    raise ConfigError(
        f"strategy: prototypes cannot tell which of {', '.join(found)} is the head's last layer; say so:"
        f" {{prototypes: {{head: {found[-1]}}}}}"
    )


def _listed(dense: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(dense)[:6]) or "none"
