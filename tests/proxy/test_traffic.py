"""Real connections through every kernel mode: {client} x {frontend} x {policy} x {setup}, against `verdict`.

What a client saw (which endpoint, with which source address; refused; silence) must be one of the outcomes that the
plan allows. The nets are built once a mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.cidrs import of_family
from proxy.modes import Mode
from proxy.plan import Family, LocalDetector, LocalKind, NodeSettings, OutcomeKind, Packet, Plan, verdict
from proxy.planning import build
from pynet.objects import Object
from support.netns import Names
from support.objects import endpoint, piece, service
from support.servicenet import REFUSED, SILENCE, ServiceNet, conntrack_flush, inside, sctp_works

pytestmark = pytest.mark.root

PODS = {Family.V4: "10.244.0.0/16", Family.V6: "fd00:244::/48"}
EXTERNAL = {Family.V4: "203.0.113.1", Family.V6: "fd00:113::1"}
BALANCER = {Family.V4: "203.0.113.2", Family.V6: "fd00:113::2"}
BASE = {Family.V4: "10.96.0.", Family.V6: "fd00:96::"}
PROTOCOLS = ("TCP", "UDP", "SCTP")
POLICIES: dict[str, dict[str, str]] = {
    "base": {},
    "external-local": {"externalTrafficPolicy": "Local"},
    "internal-local": {"internalTrafficPolicy": "Local"},
}
WHERE = {"all": ("pod1", "pod2", "far"), "here": ("pod1",), "far": ("far",), "nowhere": ()}
CLIENTS = ("pod1", "pod2", "far", "node", "other", "outside")
INTERFACES = {"pod1": "cni0", "pod2": "cni0", "far": "eth0", "node": "", "other": "eth0", "outside": "eth0"}


def made(name: str) -> Mode:
    if name == "nftables":
        from proxy.modes.nftables.mode import Nftables

        return Nftables()
    if name == "ipvs":
        from proxy.modes.ipvs.mode import IpvsMode

        return IpvsMode(backend="nft")
    if name == "userspace":
        from proxy.modes.userspace.mode import UserspaceMode

        return UserspaceMode()
    from proxy.modes.iptables.mode import IptablesMode

    return IptablesMode("legacy" if name == "iptables-legacy" else "nft")


class Stage:
    """A net with a mode in its node."""

    def __init__(self, names: Names, mode: str) -> None:
        self.net = ServiceNet(names)
        for host in ("pod1", "pod2", "far"):
            for protocol in PROTOCOLS if sctp_works() else PROTOCOLS[:2]:
                self.net.servers.add(self.net[host], host, 8080, protocol)
        self.net.servers.start()
        with inside(self.net.node):
            self.mode = made(mode)
        self.plans: dict[Family, Plan] = {}

    def show(self, objects: list[Object], **settings: Any) -> None:
        self.plans = {}
        for family in Family:
            detector = settings.get("detector", LocalDetector(LocalKind.CIDR, (PODS[family],)))
            cidrs = of_family(settings.get("service_cidrs", ()), family)
            around = NodeSettings("node", **{**settings, "detector": detector, "service_cidrs": cidrs})
            self.plans[family] = build(objects, family, around, node_ips=(self.addresses(family, "node")[0],))
        with inside(self.net.node):
            self.mode.sync(list(self.plans.values()))
        conntrack_flush(self.net.node)

    def addresses(self, family: Family, host: str) -> list[str]:
        own = self.net[host].v4 if family is Family.V4 else self.net[host].v6
        return [own, "10.244.1.1" if family is Family.V4 else "fd00:244:1::1"] if host == "node" else [own]

    def check(self, family: Family, client: str, address: str, port: int, protocol: str = "TCP") -> None:
        """Ask, and compare with the verdict."""
        node = self.addresses(family, "node")
        source = self.addresses(family, client)[0]
        if address.startswith("127."):
            source = address
        packet = Packet(source, address, protocol, port, INTERFACES[client])
        outcome = verdict(self.plans[family], packet, node)
        assert outcome.kind is not OutcomeKind.PASS, packet
        is_silent = outcome.kind is OutcomeKind.DROP
        far = self.addresses(family, "far")[0]
        if client in ("other", "outside") and any(
            c.endpoint.address == far and not c.masquerade for c in outcome.choices
        ):
            return  # the answer would take another way than through the node: so it is without a detector
        if self.mode.name == "ipvs" and source.startswith("127."):
            return  # IPVS takes no packets from loopback addresses; the userspace proxy serves those beside it
        # SCTP takes no notice of a port that is unreachable (sctp_v4_err): it asks on
        is_unheard = protocol == "SCTP" and outcome.kind is OutcomeKind.REJECT
        answer = self.net.ask(client, address, port, protocol, wait=0.1 if is_silent or is_unheard else 10)
        if is_unheard or (protocol == "UDP" and client == "node" and outcome.kind is not OutcomeKind.FORWARD):
            assert answer in (REFUSED, SILENCE), packet
            return
        if outcome.kind is not OutcomeKind.FORWARD:
            assert answer == (SILENCE if is_silent else REFUSED), (packet, outcome.kind)
            return
        names = {addr: host for host in WHERE["all"] for addr in self.addresses(family, host)}
        allowed = {names[choice.endpoint.address]: choice.masquerade for choice in outcome.choices}
        assert answer.server in allowed, (packet, answer)
        is_always = self.mode.name == "userspace" or (self.mode.name == "ipvs" and client == "node")
        if allowed[answer.server] or is_always:
            assert answer.source in node, (packet, answer)
        else:
            assert answer.source == source, (packet, answer)


@pytest.fixture(
    scope="module",
    params=["iptables-legacy", "iptables-nft", "nftables", "userspace", pytest.param("ipvs", marks=pytest.mark.vm)],
)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    names = Names()
    built = None
    try:
        built = Stage(names, request.param)
        yield built
    finally:
        if built:
            built.net.close()
        names.close()


def of_all_kinds(protocol: str = "TCP", **more: Any) -> list[Object]:
    """Return a Service for each policy and place of endpoints, with every kind of address, in both families."""
    objects: list[Object] = []
    number = 0
    for policy, spec in POLICIES.items():
        for place, hosts in WHERE.items():
            number += 1
            name = f"{policy}-{place}"
            objects.append(
                service(
                    name,
                    f"10.96.0.{number}",
                    {"name": "p", "port": 1000 + number, "nodePort": 30000 + number, "protocol": protocol},
                    clusterIPs=[f"10.96.0.{number}", f"fd00:96::{number}"],
                    externalIPs=list(EXTERNAL.values()),
                    ingress=[{"ip": address} for address in BALANCER.values()],
                    **spec,
                    **more,
                )
            )
            for family, kind in ((Family.V4, "IPv4"), (Family.V6, "IPv6")):
                net = {"pod1": (1, 2), "pod2": (1, 3), "far": (2, 2)}
                made = [
                    endpoint(
                        f"10.244.{net[host][0]}.{net[host][1]}"
                        if family is Family.V4
                        else f"fd00:244:{net[host][0]}::{net[host][1]}",
                        "other" if host == "far" else "node",
                    )
                    for host in hosts
                ]
                objects.append(piece(name, *made, name=f"{name}-{kind}", ports=(("p", protocol, 8080),), kind=kind))
    return objects


def probes(stage: Stage, family: Family, number: int) -> Iterator[tuple[str, str, int]]:
    """Yield (client, address, port) for every kind of frontend of one Service."""
    for client in CLIENTS:
        yield client, f"{BASE[family]}{number}", 1000 + number
        yield client, EXTERNAL[family], 1000 + number
        yield client, BALANCER[family], 1000 + number
        for address in stage.addresses(family, "node")[:1]:
            yield client, address, 30000 + number
    if family is Family.V4:
        yield "node", "127.0.0.1", 30000 + number


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(Family.V4, {}, id="v4"),
        pytest.param(Family.V6, {}, id="v6"),
        pytest.param(Family.V4, {"masquerade_all": True}, id="masquerade-all"),
        pytest.param(Family.V4, {"detector": LocalDetector()}, id="no-detector"),
        pytest.param(Family.V4, {"detector": LocalDetector(LocalKind.BRIDGE, interface="cni0")}, id="bridge"),
        pytest.param(Family.V6, {"detector": LocalDetector(LocalKind.PREFIX, interface="cni")}, id="prefix"),
    ],
)
def test_every_client_frontend_and_policy(stage: Stage, family: Family, settings: dict[str, Any]) -> None:
    stage.show(of_all_kinds(), **settings)
    numbers = range(1, len(POLICIES) * len(WHERE) + 1)
    if stage.mode.name == "ipvs" and (settings or family is Family.V6):
        numbers = numbers[len(str(settings)) % 3 :: 3]  # an emulated processor: a third each, all in the first setting
    for number in numbers:
        for client, address, port in probes(stage, family, number):
            stage.check(family, client, address, port)


@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
@pytest.mark.parametrize("family", list(Family))
def test_other_protocols(stage: Stage, family: Family, protocol: str) -> None:
    if protocol == "SCTP" and not sctp_works():
        pytest.skip("this kernel has no SCTP sockets")
    if protocol == "SCTP" and stage.mode.name == "userspace":
        pytest.skip("SCTP does not pass through sockets of another program")
    with inside(stage.net.node), open("/proc/sys/net/ipv4/icmp_ratelimit", "w") as file:
        file.write("0")
    with inside(stage.net.node), open("/proc/sys/net/ipv6/icmp/ratelimit", "w") as file:
        file.write("0")
    stage.show(of_all_kinds(protocol))
    for number in (1, 2, 4, 5, 9):
        for client, address, port in probes(stage, family, number):
            stage.check(family, client, address, port, protocol)


@pytest.mark.parametrize("family", list(Family))
def test_source_ranges_hold_for_the_balancer_only(stage: Stage, family: Family) -> None:
    stage.show(of_all_kinds(loadBalancerSourceRanges=["192.168.77.100/32", "fd00:77::100/128"]))
    for client, address, port in probes(stage, family, 1):
        stage.check(family, client, address, port)


@pytest.mark.parametrize("family", list(Family))
def test_unknown_ports_of_a_cluster_ip_are_refused(stage: Stage, family: Family) -> None:
    stage.show(of_all_kinds())
    for client in CLIENTS:
        stage.check(family, client, f"{BASE[family]}1", 9)


@pytest.mark.parametrize("family", list(Family))
def test_what_nobody_has_of_a_service_cidr_is_dropped(stage: Stage, family: Family) -> None:
    """Beside the cluster IPs, the net of the node itself, of other nodes and of far pods, which nobody should name."""
    length, host = (32, stage.net["other"].v4) if family is Family.V4 else (128, stage.net["other"].v6)
    address = f"{BASE[family]}200"  # another node answers there, as long as it may
    stage.net["other"].namespace.run("ip", "address", "replace", f"{address}/{length}", "dev", "lo")
    stage.net.node.run("ip", "route", "replace", f"{address}/{length}", "via", host)
    stage.show(of_all_kinds())
    assert [stage.net.ask(client, address, 80) for client in ("pod1", "node")] == [REFUSED] * 2
    overlaps = ["192.168.77.0/24", "fd00:77::/64"]
    if stage.mode.name not in ("userspace", "ipvs"):  # whose packets to a pod are as any program's of the node
        overlaps += ["10.244.0.0/16", "fd00:244::/32"]
    stage.show(of_all_kinds(), service_cidrs=("10.96.0.0/16", "fd00:96::/112", *overlaps))
    for client in CLIENTS:
        if client not in ("far", "other"):  # which meet the address before they meet the node
            stage.check(family, client, address, 80)
        stage.check(family, client, f"{BASE[family]}1", 1001)  # a Service, whose pods are in there as well
        stage.check(family, client, stage.addresses(family, "node")[0], 30001)
    stage.show(of_all_kinds())


def test_round_robin_is_exact_and_random_is_fair_within_chance(stage: Stage) -> None:
    both = [endpoint(f"10.244.1.{n}", "node") for n in (2, 3)] + [endpoint("10.244.2.2", "other")]
    objects: list[Object] = []
    for name, number in (("rr", 1), ("random", 2)):
        objects.append(
            service(name, f"10.96.1.{number}", {"name": "p", "port": 80}, annotations={"pynet/scheduler": name})
        )
        objects.append(piece(name, *both, ports=(("p", "TCP", 8080),)))
    stage.show(objects)
    seen = Counter(stage.net.ask("outside", "10.96.1.1", 80).server for _ in range(60))
    assert seen == {"pod1": 20, "pod2": 20, "far": 20}
    seen = Counter(stage.net.ask("outside", "10.96.1.2", 80).server for _ in range(300))
    assert all(55 <= count <= 145 for count in seen.values()), seen  # 5.5 standard deviations
    assert len(seen) == 3


@pytest.mark.parametrize("family", list(Family))
def test_affinity_sticks_and_survives_a_sync(stage: Stage, family: Family) -> None:
    objects = of_all_kinds(sessionAffinity="ClientIP")
    stage.show(objects)
    for client in ("outside", "pod2"):
        first = stage.net.ask(client, f"{BASE[family]}1", 1001).server
        places = [(1001, f"{BASE[family]}1"), (30001, stage.addresses(family, "node")[0])]
        for port, address in (places[:1] if stage.mode.name == "ipvs" else places) * 5:  # there: for each address
            assert stage.net.ask(client, address, port).server == first
        with inside(stage.net.node):
            stage.mode.sync(list(stage.plans.values()))
        assert stage.net.ask(client, f"{BASE[family]}1", 1001).server == first
