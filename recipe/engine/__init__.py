"""The only room that knows DeepSpeed's engine: start, precision, overlapped reduction, schedule, training loop.

Takes plain values, never the configuration. May import DeepSpeed, ``model``, and ``plan`` for the closed-form schedule.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
