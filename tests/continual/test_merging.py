"""Merging rules against dense matrices, entry by entry where a rule decides entry by entry."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapter.algebra import inner
from fedlora.adapter.rank import pad
from fedlora.adapter.state import LowRank
from fedlora.continual.merging import MERGE_RULES, depth_factors, merge
from fedlora.errors import AdapterError, ConfigError, RankError

QUIET = settings(deadline=None, derandomize=True, max_examples=40)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
RANKS = st.lists(st.integers(1, 5), min_size=1, max_size=4)
Q, V = "layers.0.q", "layers.1.v"
OPTIONS: dict[str, dict[str, Any]] = {"lines": {"alpha": 0.5}}


def random_update(rows: int, columns: int, rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))


def task(seed: int, rank: int = 2, shape: tuple[int, int] = (7, 6)) -> dict[str, LowRank]:
    return {Q: random_update(*shape, rank, seed), V: random_update(*shape[::-1], rank, 100 + seed)}


def product(update: LowRank) -> Tensor:
    update = update.folded()
    return update.B.double() @ update.A.double()


def single(matrix: list[list[float]]) -> dict[str, LowRank]:
    """A task whose update of Q is this matrix."""
    B = torch.tensor(matrix)
    return {Q: LowRank(B, torch.eye(B.shape[1]))}


def close(came: LowRank, expected: Tensor) -> bool:
    """Equal but for float32 factors: a few times 1e-7 of the largest entries."""
    return torch.allclose(product(came), expected.double(), rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def elected(products: Sequence[Tensor], density: float) -> Tensor:
    """TIES one entry at a time, as algorithm 1 of the paper has it."""
    trimmed = []
    for S in products:
        threshold = S.abs().flatten().sort(descending=True).values[max(1, round(density * S.numel())) - 1]
        trimmed.append(torch.where(S.abs() >= threshold, S, 0.0))
    result = torch.zeros_like(products[0])
    for place in range(result.numel()):
        values = [float(S.flatten()[place]) for S in trimmed]
        agreeing = [value for value in values if value * sum(values) > 0]
        result.view(-1)[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@QUIET
@given(shape=SIZES, ranks=RANKS)
def test_sum_and_mean_are_those_of_the_multiplied_updates(shape, ranks) -> None:
    tasks = [task(seed, rank, shape) for seed, rank in enumerate(ranks)]
    total, error = merge("sum", tasks, rank=20)
    mean, _ = merge("mean", tasks, rank=20)
    for path in (Q, V):
        expected = sum(product(one[path]) for one in tasks)
        assert close(total[path], expected)
        assert close(mean[path], expected / len(tasks))
        assert total[path].rank == min(*shape, sum(ranks))  # nothing is padded up to 20
    assert error < 1e-6


def test_a_core_is_part_of_the_update() -> None:
    plain = random_update(5, 4, 2)
    merged, _ = merge("sum", [{Q: LowRank(plain.B, plain.A, torch.diag(torch.tensor([2.0, 3.0])))}], rank=2)
    assert close(merged[Q], product(LowRank(plain.B * torch.tensor([2.0, 3.0]), plain.A)))


def test_ties_by_hand() -> None:
    tasks = [
        single([[4.0, 3.0, 0.1, 2.0]]),
        single([[2.0, -5.0, 0.1, -2.0]]),
        single([[-1.0, -3.0, 9.0, 0.1]]),
    ]
    # of four entries three are kept. 4 + 2 - 1 > 0: mean of 4 and 2; 3 - 5 - 3 < 0: mean of -5 and -3;
    # 9 alone; 2 and -2 weigh the same
    merged, _ = merge("ties", tasks, rank=1, density=0.75)
    assert close(merged[Q], torch.tensor([[3.0, -4.0, 9.0, 0.0]]))


@QUIET
@given(shape=SIZES, ranks=RANKS, density=st.sampled_from([0.01, 0.2, 0.5, 1.0]))
def test_ties_is_that_of_the_paper(shape, ranks, density) -> None:
    tasks = [task(seed, rank, shape) for seed, rank in enumerate(ranks)]
    merged, _ = merge("ties", tasks, rank=9, density=density)
    for path in (Q, V):
        assert close(merged[path], elected([product(one[path]) for one in tasks], density))


def test_dare_is_the_sum_on_average() -> None:
    tasks = [task(0), task(1)]
    draws = torch.stack([product(merge("dare", tasks, 6, seed, p=0.5)[0][Q]) for seed in range(400)])
    first, second = product(tasks[0][Q]), product(tasks[1][Q])
    # at p = 1/2 an entry is 0 or twice itself: its standard deviation is its magnitude. 42 means, five of theirs
    deviation = (first**2 + second**2).sqrt() / 400**0.5
    assert ((draws.mean(0) - (first + second)).abs() < 5 * deviation).all()


def test_dare_keeps_or_drops_whole_entries() -> None:
    update = task(0)
    ratio = product(merge("dare", [update], 6, p=0.75)[0][Q]) / product(update[Q])
    kept = ratio > 2
    assert torch.allclose(ratio, torch.where(kept, 4.0, 0.0).double(), atol=1e-3)  # float32 next to entries near zero
    assert 0 < kept.sum() < 21  # of 42, one quarter expected


def test_dare_draws_the_same_for_a_seed_and_a_place() -> None:
    def merged(seed: int, *tasks: dict[str, LowRank]) -> Tensor:
        return product(merge("dare", tasks, 6, seed, p=0.5)[0][Q])

    one, other = task(0), task(1)
    assert torch.equal(merged(3, one, other), merged(3, one, other))
    assert not torch.allclose(merged(3, one, other), merged(4, one, other))
    # tasks, and modules of equal shape, draw for themselves
    assert not torch.allclose(merged(3, one, one), 2 * merged(3, one))
    square = random_update(6, 6, 2)
    both, _ = merge("dare", [{Q: square, V: square}], 6, p=0.5)
    assert not torch.allclose(product(both[Q]), product(both[V]))


def test_dare_may_take_the_mean_and_drop_nothing() -> None:
    tasks = [task(0), task(1)]
    merged, _ = merge("dare", tasks, 6, p=0.0, mean=True)
    assert close(merged[Q], (product(tasks[0][Q]) + product(tasks[1][Q])) / 2)


@QUIET
@given(shape=SIZES, ranks=RANKS)
def test_orthogonal_projects_every_task_off_the_sum_so_far(shape, ranks) -> None:
    tasks = [task(seed, rank, shape) for seed, rank in enumerate(ranks)]
    merged, _ = merge("orthogonal", tasks, rank=9)
    for path in (Q, V):
        total = product(tasks[0][path])
        for one in tasks[1:]:
            # the parts are orthogonal, so their sum has the rows and columns of all of them
            inverse = torch.linalg.pinv(total, rtol=1e-7)
            left, right = total @ inverse, inverse @ total
            total = total + (product(one[path]) - left @ product(one[path])) @ (torch.eye(len(right)) - right)
        assert close(merged[path], total)


def test_the_parts_of_an_orthogonal_merge_have_inner_product_zero() -> None:
    tasks = [task(seed) for seed in range(3)]
    sums = [merge("orthogonal", tasks[: count + 1], rank=6)[0][Q] for count in range(3)]
    parts = [sums[0], _difference(sums[1], sums[0]), _difference(sums[2], sums[1])]
    sizes = [float(inner(part, part)) ** 0.5 for part in parts]
    for left in range(3):
        assert sizes[left] > 0.1
        for right in range(left):
            assert abs(inner(parts[left], parts[right])) < 1e-5 * sizes[left] * sizes[right] + 1e-5


def _difference(left: LowRank, right: LowRank) -> LowRank:
    return LowRank(torch.cat([left.B, -right.B], dim=1), torch.cat([left.A, right.A], dim=0))


def test_the_first_task_of_an_orthogonal_merge_stays_whole_so_order_matters() -> None:
    # [1 1; 0 0] uses the first row and the direction (1, 1); [1 0; 0 1] keeps the second row and (1, -1) of itself
    flat, square = single([[1.0, 1.0], [0.0, 0.0]]), single([[1.0, 0.0], [0.0, 1.0]])
    merged, _ = merge("orthogonal", [flat, square], rank=2)
    assert close(merged[Q], torch.tensor([[1.0, 1.0], [-0.5, 0.5]]))
    # the other way round nothing is left for [1 1; 0 0]
    merged, _ = merge("orthogonal", [square, flat], rank=2)
    assert close(merged[Q], torch.eye(2))


def test_directions_that_a_task_has_but_does_not_use_are_left_to_later_ones() -> None:
    update = task(0)
    idle = {path: LowRank(torch.zeros_like(u.B), u.A) for path, u in update.items()}
    padded = {path: pad(u, 4) for path, u in task(1, rank=1).items()}
    assert close(merge("orthogonal", [idle, update], rank=6)[0][Q], product(update[Q]))
    with_padding, _ = merge("orthogonal", [padded, update], rank=6)
    assert close(with_padding[Q], product(merge("orthogonal", [task(1, rank=1), update], rank=6)[0][Q]))


def test_a_task_repeated_adds_nothing_to_an_orthogonal_merge() -> None:
    merged, _ = merge("orthogonal", [task(0), task(0), task(1)], rank=6)
    assert close(merged[Q], product(merge("orthogonal", [task(0), task(1)], rank=6)[0][Q]))


def test_depth_factors_grow_linearly_from_the_first_layer_to_the_last() -> None:
    paths = [f"model.layers.{layer}.mlp.experts.7.up_proj" for layer in range(5)]
    factors = depth_factors(["lm_head", *paths], alpha=0.2, beta=1.0)
    assert factors == pytest.approx(dict(zip(["lm_head", *paths], [0.2, 0.2, 0.4, 0.6, 0.8, 1.0], strict=True)))


def test_depth_is_that_of_the_model_where_only_some_layers_have_adapters() -> None:
    factors = depth_factors(["h.6.attn", "h.9.attn"], alpha=0.0, beta=1.0, layers=13)
    assert factors == pytest.approx({"h.6.attn": 0.5, "h.9.attn": 0.75})


def test_a_single_layer_is_the_last() -> None:
    assert depth_factors(["h.0.attn"], alpha=0.25, beta=0.75) == {"h.0.attn": 0.75}


@pytest.mark.parametrize(("over", "options"), [("sum", {}), ("orthogonal", {}), ("ties", {"density": 0.5})])
def test_lines_scales_what_another_rule_merges(over: str, options: dict[str, float]) -> None:
    tasks = [task(0), task(1)]
    plain, _ = merge(over, tasks, rank=6, **options)
    merged, _ = merge("lines", tasks, rank=6, alpha=0.5, beta=2.0, over=over, **options)
    assert close(merged[Q], 0.5 * product(plain[Q]))  # layer 0
    assert close(merged[V], 2.0 * product(plain[V]))  # layer 1


def test_layers_are_read_from_module_paths_or_refused() -> None:
    with pytest.raises(AdapterError, match="no module path has a layer number: classifier, pooler"):
        depth_factors(["classifier", "pooler"], 0.5, 1.0)
    with pytest.raises(ConfigError, match="lines.layers is at least 10, as the module paths show, not 6"):
        depth_factors(["h.9.attn"], 0.5, 1.0, layers=6)


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_the_error_is_that_of_the_best_approximation_of_all_modules(rule: str) -> None:
    tasks, options = [task(seed) for seed in range(3)], OPTIONS.get(rule, {})
    whole, none = merge(rule, tasks, 6, **options)
    merged, error = merge(rule, tasks, 2, **options)
    singular = {path: torch.linalg.svdvals(product(whole[path])) for path in whole}
    lost = torch.cat([values[2:] for values in singular.values()]).norm()
    assert error == pytest.approx(float(lost / torch.cat(list(singular.values())).norm()), rel=1e-4)
    apart = torch.stack([(product(whole[path]) - product(merged[path])).norm() for path in whole]).norm()
    assert apart == pytest.approx(float(lost), rel=1e-4)
    assert none < 1e-6
    assert {update.rank for update in merged.values()} == {2}


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_every_rule_answers_in_the_precision_of_the_first_task_and_changes_nothing(rule: str) -> None:
    tasks = [{path: LowRank(u.B.bfloat16(), u.A.bfloat16()) for path, u in task(seed).items()} for seed in range(2)]
    before = [update.B.clone() for one in tasks for update in one.values()]
    merged, _ = merge(rule, tasks, 3, **OPTIONS.get(rule, {}))
    assert {(u.B.dtype, u.A.dtype) for u in merged.values()} == {(torch.bfloat16, torch.bfloat16)}
    after = [update.B for one in tasks for update in one.values()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_every_rule_merges_updates_that_are_zero(rule: str) -> None:
    zero = {path: LowRank(torch.zeros_like(u.B), u.A) for path, u in task(0).items()}
    merged, error = merge(rule, [zero, zero], 2, **OPTIONS.get(rule, {}))
    assert error == 0.0
    assert all(not update.B.any() for update in merged.values())


@pytest.mark.parametrize("rule", ["sum", "mean", "orthogonal", "lines"])
def test_linear_rules_never_multiply_out(rule: str) -> None:
    size = 300_000  # squared: 360 GB in float32
    merged, error = merge(
        rule, [{Q: random_update(size, size, 1, seed)} for seed in range(2)], 2, **OPTIONS.get(rule, {})
    )
    assert merged[Q].shape == (size, size)
    assert error < 1e-6


def test_a_module_larger_than_what_is_solved_exactly_is_merged_as_well() -> None:
    # 280 x 300 is above exact_up_to(2); one component holds nearly everything, so the search cannot miss it
    strong = LowRank(torch.ones(280, 1), torch.ones(1, 300))
    merged, error = merge("ties", [{Q: strong}, {Q: strong}], 2, density=1.0)
    assert close(merged[Q], torch.ones(280, 300))
    assert error < 1e-5


def test_updates_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(AdapterError, match="no updates to merge; give the modules of at least one task"):
        merge("sum", [], 4)
    with pytest.raises(AdapterError, match=r"layers.1.v: \(6, 7\) in task 0 but absent in task 1; merge adapters"):
        merge("sum", [task(0), {Q: task(1)[Q]}], 4)
    with pytest.raises(AdapterError, match=r"layers.0.q: \(7, 6\) in task 0 but \(5, 6\) in task 2"):
        merge("sum", [task(0), task(1), task(2, shape=(5, 6))], 4)
    with pytest.raises(RankError, match="to rank 0; expected at least 1"):
        merge("sum", [task(0)], 0)


def test_a_rule_that_is_not_known_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="merge rule: orthogonl is not known; did you mean orthogonal?"):
        merge("orthogonl", [task(0)], 4)
    with pytest.raises(ConfigError, match="merge rule: means is not known; did you mean mean?"):
        merge("lines", [task(0)], 4, alpha=0.5, over="means")


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("sum", {"density": 0.5}, "sum does not take these options"),
        ("lines", {}, "lines does not take these options: .* missing .* 'alpha'"),
        ("ties", {"density": 0.0}, "ties.density is a share above 0 and up to 1, not 0.0"),
        ("dare", {"p": 1.0}, "dare.p is a share from 0 to below 1, not 1.0"),
    ],
)
def test_options_that_a_rule_cannot_use_are_refused(rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(rule, [task(0)], 4, **options)
