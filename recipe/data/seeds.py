"""Seeds and random numbers that are functions of what they are for: no global random state, no rank, no worker."""

from hashlib import blake2b

from torch import Tensor

_GOLDEN, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return the 63-bit seed that belongs to ``purpose`` and ``numbers``, the same on every machine.

    A hash, because neighbouring epochs or samples must not get related streams; not Python's own, because
    that differs from process to process.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def splitmix64(seed: int, positions: Tensor) -> Tensor:
    """Return the numbers at ``positions``, int64 from 0, of the sequence that splitmix64 makes of a seed below 2^63.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014: any number of the sequence comes from
    its position alone, so that a batch draws all of its numbers at once. The 64 bits lie in int64, whose products and
    sums wrap alike on CPU and GPU.
    """
    bits = (positions + 1) * _GOLDEN + seed
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def uniform(seed: int, positions: Tensor) -> Tensor:
    """Return splitmix64's numbers at ``positions`` as float64 from 0 to below 1, of their 53 highest bits."""
    return _shifted(splitmix64(seed, positions), 11).double() * 2.0**-53


def _shifted(bits: Tensor, right: int) -> Tensor:
    """Shift in zeros from the left, where int64 would repeat its sign."""
    return (bits >> right) & (2 ** (64 - right) - 1)
