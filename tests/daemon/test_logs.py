"""Logs: one record is one line that a program can split, whatever the values hold."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

VALUES = {
    "plain": "web",
    "space": "a b",
    "quote": 'say "hi"',
    "equals": "a=b",
    "newline": "a\nb level=error",
    "empty": "",
}
PROGRAM = """
import json, sys
from pynet.daemon import logs
logs.configure("prog", sys.argv[1], "info")
log = logs.get("m")
log.debug("hidden")
log.info("it happened", extra=logs.fields(**json.loads(sys.argv[2])))
"""


def lines(form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form, json.dumps(VALUES)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_key_value_lines_split_back() -> None:
    (line,) = lines("text")
    pairs = dict(word.split("=", 1) for word in shlex.split(line.replace(r"\n", " ")))
    assert pairs["level"] == "info" and pairs["msg"] == "it happened"
    assert {**pairs, **VALUES, "newline": pairs["newline"]} == pairs


def test_json_lines_parse_back() -> None:
    (line,) = lines("json")
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z")
    assert entry == {"level": "info", "program": "prog", "msg": "it happened", **VALUES}


@pytest.mark.parametrize("form", ["text", "json"])
def test_debug_is_off_unless_asked_for(form: str) -> None:
    assert not any("hidden" in line for line in lines(form))
