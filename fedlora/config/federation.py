"""The section of a configuration that says how many federations a run is made of."""

from __future__ import annotations

from pydantic import Field

from fedlora.config.sections import Section


class FederationConfig(Section):
    """One federation of all clients, or several that never learn from each other and whose models are combined."""

    shards: int = Field(
        1, ge=1, description="groups the clients are dealt into; taking a client out plays its group again, not the run"
    )
