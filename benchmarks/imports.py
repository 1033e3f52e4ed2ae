"""What an import costs: ``import limbeck`` and ``limbeck --help`` beside ``import torch`` and beside what peers import to distil.

    python benchmarks/imports.py --json benchmarks/results/imports.json   # installs the peers into a virtual environment of its own
    python benchmarks/imports.py --no-peers                          # in this environment

Each statement runs in a fresh interpreter, in turns; CPU seconds, less those of an empty interpreter. Peers are asked for the class
that distils, for some import lazily until then; Limbeck also for everything that a step of ``compose`` and the trainer need.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from _peers import ensure, machine, rerun

PEERS = ("torchdistill==1.1.5", "timm==1.0.31", "trl==1.16.0", "datasets>=4.0")
MENDED = "from limbeck.models.loading import ensure_torchvision; ensure_torchvision(); "  # or torchvision may not load beside a CPU torch
COMMANDS = {
    "import torch": "import torch",
    "import limbeck": "import limbeck",
    "limbeck --help": "import sys; sys.argv = ['limbeck', '--help']; from limbeck.cli.main import main; main()",
    "limbeck.compose": "from limbeck import compose",
    "limbeck.distill": "from limbeck import distill",
}
OF_PEERS = {
    "timm.task": MENDED + "from timm.task import LogitDistillationTask",
    "torchdistill": MENDED + "from torchdistill.core.distillation import DistillationBox",
    "trl": MENDED + "from trl import DistillationTrainer",
}


def cpu_seconds(code: str) -> float:
    """Of a fresh interpreter that runs ``code``. Raises `subprocess.CalledProcessError` where that fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def benchmark(commands: dict[str, str], repeats: int) -> list[dict[str, float | str]]:
    """A row a command: the median seconds, and their ratio to ``import torch`` with its quartiles."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):  # the first fills the file cache
        empty = cpu_seconds("pass")
        for name, code in commands.items():
            seconds = cpu_seconds(code) - empty
            if repeat:
                times[name].append(seconds)
    rows: list[dict[str, float | str]] = []
    for name, seconds_of in times.items():
        ratios = [a / b for a, b in zip(seconds_of, times["import torch"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
        rows.append({"name": name, "s": statistics.median(seconds_of), "ratio_low": low, "ratio": middle, "ratio_high": high})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true", help="in this environment; nothing is installed")
    parser.add_argument("--venv", type=Path, help="where the peers are installed; default: a folder in the user's cache")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    if not arguments.no_peers:
        rerun(ensure("imports", PEERS, arguments.venv), OMP_NUM_THREADS="1")
    rows = benchmark(COMMANDS if arguments.no_peers else COMMANDS | OF_PEERS, arguments.repeats)
    found = machine("torch", "limbeck", "torchdistill", "timm", "trl")
    print(found)
    print(f"{'':18}{'CPU s':>8}{'to torch':>10}{'quartiles':>16}")
    for row in rows:
        print(f"{row['name']:18}{row['s']:>8.2f}{row['ratio']:>10.2f}{row['ratio_low']:>10.2f} - {row['ratio_high']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
