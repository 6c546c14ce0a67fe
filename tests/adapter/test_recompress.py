"""Recompressing a sum of clients: against a dense float64 SVD from numpy, on every path it can take."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import recompress
from fedlora.adapter.algebra import mean_update
from fedlora.adapter.range_finder import advance, start, width
from fedlora.adapter.rank import truncate
from fedlora.adapter.recompress import best_mean, exact_up_to, truncate_sum
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.errors import AdapterError, RankError

QUIET = settings(deadline=None, derandomize=True, max_examples=60)
Terms = list[tuple[float, LowRank]]

# Both sides and both sums are above exact_up_to(10), so that only a range finder is quick enough.
WIDE = (340, 420)
IN_FACTORS = 33  # clients of rank 10: fewer components than rows, nothing to be multiplied out
AS_PRODUCT = 64  # clients of rank 10: more than twice as many components as rows


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/aggregation.py, which is a script."""
    monkeypatch.syspath_prepend("benchmarks")
    return importlib.import_module("aggregation")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_update(rows: int, columns: int, rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))


def independent(shape: tuple[int, int], rank: int, count: int, first: int = 0) -> Terms:
    """A flat spectrum: clients with nothing in common."""
    return [(1 / count, random_update(*shape, rank, first + k)) for k in range(count)]


def agreeing(shape: tuple[int, int], rank: int, count: int) -> Terms:
    """One shared update with decaying components, and a tenth of noise from every client."""
    shared, decay = random_update(*shape, rank, 1000), 0.7 ** torch.arange(rank)
    noise = [random_update(*shape, rank, k) for k in range(count)]
    return [(1 / count, LowRank(shared.B * decay + 0.1 * own.B, shared.A + 0.1 * own.A)) for own in noise]


def with_spectrum(values: np.ndarray, shape: tuple[int, int], rank: int) -> Terms:
    """Clients that hold ``rank`` consecutive singular triples each."""
    generator = np.random.default_rng(0)
    U, _ = np.linalg.qr(generator.standard_normal((shape[0], len(values))))
    V, _ = np.linalg.qr(generator.standard_normal((shape[1], len(values))))
    B, A = torch.from_numpy(U * values), torch.from_numpy(V.T.copy())
    return [(1.0, LowRank(B[:, k : k + rank], A[k : k + rank])) for k in range(0, len(values), rank)]


def product(update: LowRank) -> np.ndarray:
    return (update.folded().B.double() @ update.folded().A.double()).numpy()


def dense(terms: Terms) -> np.ndarray:
    return sum(weight * product(update) for weight, update in terms)


def smallest_error(S: np.ndarray, rank: int) -> float:
    """Eckart-Young-Mirsky: the norm of the singular values beyond ``rank``."""
    return float(np.linalg.norm(np.linalg.svd(S, compute_uv=False)[rank:]))


def error(S: np.ndarray, came: LowRank) -> float:
    return float(np.linalg.norm(S - product(came)))


def assert_balanced(came: LowRank) -> None:
    gram_B, gram_A = came.B.double().T @ came.B.double(), came.A.double() @ came.A.double().T
    assert torch.allclose(gram_B, gram_A, atol=1e-6 * float(gram_B.max()) + 1e-30)
    assert torch.allclose(gram_B, torch.diag(gram_B.diag()), atol=1e-6 * float(gram_B.max()) + 1e-30)


@QUIET
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    weights=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    repeated=st.booleans(),
    rank=st.integers(1, 16),
)
def test_a_small_sum_is_truncated_as_well_as_the_dense_optimum(shape, ranks, weights, repeated, rank) -> None:
    clients = [random_update(*shape, r, seed=0 if repeated else seed) for seed, r in enumerate(ranks)]
    terms = list(zip(weights, clients, strict=False))
    came, S = truncate_sum(terms, rank), dense(terms)
    assert (came.rank, came.shape) == (rank, shape)
    parts = sum(abs(w) * np.linalg.norm(product(u)) for w, u in terms)
    assert error(S, came) <= smallest_error(S, rank) + 1e-6 * parts  # float32 rounds the result
    assert_balanced(came)


