"""Local differential privacy: noise that a client puts on its change before anybody else sees it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedlora.privacy.clip import shortened
from fedlora.privacy.fixed_point import Reals
from fedlora.privacy.masks import add_stream


def protected(
    delta: Mapping[str, Tensor], clip: float, noise_multiplier: float, secret: bytes, about: bytes | None = None
) -> dict[str, Tensor]:
    """The change at a Frobenius norm of ``clip`` at most, with Gaussian noise on every value, in float32.

    Any two changes are ``2 * clip`` apart at the most, so that the noise is ``noise_multiplier / 2`` times what the
    change can make a difference by.

    Args:
        noise_multiplier: standard deviation of the noise in units of ``clip``.
        secret: of the client, from which its noise follows.
        about: tells draws of one secret apart. Default the change itself: a task that is repeated after a crash gives
            the same answer, and no two changes ever have the same noise, whose difference would tell theirs.
    """
    short = dict(sorted(shortened(delta, clip).items()))
    flat = np.concatenate([*(tensor.cpu().reshape(-1).numpy() for tensor in short.values()), np.empty(0)])
    about = flat.tobytes() if about is None else about
    seed = hmac.digest(secret, b"fedlora local noise" + about, hashlib.sha256)
    noisy = torch.from_numpy(flat + noise_multiplier * clip * gaussians(seed, len(flat))).float()
    parts = torch.split(noisy, [tensor.numel() for tensor in short.values()])
    return {name: part.reshape(short[name].shape) for name, part in zip(short, parts, strict=True)}


def gaussians(seed: bytes, count: int) -> Reals:
    """Standard normal numbers, by Box and Muller from the bits of a cipher, which nobody without the seed foresees.

    Args:
        seed: 32 bytes.
    """
    bits = np.zeros(2 * ((count + 1) // 2), np.uint64)
    add_stream(bits, seed)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0, of which there is no logarithm
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]
    drawn: Reals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return drawn
