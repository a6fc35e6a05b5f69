"""The lab's command: looks at what was said, and hands it to the room that does it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from . import api, kernel, lifecycle, logs, machine, play, status
from .cluster import Lab
from .commands import change, parser
from .progress import complain, err, out
from .state import Folder, LabError, Spec


def up(arguments: argparse.Namespace) -> int:
    """`lab up`."""
    wanted = Spec(
        arguments.name, arguments.topology, arguments.mode, arguments.ipv6, arguments.scheduler,
        arguments.iptables_backend, tuple(arguments.pyproxy_arg), tuple(arguments.pynetd_arg),
        api=arguments.api,
    )  # fmt: skip
    lab = lifecycle.up(wanted, arguments.nodes, demo=not arguments.empty)
    out.print(f"lab [bold]{lab.spec.name}[/] is up: lab status, lab check, lab exec client -- CMD…, lab down")
    if lab.spec.api:
        out.print(f"kubectl: export KUBECONFIG={api.kubeconfig(lab.folder)}", soft_wrap=True)
    return 0


def execute(arguments: argparse.Namespace) -> int:
    """`lab exec`: becomes the command."""
    lab = Lab.load(arguments.name, whole=False)
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        raise LabError("exec: no command given (lab exec client -- curl …)")
    line = machine.inside(lab.netns_of(arguments.where), *argv)
    sys.stdout.flush()
    os.execvpe(line[0], line, machine.marked(lab.folder.name))


def check(arguments: argparse.Namespace) -> int:
    """`lab check`."""
    folder = Folder(arguments.name)
    lab = Lab.load(arguments.name)
    with lifecycle.holding(folder):
        rows = play.play_all(lab, arguments.scenarios, keep=arguments.keep, quiet=arguments.json)
    if arguments.json:
        print(json.dumps([play.as_json(row) for row in rows], indent=1))
    return 0 if rows and all(row.ok for row in rows) else 1


def show_status(arguments: argparse.Namespace) -> int:
    """`lab status`."""
    found = status.collect(Lab.load(arguments.name))
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        status.show(found)
    return 0


def down(arguments: argparse.Namespace) -> int:
    """`lab down`."""
    lifecycle.down(arguments.name)
    return 0


def show_logs(arguments: argparse.Namespace) -> int:
    """`lab logs`."""
    lab = Lab.load(arguments.name, whole=False)
    return logs.show(lab, arguments.who, arguments.program, arguments.lines, arguments.follow)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "up": up, "down": down, "exec": execute, "status": show_status, "check": check, "logs": show_logs,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run one command; return the exit status: 77 where this machine cannot do it."""
    arguments = parser().parse_args(argv)
    try:
        kernel.demand_root()
        if arguments.command in COMMANDS:
            return COMMANDS[arguments.command](arguments)
        lab = Lab.load(arguments.name)
        with lifecycle.holding(lab.folder):
            change(Lab.load(arguments.name), arguments)
    except kernel.Unable as error:
        err.print(f"lab: {error}", markup=False)
        return kernel.UNABLE
    except LabError as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        err.print("lab: interrupted; lab up repairs, lab down removes")
        return 130
    return 0
