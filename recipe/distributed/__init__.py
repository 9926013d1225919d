"""Ranks and hosts: finding this rank, the rendezvous, agreement between ranks, failure detection, and signals.

May import torch.distributed, and the reader of ``config`` for hostfiles and launcher arguments.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
