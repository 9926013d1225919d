"""What a run reports to people and programs: bar, log, ``metrics.jsonl``, monitors, summary.

The topmost room: may import ``plan``, and ``engine`` and ``checkpoints`` for what they have to report.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
