"""What clients keep to themselves: by round, atomically, and told apart by kind and client."""

from pathlib import Path

import pytest
import torch

from clients.private_state import Private, PrivateState
from fedlora.errors import FedLoRAError


def numbered(number: float) -> Private:
    return Private({"m:A": torch.tensor([number])}, {"scaffold/m:A": torch.tensor([-number])})


def number_of(private: Private) -> float | None:
    return float(private.personal["m:A"]) if private.personal else None


def test_a_client_that_never_took_part_has_nothing(tmp_path: Path) -> None:
    private = PrivateState(tmp_path, keep=2).load("c0", 0)
    assert (dict(private.personal), dict(private.methods)) == ({}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_client_goes_on_from_the_round_that_counted_even_if_later_ones_ran_already(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=9)
    for number, accepted in ((1, 0), (3, 1), (4, 3)):  # the client sat out round 2
        kept.save("c0", number, numbered(number), accepted)
    restarted = PrivateState(tmp_path, keep=9)
    assert [number_of(restarted.load("c0", accepted)) for accepted in (0, 1, 3, 4)] == [None, 1, 3, 4]


def test_a_state_that_is_somewhere_else_is_missed_by_name(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=2)
    kept.save("c0", 2, numbered(2), 0)
    with pytest.raises(FedLoRAError, match=r"client c0 after round 5 is not at .*shared output_dir"):
        kept.load("c0", 5)


def test_personal_parts_and_what_methods_keep_are_told_apart(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=2)
    kept.save("c0", 1, Private({"m:A": torch.ones(2), ":head": torch.ones(1)}, {"scaffold/m:A": torch.zeros(3)}), 0)
    private = kept.load("c0", 1)
    assert {name: t.tolist() for name, t in private.personal.items()} == {"m:A": [1, 1], ":head": [1]}
    assert {name: t.tolist() for name, t in private.methods.items()} == {"scaffold/m:A": [0, 0, 0]}


def test_what_a_round_did_not_touch_stays_as_it_was() -> None:
    """Rounds that train A and B in turns: each has its control variate."""
    before = Private({":head": torch.ones(1)}, {"scaffold/m:B": torch.ones(1)})
    after = before.updated({}, {"scaffold/m:A": torch.zeros(1)})
    assert (list(after.personal), sorted(after.methods)) == ([":head"], ["scaffold/m:A", "scaffold/m:B"])
    assert list(before.methods) == ["scaffold/m:B"]


def test_old_rounds_are_deleted_but_never_one_that_a_resumed_run_may_start_from(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=2)
    for number in (1, 2, 5, 6, 7):
        kept.save("c0", number, numbered(number), number - 1)
    # rounds 6 and later may be repeated: round 6 starts from 5, and 5 from 2 is over for good
    assert [number_of(kept.load("c0", accepted)) for accepted in (5, 6, 7)] == [5, 6, 7]
    assert sorted(path.stem[-1] for path in tmp_path.rglob("round-*")) == ["2", "5", "6", "7"]


def test_clients_whose_names_look_alike_have_folders_of_their_own(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=2)
    names = ("a/b", "a_b", "../a_b", "A_b", "a" * 300, "a" * 301)
    for number, name in enumerate(names):
        kept.save(name, 1, numbered(number), 0)
    assert [number_of(kept.load(name, 1)) for name in names] == list(range(len(names)))
    assert {path.parent.parent for path in tmp_path.rglob("*.safetensors")} == {tmp_path}


def test_equal_states_are_equal_bytes_and_nothing_unfinished_is_left(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        PrivateState(tmp_path / folder, keep=2).save("c0", 1, numbered(1), 0)
    one, two = (list((tmp_path / folder).rglob("*.*")) for folder in ("one", "two"))
    assert [path.name for path in one] == ["round-000001.safetensors"]
    assert one[0].read_bytes() == two[0].read_bytes()


def test_a_view_of_a_larger_tensor_is_kept_as_what_it_shows(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=2)
    square = torch.arange(9.0).reshape(3, 3)
    kept.save("c0", 1, Private({"m:A": square.T, "m:B": square[:, :1]}), 0)
    personal = kept.load("c0", 1).personal
    assert personal["m:A"].tolist() == square.T.tolist()
    assert personal["m:B"].tolist() == [[0], [3], [6]]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=2)
    kept.save("c0", 1, numbered(1), 0)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FedLoRAError, match="private state .*round-000001.safetensors of client c0 is damaged"):
        kept.load("c0", 1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("a file where the folder should be")
    with pytest.raises(FedLoRAError, match="cannot write the private state"):
        PrivateState(tmp_path / "private", keep=2).save("c0", 1, numbered(1), 0)


def test_rounds_that_did_not_count_are_forgotten_and_one_that_did_is_not(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path, keep=2)
    for number, accepted in ((3, 0), (7, 3), (9, 3), (12, 3)):  # 7, 9 and 12 were refused
        kept.save("c0", number, numbered(number), accepted)
    assert number_of(kept.load("c0", 3)) == 3
    assert [path.stem for path in sorted(tmp_path.rglob("round-*"))] == ["round-000003", "round-000012"]
