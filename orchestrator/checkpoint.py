"""Checkpoints: written aside, synced, renamed into place, and verified by hash before they are believed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from fedlora.errors import CheckpointError
from orchestrator.failpoints import reach
from orchestrator.state import SCHEMA, RunState, pack, unpack
from orchestrator.stores.files import sync_folder, write_atomic, writing

_STATE, _TENSORS, _MANIFEST = "state.json", "tensors.safetensors", "manifest.json"


def commit(folder: Path, state: RunState, keep: int, check: Callable[[], None] = lambda: None) -> None:
    """Make a round durable: after this returns, a crash loses nothing of it.

    Args:
        keep: checkpoints that stay.
        check: called before anything is written and right before the round becomes true; raises where this process must
            not write any more.

    Raises:
        RunFolderError: if the disk refuses; older checkpoints are untouched.
    """
    check()
    root = folder / "checkpoints"
    target = root / _name(state.round)
    scratch = root / f".{target.name}.{os.getpid()}"
    note, tensors = pack(state)
    files = {
        _TENSORS: safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}),
        _STATE: json.dumps(note).encode(),  # with an indent it takes three times as long
    }
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[_MANIFEST] = json.dumps(manifest, indent=1).encode()
    for entry in state.ledger.entries:
        # before the checkpoint that names it; content-addressed, so each is written once. Those of this round always:
        # when a round is repeated because its file was damaged, that file is still there
        path = _patch_file(folder, entry.payload_sha256)
        if not path.exists() or entry.provenance.get("round") == state.round:
            write_atomic(path, entry.payload)
    reach("commit.ledger", state.round)
    with writing(target):
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".round-*"):
            shutil.rmtree(leftover)
        scratch.mkdir()
        reach("commit.begun", state.round)
        for name, content in files.items():
            write_atomic(scratch / name, content)
            reach("commit.writing", state.round)
        sync_folder(scratch)
        reach("commit.written", state.round)
        check()
        if target.exists():  # a damaged one that was passed over when the run was resumed
            shutil.rmtree(target)
        scratch.rename(target)
        sync_folder(root)
        reach("commit.renamed", state.round)
        # prune only after the rename: a crash in between must leave a loadable checkpoint
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    reach("commit.pruned", state.round)


def load_latest(folder: Path) -> tuple[RunState | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not.

    Raises:
        CheckpointError: if there are checkpoints but none can be used.
    """
    problems: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return load(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("no usable checkpoint: " + "; ".join(problems))
    return None, []


def load(path: Path) -> RunState:
    """Read one checkpoint.

    Raises:
        CheckpointError: truncated, altered, or of another schema.
    """
    contents = _verified(path, (_STATE, _TENSORS))
    try:
        note = json.loads(contents[_STATE])
        patches = _read_patches(path.parent.parent, [entry["payload"] for entry in note.get("ledger", [])])
        state = unpack(note, safetensors.torch.load(contents[_TENSORS]), patches)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if path.name != _name(state.round):
        raise CheckpointError(f"{path} holds round {state.round}; it was renamed or swapped")
    return state


def read_note(path: Path) -> dict[str, Any]:
    """What one checkpoint says of its run, as plain data: everything but the tensors.

    Raises:
        CheckpointError: truncated, altered, or of another schema.
    """
    note: dict[str, Any] = json.loads(_verified(path, (_STATE,))[_STATE])
    if note.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has schema {note.get('schema')!r}; this version of fedlora reads {SCHEMA}")
    return note


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first; by number, since names stop sorting after round 9999."""
    found = [p for p in (folder / "checkpoints").glob("round-*") if p.name.removeprefix("round-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def _verified(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Files of a checkpoint, as the manifest knows them."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        contents = {name: (path / name).read_bytes() for name in names}
        damaged = [n for n, content in contents.items() if hashlib.sha256(content).hexdigest() != manifest[n]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is incomplete ({error})") from error
    if damaged:
        raise CheckpointError(f"{path}/{damaged[0]} is truncated or altered (its SHA-256 differs from the manifest)")
    return contents


def _patch_file(folder: Path, digest: str) -> Path:
    return folder / "ledger" / f"{digest}.safetensors"


def _read_patches(folder: Path, digests: Sequence[str]) -> dict[str, bytes]:
    patches = {}
    for digest in digests:
        path = _patch_file(folder, digest)
        try:
            patches[digest] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"the ledger entry {path} cannot be read ({error.strerror})") from error
        if hashlib.sha256(patches[digest]).hexdigest() != digest:
            raise CheckpointError(f"the ledger entry {path} is truncated or altered")
    return patches


def _name(round: int) -> str:
    return f"round-{round:04d}"
