"""/statusz and /flagz, as the components of Kubernetes have them (KEPs 4827, 4828): plain text for people to read.

kube-proxy names itself in the first line, and so do we: whoever looks for it finds it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping

from pynet.daemon import lifecycle
from pynet.daemon.http import Reply

_WARNING = "Warning: for people to read; the form of this page may change at any time.\n"


def uptime(seconds: float) -> str:
    """Return a time span as /statusz spells it."""
    whole = int(seconds)
    return f"{whole // 3600} hr {whole // 60 % 60:02} min {whole % 60:02} sec"


def statusz(began: float, now: float, paths: tuple[str, ...]) -> Reply:
    """Return /statusz; `began`, `now`: seconds since the epoch."""
    started = time.strftime("%a %b %e %H:%M:%S UTC %Y", time.gmtime(began))
    rows = {
        "Started": started,
        "Up": uptime(now - began),
        "Go version": f"none (Python {platform.python_version()})",
        "Binary version": lifecycle.version(),
        "Paths": " ".join(sorted(paths)),
    }
    text = "".join(f"{name}: {value}\n" for name, value in rows.items())
    return Reply(200, body=f"\nkube-proxy statusz\n{_WARNING}\n{text}".encode())


def flagz(values: Mapping[str, str]) -> Reply:
    """Return /flagz: each flag and the value in use, sorted."""
    text = "".join(f"{name}={values[name]}\n" for name in sorted(values))
    return Reply(200, body=f"\nkube-proxy flags\n{_WARNING}\n{text}".encode())


def zpages_routes(values: Mapping[str, str], paths: tuple[str, ...]) -> dict[str, Callable[[], Reply]]:
    """Return what is served on the metrics address; `paths`: what else is."""
    began = time.time()
    all_paths = (*paths, "/flagz", "/statusz")
    return {"/flagz": lambda: flagz(values), "/statusz": lambda: statusz(began, time.time(), all_paths)}
