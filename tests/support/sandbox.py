"""A machine of its own for a test: own network, mounts, processes and /run, so that "as it was before" can be asked.

`run(program)` runs a Python program as the first process of such a machine and returns the JSON that it prints last;
whatever it leaves running ends with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SETUP = """
set -e
grep -o ' /run[^ ]*' /proc/self/mountinfo | sort -r | while read -r place; do
    umount -n -l "$place" 2>/dev/null || :
done
mount -n -t tmpfs -o mode=755 tmpfs /run
ip link set lo up
exec "$@"
"""
TESTS = Path(__file__).resolve().parents[1]


def run(program: str, *arguments: str, timeout: float = 120) -> Any:
    """Return what a program printed as its last line, decoded."""
    line = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--propagation",
        "private",
    ]
    line += ["sh", "-c", SETUP, "sh", sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent / 'netns-lab'}"}
    done = subprocess.run(line, text=True, capture_output=True, timeout=timeout, check=False, env=environment)
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
