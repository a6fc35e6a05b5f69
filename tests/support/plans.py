"""Plans for tests: made by hand in a line, and generated (hypothesis) from a small world in which things collide."""

from __future__ import annotations

from hypothesis import strategies as st

from proxy.plan import (
    Action,
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    LocalDetector,
    LocalKind,
    NodeSettings,
    Packet,
    Plan,
    ServerKey,
    Verdict,
    VirtualServer,
)

CLUSTER = Verdict(Action.CLUSTER)
CLUSTER_MASQ = Verdict(Action.CLUSTER, True)
LOCAL = Verdict(Action.LOCAL)
LOCAL_MASQ = Verdict(Action.LOCAL, True)
REJECT = Verdict(Action.REJECT)
DROP = Verdict(Action.DROP)


def server(
    name: str,
    *frontends: Frontend,
    cluster: tuple[Endpoint, ...] = (),
    local: tuple[Endpoint, ...] = (),
    protocol: str = "TCP",
    port_name: str = "",
    affinity: int = 0,
    scheduler: str = "random",
) -> VirtualServer:
    """Return one Service port."""
    key = ServerKey(name, port_name, protocol)
    return VirtualServer(key, frontends, cluster, local, affinity, scheduler)


def cluster_ip(address: str, port: int, *verdicts: Verdict) -> Frontend:
    """Return a cluster IP's frontend; verdicts for pod, node, outside."""
    pod, node, outside = verdicts or (CLUSTER, CLUSTER_MASQ, CLUSTER_MASQ)
    return Frontend(FrontendKind.CLUSTER_IP, address, port, pod, node, outside)


def node_port(port: int, *verdicts: Verdict) -> Frontend:
    """Return a node port's frontend."""
    pod, node, outside = verdicts or (CLUSTER_MASQ, CLUSTER_MASQ, CLUSTER_MASQ)
    return Frontend(FrontendKind.NODE_PORT, "", port, pod, node, outside)


def load_balancer(address: str, port: int, *verdicts: Verdict, ranges: tuple[str, ...] | None = None) -> Frontend:
    """Return a load-balancer IP's frontend."""
    pod, node, outside = verdicts or (CLUSTER_MASQ, CLUSTER_MASQ, CLUSTER_MASQ)
    return Frontend(FrontendKind.LOAD_BALANCER, address, port, pod, node, outside, ranges)


def plan(*servers: VirtualServer, settings: NodeSettings | None = None, family: Family = Family.V4) -> Plan:
    """Return the plan of these servers; pods are 10.244.0.0/16 (fd00:244::/48) unless `settings` says else."""
    networks = ("10.244.0.0/16",) if family is Family.V4 else ("fd00:244::/48",)
    settings = settings or NodeSettings("node", LocalDetector(LocalKind.CIDR, networks))
    return Plan(family, settings, {server.key: server for server in servers})


class World:
    """The addresses of the generated clusters, in one family."""

    def __init__(self, family: Family) -> None:
        v4 = family is Family.V4
        self.family = family
        self.node = ("192.168.77.1", "10.244.1.1") if v4 else ("fd00:77::1", "fd00:244:1::1")
        self.loopback = "127.0.0.1" if v4 else "::1"
        self.cluster_ips = [f"10.96.0.{n}" if v4 else f"fd00:96::{n}" for n in (1, 2, 3)]
        self.other_ips = [f"203.0.113.{n}" if v4 else f"fd00:113::{n}" for n in (1, 2)] + [self.node[0]]
        self.local_pods = [f"10.244.1.{n}" if v4 else f"fd00:244:1::{n}" for n in (2, 3, 4)]
        self.far_pods = [f"10.244.2.{n}" if v4 else f"fd00:244:2::{n}" for n in (2, 3, 4)]
        self.outside = ["198.51.100.7", "192.168.77.2"] if v4 else ["2001:db8::7", "fd00:77::2"]
        self.networks = ["198.51.100.0/24", "192.168.0.0/16", "192.168.77.0/24", "10.244.0.0/16", "0.0.0.0/0"]
        if not v4:
            self.networks = ["2001:db8::/32", "fd00:77::/64", "fd00::/16", "fd00:244::/48", "::/0"]
        # beside the cluster IPs, and (a slip of somebody's) the far pods and the node itself
        self.service_cidrs = ["10.96.0.0/24", "10.244.2.0/24", "192.168.77.0/24"]
        if not v4:
            self.service_cidrs = ["fd00:96::/112", "fd00:244:2::/64", "fd00:77::/64"]
        self.pod_networks = ("10.244.0.0/16",) if v4 else ("fd00:244::/48",)


PORTS = (80, 443, 30080, 30081)
PROTOCOLS = ("TCP", "UDP", "SCTP")
_verdicts = st.sampled_from([CLUSTER, CLUSTER_MASQ, LOCAL, LOCAL_MASQ, REJECT, DROP])


