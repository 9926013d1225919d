"""Reads one JSON file strictly into a frozen, typed configuration.

Every refusal names file, key, value and remedy. The reader (JSON without surprises, text that is safe to print, the
error that all refusals are) serves every room that reads what a person wrote. May import pydantic, and no room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
