"""Memory and time of losses over a large vocabulary: forward and backward of one head, from hidden states to gradients.

    python benchmarks/logits.py --vocabulary 32000 151936 --json logits.json
    python benchmarks/logits.py --no-peers                # without Liger-Kernel and TRL, which are installed into a venv of their own

In one process, in turns, so that a busy machine slows all alike; medians over the repeats. Every row is a ratio to the first of its group,
whose memory and time are printed. Time is CPU time (wall time on a GPU), memory the peak over what was there before: of the allocator on a
GPU; else of the resident set of a second process, in which malloc maps every tensor and gives it back when it is freed. The value and the
gradients of every row are compared with those of the first before anything is timed; "(other value)" marks another objective.

- *naive*: logits of all positions, `log_softmax`, `F.kl_div`, as a person would write it;
- *checkpoint*: the same over chunks of 256 positions under `torch.utils.checkpoint`;
- *TRL*: `GKDTrainer.generalized_jsd_loss` of trl; *Liger*: `LigerFusedLinearJSDLoss` of liger-kernel, not
  compiled, in chunks of 256 (its default of 1,024 takes more);
- *Limbeck, whole*: the plain losses of `limbeck.losses` on whole logits; *Limbeck*: `limbeck.losses.linear`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck import losses
from limbeck.losses import linear
from limbeck.losses.linear import Head, LinearLogits
from limbeck.losses.top_k import top_k, top_k_divergence

TEMPERATURE = 2.0
Loss = Callable[[], Tensor]


class Case:
    """Hidden states and heads of a student that learns and of a teacher."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.device = device
        make = {"device": device, "dtype": dtype}
        self.hs, self.ht = torch.randn(tokens, hidden, **make).requires_grad_(), torch.randn(tokens, hidden, **make)
        scale = 3 / hidden**0.5  # logits of standard deviation 3: a few ids stand out
        self.ws = (torch.randn(vocabulary, hidden, **make) * scale).requires_grad_()
        self.wt = torch.randn(vocabulary, hidden, **make) * scale
        self.labels = torch.randint(0, vocabulary, (tokens,), device=device)
        self.chosen = torch.arange(tokens, device=device) % 10 == 0
        with torch.no_grad():  # a teacher cache
            self.known = top_k(self.ht @ self.wt.t(), 64, temperature=TEMPERATURE)

    @property
    def student(self) -> LinearLogits:
        return LinearLogits(self.hs, Head(self.ws))

    @property
    def frozen(self) -> LinearLogits:
        """The switch route: only the hidden states get gradient."""
        return LinearLogits(self.hs, Head(self.wt))

    @property
    def teacher(self) -> LinearLogits:
        return LinearLogits(self.ht, Head(self.wt))

    def whole(self) -> tuple[Tensor, Tensor]:
        return self.hs @ self.ws.t(), self.ht @ self.wt.t()

    def whole_frozen(self) -> tuple[Tensor, Tensor]:
        return self.hs @ self.wt.t(), self.ht @ self.wt.t()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hinton's term, as a person would write it."""
    log_q, p = (student.float() / TEMPERATURE).log_softmax(-1), (teacher.float() / TEMPERATURE).softmax(-1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def checkpointed(case: Case) -> Tensor:
    def chunk(hs: Tensor, ht: Tensor) -> Tensor:
        return kl(hs @ case.ws.t(), ht @ case.wt.t()) * len(hs)

    pieces = zip(case.hs.split(256), case.ht.split(256), strict=True)
    return sum(checkpoint(chunk, hs, ht, use_reentrant=False) for hs, ht in pieces) / len(case.hs)  # type: ignore[return-value]


def pairwise(student: Tensor, teacher: Tensor, tau: float = 3.0) -> Tensor:
    """DBiLD as eq. 7-15 write it: all pairs of the 100 largest logits of each branch, up to the knee."""
    total = student.new_zeros(())
    for led in (teacher, student.detach()):
        ids = led.topk(100).indices
        k = losses.kneedle(led, window=100)
        i, j = torch.triu_indices(100, 100, 1, device=led.device)
        outside = j >= k.unsqueeze(-1)  # [tokens, pairs]
        pairs = []
        for logits in (student, teacher):
            top = logits.gather(-1, ids)
            pairs.append(((top[..., i] - top[..., j]) / tau).masked_fill(outside, -1e9).log_softmax(-1))
        log_q, log_p = pairs
        total = total + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return total


def one(term: linear.Term, **options: Any) -> Tensor:
    return linear.losses({"term": term}, **options)["term"]


def peers(case: Case) -> dict[str, dict[str, Loss]]:
    """The peers that are installed, by group."""
    found: dict[str, dict[str, Loss]] = {"KL": {}, "JSD": {}}
    try:
        from trl.experimental.gkd import GKDTrainer

        def trl(beta: float) -> Tensor:
            student, teacher = (logits.unsqueeze(0) for logits in case.whole())
            every = torch.zeros(student.shape[:2], dtype=torch.long, device=case.device)
            value = GKDTrainer.generalized_jsd_loss(student, teacher, labels=every, beta=beta, temperature=TEMPERATURE)
            return value * TEMPERATURE**2

        found["KL"]["TRL"], found["JSD"]["TRL"] = lambda: trl(0.0), lambda: trl(0.5)
    except ImportError:
        pass
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        def liger(beta: float) -> Tensor:
            loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, temperature=TEMPERATURE, compiled=False, chunk_size=256)
            return loss(case.hs, case.ws, case.ht, case.wt, case.labels) * TEMPERATURE**2

        found["KL"]["Liger"], found["JSD"]["Liger"] = lambda: liger(0.0), lambda: liger(0.5)
    except ImportError:
        pass
    return found


