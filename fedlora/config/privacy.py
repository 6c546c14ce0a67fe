"""The section of a configuration that says what nobody is to learn of single clients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedlora.config.sections import Section


class SecureSumConfig(Section):
    """The server learns the sum of the clients' changes and no single one."""

    threshold: float = Field(
        0.66,
        gt=0.5,
        le=1,
        description="share of the clients asked without whom a round has no sum, 3 at least; fewer that collude learn"
        " nothing",
    )
    clip: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="every value of a change is cut to [-clip, clip] before it is sent"
    )


class LocalPrivacyConfig(Section):
    """Every client puts noise on its own change, which protects it from the server as well."""

    clip: float = Field(1.0, gt=0, allow_inf_nan=False, description="the largest Frobenius norm of a client's change")
    noise_multiplier: float = Field(
        1.0, ge=0.2, description="standard deviation of the noise on every value of a change, in units of clip"
    )
    delta: float = Field(1e-5, ge=1e-12, lt=1, description="the chance for which epsilon makes no promise")
    noise: Literal["secret", "seeded"] = Field(
        "secret",
        description="secret: from a number that each client draws once and keeps; seeded: from the run's seed, for"
        " simulations that are to be repeated byte for byte, and no protection from whoever knows it",
    )


class PrivacyConfig(Section):
    """What clients do to their changes before these leave them. Noise on the sum is a strategy: dp."""

    secure_sum: SecureSumConfig | None = Field(
        None, description="mask changes so that only their sum can be read; {} for the defaults"
    )
    local: LocalPrivacyConfig | None = Field(
        None, description="noise of each client on its own change; {} for the defaults"
    )
