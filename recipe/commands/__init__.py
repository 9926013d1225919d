"""The commands of ``python -m recipe``, one module or room each. Nothing else imports them."""

import functools
import os
from collections.abc import Callable, Sequence

from recipe.distributed import say


def refusing(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Decorate a command: rank 0 reports a refusal on one line, and the exit code is 2."""

    @functools.wraps(main)
    def command(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except OSError as error:
            if error.filename is None:
                raise
            refusal = f"{error.filename}: {error.strerror}"
        except ValueError as error:
            refusal = str(error)
        if os.environ.get("RANK", "0") == "0":
            say(refusal)
        return 2

    return command
