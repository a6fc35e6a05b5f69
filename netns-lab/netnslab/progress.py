"""What a user sees while the lab works: each step with its time; a failure with the command and the log behind it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from .state import LabError

WIDE = 150  # columns where there is no terminal to ask
out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Show a step while it is done, then how long it took."""
    begin = time.monotonic()
    spinner = err.status(escape(title)) if err.is_terminal else contextlib.nullcontext()
    try:
        with spinner:
            yield
    except BaseException:
        err.print(f"[red]✗[/] {escape(title)} [dim]{time.monotonic() - begin:.1f} s[/]")
        raise
    err.print(f"[green]✓[/] {escape(title)} [dim]{time.monotonic() - begin:.1f} s[/]")


def say(line: str) -> None:
    """Print a line of a command's answer."""
    out.print(escape(line), soft_wrap=True)


def complain(error: LabError) -> None:
    """Print what failed, and what explains it."""
    err.print(f"[red]lab: {escape(str(error))}[/]")
    if error.command:
        err.print(f"  the command: {escape(error.command)}")
    if error.output:
        err.print("  it said:")
        for line in error.output.splitlines():
            err.print(f"    {escape(line)}")
    if error.log:
        err.print("  its log ends with:")
        for line in error.log.splitlines():
            err.print(f"    {escape(line)}")
    sys.stderr.flush()
