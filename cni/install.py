"""Writes the executables into a folder, complete at every moment: `python -m cni.install DIRECTORY`."""

from __future__ import annotations

import marshal
import os
import sys
from pathlib import Path

NAMES = ("pynet-cni", "pynet-ipam")


def install(directory: Path, *, names: tuple[str, ...] = NAMES) -> None:
    """Write the executables, each by a rename: a runtime that starts one meanwhile gets the old one or the new."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = directory / name
        draft = directory / f".{name}.{os.getpid()}"
        draft.write_text(executable(only_ipam=name.endswith("-ipam")), encoding="utf-8")
        draft.chmod(0o755)
        os.replace(draft, target)


def executable(*, only_ipam: bool) -> str:
    """Return the text of an executable. Options: I, no environment and no user folders; S, no site packages.

    It holds client.py as bytecode, which no call need compile, and says where to find it for another interpreter.
    """
    here = Path(__file__).resolve().parent
    text = (here / "client.py").read_text(encoding="utf-8")
    text = text.replace('ROOT = ""\n', f"ROOT = {str(here.parent)!r}\n", 1)
    if only_ipam:
        text = text.replace("ONLY_IPAM = False\n", "ONLY_IPAM = True\n", 1)
    interpreter = os.path.realpath(
        sys.executable
    )  # past the environment's link: it needs nothing that is installed there
    code = marshal.dumps(compile(text, "client.py", "exec", dont_inherit=True, optimize=2))
    return f"""\
#!{interpreter} -IS
# {here}/client.py, compiled
import marshal, sys
if sys.hexversion >> 16 == {sys.hexversion >> 16}:
    exec(marshal.loads({code!r}))
else:
    sys.path.insert(0, {str(here.parent)!r})
    from cni import client
    client.ROOT, client.ONLY_IPAM = {str(here.parent)!r}, {only_ipam}
    sys.exit(client.main())
"""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cni.install DIRECTORY")
    install(Path(sys.argv[1]))
