"""Whatever comes in, an answer of the specification comes out: never a traceback on stdout, never a hang."""

from __future__ import annotations

import json
import os
import random
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cni import netconf, spec, verbs
from cni.context import Context
from cni.ipam import ranges
from support.netns import programs

KEYS = [*spec.KEYS.split(), "unknown", "cni.dev/valid-attachments"]
WORDS = [
    "10.9.0.0/24",
    "fd00::/64",
    "10.9.0.1",
    "pynet-ipam",
    "1.1.0",
    "net",
    "0.0.0.0/0",
    "tcp",
    "",
    "\ud800",
    "\0",
    "é\n",
]
NUMBERS = [0, 1, -1, 2**32, 2**70, 1e300, 0.5]
VERBS = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"]


def value(chance: random.Random, depth: int) -> Any:
    kind = chance.randrange(7 if depth < 4 else 4)
    if kind < 4:
        return (None, chance.random() < 0.5, chance.choice(NUMBERS), chance.choice(WORDS))[kind]
    if kind == 4:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(KEYS): value(chance, depth + 1) for _ in range(chance.randrange(6))}


def config(chance: random.Random) -> dict[str, Any]:
    """Return a configuration that gets past the first checks, with a few keys of any content."""
    found = {chance.choice(KEYS): value(chance, 0) for _ in range(chance.randrange(6))}
    return found | {"cniVersion": chance.choice(spec.VERSIONS), "name": "net", "type": "pynet-cni"}


@pytest.mark.parametrize("seed", range(5))
def test_any_configuration_is_parsed_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(1000):
        made = config(chance)
        args = {key: chance.choice(WORDS) for key in ("IP", "MAC", "IgnoreUnknown", "X") if chance.random() < 0.2}
        for parse in (netconf.parse, partial(ranges.parse, state_dir="/nowhere")):
            try:
                parse(spec.decode(json.dumps(made).encode()), args, version=made["cniVersion"])
            except spec.CniError as refused:
                assert refused.code in range(1, 12)  # noqa: PT017
                json.loads(refused.render(made["cniVersion"]))


@pytest.mark.parametrize("seed", range(3))
def test_any_call_gets_an_answer(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(1000):
        keys = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH", "CNI_ARGS")
        env = {key: chance.choice(VERBS + WORDS) for key in keys if chance.random() < 0.8}
        stdin = chance.randbytes(30) if chance.random() < 0.2 else json.dumps(value(chance, 0)).encode()
        try:
            spec.request(env, stdin)
        except spec.CniError as refused:
            assert json.loads(refused.render("1.1.0"))["code"] == refused.code  # noqa: PT017


WHOLE = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": "/n", "CNI_IFNAME": "e", "CNI_PATH": "/"}


@pytest.mark.parametrize(
    ("env", "stdin"),
    [
        ({"CNI_COMMAND": "ADD"}, b""),
        ({"CNI_COMMAND": "\xff"}, b"{}"),
        (WHOLE, b"\x80" * 70000),
        (WHOLE, b'{"a":' * 9999),
        ({"CNI_COMMAND": "STATUS", "CNI_PATH": "/"}, b'{"cniVersion":"1.1.0","name":"n","mtu":"\\ud800"}'),
    ],
)  # fmt: skip
def test_the_executable_answers_in_json(env: dict[str, str], stdin: bytes, tmp_path: Path) -> None:
    for name in ("pynet-cni", "pynet-ipam"):
        done = subprocess.run(
            [programs() / name],
            input=stdin,
            capture_output=True,
            timeout=30,
            env={"PATH": os.environ["PATH"], **env},
            check=False,
        )
        assert done.returncode == 1
        assert json.loads(done.stdout)["code"] in range(1, 101)
        assert b"Traceback" not in done.stdout + done.stderr


def test_without_a_command_it_says_what_it_is() -> None:
    done = subprocess.run(
        [programs() / "pynet-cni"], input="", capture_output=True, text=True, timeout=30, env={}, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "CNI plugin" in done.stderr


def test_version_reads_no_stdin() -> None:
    with subprocess.Popen(
        [programs() / "pynet-cni"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"CNI_COMMAND": "VERSION"}
    ) as child:
        assert child.stdout is not None
        answer = json.loads(child.stdout.read())
    assert answer == {"cniVersion": "1.1.0", "supportedVersions": list(spec.VERSIONS)}


@pytest.mark.parametrize("name", ["pynet-cni", "pynet-ipam"])
@pytest.mark.parametrize("way", ["<&-", "0>/dev/null"])
def test_stdin_that_cannot_be_read(name: str, way: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{programs() / name}' {way}"], capture_output=True, env=WHOLE, timeout=30, check=False
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 5
    assert b"Traceback" not in done.stderr


def test_what_is_wrong_with_us_is_an_answer_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("one\ntwo")

    monkeypatch.setitem(verbs._VERBS, "STATUS", broken)
    answer = verbs.serve({"CNI_COMMAND": "STATUS", "CNI_PATH": "/"}, b'{"cniVersion":"1.1.0","name":"n"}', Context())
    assert answer.code == 1
    assert json.loads(answer.output)["msg"] == "RuntimeError: one two"
    assert "Traceback" in capsys.readouterr().err
