"""How a daemon starts and ends: common flags, signals, word to the service manager."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import threading
from importlib import metadata
from types import FrameType

from pynet.daemon import logs


def version() -> str:
    """Return the version of the installed project."""
    return metadata.version("pynet")


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add what every program takes: --version, --log-format, --log-level, and -v/--v as kube-proxy spells it."""
    parser.add_argument("--version", action="version", version=f"{parser.prog} {version()}")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="form of the logs on stderr")
    parser.add_argument("--logging-format", choices=("text", "json"), dest="log_format", help=argparse.SUPPRESS)
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info", help="least severe level that is logged")
    parser.add_argument("-v", "--v", type=int, metavar="N", help="verbosity as kube-proxy takes it: 4 and up is debug")


def configure_logs(program: str, arguments: argparse.Namespace) -> None:
    """Set up logging as the common flags say."""
    level = "debug" if (arguments.v or 0) >= 4 else arguments.log_level
    logs.configure(program, arguments.log_format, level)


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM or SIGINT sets; the second such signal ends the process at once."""
    stop = threading.Event()
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        # by another thread: this one may have been interrupted while it holds the event's lock, in a wait for it
        threading.Thread(target=stop.set, name="stop", daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def notify(state: str) -> None:
    """Tell the service manager, where there is one, `READY=1`, `WATCHDOG=1`, `STOPPING=1` … (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.send(state.encode())


def watchdog_seconds() -> float | None:
    """Return how often the service manager wants a WATCHDOG=1 (half of its limit), or None."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    if not limit.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(limit) / 2e6
