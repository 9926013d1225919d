"""The training script, which the ``deepspeed`` launcher starts on every rank."""

import argparse
import gc
import importlib.util
import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder comes first on Python's path, where our modules would shadow others of the same name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe.config import Config, Distributed, printable, read_config
from recipe.data import look
from recipe.distributed import (
    Interrupted,
    Placement,
    check_ranks,
    find_command,
    find_placement,
    ignore,
    listen,
    open_process,
    outlive_readers,
    say,
    take_by,
)
from recipe.plan import format_plan, make_plan
from recipe.reporting import Parser, format_summary, read_summary

COMPLETE, REFUSED = 0, 2
OTHER_RANKS_WAIT_SECONDS = 15.0
AFTER_RANK_0_SECONDS = 2.0
MONITOR_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}  # the others' are dependencies


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, check and train.

    Returns:
        0 if the run is complete, 2 if the input was refused, 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP, else 1.
    """
    try:
        outlive_readers()
        listen()
        return run(parse_arguments(argv))
    except Interrupted as end:
        take_by(ignore)
        return end.exit_code


def run(arguments: argparse.Namespace) -> int:
    """Plan, check and train as the parsed command line says; return the exit code, or raise ``Interrupted``."""
    placement = Placement()
    try:
        placement = find_placement(os.environ)
        os.environ |= placement.variables()
        placement.check_address(os.environ)
    except ValueError as error:
        return refuse(error, placement.rank, arguments.verbose)
    rank, world_size, cores = placement.rank, placement.world_size, cores_per_rank(placement)
    # Before the slow imports, during which the launcher may go away.
    command = find_command() if rank == 0 else None
    above = [] if placement.launcher is None else [os.getppid()]
    above += [] if command is None else [command.pid]
    launchers = {pid: process for pid in above if (process := open_process(pid)) is not None}
    output = arguments.output or Path("runs", arguments.deepspeed_config.stem)
    one_host = placement.ranks_here == world_size  # all ranks read the same files, and refuse the same
    plan, checked, refusal = None, None, None
    try:
        config = read_config(arguments.deepspeed_config, overrides(arguments))
        check_machine(config)
        # The first rank of a host indexes the data folder while the others import torch, and then use its index.
        indexes = placement.local_rank == 0 or config.recipe.data.needs_counting
        plan = make_plan(config, world_size, cores, look if indexes else None)
        if rank == 0 and not plan.assumes_micro_batch:
            print(format_plan(plan), flush=True)
    except ValueError as error:
        if one_host:
            return refuse(error, rank, arguments.verbose)
        refusal = error
    # torch and DeepSpeed take seconds to import, so everything that can be refused without them has been. Their objects
    # live as long as the process; collecting garbage among them slows the import by a tenth, and training now and then.
    gc.disable()
    set_up_torch(cores)
    from recipe.checkpoints import unlock, unused_data
    from recipe.distributed import FAILED, DisagreementError, MeetingError, Watch, meet, own_facts
    from recipe.reporting import LOG
    from recipe.run import KNOWN_FAILURES, prepare, train

    gc.freeze()
    gc.enable()
    try:
        if plan is not None and not indexes:
            plan = make_plan(config, world_size, cores, look)
    except ValueError as error:
        if one_host:  # the first rank has refused the same
            return refuse(error, rank, arguments.verbose)
        plan, refusal = None, error
    try:
        if command is not None:
            check_ranks(command, world_size)
        if plan is not None:
            checked = prepare(plan, output, arguments.resume, arguments.accept_changes)
    except ValueError as error:
        if world_size == 1:
            return refuse(error, rank, arguments.verbose)
        refusal = error  # other ranks may find nothing wrong, and must not wait for this one
    settings = Distributed() if plan is None else plan.config.recipe.distributed
    timeout = timedelta(seconds=settings.timeout_seconds)
    try:
        meeting = meet(own_facts(refusal, **({} if checked is None else checked.facts())), timeout)
    except (DisagreementError, MeetingError) as error:
        if checked is not None:
            unlock(checked.lock)
        if isinstance(error, DisagreementError):
            return refuse_together(error, rank)
        cause = f"{refusal}; and {error}" if refusal is not None else f"{type(error).__name__}: {error}"
        say(f"rank {rank} on {socket.gethostname()} failed: {cause}")
        return FAILED
    assert checked is not None, "meet() raises if any rank refuses"
    summary = read_summary(output) if checked.start.is_complete(checked.plan) else None
    if summary is None:
        known = () if arguments.verbose else KNOWN_FAILURES
        with Watch(meeting, timeout, launchers, known, output / LOG) as watch:
            summary = train(checked, meeting, watch, arguments.verbose)
    elif rank == 0:
        unused = unused_data(checked.plan, checked.start)
        print(printable(f"{output} is already complete{unused}, and nothing was trained; use another --output"))
    if rank == 0:
        print("\n" + format_summary(summary, output, checked.plan), flush=True)
    return COMPLETE


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line: paths and overrides; everything else is in the config."""
    parser = Parser(prog="recipe/train.py", description="Train as a config says.")
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="the config, such as those in ds_configs/")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/<config name>)")
    parser.add_argument("--data", help="folder of the data; short for --set recipe.data.path=…")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config; repeatable"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="resume from the newest checkpoint: if there is one, never, or fail without one (default: auto)",
    )
    parser.add_argument("--accept-changes", action="store_true", help="resume from another config's checkpoints")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's own messages, and tracebacks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    return parser.parse_args(argv)


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The command line's overrides of the config, as ``KEY=VALUE``."""
    data = [] if arguments.data is None else [f"recipe.data.path={json.dumps(arguments.data)}"]
    return [*arguments.set, *data]


