"""``python -m recipe COMMAND``: runs a command."""

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

COMMANDS = {
    "plan": "show what a config will do, before anything runs",
    "hosts": "check whether a launch on a hostfile's hosts would work",
    "plot": "plot loss, error, learning rate and throughput of runs",
    "compare": "show what differs between two runs, and from which step on",
    "study": "train variants of a config with several seeds, and compare them",
    "pack": "pack an image folder into a few large files, which load faster",
    "evaluate": "measure a trained model's accuracy per class, confusion and calibration",
    "predict": "predict the most probable classes of image files",
    "keys": "list every key of a config and of a study, as tables",
    "export": "export a run's best weights for timm and model hubs, or as ONNX",
}


def main() -> int:
    """Run the command named by the first argument; return its exit code, or 2 if there is no such command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for terminals that cannot show ×
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        try:
            try:
                command = importlib.import_module(f"recipe.commands.{arguments[0]}")
                return int(command.main(arguments[1:]))
            finally:
                print(end="", flush=True)
        except KeyboardInterrupt:  # the command had nothing to finish
            say("ended by SIGINT")
            return 128 + signal.SIGINT
        except OSError as error:
            if not _cannot_be_written(sys.stdout):
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    say(f"{error.strerror}: the output is incomplete; make room, and run it again")
                    return 2
                if error.filename is None:
                    raise
                say(f"{os.fsdecode(error.filename)}: {error.strerror}")
                return 2
            say(f"standard output cannot be written: {error.strerror}; the answer is incomplete")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again when it exits
            return 2
    is_asked_for = arguments in (["-h"], ["--help"])
    stream = sys.stdout if is_asked_for else sys.stderr
    print(f"usage: python -m recipe COMMAND …\n\n{fields(list(COMMANDS.items()), columns())}", file=stream)
    print("To train: deepspeed recipe/train.py --deepspeed_config …", file=stream)
    if is_asked_for:
        return 0
    close = difflib.get_close_matches(arguments[0], COMMANDS, n=1) if arguments else []
    problem = f"there is no command {arguments[0]!r}" if arguments else "name a command"
    say(f"{problem}; {f'did you mean {close[0]}?' if close else 'see the list above'}")
    return 2


def _cannot_be_written(stream: TextIO) -> bool:
    try:
        print(file=stream, flush=True)
    except OSError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
