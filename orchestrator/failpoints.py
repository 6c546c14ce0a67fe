"""Named places where a test can stop the process dead.

``FEDLORA_FAILPOINT=commit.renamed:2`` kills the process with SIGKILL when it reaches ``commit.renamed`` in
round 2. Nothing else happens there.
"""

import os
import signal

FAILPOINTS = (
    "round.started",
    "round.selected",
    "round.planned",
    "round.answered",
    "round.trained",
    "round.aggregated",
    "round.evaluated",
    "commit.ledger",
    "commit.begun",
    "commit.writing",
    "commit.written",
    "commit.renamed",
    "commit.pruned",
    "commit.logged",
    "commit.told",
)


def reach(name: str, round: int) -> None:
    """Die here if the environment asks for it."""
    wanted = os.environ.get("FEDLORA_FAILPOINT")
    if wanted and wanted == f"{name}:{round}":
        os.kill(os.getpid(), signal.SIGKILL)
