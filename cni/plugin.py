"""The executable's two entry points, when served in process: `pynet-cni` and `pynet-ipam`."""

from __future__ import annotations

import os
import sys

from cni import spec


def main() -> int:
    """Serve one call of `pynet-cni`."""
    return run(only_ipam=False)


def main_ipam() -> int:
    """Serve one call of `pynet-ipam`."""
    return run(only_ipam=True)


def run(*, only_ipam: bool, stdin: bytes | None = None, again: bool = False) -> int:
    """Serve one call in process; return the exit code.

    `again`: an agent died over this ADD, so what it may have done is removed first.
    """
    from cni import verbs
    from cni.context import Context

    environment = {key: value for key, value in os.environ.items() if key.startswith("CNI_") or key == "PATH"}
    if not environment.get("CNI_COMMAND"):
        name = "pynet-ipam" if only_ipam else "pynet-cni"
        print(f"{name}: a CNI plugin; it is called by a container runtime, with CNI_COMMAND set", file=sys.stderr)
        return 0
    if stdin is None:
        try:
            stdin = b"" if environment["CNI_COMMAND"] == "VERSION" else _read_stdin()
        except OSError as error:
            return refuse(f"the configuration cannot be read from stdin: {error.strerror}", spec.IO_FAILURE)
    context = Context()
    if again:
        verbs.serve({**environment, "CNI_COMMAND": "DEL"}, stdin, context, only_ipam=only_ipam)
    answer = verbs.serve(environment, stdin, context, only_ipam=only_ipam)
    context.close()
    os.write(1, answer.output.encode())
    return answer.code


def refuse(message: str, code: int = spec.TRY_LATER) -> int:
    """Answer a call with an error, as a rule one for which trying later helps; return the exit code."""
    os.write(1, spec.CniError(code, message).render(spec.NEWEST).encode())
    return 1


def _read_stdin() -> bytes:
    chunks = []
    while chunk := os.read(0, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)
