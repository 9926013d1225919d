"""Data sets, the deterministic sampler, augmentation, decoding and the loaders.

A sample is a function of (seed, epoch, index), never of rank or worker. This package takes plain values, never the
config. It may import torch, torchvision, and the reader of ``config`` for the files that describe a pack.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
