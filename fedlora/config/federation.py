"""The sections of a configuration that say who meets: shards of a federation, and organisations over Flower."""

from __future__ import annotations

from pydantic import Field

from fedlora.config.sections import Section


class FederationConfig(Section):
    """One federation of all clients, or several that never learn from each other and whose models are combined."""

    shards: int = Field(
        1, ge=1, description="groups the clients are dealt into; taking a client out plays its group again, not the run"
    )


class FlowerConfig(Section):
    """The Flower pool: every SuperNode is one client, with its own rows, base model and rank."""

    nodes: int = Field(2, ge=1, description="organisations a run waits for before it starts; later ones join a resume")
    wait_s: float = Field(600.0, gt=0, description="how long it waits for them, and for a SuperLink that is away")
    poll_s: float = Field(1.0, gt=0, description="between looks for answers")
    address: str | None = Field(None, description="host:port of a SuperLink started with --isolation process")
    root_certificates: str | None = Field(None, description="PEM file of the authority that signed the SuperLink's")
    insecure: bool = Field(False, description="true speaks plain text to the SuperLink: for trying out on one machine")
    keys: dict[str, str] | None = Field(
        None, description="{client: its node's public key file}; nobody else takes part, whoever may have registered"
    )
    secret_file: str | None = Field(
        None, description="the SuperLink's --superexec-auth-secret-file, without which anybody could take the run"
    )