@QUIET
@given(
    shape=st.tuples(st.integers(66, 130), st.integers(66, 130)),
    client=st.integers(4, 30),
    count=st.integers(4, 12),
    rank=st.integers(1, 40),
    alike=st.sampled_from([independent, agreeing]),
    seed=st.integers(0, 3),
)
def test_a_sum_of_a_few_hundred_components_is_still_exact(shape, client, count, rank, alike, seed) -> None:
    terms = alike(shape, client, count) if alike is agreeing else independent(shape, client, count, seed)
    S, came = dense(terms), truncate_sum(terms, rank)
    assert error(S, came) <= smallest_error(S, rank) + 1e-6 * np.linalg.norm(S)
    assert_balanced(came)


SPECTRA = {
    "independent clients": lambda count: independent(WIDE, 10, count),
    "clients that agree": lambda count: agreeing(WIDE, 10, count),
    "values like 1/i": lambda count: with_spectrum(1 / np.arange(1, 331), WIDE, 10),
    "values like 1/sqrt(i)": lambda count: with_spectrum(np.arange(1, 331) ** -0.5, WIDE, 10),
    "a step of a tenth at the cut": lambda count: with_spectrum(np.repeat([1.1, 1.0], [10, 320]), WIDE, 10),
    "a step of a half at the cut": lambda count: with_spectrum(np.repeat([1.5, 1.0], [10, 320]), WIDE, 10),
    "five large values over a flat rest": lambda count: with_spectrum(
        np.concatenate([np.full(5, 1e3), np.linspace(2, 1, 325)]), WIDE, 10
    ),
    "three times the rank and nothing beyond": lambda count: with_spectrum(
        np.concatenate([np.linspace(1, 0.5, 30), np.zeros(300)]), WIDE, 10
    ),
}


