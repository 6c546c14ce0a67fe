"""The section of a configuration that says in which rounds clients forget rows in place of learning some."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from fedlora.config.sections import Section


class ForgettingConfig(Section):
    """Rounds that ask nobody but the owners of rows, who make these unlikely. ``fedlora unlearn`` writes it."""

    clients: list[str] = Field(min_length=1, description="the owners; asked although clients.exclude may name them")
    records: list[str] = Field(
        [], description="SHA-256 of the names of their rows that are to be forgotten; all they have where empty"
    )
    first: int = Field(ge=1, description="the first of these rounds")
    last: int = Field(ge=1, description="the last of these rounds")
    loss: str = Field(description="npo, simnpo, gradient_difference, ascent, or a plug-in")
    options: dict[str, Any] = Field({}, description="of the loss, such as {beta: 1}")
    steps: int = Field(ge=1, description="of each owner, in each of these rounds")
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    max_norm: float = Field(
        gt=0, allow_inf_nan=False, description="of an owner's change in a round, all trained tensors together"
    )
    retain_weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="of the loss on an owner's other rows")
    batch_size: int = Field(16, ge=1, description="rows of either kind per step")

    @model_validator(mode="after")
    def _check(self) -> ForgettingConfig:
        if self.last < self.first:
            raise ValueError(f"rounds {self.first} to {self.last} are none; last is at least first")
        return self

    @property
    def rounds(self) -> range:
        """The rounds in which it is done."""
        return range(self.first, self.last + 1)
