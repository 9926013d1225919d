"""The cost of scaling to more ranks: step time and its shares of communication and data, versus the cost model.

The recipe's own loop trains resnet18 on the digits under the ``deepspeed`` launcher, with the same number of images per
rank on any number of ranks. Three kinds of step take turns: the recipe's, which reduces gradients during the backward
pass; DeepSpeed's, which reduces them after it; and one without reduction. The cost model (``recipe/plan/cost.py``)
predicts the all-reduce from the link as measured around the ring of ranks; the prediction is compared with an
all-reduce that all ranks start together. With ``--hosts``, the ranks also run on hosts made of network namespaces, one
rank each, with limited link rates (needs root, and the requirements of ``tests/multinode``). The same model then
predicts large clusters, under stated assumptions.

    python -m benchmarks.scaling --hosts 1gbit 200mbit --json benchmarks/results/scaling_cpu.json
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.launch import deepspeed_command, run_ok
from benchmarks.report import context, heading, new_parser, positive, publish, say
from benchmarks.scaling_rank import FOUND, MODEL
from recipe.plan import Link, all_reduce_bytes, all_reduce_seconds, efficiency, exposed_seconds

SCRIPT = "benchmarks/scaling_rank.py"

# Hypothetical clusters: ResNet-50 in fp16, an all-reduce of fp16 gradients.
RESNET50_GRADIENT_BYTES = 2 * 25_557_032
GPUS = (8, 64, 256, 3584)
IMAGES_PER_SECOND = 2500.0
BACKWARD_SHARE = 2 / 3  # of a step's computation: the backward pass has twice the multiplications of the forward pass
CLUSTERS = {
    "400 Gbit/s and 5 µs a GPU": Link(50e9, 5e-6),
    # In each node, one rank sends to the next node and one receives: the ring crosses a node's network once.
    "50 Gbit/s a node (the paper's network) and 20 µs": Link(50e9 / 8, 20e-6),
}


def measure(ranks: int, micro_batch: int, steps: int, rate: str | None) -> dict[str, Any]:
    """Run the ranks on this machine or, with a ``rate`` such as "1gbit", one per host with links of that rate."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "run")
        folder.mkdir()
        words = ("--micro-batch", str(micro_batch), "--steps", str(steps), "--folder", str(folder))
        if rate is None:
            run_ok(deepspeed_command(ranks, SCRIPT, *words))
        else:
            from tests.multinode.cluster import Cluster

            with Cluster(Path(name, "cluster"), ranks) as cluster:
                for host in cluster.names:
                    cluster.limit(host, rate)
                with cluster.launched(*words, script=SCRIPT) as process:
                    printed, _ = process.communicate()
                if process.returncode != 0:
                    raise RuntimeError(f"{ranks} hosts ended with {process.returncode}:\n{printed}")
        return summarise(json.loads((folder / FOUND).read_text()), ranks, rate)


def summarise(everyone: list[dict[str, Any]], ranks: int, rate: str | None) -> dict[str, Any]:
    """One row of results: the slowest rank's median times, and the model's prediction from the link."""
    found = [one["steps"] for one in everyone]
    row: dict[str, Any] = {"ranks": ranks, "rate": rate, "link": None}
    row["step_seconds"] = {way: max(one["step"][way] for one in found) for way in found[0]["step"]}
    row["all_reduce_seconds"] = max(one["all_reduce_alone"] for one in found)
    row["predicted_all_reduce_seconds"] = 0.0
    if ranks > 1:
        link = Link(**{key: median(one["link"][key] for one in everyone) for key in everyone[0]["link"]})
        row["link"] = {"bytes_per_second": link.bytes_per_second, "latency_seconds": link.latency_seconds}
        row["predicted_all_reduce_seconds"] = all_reduce_seconds(found[0]["gradient_bytes"], ranks, link)
    return row


def on_paper() -> list[dict[str, Any]]:
    """The model's predictions for large clusters."""
    rows = []
    for name, link in CLUSTERS.items():
        for micro_batch in (32, 256):
            compute = micro_batch / IMAGES_PER_SECOND
            for gpus in GPUS:
                best = min(
                    all_reduce_seconds(RESNET50_GRADIENT_BYTES, gpus, link, "ring"),
                    all_reduce_seconds(RESNET50_GRADIENT_BYTES, gpus, link, "tree"),
                )
                shares = {
                    overlaps: efficiency(compute, exposed_seconds(best, BACKWARD_SHARE * compute, overlaps))
                    for overlaps in (False, True)
                }
                rows.append(
                    {
                        "network": name,
                        "micro_batch": micro_batch,
                        "gpus": gpus,
                        "all_reduce_seconds": best,
                        "efficiency": shares[False],
                        "efficiency_with_overlap": shares[True],
                        "images_per_second": gpus * IMAGES_PER_SECOND * shares[True],
                    }
                )
    return rows


