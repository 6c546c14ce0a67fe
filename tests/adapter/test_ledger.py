"""The base ledger: entries follow from each other, nobody misses one, and a compaction says what it cost."""

import json

import pytest
import torch

from fedlora.adapter.ledger import BaseLedger, restored
from fedlora.adapter.state import LowRank
from fedlora.errors import AdapterError


def patch(seed: int, rank: int = 2, size: tuple[int, int] = (6, 5)) -> dict[str, LowRank]:
    draw = torch.Generator().manual_seed(seed)
    return {"q": LowRank(torch.randn(size[0], rank, generator=draw), torch.randn(rank, size[1], generator=draw))}


def ledger(count: int) -> BaseLedger:
    made = BaseLedger()
    for number in range(count):
        made = made.append(patch(number), "patch", {"round": number + 1, "contributors": {"c1": 2}})
    return made


def dense(modules) -> torch.Tensor:
    return modules["q"].B.double() @ modules["q"].A.double()


def test_the_total_is_the_sum_of_all_patches() -> None:
    expected = sum(dense(patch(number)) for number in range(3))
    assert torch.allclose(dense(ledger(3).total()), expected)
    assert ledger(3).rank() == 6


def test_an_empty_ledger_is_the_base_as_it_was() -> None:
    assert (BaseLedger().head, BaseLedger().patches(), BaseLedger().total(), BaseLedger().rank()) == ("", (), {}, 0)


def test_appending_leaves_the_old_ledger_as_it_was() -> None:
    two = ledger(2)
    head = two.head
    two.append(patch(9), "patch", {})
    assert (two.head, len(two.entries)) == (head, 2)


def test_a_client_catches_up_from_wherever_it_stopped() -> None:
    whole = ledger(4)
    ids = [entry.id for entry in whole.entries]
    for have in range(5):
        head = ids[have - 1] if have else ""
        assert [p.id for p in whole.missing(head)] == ids[have:]


def test_after_a_compaction_everyone_who_was_behind_gets_it_and_what_follows() -> None:
    three = ledger(3)
    compacted, error = three.compacted(max_rank=5, provenance={"round": 3})
    later = compacted.append(patch(7), "patch", {"round": 4})
    assert error < 1e-6  # rank 5 is all a 6 x 5 matrix has
    for head in ("", three.entries[0].id, three.head):
        assert [p.id for p in later.missing(head)] == [compacted.head, later.head]
    assert [p.id for p in later.missing(compacted.head)] == [later.head]
    assert torch.allclose(dense(later.total()), dense(three.total()) + dense(patch(7)), atol=1e-5)


def test_a_compaction_to_fewer_ranks_reports_the_error_of_the_best_approximation() -> None:
    three = ledger(3)
    compacted, error = three.compacted(max_rank=2, provenance={"round": 3})
    S = torch.linalg.svdvals(dense(three.total()))
    assert error == pytest.approx(float(torch.linalg.norm(S[2:]) / torch.linalg.norm(S)), rel=1e-5)
    assert compacted.entries[-1].provenance["relative_error"] == error
    assert compacted.rank() == 2
    assert len(compacted.entries) == 4  # nothing is taken away


def test_what_stands_in_for_others_is_the_base_from_then_on_and_they_stay_to_be_found() -> None:
    head = {"head": torch.ones(2)}
    first = BaseLedger().append(patch(1), "merge", {"task": 0}).append(patch(2), "merge", {"task": 1}, dense=head)
    merged = first.replaced(patch(3), "merged", {"combines": [entry.id for entry in first.entries]})
    assert [entry.kind for entry in merged.active] == ["merged"]
    assert torch.allclose(dense(merged.total()), dense(patch(3)))
    assert torch.equal(merged.entries[-1].adapter().dense["head"], head["head"])
    assert [entry.id for entry in merged.of_kind("merge")] == merged.entries[-1].provenance["combines"]
    later = merged.append(patch(4), "merge", {"task": 2})
    for stopped in ("", first.entries[0].id, first.head):
        assert [p.id for p in later.missing(stopped)] == [merged.head, later.head]
    assert [p.id for p in later.missing(merged.head)] == [later.head]


def test_the_adapter_of_a_task_is_kept_and_is_no_part_of_the_base() -> None:
    one = ledger(1)
    kept = one.append(patch(8), "task", {"task": 0}, dense={"head": torch.ones(2)})
    assert (kept.active, kept.rank()) == (one.active, one.rank())
    assert torch.equal(dense(kept.total()), dense(one.total()))
    assert kept.missing(one.head) == ()
    later = kept.append(patch(9), "patch", {})
    assert [p.id for p in later.missing(kept.head)] == [later.head]  # whoever has the task has all before it
    (entry,) = later.of_kind("task")
    assert torch.equal(dense(entry.modules()), dense(patch(8)))
    assert torch.equal(entry.adapter().dense["head"], torch.ones(2))
    compacted, _ = later.compacted(5, {})
    assert [entry.kind for entry in compacted.active] == ["compaction"]
    assert torch.allclose(dense(compacted.total()), dense(one.total()) + dense(patch(9)), atol=1e-5)


def test_equal_patches_with_another_history_have_other_ids() -> None:
    one = BaseLedger().append(patch(1), "patch", {"round": 1})
    other = BaseLedger().append(patch(1), "patch", {"round": 2})
    assert one.entries[0].payload == other.entries[0].payload
    assert one.head != other.head


def test_notes_and_payloads_restore_the_ledger() -> None:
    made, _ = ledger(3).compacted(4, {"round": 3})
    saved = [(json.loads(json.dumps(entry.note())), entry.payload) for entry in made.entries]
    assert restored(saved).head == made.head


@pytest.mark.parametrize("change", ["payload", "round", "order", "left out"])
def test_an_altered_entry_is_refused(change: str) -> None:
    saved = [(dict(entry.note()), entry.payload) for entry in ledger(3).entries]
    if change == "payload":
        saved[1] = (saved[1][0], saved[0][1])
    elif change == "round":
        saved[0] = ({**saved[0][0], "provenance": {"round": 9}}, saved[0][1])
    elif change == "order":
        saved[0], saved[1] = saved[1], saved[0]
    else:
        del saved[1]
    with pytest.raises(AdapterError, match=r"ledger entry \d is altered or out of order"):
        restored(saved)