def cores_per_rank(placement: Placement) -> int:
    """This rank's share of the CPU cores that the process is allowed to use."""
    allowed = len(os.sched_getaffinity(0))
    # Slurm may have bound each rank to its share already.
    return min(allowed, placement.cores) if placement.cores else max(1, allowed // placement.ranks_here)


def check_machine(config: Config) -> None:
    """Refuse what this machine certainly lacks, as far as that can be known without torch.

    Raises:
        ConfigError: a monitor's package is not installed, or fp16 or the decoder needs a GPU and there is none.
    """
    for monitor, package in MONITOR_PACKAGES.items():
        if getattr(config, monitor).enabled and importlib.util.find_spec(package) is None:
            raise config.source.refusal(
                f"{monitor}.enabled",
                f"the package {package} is not installed",
                f"pip install {package}, or use false",
            )
    if not lacks_gpu():
        return
    if config.recipe.data.decoder == "gpu":
        raise config.source.refusal("recipe.data.decoder", "there is no CUDA GPU", 'use "cpu", or "dali"')
    if config.precision == "fp16" and not cpu_may_support_fp16():
        raise config.source.refusal(
            "fp16.enabled",
            "there is no GPU, and the CPU does not support it",
            'use "fp16": {"enabled": false} to train in fp32, or run it on a GPU',
        )


def lacks_gpu() -> bool:
    """Whether torch will certainly find no GPU; in case of doubt, torch is asked later."""
    devices = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # CUDA, CUDA in WSL 2, ROCm
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    other_accelerator = os.environ.get("DS_ACCELERATOR", "cpu") not in ("cpu", "cuda")
    is_missing = hidden or not any(map(os.path.exists, devices))
    return platform.machine() == "x86_64" and not other_accelerator and is_missing


def cpu_may_support_fp16() -> bool:
    """Whether the CPU may have the instructions that torch's oneDNN kernels need (AVX512-FP16)."""
    try:
        return "avx512_fp16" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def set_up_torch(cores: int | None = None) -> None:
    """Set what torch and DeepSpeed read only at import, threads and accelerator, and import torch.

    ``cores`` is this rank's share of the CPU cores (default: as the environment says).
    """
    # OpenMP's threads wait for each other by spinning. On an idle machine that is faster (1.5 times for the digits),
    # but if another process wants a core, they spin through whole time slices and training takes 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # If another rank is gone, torch's C++ code would print pages of call stacks as warnings.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no other
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(cores or cores_per_rank(find_placement(os.environ)))


def refuse(refusal: ValueError, rank: int, verbose: bool) -> int:
    """Print on one line why the run does not start; every rank on the host finds the same."""
    if rank != 0:
        time.sleep(OTHER_RANKS_WAIT_SECONDS)  # the launcher ends the other ranks once rank 0 has reported and exited
    if verbose:
        traceback.print_exception(refusal)
    say(str(refusal))
    return REFUSED


def refuse_together(disagreement: ValueError, rank: int) -> int:
    """Print, once per host, why the ranks do not train after their rendezvous."""
    if rank != 0:
        time.sleep(AFTER_RANK_0_SECONDS)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        say(str(disagreement))
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
