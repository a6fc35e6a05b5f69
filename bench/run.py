"""`make bench`: every benchmark, one after the other, and one page of what they found (`--quick`: small sizes)."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# script → what makes it quick
BENCHMARKS = {
    "sync.py": ["--sizes", "100,1000", "--runs", "1", "--changes", "30"],
    "first_packet.py": ["--sizes", "100,1000", "--runs", "1", "--connections", "500"],
    "churn.py": ["--services", "200", "--seconds", "3"],
    "userspace.py": ["--requests", "300", "--seconds", "0.5", "--runs", "1"],
    "cni_latency.py": ["--quick"],
    "routes.py": ["--quick"],
    "source.py": ["--quick"],
    "runtime.py": ["--quick"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one run: a look, no measurement")
    parser.add_argument("--only", default="", help="benchmarks to run, with commas (default: all)")
    args = parser.parse_args()
    chosen = [f"{name.strip().removesuffix('.py')}.py" for name in args.only.split(",") if name.strip()]
    failed = []
    for script, quick in BENCHMARKS.items():
        if chosen and script not in chosen:
            continue
        print(f"# {script}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *(quick if args.quick else [])], check=False).returncode:
            failed.append(script)
    subprocess.run([sys.executable, str(HERE / "report.py")], check=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
