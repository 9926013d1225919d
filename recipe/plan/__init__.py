"""The paper's arithmetic: turns a config and a world size into a frozen ``Plan`` with its estimated cost and its text.

Imports no torch, so that a laptop plans for 256 GPUs in a second. May import ``config``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
