"""``python -m recipe COMMAND``: finds the command and hands over."""

import difflib
import errno
import importlib
import io
import os
import signal
import sys
from typing import TextIO

from recipe.distributed import say
from recipe.plan import columns, fields

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
    "keys": "every key of a config and of a study, as tables",
    "export": "the best weights of a run as timm and hubs expect them, and as ONNX",
}


def main() -> int:
    """Run the command that is named first; return its exit code, 2 if there is no such command."""
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
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                say(f"{error.strerror}: what was being written is not whole; make room, and run it again")
                return CUT_SHORT
            say(f"standard output cannot be written: {error.strerror}; the answer is not whole")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at its exit
            return CUT_SHORT
    is_asked_for = arguments in (["-h"], ["--help"])
    stream = sys.stdout if is_asked_for else sys.stderr
    print(f"usage: python -m recipe COMMAND …\n\n{fields(list(COMMANDS.items()), columns())}", file=stream)
    print("Training is started by: deepspeed recipe/train.py --deepspeed_config …", file=stream)
    if is_asked_for:
        return 0
    close = difflib.get_close_matches(arguments[0], COMMANDS, n=1) if arguments else []
    problem = f"there is no command {arguments[0]!r}" if arguments else "name a command"
    say(f"{problem}; {f'did you mean {close[0]}?' if close else 'the list above has all of them'}")
    return 2


def _cannot_be_written(stream: TextIO) -> bool:
    try:
        print(file=stream, flush=True)
    except OSError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
