"""What people and programs see of a run: bar, log, ``metrics.jsonl``, monitors, summary.

May import ``plan``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
