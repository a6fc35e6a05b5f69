"""Which tracked flows a change makes stale; and conntrack's own answers on the real kernel."""

from __future__ import annotations

import socket

import pytest

from proxy.flows import removals, stale, udp_watches
from proxy.plan import Endpoint, PlanChange, VirtualServer
from pynet.kernel import conntrack
from pynet.kernel.conntrack import Flow
from support.netns import Names
from support.plans import cluster_ip, node_port, plan, server
from support.servicenet import inside

A, B = Endpoint("10.244.1.2", 53), Endpoint("10.244.1.3", 53)
VIP, NODE = "10.96.0.1", "192.168.77.1"


def dns(*endpoints: Endpoint, removal: str = "keep", protocol: str = "UDP", number: int = 53) -> VirtualServer:
    from msgspec.structs import replace

    made = server("a/dns", cluster_ip(VIP, number), node_port(30053), cluster=endpoints, protocol=protocol)
    return replace(made, removal=removal)


def change(old: VirtualServer | None, new: VirtualServer | None) -> PlanChange:
    key = (old or new).key  # type: ignore[union-attr]
    return PlanChange(plan(*filter(None, [old])), plan(*filter(None, [new])), (key,))


def flow(destination: str, port: int, answers: str, answers_port: int = 53, protocol: str = "UDP") -> Flow:
    return Flow(protocol, "10.244.1.9", 4444, destination, port, answers, answers_port)


@pytest.mark.parametrize(
    ("old", "new", "tracked", "is_stale"),
    [
        pytest.param(dns(A, B), dns(B), flow(VIP, 53, A.address), True, id="endpoint removed"),
        pytest.param(dns(A, B), dns(B), flow(VIP, 53, B.address), False, id="another endpoint's flow"),
        pytest.param(dns(A), dns(), flow(VIP, 53, A.address), True, id="no endpoint left"),
        pytest.param(dns(A), None, flow(VIP, 53, A.address), True, id="Service deleted"),
        pytest.param(None, dns(A), flow(VIP, 53, VIP), True, id="sent before the Service was there"),
        pytest.param(None, dns(A), flow(VIP, 53, A.address), False, id="right already, after a restart"),
        pytest.param(None, dns(A), flow(VIP, 53, B.address), True, id="removed while the proxy was down"),
        pytest.param(dns(), dns(A), flow(NODE, 30053, NODE, 30053), True, id="node port, before there was an endpoint"),
        pytest.param(dns(A), dns(B), flow(NODE, 30053, A.address), True, id="node port, endpoint replaced"),
        pytest.param(dns(A), dns(Endpoint(A.address, 54)), flow(VIP, 53, A.address), True, id="target port changed"),
        pytest.param(dns(A), dns(A, number=54), flow(VIP, 53, A.address), True, id="Service port changed"),
        pytest.param(dns(A), dns(B), flow("198.51.100.1", 30053, "198.51.100.1", 30053), False, id="passing through"),
        pytest.param(dns(A), dns(B), flow("8.8.8.8", 53, "8.8.8.8"), False, id="not a Service's"),
        pytest.param(dns(A), None, flow(VIP, 53, VIP), False, id="deleted, never translated"),
    ],
)
def test_udp(old: VirtualServer | None, new: VirtualServer | None, tracked: Flow, is_stale: bool) -> None:
    found = stale([tracked], udp_watches(change(old, new)), {NODE})
    assert found == ([tracked] if is_stale else [])


def test_endpoints_that_still_serve_keep_their_flows() -> None:
    from msgspec.structs import replace

    after = replace(dns(B), draining=(A,))
    assert stale([flow(VIP, 53, A.address)], udp_watches(change(dns(A, B), after)), ()) == []


def test_nothing_is_looked_at_when_endpoints_and_frontends_stay() -> None:
    assert udp_watches(change(dns(A), dns(A, removal="reset"))) == {}


@pytest.mark.parametrize(
    ("removal", "due"), [("keep", []), ("reset", [100.0]), ("drain:30", [130.0])], ids=["keep", "reset", "drain"]
)
def test_tcp_ends_as_the_service_declares(removal: str, due: list[float]) -> None:
    found = removals(change(dns(A, B, removal=removal, protocol="TCP"), dns(B, removal=removal, protocol="TCP")), 100.0)
    assert [drain.due for drain in found] == due
    assert all(drain.backends == {(A.address, 53)} for drain in found)


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_flows_are_read_and_deleted(netns: Names, family: int) -> None:
    here = netns("node")
    address = "127.0.0.1" if family == 4 else "::1"
    if family == 6:
        here.run("ip6tables-nft", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
    here.run("iptables-nft", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
    with inside(here):
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        with socket.socket(kind, socket.SOCK_DGRAM) as receiver, socket.socket(kind, socket.SOCK_DGRAM) as sender:
            receiver.bind((address, 0))
            port = receiver.getsockname()[1]
            sender.sendto(b"x", (address, port))
            mine = sender.getsockname()[1]
            found = [each for each in conntrack.flows({"UDP"}, family) if each.port == port]
            assert [(f.source_port, f.destination, f.answers, f.answers_port) for f in found] == [
                (mine, address, address, port)
            ]
            assert conntrack.delete(found) == 1
            assert conntrack.delete(found) == 0
            assert [each for each in conntrack.flows({"UDP"}, family) if each.port == port] == []
            assert list(conntrack.flows({"SCTP"}, family)) == []
