"""Taking out what was learned. What the author of a forget loss needs can be imported from here."""

from fedlora.unlearning.forget_losses import FORGET_LOSSES, ForgetLoss

__all__ = ["FORGET_LOSSES", "ForgetLoss"]
