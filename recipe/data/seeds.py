"""Seeds and random numbers derived from their purpose and position, without global state, rank or worker."""

from hashlib import blake2b

from torch import Tensor

_GOLDEN, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed for ``purpose`` and ``numbers``, the same on every machine.

    It is a hash, so that neighbouring epochs or samples get unrelated streams. Python's own hash differs between
    processes.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def splitmix64(seed: int, positions: Tensor) -> Tensor:
    """Return the numbers at ``positions``, int64 from 0, of the splitmix64 sequence for a seed below 2^63.

    Each number depends on its position alone, so a batch draws all its numbers at once (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014). The 64 bits are stored as int64, whose products and sums wrap in
    the same way on CPU and GPU.
    """
    bits = (positions + 1) * _GOLDEN + seed
    bits = (bits ^ _logical_shift(bits, 30)) * _FIRST
    bits = (bits ^ _logical_shift(bits, 27)) * _SECOND
    return bits ^ _logical_shift(bits, 31)


def uniform(seed: int, positions: Tensor) -> Tensor:
    """Return the top 53 bits of splitmix64's numbers at ``positions`` as float64 in [0, 1)."""
    return _logical_shift(splitmix64(seed, positions), 11).double() * 2.0**-53


def _logical_shift(bits: Tensor, right: int) -> Tensor:
    """Shift right, filling with zeros instead of int64's sign bit."""
    return (bits >> right) & (2 ** (64 - right) - 1)