@pytest.mark.parametrize("count", [IN_FACTORS, AS_PRODUCT], ids=["in the factors", "in the product"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_large_sum_loses_at_most_a_hundredth_more_than_the_dense_optimum(spectrum: str, count: int) -> None:
    terms: Terms = SPECTRA[spectrum](count)
    if sum(update.rank for _, update in terms) == 330 and count == AS_PRODUCT:
        terms = [(weight / 3, update) for weight, update in terms] * 3  # the same sum from three times as many clients
    S, came = dense(terms), truncate_sum(terms, 10)
    assert sum(update.rank for _, update in terms) > exact_up_to(10) < min(WIDE)
    assert error(S, came) <= 1.01 * smallest_error(S, 10) + 1e-6 * np.linalg.norm(S)
    assert_balanced(came)


@pytest.mark.parametrize(
    "values",
    [np.repeat([1.2, 1.0], [40, 290]), np.repeat([1.5, 1.0], [40, 290]), np.linspace(1, 0, 330)],
    ids=["step of a fifth", "step of a half", "line"],
)
def test_a_spectrum_that_hardly_separates_is_searched_for_longer(values: np.ndarray) -> None:
    # rank 40 of 330: the passes that are enough elsewhere would lose 1.1 to 1.5 % here
    terms = with_spectrum(values, (340, 400), 10)
    S, came = dense(terms), truncate_sum(terms, 40)
    assert error(S, came) <= 1.006 * smallest_error(S, 40)


@pytest.mark.parametrize("shape", [(40, 600), (600, 40), (256, 300)], ids=["wide", "tall", "square"])
def test_a_narrow_layer_is_exact_for_any_number_of_clients(shape: tuple[int, int]) -> None:
    terms = independent(shape, 8, 70)
    S, came = dense(terms), truncate_sum(terms, 8)
    assert error(S, came) <= (1 + 1e-6) * smallest_error(S, 8)
    assert_balanced(came)


@pytest.mark.parametrize("count", [3, 70], ids=["few", "many"])
@pytest.mark.parametrize("shape", [(90, 80), WIDE], ids=["narrow", "wide"])
def test_equal_clients_give_that_client_and_zeros_beyond_its_rank(shape: tuple[int, int], count: int) -> None:
    client = random_update(*shape, 6)
    came = truncate_sum([(1 / count, client)] * count, 10)
    assert np.allclose(product(came), product(client), atol=1e-5)  # sums of six float32 products of size 1
    assert (came.B[:, :6] != 0).any(dim=0).all()
    assert (came.B[:, 6:] == 0).all()
    assert (came.A[6:] == 0).all()


@pytest.mark.parametrize("pairs", [1, 20], ids=["few", "many"])
@pytest.mark.parametrize("shape", [(90, 80), WIDE], ids=["narrow", "wide"])
def test_clients_that_cancel_leave_exact_zeros(shape: tuple[int, int], pairs: int) -> None:
    terms = [(sign / 3, random_update(*shape, 8, k)) for k in range(pairs) for sign in (1.0, -1.0)]
    came = truncate_sum(terms, 4)
    assert (came.B == 0).all()
    assert (came.A == 0).all()


@pytest.mark.parametrize("shape", [(90, 80), WIDE], ids=["narrow", "wide"])
def test_a_small_update_is_not_lost_among_large_ones_that_cancel(shape: tuple[int, int]) -> None:
    # what is left is 1e-6 of every part, and float32 rounds the parts at 1e-7
    terms = [(sign, random_update(*shape, 8, k)) for sign in (1e3, -1e3) for k in range(20)]
    small = random_update(*shape, 3, 99)
    came = truncate_sum([*terms, (1e-3, small)], 3)
    assert np.linalg.norm(product(came) - 1e-3 * product(small)) <= 1e-6 * np.linalg.norm(1e-3 * product(small))


def test_a_shared_initialisation_is_resolved_down_to_float32() -> None:
    # every A is the same up to 1e-6: the Gram matrix of the stack has condition 1e12, beyond float32
    start_A, generator = random_update(200, 180, 8).A.double(), torch.Generator().manual_seed(1)

    def client() -> LowRank:
        own = random_update(200, 180, 8, int(torch.randint(1 << 30, (), generator=generator)))
        return LowRank(own.B.double(), start_A + 1e-6 * own.A.double())

    terms = [(0.1, client()) for _ in range(10)]
    S = dense(terms)
    for rank in (4, 8, 16):
        assert error(S, truncate_sum(terms, rank)) <= (1 + 1e-4) * smallest_error(S, rank)


@pytest.mark.parametrize("count", [2, IN_FACTORS, AS_PRODUCT])
def test_updates_of_zero_sum_to_zero(count: int) -> None:
    came = truncate_sum([(1.0, LowRank(torch.zeros(340, 10), torch.zeros(10, 420)))] * count, 10)
    assert (came.B == 0).all()
    assert (came.A == 0).all()


def test_weights_of_zero_count_as_nobody() -> None:
    terms = independent((30, 20), 3, 2)
    came = truncate_sum([*terms, (0.0, random_update(30, 20, 3, 9))], 6)
    assert np.allclose(product(came), dense(terms), atol=1e-5)


def test_a_sum_of_lower_rank_than_asked_for_is_padded_with_zeros() -> None:
    terms = independent((30, 20), 2, 2)
    came = truncate_sum(terms, 7)
    assert came.rank == 7
    assert np.allclose(product(came), dense(terms), atol=1e-5)
    assert (came.B[:, 4:] == 0).all()
    assert (came.A[4:] == 0).all()


@pytest.mark.parametrize("count", [5, IN_FACTORS, AS_PRODUCT])
def test_a_sum_read_client_by_client_is_the_truncated_stack(count: int) -> None:
    terms = independent(WIDE, 10, count)
    weights, states = [w for w, _ in terms], [AdapterState({"q": u}) for _, u in terms]
    stack = mean_update(states, weights).modules["q"]
    apart = product(truncate_sum(terms, 10)) - product(truncate(stack, 10))
    # the same steps over blocks of other sizes; float32 rounds w B in the stack, and products once
    assert np.linalg.norm(apart) <= 1e-5 * np.linalg.norm(product(stack))


@pytest.mark.parametrize("count", [5, IN_FACTORS, AS_PRODUCT])
def test_the_same_clients_give_the_same_bits_whatever_else_goes_on(count: int) -> None:
    terms = independent(WIDE, 10, count)
    torch.manual_seed(1)
    one, drawn = truncate_sum(terms, 10), torch.rand(3)
    torch.manual_seed(1)
    other = best_mean([(w, AdapterState({"other": random_update(7, 5, 2), "q": u})) for w, u in terms], 10)["q"]
    assert torch.equal(one.B, other.B)
    assert torch.equal(one.A, other.A)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)  # nothing is drawn from the global generator


def test_a_whole_adapter_is_recompressed_module_by_module() -> None:
    shapes = {"small": (20, 30), "narrow": (40, 500), "wide": WIDE, "tall": WIDE[::-1]}
    clients = [
        (1 / 33, AdapterState({path: random_update(*shape, 10, 100 * k) for path, shape in shapes.items()}))
        for k in range(33)
    ]
    came = best_mean(clients, 10)
    assert list(came) == list(shapes)
    for path in shapes:
        alone = truncate_sum([(weight, state.modules[path]) for weight, state in clients], 10)
        assert torch.equal(came[path].B, alone.B)
        assert torch.equal(came[path].A, alone.A)


def test_cores_and_frozen_components_are_part_of_the_sum() -> None:
    core, frozen = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), random_update(12, 9, 2, 1)
    factors = random_update(12, 9, 3)
    with_core = LowRank(factors.B, factors.A, core)
    state = AdapterState({"q": with_core}, {}, {"q": frozen})
    came = best_mean([(0.5, state), (0.5, state)], 5)["q"]
    assert np.allclose(product(came), product(with_core) + product(frozen), atol=1e-5)
    assert np.allclose(product(truncate_sum([(2.0, with_core)], 3)), 2 * product(with_core), atol=1e-4)


