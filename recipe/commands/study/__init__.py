"""``python -m recipe study``: trains cases of a config, each with several seeds, and reports what differs."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from recipe.checkpoints import lock
from recipe.commands.study.figures import draw_figures
from recipe.commands.study.file import CSV, REPORT, Study, read_study
from recipe.commands.study.results import format_report, read_results, write_csv
from recipe.commands.study.runs import REFUSED, Runner, Where, check_output
from recipe.distributed import count_slots, outlive_readers, read_hostfile, say
from recipe.reporting import Parser, within

COMPLETE, FAILED = 0, 1


def main(argv: Sequence[str]) -> int:
    """Run the trainings that are not over yet, and write the report.

    Returns:
        0 if every run is complete or has diverged, 1 if one failed, 2 if the study was refused, or 128 and the number
        of the signal that ended it.
    """
    outlive_readers()
    arguments = _parse(argv)
    output: Path = arguments.output or Path("runs", arguments.study.stem)
    try:
        ranks = count_slots(read_hostfile(arguments.hostfile)) if arguments.hostfile else arguments.num_gpus
        where = Where(arguments.hostfile, ranks, arguments.jobs, _count_gpus() if arguments.jobs > 1 else 0)
        study = read_study(arguments.study, ranks, arguments.data, where.cores_per_rank())
        with lock(output):
            check_output(study, output)
            return _run(study, output, where, shlex.join(["python", "-m", "recipe", "study", *argv]))
    except ValueError as refusal:
        say(str(refusal))
        return REFUSED
    except OSError as error:
        say(f"{error.filename or output}: {error.strerror}; mend it, and the same command resumes the study")
        return FAILED


def _run(study: Study, output: Path, where: Where, command: str) -> int:
    runner = Runner(study, output, where)
    images = sum(training.images for training in study.trainings)
    steps = sum(training.plan.total_steps for training in study.trainings)
    print(
        f"{study.path}: {len(study.file.cases)} cases × {len(study.file.seeds)} seeds = {len(study.trainings)} runs, "
        f"{steps:,} steps on {images:,} images; {runner.over} runs are over already",
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
    for training, failure in runner.failures.items():
        say(f"{training} failed: {failure}")
    if runner.stopped_by is not None:
        say("ended by a signal, and the runs are saved; the same command resumes them")
        return 128 + runner.stopped_by
    return FAILED if runner.failures else COMPLETE


def _count_gpus() -> int:
    import torch  # takes seconds, and only runs side by side have GPUs to share out

    return torch.cuda.device_count()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m recipe study", description="Train the cases of a study with all its seeds, and compare them."
    )
    parser.add_argument("study", type=Path, help="a JSON of ds_configs/studies/")
    parser.add_argument("--output", type=Path, help="folder of the study (default: runs/<study name>)")
    parser.add_argument("--data", help="folder of the data; replaces recipe.data.path of every case")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, help="train on all slots of this DeepSpeed hostfile")
    where.add_argument(
        "--num_gpus", type=within(1, 9999), default=1, metavar="N", help="ranks per run here (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=within(1, 9999), default=1, metavar="N", help="runs side by side here (default: 1)"
    )
    arguments = parser.parse_args(argv)
    if arguments.hostfile and arguments.jobs > 1:
        parser.error("--jobs is for one machine: a hostfile's slots take one run at a time")
    return arguments
