"""IPAM by another executable, found through CNI_PATH, as the specification's section on delegation asks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

from cni import results, spec

_SECONDS = 120


def run(command: str, request: spec.Request, kind: str, environment: Mapping[str, str]) -> bytes:
    """Run the IPAM plugin `kind` with a verb and the complete configuration; return its stdout. Raise `CniError`."""
    import subprocess  # 3 ms, which our own IPAM need not wait for

    program = find(kind, request.path)
    try:
        done = subprocess.run(
            [program], input=request.stdin, env={**environment, "CNI_COMMAND": command},
            capture_output=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise spec.CniError(spec.TRY_LATER, f"IPAM plugin {kind}: no answer to {command} in {_SECONDS} s") from None
    except OSError as error:
        raise spec.CniError(spec.IO_FAILURE, f"IPAM plugin {kind}: {program}: {error.strerror}") from None
    if done.stderr:
        sys.stderr.write(done.stderr.decode(errors="replace"))
    if done.returncode:
        raise _refusal(kind, done.stdout, done.stderr)
    return done.stdout


def add(request: spec.Request, kind: str, environment: Mapping[str, str]) -> results.Result:
    """Have the IPAM plugin allocate; return its result. Raise `CniError`."""
    output = run("ADD", request, kind, environment)
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        raise spec.CniError(spec.DECODING, f"IPAM plugin {kind}: its result is not JSON: {output[:200]!r}") from None
    return results.parse_result(answer, request.version, f"result of {kind}")


def find(kind: str, path: str) -> str:
    """Return the executable of a plugin type. Raise `CniError`."""
    for folder in path.split(":"):
        candidate = f"{folder}/{kind}"
        if folder and os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise spec.CniError(spec.BAD_CONFIG, f"field ipam.type: no plugin {kind} in CNI_PATH {path}")


def _refusal(kind: str, stdout: bytes, stderr: bytes) -> spec.CniError:
    try:
        answer = json.loads(stdout)
        code, message = int(answer["code"]), str(answer["msg"])
        return spec.CniError(code, f"IPAM plugin {kind}: {message}", str(answer.get("details") or ""))
    except (ValueError, KeyError, TypeError, RecursionError):
        said = (stdout or stderr).decode(errors="replace").strip()
        return spec.CniError(spec.FAILED, f"IPAM plugin {kind} failed: {said[:500]}")
