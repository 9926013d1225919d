"""The paper's arithmetic: a configuration and a world size become a frozen ``Plan``, its cost on paper and its text.

Imports no torch: a plan for 256 GPUs is made on a laptop in a second. May import ``config``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
