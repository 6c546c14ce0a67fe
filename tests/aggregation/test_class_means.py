"""Heads made of class means, the server's half: by numbers that can be checked by hand."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import Aggregate, Contribution, RoundContext, compose
from fedlora.aggregation.combine import combine
from fedlora.aggregation.prototypes import among_the_seen, find_head, nearest_mean_head, shrunk
from fedlora.errors import ConfigError
from fedlora.protocol import ClientInfo
from fedlora.training.objective import among

PAIR = LowRank(torch.zeros(2, 1), torch.ones(1, 2))
HEAD = {"classifier.weight": torch.ones(3, 2), "classifier.bias": torch.ones(3)}


def sent(
    client: str,
    rows: int,
    means: list[list[float]],
    shares: list[float],
    weight: float = 1.0,
    dense: Mapping[str, Tensor] = HEAD,
) -> Contribution:
    """What a client of so many rows says of three labels."""
    adapter = AdapterState({"q": PAIR}, dense)
    extras = {
        "prototypes/classifier/means": torch.tensor(means),
        "prototypes/classifier/shares": torch.tensor(shares),
    }
    return Contribution(ClientInfo(client, 1, rows), weight, adapter, adapter, extras=extras)


def played(options: dict[str, Any], *updates: Contribution, state: Any = None, number: int = 1) -> Aggregate:
    ctx = RoundContext(number, 1, seed=0, adapter=updates[0].received)
    return combine(compose([{"prototypes": options}, "head_only"]), updates, ctx, state or {})


NOTHING = [0.0, 0.0]
C1 = sent("c1", 10, [[1.0, 0.0], [0.0, 2.0], NOTHING], [0.5, 0.5, 0.0])
C2 = sent("c2", 30, [[5.0, 4.0], NOTHING, NOTHING], [0.5, 0.0, 0.0])


def test_a_row_of_a_cosine_head_has_the_direction_of_the_mean_over_all_rows() -> None:
    # label 0: 5 rows at (1, 0) and 15 at (5, 4) have the mean (4, 3), of length 5; label 1 is c1's alone
    head = played({"scale": 2.0}, C1, C2).adapter.dense
    assert_close(head["classifier.weight"][:2], torch.tensor([[1.6, 1.2], [0.0, 2.0]]))
    assert head["classifier.bias"][:2].tolist() == [0.0, 0.0]
    assert head["classifier.weight"][2].tolist() == NOTHING


def test_a_row_of_a_euclidean_head_is_the_mean_itself() -> None:
    head = played({"metric": "euclidean", "scale": 2.0}, C1, C2).adapter.dense
    assert_close(head["classifier.weight"][:2], torch.tensor([[8.0, 6.0], [0.0, 4.0]]))
    assert head["classifier.bias"][:2].tolist() == pytest.approx([-25.0, -4.0])  # -2 * 25 / 2 and -2 * 4 / 2


def test_rows_count_once_whatever_the_aggregation_weights_are() -> None:
    heavy = [replace(C1, weight=1.0), replace(C2, weight=99.0)]
    for options in ({}, {"metric": "euclidean"}):
        light, other = played(options, C1, C2).adapter.dense, played(options, *heavy).adapter.dense
        assert all(torch.equal(light[name], other[name]) for name in light)


def test_a_client_claims_as_many_rows_as_it_registered_at_most() -> None:
    # shares of 3 and 1 of 8 rows are 6 and 2, and less than none is none
    liar = sent("c3", 8, [[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], [3.0, 1.0, -5.0])
    outcome = played({}, liar)
    assert outcome.state["rows"].tolist() == [6.0, 2.0, 0.0]
    assert outcome.metrics["labels_with_a_mean"] == 2


def test_of_earlier_rounds_a_share_counts_where_a_label_is_seen_again() -> None:
    first = played({"memory": 0.5}, sent("c1", 10, [[0.0, 0.0], [2.0, 0.0], NOTHING], [0.8, 0.2, 0.0]))
    again = sent("c1", 4, [[6.0, 0.0], NOTHING, NOTHING], [1.0, 0.0, 0.0])
    # 8 rows at 0 count as 4, and 4 more are at 6: their mean is 3. Label 1 was not seen and stays
    second = played({"memory": 0.5}, again, state=first.state, number=2)
    assert second.state["means"].tolist() == [[3.0, 0.0], [2.0, 0.0], NOTHING]
    assert second.state["rows"].tolist() == [8.0, 2.0, 0.0]
    latest = played({"memory": 0.0}, again, state=first.state, number=2)
    assert latest.state["means"][0].tolist() == [6.0, 0.0]
    assert latest.state["means"][1].tolist() == [2.0, 0.0]


def test_a_scatter_over_clients_is_that_of_all_their_rows_together() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 2, generator=draw, dtype=torch.float64) * torch.tensor([3.0, 0.5])
    labels = torch.arange(40) % 3
    owners = torch.arange(40) // 10  # client 0 has ten rows, client 1 thirty
    said = []
    for client, mine in (("c1", owners == 0), ("c2", owners > 0)):
        own, names = rows[mine], labels[mine]
        means = torch.stack([own[names == label].mean(dim=0) for label in range(3)])
        shares = torch.bincount(names, minlength=3) / len(own)
        apart = own - means[names]
        update = sent(client, len(own), means.tolist(), shares.tolist())
        covariance = {"prototypes/classifier/covariance": (apart.T @ apart / len(own)).float()}
        said.append(replace(update, extras={**update.extras, **covariance}))
    means = torch.stack([rows[labels == label].mean(dim=0) for label in range(3)])
    apart = rows - means[labels]
    options = {"metric": "mahalanobis", "memory": 1.0}
    first = played(options, *said)
    assert_close(first.state["covariance"].double(), apart.T @ apart / 40, atol=1e-5, rtol=1e-5)
    # the same rows once more change neither means nor covariance
    second = played(options, *said, state=first.state, number=2)
    assert_close(second.state["covariance"], first.state["covariance"])
    # and one client after the other gives what both together give
    half = played(options, said[0])
    whole = played(options, said[1], state=half.state, number=2)
    assert_close(whole.state["covariance"], first.state["covariance"], atol=1e-5, rtol=1e-5)


def test_a_matrix_that_is_no_covariance_counts_as_the_nearest_one() -> None:
    update = sent("c1", 10, [[1.0, 0.0], [0.0, 2.0], NOTHING], [0.5, 0.5, 0.0])
    liar = {"prototypes/classifier/covariance": torch.tensor([[2.0, 0.0], [0.0, -1000.0]])}
    state = played({"metric": "mahalanobis"}, replace(update, extras={**update.extras, **liar})).state
    assert_close(state["covariance"], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_what_else_is_trained_in_full_is_still_averaged() -> None:
    pooled = [
        sent(name, 10, [[1.0, 0.0]] * 3, [0.5, 0.5, 0.0], weight, {**HEAD, "pooler.weight": torch.full((2, 2), value)})
        for name, weight, value in (("c1", 1.0, 4.0), ("c2", 3.0, 8.0))
    ]
    dense = played({}, *pooled).adapter.dense
    assert dense["pooler.weight"].tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert torch.equal(dense["classifier.weight"][0], torch.tensor([1.0, 0.0]))


def test_a_freeze_keeps_the_means_and_only_the_first_round_is_handed_a_head_of_zeros() -> None:
    strategy = compose(["prototypes", "flexlora"])
    ctx = RoundContext(1, 1, 0, C1.received)
    client = ClientInfo("c1", 1, 10)
    handed = strategy.redistribute(C1.received, client, ctx, {})
    assert not handed.dense["classifier.weight"].any()
    outcome = combine(strategy, [C1, C2], ctx, {})
    kept = strategy.freeze(outcome.adapter, ctx, outcome.state)
    assert torch.equal(kept["means"], outcome.state["means"])
    handed = strategy.redistribute(outcome.adapter, client, ctx, kept)
    assert torch.equal(handed.dense["classifier.weight"], outcome.adapter.dense["classifier.weight"])


def random_means(labels: int = 12, size: int = 6) -> tuple[Tensor, Tensor]:
    """Means, and features around them."""
    draw = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(labels, size, generator=draw, dtype=torch.float64)
    features = means.repeat_interleave(40, 0) + 2 * torch.randn(40 * labels, size, generator=draw, dtype=torch.float64)
    return means, features


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "mahalanobis"])
def test_the_largest_logit_is_that_of_the_nearest_mean(metric: str, scale: float) -> None:
    means, features = random_means()
    spread = torch.diag(torch.linspace(0.1, 5.0, means.shape[1], dtype=torch.float64))
    spread[0, 1] = spread[1, 0] = 0.05
    covariance = shrunk(spread, 0.1) if metric == "mahalanobis" else None
    weight, bias = nearest_mean_head(means, torch.ones(12, dtype=torch.bool), metric, scale, covariance)
    came = linear(features, weight, bias).argmax(dim=1)
    if metric == "cosine":
        nearest = torch.cosine_similarity(features[:, None], means, dim=2).argmax(dim=1)
    elif covariance is not None:
        apart = features[:, None] - means
        nearest = torch.einsum("ncd,de,nce->nc", apart, covariance.inverse(), apart).argmin(dim=1)
    else:
        nearest = torch.cdist(features, means).argmin(dim=1)
    assert torch.equal(came, nearest)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_label_without_a_mean_never_wins_against_one_that_has_it(metric: str) -> None:
    means, features = random_means()
    seen = torch.arange(12) % 3 == 0
    weight, bias = nearest_mean_head(means, seen, metric, 2.0)
    # as long as the longest mean and pointing away from everything that has been seen, too
    away = -torch.nn.functional.normalize(means[seen].mean(0, keepdim=True), dim=1) * means.norm(dim=1).max()
    logits = linear(torch.cat([features, away]), weight, bias)
    assert seen[logits.argmax(dim=1)].all()
    assert seen[among(logits, [0, 1, 2, 3, 4]).argmax(dim=1)].all()  # 0 and 3 of these have one
    # among labels of which none has a mean, nobody is favoured
    chances = among(logits, [1, 2, 4]).softmax(dim=1)[:, [1, 2, 4]]
    assert torch.allclose(chances, torch.full_like(chances, 1 / 3))


def test_without_a_bias_a_label_without_a_mean_scores_as_the_others_do_on_average() -> None:
    means, features = random_means()
    seen = torch.arange(12) % 3 == 0
    weight, _ = nearest_mean_head(means, seen, "cosine", 1.0)
    logits = linear(torch.cat([features, -features]), among_the_seen(weight, seen))
    assert seen[logits.argmax(dim=1)].all()
    assert torch.allclose(logits[:, 1], logits[:, seen].mean(dim=1))


def test_the_head_is_found_by_its_name() -> None:
    weight, bias = torch.zeros(3, 2), torch.zeros(3)
    square = torch.zeros(2, 2)
    for names, found in (
        (["classifier", "bert.pooler.dense"], "classifier"),
        (["score"], "score"),
        (["classifier.dense", "classifier.out_proj"], "classifier.out_proj"),
    ):
        dense = {f"{name}.weight": square if "dense" in name else weight for name in names} | {"x.bias": bias}
        assert find_head(dense) == found


@pytest.mark.parametrize(
    ("options", "dense", "message"),
    [
        ({}, {}, r"nothing of one is trained in full \(these are: none\); give rows of text and label"),
        ({}, {"bert.pooler.dense.weight": torch.zeros(2, 2)}, "these are: bert.pooler.dense.weight"),
        (
            {},
            {"classifier.0.weight": torch.zeros(2, 2), "classifier.2.weight": torch.zeros(3, 2)},
            "which of classifier.0, classifier.2 .* say so: {prototypes: {head: classifier.2}}",
        ),
        ({"head": "clasifier"}, HEAD, "prototypes.head is clasifier, and no linear layer of that name"),
        (
            {"metric": "mahalanobis"},
            {"score.weight": torch.zeros(3, 2)},
            "mahalanobis needs a bias, and score has none",
        ),
        ({"metric": "euclidean"}, {"score.weight": torch.zeros(3, 2)}, "euclidean needs a bias, and score has none"),
    ],
)
def test_a_head_that_cannot_be_made_is_refused(options: dict, dense: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([{"prototypes": options}, "flexlora"]).place(dense)


def test_a_head_may_be_named() -> None:
    dense = {"classifier.0.weight": torch.zeros(2, 2), "classifier.2.weight": torch.zeros(3, 2)}
    assert compose([{"prototypes": {"head": "classifier.2"}}, "flexlora"]).place(dense) == "classifier.2"
