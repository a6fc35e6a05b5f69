"""What the agent decides for a node `own`, beside a router: Nodes in, routes and problems out."""

from __future__ import annotations

from cni.node.nodes import Member, member_of
from cni.node.routes import Reach, Settings, Wanted, wanted
from pynet.netstate import Link, LinkAddress, NetState, Route
from pynet.objects import Metadata, Node, NodeAddress, NodeSpec, NodeStatus

KERNEL, ADMIN = 2, 4


def node(name: str, *cidrs: str, ip: str | tuple[str, ...] = (), created: str = "", external: str = "") -> Node:
    ips = (ip,) if isinstance(ip, str) else ip
    addresses = tuple(NodeAddress("InternalIP", each) for each in ips)
    addresses += (NodeAddress("ExternalIP", external),) if external else ()
    addresses += (NodeAddress("Hostname", name),)
    metadata = Metadata(name=name, creation_timestamp=created or None)
    return Node(metadata, NodeSpec(pod_cidrs=cidrs or None), NodeStatus(addresses))


def members(*nodes: Node) -> dict[str, Member]:
    return {each.metadata.name: member_of(each) for each in nodes}


ETH0 = Link(2, "eth0", 1500, True)
LINKS = (Link(1, "lo", 65536, True), ETH0)
ADDRESSES = (
    LinkAddress("lo", "127.0.0.1", 8),
    LinkAddress("eth0", "192.168.1.1", 24),
    LinkAddress("eth0", "fd01::1", 64),
)
CONNECTED = (
    Route("192.168.1.0/24", dev="eth0", src="192.168.1.1", protocol=KERNEL),
    Route("fd01::/64", dev="eth0", metric=256, protocol=KERNEL),
)
DEFAULT = (
    Route("0.0.0.0/0", via="192.168.1.254", dev="eth0", protocol=ADMIN),
    Route("::/0", via="fd01::fe", dev="eth0", metric=1024, protocol=ADMIN),
)
HERE = NetState(LINKS, ADDRESSES, CONNECTED + DEFAULT)
OWN = node("own", "10.244.1.0/24", "fd00:1::/64", ip=("192.168.1.1", "fd01::1"))


def decided(*peers: Node, state: NetState = HERE, own: Node = OWN, **settings: object) -> Wanted:
    return wanted(members(own, *peers), Settings("own", **settings), state)  # type: ignore[arg-type]


def only(want: Wanted) -> Reach:
    (reach,) = want.reaches
    return reach