def main(words: Sequence[str]) -> int:
    """Measure all cases; print the tables and, with ``--json``, write them and the JSON."""
    before = context("benchmarks.scaling", words)
    parser = new_parser("benchmarks.scaling", __doc__)
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[1, 2, 4], help="ranks on this machine (default: 1 2 4)"
    )
    parser.add_argument("--hosts", nargs="*", default=[], metavar="RATE", help="link rates for runs on 2 and 4 hosts")
    parser.add_argument(
        "--micro-batch", type=positive, default=16, help="images per rank and step (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=15, help="steps per kind of reduction (default: %(default)s)")
    arguments = parser.parse_args(words)
    cases: list[tuple[int, str | None]] = [(ranks, None) for ranks in arguments.ranks]
    cases += [(ranks, rate) for rate in arguments.hosts for ranks in (2, 4)]
    results = []
    for ranks, rate in cases:
        say(f"{ranks} ranks{f', hosts with links of {rate}' if rate else ''}")
        results.append(measure(ranks, arguments.micro_batch, arguments.steps, rate))
    report = before | {
        "settings": {"model": MODEL, "micro_batch": arguments.micro_batch, "steps": arguments.steps},
        "results": results,
        "on_paper": on_paper(),
    }
    publish(report, format_report(report), arguments.json)
    return 0


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    lines = [
        *heading("The cost of scaling to more ranks", report),
        f"{settings['model']} in fp32, {settings['micro_batch']} images per rank and step, one thread per rank; "
        f"medians of {settings['steps']} steps of each kind, interleaved. Overlapped is the recipe's reduction, "
        "blocking is DeepSpeed's at ZeRO stage 0. The ranks share the cores of one machine. Unlike on GPUs, a step "
        "without reduction therefore takes longer with more ranks, and summing and copying cost CPU time.",
        "",
        "| ranks | where | step without reduction | blocking | overlapped | blocking ÷ overlapped | "
        "share of communication: blocking | overlapped | waiting for data |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        step, none = row["step_seconds"], row["step_seconds"]["none"]
        where = f"hosts, {row['rate']}" if row["rate"] else "one machine"
        if "blocking" in step:
            blocking, overlapped = step["blocking"], step["overlapped"]
            cells = f"{_ms(blocking)} | {_ms(overlapped)} | {blocking / overlapped:.2f} | "
            cells += " | ".join(f"{max(0.0, 1 - none / way):.0%}" for way in (blocking, overlapped))
        else:
            cells = "– | – | – | – | –"
        waiting = step["data_wait"] / step.get("overlapped", none)
        lines.append(f"| {row['ranks']} | {where} | {_ms(none)} | {cells} | {waiting:.1%} |")
    lines += [
        "",
        "## Predictions of the cost model",
        "",
        "An all-reduce of M bytes on P ranks takes 2 (P − 1) / P · M over the bandwidth plus 2 (P − 1) latencies, both "
        "measured around the ring of ranks. Summing is not included. Measured: an all-reduce as large as the "
        "gradients, which all ranks start together. A step is predicted as a step without reduction plus the part of "
        "the all-reduce that the backward pass, two thirds of that step, does not hide.",
        "",
        "| ranks | where | link | all-reduce, predicted | measured | predicted ÷ measured | step, predicted | "
        "overlapped, measured | predicted ÷ measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        if row["link"] is not None:
            where = f"hosts, {row['rate']}" if row["rate"] else "one machine"
            measured, predicted = row["all_reduce_seconds"], row["predicted_all_reduce_seconds"]
            step = row["step_seconds"]
            on_paper = step["none"] + exposed_seconds(predicted, BACKWARD_SHARE * step["none"], overlaps=True)
            lines.append(
                f"| {row['ranks']} | {where} | {_link(row['link'])} | {_ms(predicted)} | {_ms(measured)} | "
                f"{predicted / measured:.2f} | {_ms(on_paper)} | {_ms(step['overlapped'])} | "
                f"{on_paper / step['overlapped']:.2f} |"
            )
    lines += [
        "",
        "## Predictions for large clusters",
        "",
        f"ResNet-50, fp16 gradients ({RESNET50_GRADIENT_BYTES / 1e6:.0f} MB). Assumed: {IMAGES_PER_SECOND:,.0f} images "
        "per second and GPU, at either micro-batch; the network as named, without contention, with the faster of ring "
        "and tree; batch norm within the micro-batch; no waiting for data. **None of this was measured.**",
        "",
        "| network | micro-batch | GPUs | global batch | all-reduce | efficiency: blocking | overlapped | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["on_paper"]:
        lines.append(
            f"| {row['network']} | {row['micro_batch']} | {row['gpus']:,} | {row['gpus'] * row['micro_batch']:,} | "
            f"{_ms(row['all_reduce_seconds'])} | {row['efficiency']:.0%} | {row['efficiency_with_overlap']:.0%} | "
            f"{row['images_per_second']:,.0f} |"
        )
    sent = all_reduce_bytes(RESNET50_GRADIENT_BYTES, 256) / 1e6
    return "\n".join([*lines, "", f"Each of 256 GPUs sends {sent:.0f} MB per step.", ""])


def _link(link: dict[str, float]) -> str:
    return f"{link['bytes_per_second'] * 8 / 1e9:.2f} Gbit/s, {link['latency_seconds'] * 1e6:.0f} µs"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
