"""What only nftables mode promises of packets: its counts of drops, and how long a client is remembered."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from msgspec.structs import replace

from proxy.metrics import Metrics
from proxy.modes.nftables.mode import Nftables
from proxy.modes.nftables.names import TABLE
from proxy.plan import Endpoint, Family, Plan, PlanChange, VirtualServer
from proxy.refusals import Refusals
from support.netns import Names
from support.plans import DROP, cluster_ip, load_balancer, node_port, plan, server
from support.servicenet import REFUSED, SILENCE, ServiceNet, inside

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def net() -> Iterator[ServiceNet]:
    names = Names()
    built = None
    try:
        built = ServiceNet(names)
        for host in ("pod1", "pod2", "far"):
            built.servers.add(built[host], host, 8080)
        built.servers.start()
        yield built
    finally:
        if built:
            built.close()
        names.close()


@contextmanager
def serving(
    net: ServiceNet, *servers: VirtualServer, service_cidrs: tuple[str, ...] = ()
) -> Iterator[tuple[Nftables, Plan]]:
    with inside(net.node):
        mode = Nftables()
        wanted = plan(*servers, settings=replace(plan().settings, service_cidrs=service_cidrs))
        mode.sync([wanted])
        try:
            yield mode, wanted
        finally:
            mode.cleanup()


def endpoints(net: ServiceNet, *hosts: str, weights: tuple[int, ...] = ()) -> tuple[Endpoint, ...]:
    made = [Endpoint(net[host].v4, 8080, host != "far") for host in hosts]
    return tuple(Endpoint(e.address, e.port, e.local, w) for e, w in zip(made, weights or [1] * len(made), strict=True))


def test_what_is_not_let_through_is_counted_by_reason_and_frontend(net: ServiceNet) -> None:
    some = endpoints(net, "pod1")
    with serving(
        net,
        server("a/none", cluster_ip("10.96.0.1", 80)),
        server("a/held", cluster_ip("10.96.0.2", 80, DROP, DROP, DROP), cluster=some),
        server("a/shut", load_balancer("203.0.113.1", 80, ranges=("192.168.77.0/26",)), cluster=some),
        service_cidrs=("192.168.77.248/29",),
    ) as (mode, _):
        for _ in range(3):
            assert net.ask("outside", "10.96.0.1", 80) == REFUSED
        assert net.ask("outside", "10.96.0.2", 80, wait=0.2) == SILENCE
        assert net.ask("outside", "203.0.113.1", 80, wait=0.2) == SILENCE
        assert net.ask("other", "203.0.113.1", 80).server == "pod1"
        for client in ("pod1", "node", "pod2"):
            assert net.ask(client, "192.168.77.250", 80, wait=0.2) == SILENCE
        found = mode.drops()
        assert found["unallocated"] == {(Family.V4, "tcp"): 3}
        assert found["no-endpoint"] == {(Family.V4, "10.96.0.1 . tcp . 80"): 3}
        assert found["local-policy"] == {(Family.V4, "10.96.0.2 . tcp . 80"): 1}
        assert found["source-range"] == {(Family.V4, "203.0.113.1 . tcp . 80"): 1}
        metrics = Metrics()
        Refusals(mode, metrics).tick(1.0)
        for family, count in (("IPv4", 3), ("IPv6", 0)):
            labels = {"reason": "no-endpoint", "ip_family": family}
            assert metrics.registry.get_sample_value("pyproxy_refused_packets", labels) == count


def test_a_client_is_forgotten_after_the_timeout(net: ServiceNet) -> None:
    sticky = server("a/sticky", cluster_ip("10.96.0.1", 80), cluster=endpoints(net, "pod1", "pod2", "far"), affinity=1)
    with serving(net, sticky):
        first = net.ask("outside", "10.96.0.1", 80).server
        assert {net.ask("outside", "10.96.0.1", 80).server for _ in range(20)} == {first}
        seen = {first}
        for _ in range(40):  # each time the kernel forgets, another endpoint has two chances in three
            while net["outside"].v4 in remembered(net):
                time.sleep(0.05)
            seen.add(net.ask("outside", "10.96.0.1", 80).server)
            if len(seen) > 1:
                return
        pytest.fail("always the same endpoint")


def remembered(net: ServiceNet) -> str:
    text = net.node.run("nft", "list", "table", "ip", TABLE)
    return "".join(re.findall(r"map sticky-[^}]+elements = (\{[^}]+\})", text))


def test_a_client_keeps_its_endpoint_while_others_come_and_go(net: ServiceNet) -> None:
    def with_(*hosts: str) -> VirtualServer:
        return server(
            "a/sticky", cluster_ip("10.96.0.1", 80), node_port(30080), cluster=endpoints(net, *hosts), affinity=60
        )

    with serving(net, with_("pod1", "pod2")) as (mode, now):
        first = net.ask("outside", "10.96.0.1", 80).server
        other = "pod2" if first == "pod1" else "pod1"
        for hosts in [("far", *sorted([first, other])), ("far", first), (first,), tuple(sorted([first, other]))]:
            then = plan(with_(*hosts))
            mode.update([PlanChange(now, then, tuple(then.servers))])
            now = then
            for address, port in (("10.96.0.1", 80), (net["node"].v4, 30080)):
                assert {net.ask("outside", address, port).server for _ in range(6)} == {first}
        then = plan(with_(other))
        mode.update([PlanChange(now, then, tuple(then.servers))])
        assert {net.ask("outside", "10.96.0.1", 80).server for _ in range(6)} == {other}


@pytest.mark.parametrize(("scheduler", "affinity"), [("rr", 0), ("rr", 60), ("random", 0)])
def test_weights(net: ServiceNet, scheduler: str, affinity: int) -> None:
    weighed = endpoints(net, "pod1", "far", weights=(3, 1))
    front = cluster_ip("10.96.0.1", 80)
    with serving(net, server("a/weights", front, cluster=weighed, scheduler=scheduler, affinity=affinity)):
        asked = 40 if scheduler == "rr" else 200
        count = 0
        for _ in range(asked):
            count += net.ask("outside", "10.96.0.1", 80).server == "pod1"
            if affinity:
                net.node.run("nft", "flush", "map", "ip", TABLE, sticky_map(net))
        if scheduler == "rr":
            assert count == 30
        else:
            assert 110 <= count <= 190  # 6.5 standard deviations


def sticky_map(net: ServiceNet) -> str:
    if not hasattr(sticky_map, "name"):
        found = re.search(r"map (sticky-\S+)", net.node.run("nft", "list", "table", "ip", TABLE))
        assert found
        sticky_map.name = found[1]  # type: ignore[attr-defined]
    return str(sticky_map.name)  # type: ignore[attr-defined]


def test_each_service_takes_turns_of_its_own(net: ServiceNet) -> None:
    """Round robin is exactly even for each Service, however connections to several of them mix; over all its doors."""
    both = endpoints(net, "pod1", "far")
    with serving(
        net,
        server("a/one", cluster_ip("10.96.0.1", 80), node_port(30080), cluster=both, scheduler="rr"),
        server("a/two", cluster_ip("10.96.0.2", 80), cluster=both, scheduler="rr"),
    ):
        one, two = [], []
        for number in range(10):
            one.append(net.ask("outside", "10.96.0.1", 80).server)
            one.append(net.ask("pod2", net["node"].v4, 30080).server)
            two += [net.ask("outside", "10.96.0.2", 80).server for _ in range(number % 3)]
        assert one.count("pod1") == one.count("far") == 10
        assert abs(two.count("pod1") - two.count("far")) <= 1
