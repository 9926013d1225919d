"""Seeds that are functions of what they are for: no global random state, no rank, no worker."""

from hashlib import blake2b


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return the 63-bit seed that belongs to ``purpose`` and ``numbers``, the same on every machine.

    A hash, because neighbouring epochs or samples must not get related streams; not Python's own, because
    that differs from process to process.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
