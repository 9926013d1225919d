"""Ranks and hosts: which rank this is, whether the ranks agree, whether one has failed or a signal has come.

May import torch.distributed and the reader of ``config``, for hostfiles and what the launcher was given.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
