"""nftables through the `nft` program: text in, JSON out. The only place that runs it."""

from __future__ import annotations

import json
import re
from typing import Any

_LINE = re.compile(r"^/dev/stdin:(\d+):", re.MULTILINE)


class NftError(Exception):
    """`nft` refused: what it said. `lines`: those of the script that it points at, from 1."""

    def __init__(self, message: str, lines: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.lines = lines


def apply(script: str) -> None:
    """Apply `script` as one transaction: all of it or nothing. Raise `NftError`."""
    _run(["-f", "-"], script)


def list_table(family: str, table: str) -> list[dict[str, Any]]:
    """Return the objects of one table as libnftables-json(5) gives them; an absent table has none."""
    try:
        output = _run(["--json", "list", "table", family, table])
    except NftError as error:
        if "No such file or directory" in str(error):
            return []
        raise
    objects: list[dict[str, Any]] = json.loads(output)["nftables"]
    return [entry for entry in objects if "metainfo" not in entry]


def version() -> tuple[int, ...]:
    """Return the program's version, as in (1, 0, 6). Raise `NftError`."""
    output = _run(["--version"])
    if not (found := re.search(r"v(\d+(?:\.\d+)+)", output)):
        raise NftError(f"nft --version says {output.strip()!r}: no version in it")
    return tuple(int(number) for number in found[1].split("."))


def list_chains() -> list[dict[str, Any]]:
    """Return every chain of every table, without its rules."""
    objects: list[dict[str, Any]] = json.loads(_run(["--json", "list", "chains"]))["nftables"]
    return [entry["chain"] for entry in objects if "chain" in entry]


def _run(arguments: list[str], script: str | None = None) -> str:
    import subprocess  # 3 ms, which a pod without rules need not wait for

    try:
        done = subprocess.run(["nft", *arguments], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NftError("the nft program is missing: install the package nftables") from None
    if done.returncode:
        said = done.stderr.strip()
        lines = tuple(dict.fromkeys(int(line) for line in _LINE.findall(said)))
        raise NftError(f"nft {' '.join(arguments)}: {_short(said, script, lines)}", lines)
    return done.stdout


def _short(said: str, script: str | None, lines: tuple[int, ...]) -> str:
    """Return the first of what `nft` said, cut to a readable length; its copies of long lines are no help."""
    short = "\n".join(line[:400] for line in said.splitlines()[:12])
    if script and lines and lines[0] <= script.count("\n"):
        offending = script.splitlines()[lines[0] - 1][:400]
        if offending not in short:
            short += f"\n  line {lines[0]}: {offending}"
    return short
