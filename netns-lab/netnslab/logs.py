"""`lab logs`: what the daemons and the pods' servers have written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from . import daemons
from .cluster import Lab
from .progress import err, say
from .state import LabError


def paths(lab: Lab, who: Sequence[str], program: str | None) -> list[tuple[str, Path]]:
    """Return the logs asked for, with a title each."""
    names = {node.name: node for node in lab.spec.nodes}
    found = []
    for name in who or list(names):
        if name in names:
            chosen = [each for each in daemons.PROGRAMS if program in (None, each)]
            found += [(f"{name} {each}", daemons.log_path(lab.folder, names[name], each)) for each in chosen]
        else:
            lab.netns_of(name)
            found.append((name, lab.folder.logs / f"{name}.log"))
    return found


def show(lab: Lab, who: Sequence[str], program: str | None, lines: int, follow: bool) -> int:
    """Print the last lines of each log; go on with what comes, when asked."""
    wanted = paths(lab, who, program)
    if lines < 0:
        raise LabError(f"--lines {lines}: expected 0 or more")
    ends = {}
    for title, path in wanted:
        if len(wanted) > 1:
            err.print(f"[bold]── {title}[/]")
        ends[path] = path.stat().st_size if path.exists() else 0
        text = daemons.tail(path, lines) if lines else ""
        if text:
            say(text)
    while follow:
        for title, path in wanted:
            with path.open("rb") as log:
                log.seek(ends[path])
                data = log.read()
            ends[path] += len(data)
            for line in data.decode(errors="replace").splitlines():
                say(f"{title}: {line}" if len(wanted) > 1 else line)
        time.sleep(0.2)
    return 0
