"""``python -m recipe study``: trains cases of a config, each with several seeds, and reports how they differ."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from recipe.checkpoints import lock
from recipe.commands import refusing
from recipe.commands.study.figures import draw_figures
from recipe.commands.study.file import CSV, REPORT, Study, read_study
from recipe.commands.study.results import format_report, read_results, write_csv
from recipe.commands.study.runs import Resources, Runner, check_output
from recipe.distributed import count_slots, outlive_readers, read_hostfile, say
from recipe.plan import counted
from recipe.reporting import Parser, within

COMPLETE, FAILED = 0, 1


@refusing
def main(argv: Sequence[str]) -> int:
    """Launch the runs that are not over yet, and write the report.

    Returns:
        0 if every run is complete or has diverged, 1 if one failed, 2 if the study was refused, or 128 plus the number
        of the signal that ended it.
    """
    outlive_readers()
    arguments = _parse(argv)
    output: Path = arguments.output or Path("runs", arguments.study.stem)
    try:
        ranks = count_slots(read_hostfile(arguments.hostfile)) if arguments.hostfile else arguments.num_gpus
        gpus = 0
        if arguments.jobs > 1:
            import torch  # takes seconds, and only parallel runs need to share out the GPUs

            gpus = torch.cuda.device_count()
        resources = Resources(arguments.hostfile, ranks, arguments.jobs, gpus)
        study = read_study(arguments.study, ranks, arguments.data, resources.cores_per_rank())
        with lock(output):
            check_output(study, output)
            return _run(study, output, resources, shlex.join(["python", "-m", "recipe", "study", *argv]))
    except OSError as error:
        say(f"{error.filename or output}: {error.strerror}; fix it, and the same command resumes the study")
        return FAILED


def _run(study: Study, output: Path, resources: Resources, command: str) -> int:
    runner = Runner(study, output, resources)
    images = sum(run.images for run in study.runs)
    steps = sum(run.plan.total_steps for run in study.runs)
    print(
        f"{study.path}: {len(study.file.cases)} cases × {len(study.file.seeds)} seeds = {len(study.runs)} runs, "
        f"{steps:,} steps on {images:,} images; {counted(runner.over, 'run')} already over",
        flush=True,
    )
    runner.run()
    results = read_results(study, output, runner.failures)
    write_csv(study, results, output / CSV)
    pictures = draw_figures(study, results, output)
    report = format_report(study, results, command, pictures)
    (output / REPORT).write_text(report, encoding="utf-8")
    written = [REPORT, CSV, *(picture.name for picture in pictures if picture is not None)]
    print(f"\n{report}\nIn {output}: {', '.join(written)}", flush=True)
    for run, failure in runner.failures.items():
        say(f"{run} failed: {failure}")
    if runner.stopped_by is not None:
        say("ended by a signal, and the runs are saved; the same command resumes them")
        return 128 + runner.stopped_by
    return FAILED if runner.failures else COMPLETE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m recipe study", description="Train the cases of a study with all its seeds, and compare them."
    )
    parser.add_argument("study", type=Path, help="a study, such as those in ds_configs/studies/")
    parser.add_argument("--output", type=Path, help="folder of the study (default: runs/<study name>)")
    parser.add_argument("--data", help="data folder; replaces recipe.data.path of every case")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, help="train on all slots of this DeepSpeed hostfile")
    where.add_argument(
        "--num_gpus", type=within(1, 9999), default=1, metavar="N", help="ranks per run on this machine (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=within(1, 9999), default=1, metavar="N", help="parallel runs on this machine (default: 1)"
    )
    arguments = parser.parse_args(argv)
    if arguments.hostfile and arguments.jobs > 1:
        parser.error("--jobs is for one machine: on a hostfile's slots one run trains at a time")
    return arguments
