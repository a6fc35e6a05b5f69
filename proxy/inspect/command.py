"""`pyproxy explain`: the question from the command line, the cluster from the source, the answer on stdout."""

from __future__ import annotations

import argparse
import ipaddress
import re
import sys
import threading
import time
from collections.abc import Sequence

from proxy import flags
from proxy.cluster import KINDS, Cluster
from proxy.config import ConfigError, surroundings
from proxy.inspect.explain import Answer, explain
from proxy.plan import Family, OutcomeKind, Packet
from proxy.planning import Planner
from proxy.services import PROTOCOLS
from pynet.daemon import lifecycle
from pynet.sources import Batch, Source
from pynet.sources.flags import NoSource, source_from

_WAIT_SECONDS = 15.0
_DESTINATION = re.compile(r"\[?(?P<address>[0-9A-Fa-f:.]+?)\]?:(?P<port>\d{1,5})(/(?P<protocol>\w+))?")
# exit codes: the packet reaches an endpoint (or is not the proxy's), or it does not; 2: the question cannot be answered
_REACHES = {OutcomeKind.FORWARD: 0, OutcomeKind.PASS: 0, OutcomeKind.REJECT: 1, OutcomeKind.DROP: 1}
_SAYS = {
    OutcomeKind.FORWARD: "forwarded to one of its endpoints",
    OutcomeKind.PASS: "no Service's",
    OutcomeKind.REJECT: "refused",
    OutcomeKind.DROP: "dropped",
}


class NoAnswer(ValueError):
    """The question cannot be answered; the message says what is wrong with it or what is missing."""


def main(arguments: Sequence[str]) -> int:
    """Answer one question; return the exit code."""
    parser = _parser()
    asked, rest = parser.parse_known_args(arguments)
    try:
        args, settings = flags.parse(rest)
        lifecycle.configure_logs("pyproxy", args)
        packet = packet_of(asked.source, asked.destination, asked.interface)
        family = Family.V6 if ":" in packet.destination else Family.V4
        cluster = known(source_from(args, KINDS, node=settings.node_name), settings.node_name)
        around = surroundings(settings, family, cluster.node, cluster.service_cidrs)
        planner = Planner(family, around)
        plan = planner.update(cluster, cluster.services).new
        addresses = asked.node_address or around.node_ips
        answer = explain(cluster, plan, planner.contests, around.place, packet, addresses)
    except (ConfigError, NoSource, NoAnswer) as error:
        print(f"pyproxy explain: {error}", file=sys.stderr)
        return 2
    print(text_of(packet, settings.node_name, answer))
    return _REACHES[answer.outcome]


def packet_of(source: str, destination: str, interface: str) -> Packet:
    """Return the packet that the command line names. Raise `NoAnswer`."""
    match = _DESTINATION.fullmatch(destination)
    protocol = (match["protocol"] or "TCP").upper() if match else ""
    if match is None or protocol not in PROTOCOLS or not 1 <= int(match["port"]) <= 65535:
        raise NoAnswer(f"{destination!r}: expected ADDRESS:PORT or ADDRESS:PORT/PROTOCOL, as in 10.96.0.10:53/udp")
    try:
        ends = [ipaddress.ip_address(text) for text in (source, match["address"])]
    except ValueError as error:
        raise NoAnswer(str(error)) from None
    if ends[0].version != ends[1].version:
        raise NoAnswer(f"{source} and {match['address']} are of different families")
    return Packet(str(ends[0]), str(ends[1]), protocol, int(match["port"]), interface)


def known(source: Source, node_name: str) -> Cluster:
    """Return the cluster as soon as the source has said everything once. Raise `NoAnswer` where it says nothing."""
    cluster = Cluster(node_name)
    waiting = set(source.kinds)
    stop = threading.Event()

    def take(batch: Batch) -> None:
        cluster.apply(batch)
        waiting.difference_update(batch.replaced)
        if not waiting:
            stop.set()

    thread = threading.Thread(target=source.run, args=(take, stop), daemon=True)
    thread.start()
    deadline = time.monotonic() + _WAIT_SECONDS
    while thread.is_alive() and time.monotonic() < deadline and not stop.is_set():
        thread.join(0.05)
    stop.set()
    thread.join(_WAIT_SECONDS)
    if waiting:
        raise NoAnswer(f"the source said nothing of {', '.join(sorted(waiting))} within {_WAIT_SECONDS:.0f} s")
    return cluster


def text_of(packet: Packet, node: str, answer: Answer) -> str:
    """Return the answer for a person."""
    way = f"{packet.source} → {packet.destination}:{packet.port}/{packet.protocol} on node {node}"
    steps = [f"  {number}. {finding}" for number, finding in enumerate(answer.findings, 1)]
    return "\n".join([f"{way}: {_SAYS[answer.outcome]}", *steps])


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="pyproxy explain",
        description="Says what becomes of a connection on this node, and which field of which object decides it. Exit "
        "code 0: it reaches an endpoint (or is no Service's); 1: it is refused or dropped; 2: no answer.",
        epilog="Takes pyproxy's flags besides: the source (--manifests, --kubeconfig), --hostname-override, "
        "--cluster-cidr … as the daemon has them.",
        allow_abbrev=False,
    )
    made.add_argument("source", metavar="FROM", help="the client's address")
    made.add_argument("destination", metavar="TO:PORT[/PROTOCOL]", help="where it connects to")
    made.add_argument("--interface", default="", help="the interface it arrives at, for the detect-local modes by name")
    made.add_argument(
        "--node-address", action="append", metavar="IP", help="an address of the node (default: its Node object's)"
    )
    return made
