"""Named seeds: every random draw of the project comes from a generator made here."""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive an independent 63-bit seed for the draw called `names`.

    A cryptographic hash keeps streams of neighbouring seeds and names unrelated, and the
    value is the same on every platform and Python version.

    Args:
        seed: Root seed, any integer.
        *names: What the seed is for, such as `"head"` or `("rollout", update, episode)`.

    Returns:
        An integer in [0, 2**63).
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed(seed, *names)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator seeded with `derive_seed(seed, *names)`."""
    return np.random.default_rng(derive_seed(seed, *names))
