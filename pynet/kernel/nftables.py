"""nftables through the `nft` program: text in, JSON out. The only place that runs it."""

from __future__ import annotations

import json
import subprocess
from typing import Any


class NftError(Exception):
    """`nft` refused: what it said, with the line of the script that it points at."""


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


def _run(arguments: list[str], script: str | None = None) -> str:
    try:
        done = subprocess.run(["nft", *arguments], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NftError("the nft program is missing: install the package nftables") from None
    if done.returncode:
        raise NftError(f"nft {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