def groups(case: Case) -> dict[str, dict[str, Loss]]:
    """Rows by group; each group's first row is what the others are measured against."""
    kinds: dict[str, Any] = {"KL": "forward", "JSD": "jsd", "reverse KL": "reverse", "Jeffreys": "jeffreys"}
    rows: dict[str, dict[str, Loss]] = {
        name: {
            "Limbeck, whole": lambda kind=kind: losses.kl_divergence(*case.whole(), kind=kind, temperature=TEMPERATURE),
            "Limbeck": lambda kind=kind: one(linear.Divergence(case.student, case.teacher, kind=kind, temperature=TEMPERATURE)),
        }
        for name, kind in kinds.items()
    }
    rows["KL"] = {"naive": lambda: kl(*case.whole()), "checkpoint": lambda: checkpointed(case), **rows["KL"]}
    for name, found in peers(case).items():
        rows[name] |= found
    rows["CE"] = {
        "naive": lambda: F.cross_entropy(case.whole()[0], case.labels),
        "Limbeck": lambda: one(linear.CrossEntropy(case.student, case.labels)),
    }

    def ce_and_kl() -> Tensor:
        student, teacher = case.whole()
        return F.cross_entropy(student, case.labels) + kl(student, teacher)

    def in_one_pass() -> Tensor:
        student = case.student
        ce, divergence = linear.CrossEntropy(student, case.labels), linear.Divergence(student, case.teacher, TEMPERATURE)
        return sum(linear.losses({"ce": ce, "kd": divergence}).values())  # type: ignore[return-value]

    rows["CE + KL"] = {"naive": ce_and_kl, "Limbeck": in_one_pass}
    rows["top-64 KL"] = {
        "Limbeck, whole": lambda: top_k_divergence(case.hs @ case.ws.t(), case.known),
        "Limbeck": lambda: one(linear.TopKDivergence(case.student, case.known)),
    }
    rows["DBiLD"] = {
        "pairs": lambda: pairwise(*case.whole()),
        "Limbeck, whole": lambda: losses.dbild(*case.whole()),
        "Limbeck": lambda: one(linear.DBiLD(case.student, case.teacher)),
    }
    rows["KL, frozen head"] = {
        "naive": lambda: kl(*case.whole_frozen()),
        "Limbeck": lambda: one(linear.Divergence(case.frozen, case.teacher, TEMPERATURE)),
    }
    rows["DBiLD, frozen head"] = {
        "pairs": lambda: pairwise(*case.whole_frozen()),
        "Limbeck, whole": lambda: losses.dbild(*case.whole_frozen()),
        "Limbeck": lambda: one(linear.DBiLD(case.frozen, case.teacher)),
    }
    rows["KL, 10 % of the positions"] = {
        "naive, all": lambda: kl(*case.whole()),
        "Limbeck, all": lambda: one(linear.Divergence(case.student, case.teacher, TEMPERATURE)),
        "Limbeck": lambda: one(linear.Divergence(case.student, case.teacher, TEMPERATURE), mask=case.chosen),
    }
    return rows


def run(case: Case, loss: Loss) -> tuple[float, list[Tensor | None]]:
    """The value, and the gradients of the hidden states and of the head."""
    value = loss()
    value.backward()
    gradients = [case.hs.grad, case.ws.grad]
    case.hs.grad = case.ws.grad = None
    return float(value.detach()), gradients


def same(case: Case, expected: tuple[float, list[Tensor | None]], loss: Loss) -> bool:
    """Whether a row is the objective whose value and gradients are expected."""
    (value, gradients), (reference, references) = run(case, loss), expected
    pairs = [(g, r) for g, r in zip(gradients, references, strict=True) if g is not None and r is not None]
    near = all((g.float() - r.float()).norm() <= 2e-3 * r.float().norm() for g, r in pairs)
    return near and abs(value - reference) <= 2e-3 * abs(reference)


