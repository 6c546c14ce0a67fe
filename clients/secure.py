"""A client's side of secure sums: what it draws, deals, holds and gives away.

Between the stages of a round its secrets wait in a file of its own, since any worker may execute any stage. They are
replaced when the next round's are drawn. What it has helped to open stays known for good: a round that is repeated
after a crash is opened over the same clients or not at all, since two sums that differ by one client tell its answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field
from torch import Tensor

from clients.private_state import folder_of, write_private
from fedlora.config import RunConfig
from fedlora.errors import SecureSumError
from fedlora.privacy.clip import shortened
from fedlora.privacy.messages import (
    AskKeys,
    AskMasked,
    AskOpened,
    AskShares,
    Message,
    Opened,
    Sealed,
    Session,
    encode_masked,
    read,
    read_request,
)
from fedlora.privacy.secure_sum import Pair, Secrets, collect, deal, mask, needed, reveal
from fedlora.privacy.summand import to_ring
from fedlora.protocol import TrainTask


class _Kept(Message):
    """What a client knows of the round it is in.

    Attributes:
        round, received: of the task whose answer is to be masked.
        session, own: once it has dealt shares.
        held, sent: once its answer went out: everybody's shares, and the SHA-256 of who is masked with and of what.
    """

    round: int
    received: str
    secrets: Secrets
    session: Session | None = None
    own: Pair | None = None
    held: dict[str, Pair] = Field(default_factory=dict)
    sent: str = ""


class SecureClient:
    """The clients of one runtime, each with its own folder.

    Args:
        root: where the folders go.
        threshold: share of a sum's clients without whom it must not open, whatever the server would be content with.
    """

    def __init__(self, root: Path, threshold: float):
        self._root, self._threshold = root, threshold

    @staticmethod
    def of(config: RunConfig, private: Path) -> SecureClient | None:
        """The clients of a configuration; None where answers travel as they are.

        Args:
            private: folder of what clients keep to themselves.
        """
        settings = config.privacy.secure_sum
        return SecureClient(private / "secure", settings.threshold) if settings else None

    def answer(self, client: str, message: bytes) -> bytes:
        """To one message of the server.

        Raises:
            SecureSumError: if it asks for what would tell more than a sum of enough clients.
            WireError: if it is no message.
        """
        request = read_request(message)
        if isinstance(request, AskKeys):
            kept = _Kept(round=request.round, received=request.received, secrets=Secrets.draw())
            self._save(client, kept)
            return kept.secrets.public().encode()
        if isinstance(request, AskShares):
            return self._deal(client, request.session).encode()
        return self._open(client, request).encode()

    def masked(self, task: TrainTask, delta: Mapping[str, Tensor], rows: int, metrics: Mapping[str, float]) -> bytes:
        """The answer to a task, which nobody can read alone.

        Args:
            delta: what was learned, by tensor name.
            rows: of the client that can be learned from.
            metrics: what it measured; those of ``fedlora.privacy.summand`` are summed, others stay here.

        Raises:
            SecureSumError: if its mask would not hide it.
        """
        if not task.mask:
            raise SecureSumError(f"{task.client} sends its change under a mask only, and the task has none")
        asked, kept = read(AskMasked, task.mask.encode()), self._load(task.client)
        session, own = kept.session, kept.own
        current = session is not None and session.id == asked.session
        if not current or (kept.round, kept.received) != (task.round, task.received):
            raise SecureSumError(f"the mask is not for the task of round {task.round}")
        assert session is not None
        assert own is not None
        held = collect(kept.secrets, session, task.client, own, asked.shares)
        weight = rows if session.heaviest > 1 else 1
        if weight > session.heaviest:
            raise SecureSumError(f"its {weight} rows weigh more than the {session.heaviest} that the sum has room for")
        change = delta if session.longest is None else shortened(delta, session.longest)
        numbers = to_ring(change, metrics, weight, session.clip, session.total)
        sent = hashlib.sha256("\n".join(sorted(held)).encode() + numbers.tobytes()).hexdigest()
        if kept.sent not in ("", sent):
            raise SecureSumError("has sent another answer under this mask; both would tell their difference")
        self._save(task.client, kept.model_copy(update={"held": held, "sent": sent}))
        return encode_masked(session.id, mask(numbers, kept.secrets, session, task.client, held))

    def _deal(self, client: str, session: Session) -> Sealed:
        kept = self._load(client)
        if (kept.round, kept.received) != (session.round, session.received):
            raise SecureSumError(f"has drawn no keys for round {session.round}")
        if session.keys.get(client) != kept.secrets.public():
            raise SecureSumError("the keys that go round as its own are others")
        if len({key for keys in session.keys.values() for key in (keys.shares, keys.masks)}) < 2 * len(session.keys):
            raise SecureSumError("two clients have the same key")
        least = needed(self._threshold, len(session.keys))
        if not least <= session.threshold <= len(session.keys):
            raise SecureSumError(
                f"the sum of {len(session.keys)} clients would open with {session.threshold}; this client takes part in"
                f" one of {least} or more of them"
            )
        if kept.session not in (None, session):
            raise SecureSumError("has dealt its shares among other clients already")
        own, sealed = deal(kept.secrets, session, client)
        self._save(client, kept.model_copy(update={"session": session, "own": own}))
        return Sealed(shares=sealed)

    def _open(self, client: str, asked: AskOpened) -> Opened:
        kept = self._load(client)
        if kept.session is None or kept.session.id != asked.session or not kept.sent:
            raise SecureSumError("has sent no answer under a mask of this sum")
        opened = reveal(kept.held, kept.session, client, asked.survivors)
        path = folder_of(self._root, client) / "opened.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        task, over = f"{kept.round} {kept.received}", sorted(set(asked.survivors))
        if before.setdefault(task, over) != over:
            raise SecureSumError(
                f"has helped to open the sum of round {kept.round} over {len(before[task])} clients, and now it is over"
                f" {'others' if len(over) == len(before[task]) else len(over)}: the two would tell what single clients"
                " sent"
            )
        write_private(path, json.dumps(before).encode())
        return opened

    def _load(self, client: str) -> _Kept:
        path = folder_of(self._root, client) / "round.json"
        if not path.exists():
            raise SecureSumError("has drawn no keys")
        return read(_Kept, path.read_bytes())

    def _save(self, client: str, kept: _Kept) -> None:
        write_private(folder_of(self._root, client) / "round.json", kept.encode())
