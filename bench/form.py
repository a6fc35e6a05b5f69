"""The form that every benchmark's result takes: one table, printed, written as JSON, plotted by `report.py`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "out"


class Table:
    """Rows of one benchmark. `columns`: name and unit of each; `x`, `y`, `series`: columns that a plot uses."""

    def __init__(self, name: str, title: str, columns: Sequence[str]) -> None:
        self.name = name
        self.title = title
        self.columns = list(columns)
        self.rows: list[list[Any]] = []
        self.notes: list[str] = []
        self.plots: list[dict[str, Any]] = []

    def add(self, *values: Any) -> None:
        assert len(values) == len(self.columns), (values, self.columns)
        self.rows.append(list(values))
        print("  " + "  ".join(f"{column}={shown(value)}" for column, value in zip(self.columns, values, strict=True)))
        sys.stdout.flush()

    def plot(self, title: str, *, x: str, y: str, series: Sequence[str], log: bool = False) -> None:
        self.plots.append({"title": title, "x": x, "y": y, "series": list(series), "log": log})

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(shown(value) for value in row) + " |" for row in self.rows]
        return "\n".join(lines)

    def finish(self) -> None:
        """Print the whole table and write it to `bench/out/NAME.json`."""
        print(f"\n## {self.title}\n\n{self.markdown()}\n")
        for note in self.notes:
            print(f"- {note}")
        OUT.mkdir(exist_ok=True)
        content = {
            "name": self.name, "title": self.title, "columns": self.columns, "rows": self.rows, "notes": self.notes,
            "plots": self.plots, "machine": machine(),
        }  # fmt: skip
        (OUT / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, str]:
    """Describe where the figures were taken."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()[0]
        except (FileNotFoundError, IndexError):
            return "absent"

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "cores": str(os.cpu_count()),
        "processor": model,
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "iptables": said("iptables", "--version"),
        "nft": said("nft", "--version"),
        "date": time.strftime("%Y-%m-%d"),
    }


def in_own_namespace() -> None:
    """Go on in a fresh network namespace, which ends with this process: nothing can stay behind."""
    if os.environ.get("PYNET_BENCH_NAMESPACE") != "1":
        os.environ["PYNET_BENCH_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "--net", "--", sys.executable, *sys.argv])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def in_process_of_its_own(script: str, *arguments: object) -> dict[str, float]:
    """Run `script --point ARGUMENTS ANSWER` in a new process and network namespace; return what it wrote to ANSWER."""
    with tempfile.NamedTemporaryFile("r") as answer:
        command = [sys.executable, script, "--point", *map(str, arguments), answer.name]
        environment = {**os.environ, "PYNET_BENCH_NAMESPACE": "1"}
        subprocess.run(["unshare", "--net", "--", *command], check=True, env=environment)
        found: dict[str, float] = json.loads(Path(answer.name).read_text())
        return found


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def resident_mib() -> float:
    """Return this process's resident memory, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
