"""Saving, finding, verifying and resuming checkpoints; a lock that allows one run at a time per output folder.

May import ``engine`` and ``model``, and ``plan`` and ``config`` to compare the configurations of two runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
