"""Saves, finds, verifies and resumes; one run at a time per output folder.

May import ``engine`` and ``model``, and ``plan`` and ``config`` for the comparison of two trainings.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