def test_a_module_that_a_client_lacks_counts_as_zero() -> None:
    q, v = random_update(6, 5, 2, 1), random_update(4, 3, 2, 2)
    came = best_mean([(0.5, AdapterState({"q": q})), (0.5, AdapterState({"q": q, "v": v}))], 2)
    assert np.allclose(product(came["q"]), product(q), atol=1e-6)
    assert np.allclose(product(came["v"]), 0.5 * product(v), atol=1e-6)


class Loaded:
    """Clients that are made anew each time they are read, as from disk; counts readings and clients held."""

    def __init__(self, count: int, shape: tuple[int, int]):
        self.count, self.shape = count, shape
        self.readings = self.held = self.most_held = 0

    def __iter__(self) -> Iterator[tuple[float, AdapterState]]:
        self.readings += 1
        for k in range(self.count):
            update = random_update(*self.shape, 10, k)
            self.held += 1
            self.most_held = max(self.most_held, self.held)
            weakref.finalize(update, self._let_go)
            yield 1 / self.count, AdapterState({"q": update})
            del update

    def _let_go(self) -> None:
        self.held -= 1


@pytest.mark.parametrize("count", [IN_FACTORS, AS_PRODUCT])
def test_clients_beyond_the_small_stack_are_held_one_at_a_time(count: int) -> None:
    source = Loaded(count, WIDE)
    best_mean(source, 10)
    assert source.most_held <= exact_up_to(10) // 10 + 2  # the stack, the client that is too much, and the next
    assert source.held <= 1
    assert source.readings <= 12

    few = Loaded(10, WIDE)
    best_mean(few, 10)
    assert few.readings == 1


