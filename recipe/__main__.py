"""``python -m recipe COMMAND``: finds the command and hands over."""

import importlib
import io
import os
import signal
import sys
from typing import TextIO

from recipe.distributed import say

CUT_SHORT = 2  # as what is refused
COMMANDS = {
    "plan": "what a config will do, before anything runs",
    "hosts": "whether a launch on a hostfile's hosts would work",
    "plot": "loss, error, rate and speed of runs, as a picture",
    "compare": "what differs between two runs, and from which step on",
    "study": "cases of a config trained with several seeds, and compared",
    "pack": "an image folder in a few large files, which train faster",
    "evaluate": "accuracy, confusion and calibration of a trained model, class by class",
    "predict": "the most probable classes of image files",
    "export": "the best weights of a run for plain timm, with a model card",
}


def main() -> int:
    """Run the command that is named first; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × shall see the rest
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        try:
            try:
                command = importlib.import_module(f"recipe.commands.{arguments[0]}")
                return int(command.main(arguments[1:]))
            finally:
                print(end="", flush=True)
        except KeyboardInterrupt:  # where the command had nothing to finish
            say("ended by SIGINT")
            return 128 + signal.SIGINT
        except OSError as error:
            if not _cannot_be_written(sys.stdout):
                raise
            say(f"standard output cannot be written: {error.strerror}; the answer is not whole")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at its exit
            return CUT_SHORT
    listing = "".join(f"  {name:<8} {purpose}\n" for name, purpose in COMMANDS.items())
    print(f"usage: python -m recipe COMMAND …\n\n{listing}", file=sys.stderr, end="")
    return 0 if arguments in (["-h"], ["--help"]) else 2


def _cannot_be_written(stream: TextIO) -> bool:
    try:
        print(file=stream, flush=True)
    except OSError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
