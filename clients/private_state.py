"""What a client keeps to itself, by round: personal parts, what local methods keep, what updates left unsent.

None of it leaves the client as it is. Files are named after the round that wrote them, and a task says which of the
client's rounds counted last: a round that is repeated after a crash, or that follows a refused update, starts from what
the client had when the server last took something from it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fedlora.errors import FedLoRAError

# a control variate is called like the tensor it belongs to, and so is what its update lost
_PERSONAL, _METHODS, _UNSENT = "personal/", "methods/", "unsent/"


@dataclass(frozen=True, eq=False)
class Private:
    """What one client keeps.

    Attributes:
        personal: its own parts of the adapter, by tensor name, in effective units.
        methods: what local methods keep, by method and tensor name, such as ``scaffold/layers.0.query:A``.
        unsent: what packing has taken from its updates and the next one adds, by tensor name, in effective units.
    """

    personal: Mapping[str, Tensor] = field(default_factory=dict)
    methods: Mapping[str, Tensor] = field(default_factory=dict)
    unsent: Mapping[str, Tensor] = field(default_factory=dict)

    def updated(self, personal: Mapping[str, Tensor], methods: Mapping[str, Tensor]) -> Private:
        """With these tensors in place of those of the same name. A round may touch only some: the rest stays."""
        return replace(self, personal={**self.personal, **personal}, methods={**self.methods, **methods})


class PrivateState:
    """One folder per client.

    Args:
        root: where the folders go.
        keep: rounds back a run may be resumed from; older states are deleted.
    """

    def __init__(self, root: Path, keep: int):
        self._root, self._keep = root, keep

    def load(self, client: str, accepted: int) -> Private:
        """What the client had after the round of its last update that counted; nothing where that is 0.

        Raises:
            FedLoRAError: if the file is missing or damaged. An older state, or none, would train something else.
        """
        if not accepted:
            return Private()
        path = self._file(client, accepted)
        if not path.exists():
            raise FedLoRAError(
                f"the private state of client {client} after round {accepted} is not at {path}; whoever trains the"
                " client has to see the folder it was written to (a shared output_dir)"
            )
        try:
            tensors = safetensors.torch.load(path.read_bytes())
            return Private(*(_below(prefix, tensors) for prefix in (_PERSONAL, _METHODS, _UNSENT)))
        except Exception as error:  # safetensors raises its own type for a bad file
            raise FedLoRAError(f"the private state {path} of client {client} is damaged ({error})") from error

    def save(self, client: str, round: int, private: Private, accepted: int) -> None:
        """Keep what the client has after ``round``, atomically. Whether it counts is the server's to say.

        Args:
            accepted: round of the client's last update that counted; what came between that and ``round`` did not.

        Raises:
            FedLoRAError: if it cannot be written.
        """
        path = self._file(client, round)
        tensors = {_PERSONAL + name: tensor for name, tensor in private.personal.items()}
        tensors |= {_METHODS + name: tensor for name, tensor in private.methods.items()}
        tensors |= {_UNSENT + name: tensor for name, tensor in private.unsent.items()}
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                file.write(safetensors.torch.save({name: t.contiguous().clone() for name, t in tensors.items()}))
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
            saved = self._rounds(client)
            # the newest state from before the oldest round that may be repeated is still needed
            # (a freeze begins to count anew, and what was accepted before it may still be gone back to)
            old = [number for number in saved if number < round - self._keep]
            settled = [number for number in old if number <= (accepted or round)]
            for number in (*settled[:-1], *(n for n in old if n not in settled)):
                self._file(client, number).unlink(missing_ok=True)
        except OSError as error:
            raise FedLoRAError(f"cannot write the private state {path}: {error.strerror or error}") from error

    def holds(self, accepted: Mapping[str, int]) -> bool:
        """Whether every client that keeps anything still has what it had after these rounds."""
        kept = {client: number for client, number in accepted.items() if folder_of(self._root, client).is_dir()}
        return all(self._file(client, number).is_file() for client, number in kept.items())

    def copy(self, target: Path, accepted: Mapping[str, int]) -> None:
        """Give another run what these clients had after these rounds.

        Raises:
            FedLoRAError: if it cannot be written.
        """
        other = PrivateState(target, self._keep)
        for client, number in accepted.items():
            if self._file(client, number).is_file():
                other.save(client, number, self.load(client, number), number)

    def _rounds(self, client: str) -> list[int]:
        return list(private_files(self._root, client))

    def _file(self, client: str, round: int) -> Path:
        return folder_of(self._root, client) / f"round-{round:06d}.safetensors"


def private_files(root: Path, client: str) -> dict[int, Path]:
    """What a client keeps, by the round that wrote it, oldest first."""
    found = ((path.stem.removeprefix("round-"), path) for path in folder_of(root, client).glob("round-*.safetensors"))
    return dict(sorted((int(name), path) for name, path in found if name.isdigit()))


def write_private(path: Path, content: bytes) -> None:
    """Write a client's secret atomically, for nobody else's eyes.

    Raises:
        FedLoRAError: if it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise FedLoRAError(f"cannot write the secret {path}: {error.strerror or error}") from error


def folder_of(root: Path, client: str) -> Path:
    """Where a client keeps what is its own."""
    # a name may hold anything, slashes too; the hash keeps two that look alike apart
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in client)[:40]
    return root / f"{plain}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
