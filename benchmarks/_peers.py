"""The benchmarks' own environments: peers are compared with here, and Limbeck never depends on them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import venv as virtual
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "limbeck" / "benchmarks"


def ensure(name: str, requirements: Sequence[str], venv: Path | None = None, *, alone: Sequence[str] = ()) -> Path:
    """The interpreter of a virtual environment that holds Limbeck (this checkout) and ``requirements``; made where it is missing.

    venv: its folder; None takes ``~/.cache/limbeck/benchmarks/<name>``. alone: requirements to install without what they declare.
    torch comes first and by the exact version of constraints.txt, so that nothing brings a CUDA build beside a CPU one.
    Raises `subprocess.CalledProcessError` where pip cannot install them.
    """
    folder = (venv or CACHE / name).expanduser().resolve()
    python, stamp = folder / "bin" / "python", folder / ".installed"
    constraints = ROOT / "constraints.txt"
    installed = "\n".join([constraints.read_text(), *requirements, *alone, str(ROOT)])
    if stamp.exists() and stamp.read_text() == installed:
        return python
    print(f"installing {', '.join([*requirements, *alone])} into {folder}", file=sys.stderr)
    virtual.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    for given in (["torch"], ["-e", f"{ROOT}[embedded]", *requirements], ["--no-deps", *alone] if alone else []):
        if given:
            subprocess.run([*pip, *given], check=True)
    stamp.write_text(installed)
    return python


def rerun(python: Path, **environment: str) -> None:
    """Go on as the same script, with the same arguments, under ``python`` and with ``environment`` set; returns if it runs so already."""
    if Path(sys.prefix) == python.parents[1] and all(os.environ.get(name) == value for name, value in environment.items()):
        return
    os.execve(python, [str(python), *sys.argv], {**os.environ, **environment})


def machine(*packages: str) -> dict[str, str]:
    """What a result was measured on: the processor, Python, and the version of each package that is installed."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(": ")[2] if names else processor
    found = {"processor": processor, "cores": str(os.cpu_count()), "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
