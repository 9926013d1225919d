"""Data sets, the deterministic sampler, augmentation, decoding and the loaders.

What a sample looks like is a function of (seed, epoch, index), never of rank or worker. Takes plain values, never the
configuration. May import torch, torchvision and the reader of ``config``, for the files that describe a pack.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