@st.composite
def settings_of(draw: st.DrawFn, world: World) -> NodeSettings:
    """Draw what holds for the node."""
    detector = draw(
        st.sampled_from(
            [
                LocalDetector(),
                LocalDetector(LocalKind.CIDR, world.pod_networks),
                LocalDetector(LocalKind.BRIDGE, interface="cni0"),
                LocalDetector(LocalKind.PREFIX, interface="veth"),
            ]
        )
    )
    networks = draw(st.sampled_from([(), (world.networks[2],), (world.networks[3], world.networks[2])]))
    bit = draw(st.sampled_from([0x4000, 0x1, 0x80000000]))
    localhost = draw(st.booleans())
    cidrs = tuple(draw(st.lists(st.sampled_from(world.service_cidrs), max_size=2, unique=True)))
    return NodeSettings("node", detector, networks, localhost, masquerade_mark=bit, service_cidrs=cidrs)


@st.composite
def servers_of(draw: st.DrawFn, world: World, *, most: int = 4) -> list[VirtualServer]:
    """Draw Service ports; no two of them claim one address, protocol and port."""
    claims: set[tuple[str, str, int]] = set()
    found = []
    for number in range(draw(st.integers(0, most))):
        protocol = draw(st.sampled_from(PROTOCOLS))
        frontends = []
        for _ in range(draw(st.integers(1, 3))):
            made = draw(_frontend(world))
            if (made.address, protocol, made.port) not in claims:
                claims.add((made.address, protocol, made.port))
                frontends.append(made)
        cluster = draw(_endpoints(world))
        local = tuple(endpoint for endpoint in draw(_endpoints(world)) if endpoint.local)
        if any(REJECT in (made.pod, made.node, made.outside) for made in frontends):
            cluster = local = ()  # a plan says so only where there is no endpoint at all
        found.append(
            server(
                f"space/service-{number}",
                *frontends,
                cluster=cluster,
                local=local,
                protocol=protocol,
                affinity=draw(st.sampled_from([0, 0, 0, 10800])),
                scheduler=draw(st.sampled_from(["random", "random", "rr"])),
            )
        )
    return found


@st.composite
def _frontend(draw: st.DrawFn, world: World) -> Frontend:
    kind = draw(st.sampled_from(list(FrontendKind)))
    address = {
        FrontendKind.CLUSTER_IP: st.sampled_from(world.cluster_ips),
        FrontendKind.NODE_PORT: st.just(""),
        FrontendKind.LOAD_BALANCER: st.sampled_from(world.other_ips),
        FrontendKind.EXTERNAL_IP: st.sampled_from(world.other_ips),
    }[kind]
    ranges = None
    if kind is FrontendKind.LOAD_BALANCER:
        networks = st.lists(st.sampled_from(world.networks), max_size=3, unique=True).map(tuple)
        ranges = draw(st.none() | networks)
    ports = PORTS[2:] if kind is FrontendKind.NODE_PORT else PORTS
    pod, node, outside = draw(st.tuples(_verdicts, _verdicts, _verdicts))
    return Frontend(kind, draw(address), draw(st.sampled_from(ports)), pod, node, outside, ranges)


@st.composite
def _endpoints(draw: st.DrawFn, world: World) -> tuple[Endpoint, ...]:
    pods = [(address, True) for address in world.local_pods] + [(address, False) for address in world.far_pods]
    chosen = draw(st.lists(st.sampled_from(pods), max_size=5, unique=True))
    port = draw(st.sampled_from([8080, 9090]))
    weights = draw(st.sampled_from([(1,), (1, 2, 3), (2, 2)]))
    made = (Endpoint(a, port, loc, weights[n % len(weights)]) for n, (a, loc) in enumerate(chosen))
    return tuple(sorted(made))


@st.composite
def packets_of(draw: st.DrawFn, world: World) -> Packet:
    """Draw the first packet of a connection that can really be: each source comes in where it lives."""
    source, interface = draw(
        st.sampled_from(
            [(pod, "cni0") for pod in world.local_pods]
            + [(pod, "veth1234") for pod in world.local_pods[:1]]
            + [(address, "eth0") for address in world.outside]
            + [(address, "") for address in world.node]
            + [(world.loopback, "")]
        )
    )
    addresses = [*world.cluster_ips, *world.other_ips, *world.node, *world.far_pods[:1]]
    addresses += ["198.51.100.99", "10.96.0.200"] if ":" not in source else ["fd99::1", "fd00:96::200"]
    if not interface:
        addresses.append(world.loopback)
    return Packet(
        source,
        draw(st.sampled_from(addresses)),
        draw(st.sampled_from(PROTOCOLS)),
        draw(st.sampled_from(PORTS)),
        interface,
    )
