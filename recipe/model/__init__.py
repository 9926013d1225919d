"""timm's models with the paper's initialisation, its parameter groups and its batch norm with running averages.

Takes plain values, never the configuration. May import torch and timm, but no other room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
