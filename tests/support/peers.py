"""One node's peers: published near and far, and what its kernel has of the ways to them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import yaml

from support.nodes import Machine, write
from support.waiting import until


def peer(own: Machine, name: str, *, cidrs: list[str], ips: list[str]) -> None:
    """Publish another Node."""
    write(own.manifests / f"{name}.yaml", yaml.safe_dump(own.manifest(name=name, cidrs=cidrs, ips=ips)))


def near(own: Machine, number: int, name: str = "") -> None:
    cidrs = [f"10.244.{number}.0/24", f"fd00:244:{number}::/64"]
    peer(own, name or f"n{number}", cidrs=cidrs, ips=[f"192.168.1.{number}", f"fd01:1::{number}"])


def far(own: Machine, number: int) -> None:
    cidrs = [f"10.244.{number}.0/24", f"fd00:244:{number}::/64"]
    peer(own, f"n{number}", cidrs=cidrs, ips=[f"192.168.2.{number}", f"fd01:2::{number}"])


def ways_are(own: Machine, expected: dict[str, str], family: int = 4) -> None:
    until(f"ways {expected} (now {own.ways(family)})", lambda: own.ways(family) == expected)


def events_of(own: Machine) -> Callable[[], str]:
    """Watch the namespace's routes from here on; the function returns what happened to them until now."""
    log = own.state.with_name("events")
    with log.open("w") as file:
        own.space.start("ip", "-N", "monitor", "route", stdout=file)
    numbers = itertools.count(1)

    def marked() -> bool:
        number = next(numbers)
        own.ip_command("route", "add", "blackhole", f"198.51.100.{number}/32")
        # the first ones may go by before the monitor listens
        return f"198.51.100.{number}" in log.read_text() or f"198.51.100.{number - 1} " in log.read_text()

    def happened() -> str:
        until("the monitor sees", marked)
        return "".join(line for line in log.read_text().splitlines(True) if " proto 112 " in line)

    happened()
    return happened


def overlay_of(own: Machine) -> tuple[set[str], set[str], dict[str, str]]:
    """Return forwarding entries, neighbours, and routes of the VXLAN device."""
    fdb = json.loads(own.space.run("bridge", "-j", "fdb", "show", "dev", "pynet-vx4"))
    neighbours = json.loads(own.ip_command("-j", "neighbour", "show", "dev", "pynet-vx4", "nud", "permanent"))
    return (
        {f"{entry['mac']} {entry['dst']}" for entry in fdb if "dst" in entry},
        {f"{entry['dst']} {entry['lladdr']}" for entry in neighbours},
        {dst: way for dst, way in {**own.ways(), **own.ways(6)}.items() if way.endswith("pynet-vx4")},
    )
