"""Train what a config says: the script that the ``deepspeed`` launcher starts on every rank."""

import argparse
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Started as a file, Python puts this folder first on its path, where our modules would shadow others' names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe.config import read_config
from recipe.interruption import Interrupted, end_at_once
from recipe.plan import make_plan
from recipe.plan_text import format_plan
from recipe.summary import format_summary

COMPLETE, FAILED, REFUSED = 0, 1, 2
OTHER_RANKS_WAIT_SECONDS = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, check, train.

    Returns:
        0 if the run is complete, 2 if the input was refused, 130 or 143 if SIGINT or SIGTERM ended it, else 1.
    """
    try:
        end_at_once()
        return run(parse_arguments(argv))
    except Interrupted as end:
        return end.exit_code


def run(arguments: argparse.Namespace) -> int:
    """``main`` behind the command line.

    Raises:
        Interrupted: a signal asked for the end.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    output = arguments.output or Path("runs", arguments.deepspeed_config.stem)
    try:
        config = read_config(arguments.deepspeed_config, overrides(arguments))
        plan = make_plan(config, world_size, cores_per_rank())
        if rank == 0 and not plan.assumes_micro_batch:
            print(format_plan(plan), flush=True)
        # torch and DeepSpeed take seconds to import; a mistake in the config need not wait for them.
        set_up_torch()
        from recipe.preflight import prepare
        from recipe.run import KNOWN_FAILURES, summary_of_complete_run, train

        checked = prepare(plan, output, arguments.resume, arguments.accept_changes)
    except ValueError as refusal:
        return refuse(refusal, rank, arguments.verbose)
    try:
        summary = summary_of_complete_run(checked)
        if summary is None:
            summary = train(checked, arguments.verbose)
        elif rank == 0:
            print(f"{output} is complete already, and nothing was trained; another --output trains it anew")
    except Exception as error:
        if arguments.verbose or not isinstance(error, KNOWN_FAILURES):
            traceback.print_exc()
        where = f"rank {rank} on {socket.gethostname()}"
        print(f"recipe: {where} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return FAILED
    if rank == 0:
        print("\n" + format_summary(summary, output), flush=True)
    return COMPLETE


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line: where things lie and what of the config to override; all else stands in the config."""
    parser = argparse.ArgumentParser(prog="recipe/train.py", description="Train what a config says.")
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="a JSON of ds_configs/")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/<config name>)")
    parser.add_argument("--data", help="folder of the data; stands for --set recipe.data.path=…")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="go on from the newest checkpoint of the run: if there is one, never, or fail without (default: auto)",
    )
    parser.add_argument("--accept-changes", action="store_true", help="go on from checkpoints of a config that differs")
    parser.add_argument("--verbose", action="store_true", help="show all that DeepSpeed says, and tracebacks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher gives it
    return parser.parse_args(argv)


def overrides(arguments: argparse.Namespace) -> list[str]:
    """What the command line changes in the config, as ``KEY=VALUE``."""
    data = [] if arguments.data is None else [f"recipe.data.path={json.dumps(arguments.data)}"]
    return [*arguments.set, *data]


def cores_per_rank() -> int:
    """This rank's share of the CPU cores that the process may use."""
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, len(os.sched_getaffinity(0)) // int(ranks_here))


def set_up_torch() -> None:
    """Say to torch and DeepSpeed what they read once, when they are imported: threads and accelerator."""
    # OpenMP's threads wait for each other by spinning. On an idle machine that is faster (1.5 times for the digits),
    # but where anything else wants a core they spin through whole time slices, and training takes 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found no other
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(cores_per_rank())


def refuse(refusal: ValueError, rank: int, verbose: bool) -> int:
    """Say on one line why the run does not start."""
    if rank != 0:
        # Every rank finds the same; the launcher ends the others when the first one exits, and rank 0 shall speak.
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    if verbose:
        traceback.print_exception(refusal)
    print(f"recipe: {refusal}", file=sys.stderr, flush=True)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