def cost(case: Case, loss: Loss) -> tuple[float, int]:
    """Seconds and peak bytes of one forward and backward."""
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        run(case, loss)
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    start = time.process_time()
    run(case, loss)
    return time.process_time() - start, 0


def peak(case: Case, loss: Loss) -> int:
    """Peak resident bytes of one forward and backward, over those before."""
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run(case, loss)
    return _resident("VmHWM") - before


def peaks(arguments: argparse.Namespace) -> dict[str, int]:
    """`peak` of every row, by "vocabulary/group/row", in a process whose malloc keeps nothing."""
    given = {
        "vocabulary": arguments.vocabulary,
        "tokens": [arguments.tokens],
        "hidden": [arguments.hidden],
        "only": arguments.only,
    }
    given |= {"dtype": [arguments.dtype], "threads": [arguments.threads], "device": ["cpu"]}
    flags = [str(part) for name, values in given.items() if values for part in (f"--{name}", *values)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        *flags,
        "--no-peers" if arguments.no_peers else "--peers-here",
        "--memory",
    ]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(told.splitlines()[-1])


def _resident(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def every(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[int, Case, str, dict[str, Loss]]]:
    """The groups that are asked for, at every vocabulary."""
    for vocabulary in arguments.vocabulary:
        case = Case(arguments.tokens, arguments.hidden, vocabulary, device, getattr(torch, arguments.dtype))
        for group, rows in groups(case).items():
            if not arguments.only or group in arguments.only:
                yield vocabulary, case, group, rows


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every group at every vocabulary."""
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {arguments.threads} thread(s)",
        "versions": {"python": platform.python_version(), **_versions("limbeck", "torch", "trl", "liger-kernel")},
        "arguments": {key: value for key, value in vars(arguments).items() if key in ("tokens", "hidden", "dtype", "repeats")},
        "results": [],
    }
    held = peaks(arguments) if device.type == "cpu" else {}
    for vocabulary, case, group, rows in every(arguments, device):
        expected = run(case, next(iter(rows.values())))
        alike = {name: same(case, expected, loss) for name, loss in list(rows.items())[1:]}
        del expected
        measured: dict[str, list[tuple[float, int]]] = {name: [] for name in rows}
        for _ in range(arguments.repeats):
            for name, loss in rows.items():
                seconds, size = cost(case, loss)
                measured[name].append((seconds, held.get(f"{vocabulary}/{group}/{name}", size)))
        base = next(iter(measured.values()))
        for name, costs in measured.items():
            ratios = [taken / reference for (taken, _), (reference, _) in zip(costs, base, strict=True)]
            row = {
                "vocabulary": vocabulary,
                "group": group,
                "row": name,
                "same": alike.get(name, True) or "10 %" in group,
                "seconds": statistics.median(taken for taken, _ in costs),
                "bytes": statistics.median(peak for _, peak in costs),
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "memory_ratio": statistics.median(peak for _, peak in costs)
                / max(1, statistics.median(peak for _, peak in base)),
            }
            report["results"].append(row)
            print(line(row), flush=True)
    return report


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    low, high = row["time_ratio_range"]
    return (
        f"{row['vocabulary']:>8,}  {row['group']:<26}{row['row']:<16}{row['bytes'] / 2**20:>7,.0f} MiB {row['memory_ratio']:>6.3f}"
        f"{row['seconds']:>9.2f} s {row['time_ratio']:>6.2f} [{low:.2f}, {high:.2f}]{'' if row['same'] else '  (other value)'}"
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((text.split(":")[1].strip() for text in lines if text.startswith("model name")), platform.processor())


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="groups to run, e.g. KL DBiLD")
    parser.add_argument("--no-peers", action="store_true", help="leave Liger-Kernel and TRL out")
    parser.add_argument("--peers-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args(argv)
    if arguments.memory:
        torch.set_num_threads(arguments.threads)
        small = Case(8, 8, 200, torch.device("cpu"), torch.float32)
        for loss in (loss for found in groups(small).values() for loss in found.values()):
            run(small, loss)  # what a first call loads is no cost of a loss
        rows = every(arguments, torch.device("cpu"))
        print(
            json.dumps(
                {f"{size}/{group}/{name}": peak(case, loss) for size, case, group, found in rows for name, loss in found.items()}
            )
        )
        return
    if not arguments.no_peers:
        from _peers import ensure, rerun

        rerun(ensure("logits", ["trl==1.16.0"], alone=["liger-kernel==0.8.5"]))
    print(f"{'V':>8}  {'objective':<26}{'':<16}{'peak':>11} {'ratio':>6}{'time':>11} {'ratio':>6} [range]")
    report = benchmark(arguments)
    print(report["device"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
