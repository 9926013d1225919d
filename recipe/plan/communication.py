"""What a step spends on talking between ranks, on paper: bytes, messages, bandwidth and latency."""

import math
from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["ring", "tree"]


@dataclass(frozen=True)
class Link:
    """What lies between two ranks.

    ``bytes_per_second`` is what a rank sends while it receives as much; ``latency_seconds`` the time of a short
    message, one way.
    """

    bytes_per_second: float
    latency_seconds: float


def all_reduce_bytes(message_bytes: float, ranks: int) -> float:
    """What each rank sends, and receives, in an all-reduce: 2 (P − 1) / P · M.

    No algorithm needs less (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009).
    """
    return 2 * (ranks - 1) / ranks * message_bytes


def all_reduce_seconds(message_bytes: float, ranks: int, link: Link, algorithm: Algorithm = "ring") -> float:
    """The time of an all-reduce: its bytes over the bandwidth, and a latency for each message of a chain.

    A ring has 2 (P − 1) messages one after the other, a tree and halving-doubling 2 ⌈log₂ P⌉ (Thakur, Rabenseifner and
    Gropp, "Optimization of collective communication operations in MPICH", 2005). Adding up the numbers takes no time
    here.
    """
    messages = 2 * (ranks - 1) if algorithm == "ring" else 2 * math.ceil(math.log2(ranks))
    return all_reduce_bytes(message_bytes, ranks) / link.bytes_per_second + messages * link.latency_seconds


def exposed_seconds(all_reduce: float, backward: float, overlaps: bool) -> float:
    """What of an all-reduce a step waits for: all of it, or what the backward pass does not hide."""
    return max(0.0, all_reduce - backward) if overlaps else all_reduce


def efficiency(compute_seconds: float, waiting_seconds: float) -> float:
    """The share of a step in which a rank computes: its speed beside that of one alone, for as many images each."""
    return compute_seconds / (compute_seconds + waiting_seconds)
