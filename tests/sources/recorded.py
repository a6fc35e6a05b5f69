"""The recorded answers of a real API server, as the tests use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"


def answer(name: str) -> Any:
    """Return request, status, headers and body of a recorded request."""
    return json.loads((CORPUS / f"{name}.json").read_text())


def body(name: str) -> bytes:
    """Return the body of a recorded answer, as bytes."""
    return json.dumps(answer(name)["body"]).encode()


def watch(name: str) -> list[dict[str, Any]]:
    """Return the events of a recorded watch."""
    entries = [json.loads(line) for line in (CORPUS / f"{name}.ndjson").read_text().splitlines()]
    return [entry["event"] for entry in entries if "event" in entry]


def lines(name: str) -> bytes:
    """Return a recorded watch as it came over the wire."""
    return b"".join(json.dumps(event).encode() + b"\n" for event in watch(name))
