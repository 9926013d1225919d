"""``python -m recipe pack``: writes an image folder into a few large files, or verifies them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipe.distributed import listen, outlive_readers, say
from recipe.reporting import Parser

REFUSED = 2


def main(argv: Sequence[str]) -> int:
    """Pack, or verify a pack.

    Returns:
        0 on success, 1 if the pack is damaged, 2 if the input was refused or a file cannot be written, 128 plus the
        signal's number if a signal ended it.
    """
    outlive_readers()
    arguments = _parse(argv)
    listen()
    # A signal leaves semaphores to multiprocessing's resource tracker, which removes them: no cause for a warning.
    sys.warnoptions.append("ignore:resource_tracker")
    from recipe.commands.pack.command import pack, verify  # takes seconds, and starts threads: not before ``listen``

    try:
        if arguments.verify is not None:
            return verify(arguments.verify)
        return pack(arguments.source, arguments.destination, arguments.short_side or 0, raw=arguments.raw)
    except OSError as error:
        folder = arguments.destination or arguments.verify
        say(f"{folder}: {error.strerror or error}; fix that, and the same command resumes")
    except ValueError as refusal:
        say(str(refusal))
    return REFUSED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m recipe pack",
        usage="python -m recipe pack SRC DST [--short-side PIXELS [--raw]]\n       python -m recipe pack --verify DST",
        description="Pack an image folder into a few large files with fast random access, or verify such a pack.",
    )
    parser.add_argument("source", type=Path, nargs="?", metavar="SRC", help="folder with train/, and val/ or test/")
    parser.add_argument("destination", type=Path, nargs="?", metavar="DST", help="folder of the pack; new or empty")
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="resize larger images to this short side (default: 0, keep every image as it is)",
    )
    parser.add_argument("--raw", action="store_true", help="write pixels, which take more space and need no decoding")
    parser.add_argument("--verify", type=Path, metavar="DST", help="check every byte of a pack against its SHA-256")
    arguments = parser.parse_args(argv)
    folders = [arguments.source, arguments.destination]
    if arguments.verify is None:
        fits = None not in folders
    else:
        fits = folders == [None, None] and arguments.short_side is None and not arguments.raw
    if not fits:
        parser.error("name SRC and DST, or --verify and DST alone")
    if arguments.short_side and arguments.short_side < 8:
        parser.error(f"argument --short-side: {arguments.short_side} pixels; expected 0, or 8 or more")
    if arguments.raw and not arguments.short_side:
        parser.error("--raw needs --short-side PIXELS")
    return arguments
