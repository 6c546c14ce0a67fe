"""The section of a configuration that says what nobody is to learn of single clients."""

from __future__ import annotations

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
    clip: float = Field(1.0, gt=0, description="every value of a change is cut to [-clip, clip] before it is sent")


class PrivacyConfig(Section):
    """What clients do to their changes before these leave them. Noise on the sum is a strategy: dp."""

    secure_sum: SecureSumConfig | None = Field(
        None, description="mask changes so that only their sum can be read; {} for the defaults"
    )
