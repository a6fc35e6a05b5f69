"""Start-up of the CNI executable: with the host's Python, and with the runtime that it brings to hosts without one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from form import Table, median, percentile

ROOT = Path(__file__).resolve().parent.parent


def measure(executable: Path, folder: Path, runs: int) -> list[float]:
    """Return milliseconds of VERSION calls, from spawn to end."""
    times = []
    environment = {"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"], "CNI_PATH": str(folder)}
    for _ in range(runs):
        begin = time.perf_counter()
        subprocess.run([executable], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        times.append((time.perf_counter() - begin) * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    runs = 10 if args.quick else args.runs
    table = Table(
        "runtime", "Start-up of the CNI executable", ["what", "median ms", "p95 ms", "least ms", "MiB on disk"]
    )
    table.notes.append("VERSION is served in process: the executable's whole start with the plugin's code, no agent.")
    with tempfile.TemporaryDirectory() as place:
        out, host = Path(place, "out"), Path(place, "host")
        subprocess.run([ROOT / "deploy/runtime/build", out], check=True)
        subprocess.run([ROOT / "deploy/runtime/install", out, host], check=True)
        size = sum(path.stat().st_size for path in host.rglob("*") if path.is_file() and not path.is_symlink()) / 2**20
        ours = Path(sys.executable).parent / "pynet-cni"
        found: dict[str, list[float]] = {"the host's Python": [], "its own runtime": []}
        for _ in range(5):  # in turns, so that whatever else the machine does meets both
            found["the host's Python"] += measure(ours, host, runs // 5)
            found["its own runtime"] += measure(host / "pynet-cni", host, runs // 5)
        for what, times in found.items():
            disk = round(size, 1) if what == "its own runtime" else 0
            table.add(what, median(times), percentile(times, 0.95), min(times), disk)
    table.finish()


if __name__ == "__main__":
    main()
