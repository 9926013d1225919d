"""Reads one JSON file strictly into a frozen, typed config; every refusal names file, key, value and remedy.

Other rooms use its strict JSON reader, too, for every file that a person wrote. Imports pydantic, and no other room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
