"""The reports of a run: progress bar, log, ``metrics.jsonl``, monitors, summary.

The topmost room: may import ``plan``, ``engine`` and ``checkpoints``, whose results it reports.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
