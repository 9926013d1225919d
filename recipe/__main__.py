"""``python -m recipe COMMAND``: finds the command and hands over."""

import importlib
import io
import signal
import sys

from recipe.distributed import say

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
            command = importlib.import_module(f"recipe.commands.{arguments[0]}")
            return int(command.main(arguments[1:]))
        except KeyboardInterrupt:  # where the command had nothing to finish
            say("ended by SIGINT")
            return 128 + signal.SIGINT
    listing = "".join(f"  {name:<8} {purpose}\n" for name, purpose in COMMANDS.items())
    print(f"usage: python -m recipe COMMAND …\n\n{listing}", file=sys.stderr, end="")
    return 0 if arguments in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main())