def test_fewer_components_than_rows_are_never_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("B @ A was formed")

    monkeypatch.setattr(recompress, "Product", refused)
    truncate_sum(independent(WIDE, 10, IN_FACTORS), 10)
    with pytest.raises(AssertionError, match="was formed"):
        truncate_sum(independent(WIDE, 10, AS_PRODUCT), 10)


@pytest.mark.parametrize("count", [3, IN_FACTORS, AS_PRODUCT])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_precision_of_the_clients_is_kept(dtype: torch.dtype, count: int) -> None:
    terms = [(w, LowRank(u.B.to(dtype), u.A.to(dtype))) for w, u in independent(WIDE, 10, count)]
    came = truncate_sum(terms, 10)
    assert came.B.dtype == came.A.dtype == dtype
    S = dense(terms)
    coarse = 0.01 if dtype in (torch.float16, torch.bfloat16) else 0
    assert error(S, came) <= 1.01 * smallest_error(S, 10) + coarse * np.linalg.norm(S)


@pytest.mark.parametrize("count", [3, IN_FACTORS, AS_PRODUCT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_client_is_changed(dtype: torch.dtype, count: int) -> None:
    terms = [(w, LowRank(u.B.to(dtype), u.A.to(dtype))) for w, u in independent(WIDE, 10, count)]
    before = [(u.B.clone(), u.A.clone()) for _, u in terms]
    truncate_sum(terms, 10)
    for (_, update), (B, A) in zip(terms, before, strict=True):
        assert torch.equal(update.B, B)
        assert torch.equal(update.A, A)


def test_a_rank_below_one_is_refused() -> None:
    terms = independent((6, 5), 2, 2)
    for rank in (0, -3):
        with pytest.raises(RankError, match=f"to rank {rank}; expected at least 1"):
            truncate_sum(terms, rank)
        with pytest.raises(RankError, match=f"to rank {rank}"):
            best_mean([(w, AdapterState({"q": u})) for w, u in terms], rank)


def test_a_sum_of_nobody_is_refused_for_a_module_and_empty_for_an_adapter() -> None:
    with pytest.raises(RankError, match="no updates to rank 3"):
        truncate_sum([], 3)
    assert best_mean([], 3) == {}


@pytest.mark.parametrize("function", [truncate_sum, best_mean])
def test_a_source_that_can_be_read_only_once_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(AdapterError, match="but a generator gives them once"):
        function((term for term in independent((6, 5), 2, 2)), 2)


def test_a_search_takes_no_more_passes_than_it_must_where_the_spectrum_ends() -> None:
    # rank 4 exactly: the first image spans it, nothing more can be gained
    S = torch.from_numpy(product(random_update(60, 50, 4)))
    search, passes = start((60, 50), 4), 0
    assert search.basis.shape == (50, width(4))
    while search.found is None:
        search, passes = advance(search, (S.T if search.transposed else S) @ search.basis), passes + 1
    U, values, Vh = search.found
    assert passes == 5
    assert torch.allclose(U * values @ Vh, S, atol=1e-9)
    assert torch.allclose(U.T @ U, torch.eye(width(4), dtype=torch.float64), atol=1e-10)
    assert torch.allclose(Vh @ Vh.T, torch.eye(width(4), dtype=torch.float64), atol=1e-10)


def test_the_benchmark_compares_both_arms_on_the_same_clients(benchmark: ModuleType) -> None:
    grid = benchmark.Grid(iter(range(1000)).__next__)  # every call takes one second
    grid.measure(benchmark.Point(96, 4, 3))
    table = grid.table().splitlines()
    assert table[2] == "| 96 | 4 | 3 | 12 | 1000 | 1000 | 1000 | 2 | 1.0000 | 1.0000 |"
    assert table[-1] == "Smallest ratio of the times 2, largest error 1.0000."
