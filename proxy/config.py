"""The proxy's settings: one value, whatever flags and configuration file it came from, and what follows for the node.

Pure: reading flags and files is for `flags.py` and `configfile.py`; what the settings mean is said here.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from proxy.cidrs import of_family
from proxy.endpoints import Place
from proxy.plan import Family, LocalDetector, LocalKind, NodeSettings
from proxy.planning import Surroundings
from proxy.services import canonical_address, canonical_network
from pynet.objects import Node

MODES = ("iptables", "ipvs", "nftables", "userspace")
DETECT_MODES = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
ZONE_LABEL = "topology.kubernetes.io/zone"
LOCALHOST = {Family.V4: "127.0.0.0/8", Family.V6: "::1/128"}
EVERYTHING = {Family.V4: "0.0.0.0/0", Family.V6: "::/0"}


class ConfigError(ValueError):
    """A setting that cannot be; the message names the flag or field, and what was expected."""


class Conntrack(msgspec.Struct, frozen=True):
    """Connection tracking's limits and timeouts, seconds; 0 or None: left as they are."""

    max_per_core: int = 32768
    min: int = 131072
    tcp_established_seconds: float | None = 86400.0
    tcp_close_wait_seconds: float | None = 3600.0
    tcp_be_liberal: bool = False
    udp_seconds: float = 0.0
    udp_stream_seconds: float = 0.0


class Ipvs(msgspec.Struct, frozen=True):
    """What only the IPVS mode takes. `fallback`: the mode to take where the kernel has no IPVS, or `none`."""

    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_seconds: float = 0.0
    tcp_fin_seconds: float = 0.0
    udp_seconds: float = 0.0
    fallback: str = "iptables"
    drain_seconds: float = 3600.0


class Userspace(msgspec.Struct, frozen=True):
    """What only the userspace proxy takes. `listen_only`: node ports only, without any privilege; `localhost`: node
    ports on loopback addresses beside any other mode; `max_connections`: in all ports together.
    """

    listen_only: bool = False
    udp_idle_seconds: float = 60.0
    localhost: bool = False
    max_connections: int = 20_000


class Settings(msgspec.Struct, frozen=True):
    """Everything that can be set. Times in seconds; addresses to serve on as host:port, empty: not served."""

    mode: str = "iptables"
    mode_is_default: bool = True
    node_name: str = ""
    bind_address: str = ""
    healthz_bind: str = "0.0.0.0:10256"
    metrics_bind: str = "127.0.0.1:10249"
    bind_hard_fail: bool = False
    detect_local_mode: str = "ClusterCIDR"
    cluster_cidrs: tuple[str, ...] = ()
    pod_bridge: str = ""
    pod_interface_prefix: str = ""
    node_port_addresses: tuple[str, ...] = ()
    masquerade_all: bool = False
    masquerade_bit: int = 14
    localhost_node_ports: bool = True
    scheduler: str = "random"
    sync_seconds: float = 30.0
    min_sync_seconds: float = 0.1
    audit_seconds: float = 60.0
    iptables_backend: str = ""
    oom_score_adj: int | None = -999
    conntrack: Conntrack = Conntrack()
    ipvs: Ipvs = Ipvs()
    userspace: Userspace = Userspace()
    hold_node_ports: bool = False
    state_file: str = ""
    drop_privileges: bool = True
    feature_gates: dict[str, bool] = {}


def checked(settings: Settings) -> Settings:
    """Return `settings` with addresses in their usual spelling. Raise `ConfigError`."""
    if settings.mode not in MODES:
        raise ConfigError(f"--mode: expected one of {', '.join(MODES)}, found {settings.mode!r}")
    if settings.detect_local_mode not in DETECT_MODES:
        raise ConfigError(
            f"--detect-local-mode: expected one of {', '.join(DETECT_MODES)}, found {settings.detect_local_mode!r}"
        )
    if settings.detect_local_mode == "BridgeInterface" and not settings.pod_bridge:
        raise ConfigError("--detect-local-mode=BridgeInterface needs --pod-bridge-interface")
    if settings.detect_local_mode == "InterfaceNamePrefix" and not settings.pod_interface_prefix:
        raise ConfigError("--detect-local-mode=InterfaceNamePrefix needs --pod-interface-name-prefix")
    for flag, name in (
        ("--pod-bridge-interface", settings.pod_bridge),
        ("--pod-interface-name-prefix", settings.pod_interface_prefix),
    ):
        if len(name) > 15 or any(mark in name for mark in ' \t\n"/!+'):
            raise ConfigError(f"{flag}: {name!r} is no name of an interface (at most 15 characters)")
    if not 0 <= settings.masquerade_bit <= 31:
        raise ConfigError(f"--iptables-masquerade-bit: expected 0 to 31, found {settings.masquerade_bit}")
    if settings.sync_seconds <= 0:
        raise ConfigError("--iptables-sync-period: must be above 0")
    if settings.min_sync_seconds > settings.sync_seconds:
        raise ConfigError("--iptables-min-sync-period: must not be longer than --iptables-sync-period")
    if settings.oom_score_adj is not None and not -1000 <= settings.oom_score_adj <= 1000:
        raise ConfigError(f"--oom-score-adj: expected -1000 to 1000, found {settings.oom_score_adj}")
    for flag, number in (("max-per-core", settings.conntrack.max_per_core), ("min", settings.conntrack.min)):
        if number < 0:
            raise ConfigError(f"--conntrack-{flag}: must not be negative, found {number}")
    if settings.bind_address and canonical_address(settings.bind_address) is None:
        raise ConfigError(f"--bind-address: {settings.bind_address!r} is no IP address")
    if settings.iptables_backend not in ("", "legacy", "nft"):
        raise ConfigError(f"--iptables-backend: expected legacy or nft, found {settings.iptables_backend!r}")
    cluster_cidrs = _networks("--cluster-cidr", settings.cluster_cidrs)
    if len({canonical_network(network) for network in cluster_cidrs}) != len(settings.cluster_cidrs):
        raise ConfigError("--cluster-cidr: the same network twice")
    keywords = {"primary", "localhost", "all"}
    node_ports = tuple(
        entry if entry in keywords else _networks("--nodeport-addresses", (entry,))[0]
        for entry in settings.node_port_addresses
    )
    return msgspec.structs.replace(settings, cluster_cidrs=cluster_cidrs, node_port_addresses=node_ports)


def _networks(flag: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for text in texts:
        network = canonical_network(text)
        if network is None:
            raise ConfigError(f"{flag}: {text!r} is no network: expected ADDRESS/LENGTH, as in 10.244.0.0/16")
        found.append(network[1])
    return tuple(found)


def family_of(text: str) -> Family:
    """Return the family of an address or network that is known to be one."""
    return Family.V6 if ":" in text else Family.V4


def surroundings(
    settings: Settings, family: Family, node: Node | None, service_cidrs: Iterable[str] = ()
) -> Surroundings:
    """Return what holds for this node in one family, as its Node object, the ServiceCIDRs and the settings say."""
    labels = (node.metadata.labels if node else None) or {}
    node_ips = _node_ips(settings, family, node)
    return Surroundings(
        settings=NodeSettings(
            node_name=settings.node_name,
            detector=_detector(settings, family, node),
            node_port_addresses=_node_port_addresses(settings, family, node_ips),
            localhost_node_ports=settings.localhost_node_ports and family is Family.V4,
            masquerade_all=settings.masquerade_all,
            masquerade_mark=1 << settings.masquerade_bit,
            service_cidrs=of_family(service_cidrs, family),
        ),
        place=Place(settings.node_name, labels.get(ZONE_LABEL, "")),
        node_ips=node_ips,
        default_scheduler=(settings.ipvs.scheduler or "rr") if settings.mode == "ipvs" else settings.scheduler,
    )


def _node_ips(settings: Settings, family: Family, node: Node | None) -> tuple[str, ...]:
    """Return the node's own addresses, the first of each kind of the Node object first: InternalIP, then ExternalIP."""
    found: dict[str, None] = {}
    bound = canonical_address(settings.bind_address) if settings.bind_address else None
    if bound and bound[0] is family and bound[1] not in ("0.0.0.0", "::"):
        found[bound[1]] = None
    addresses = (node.status.addresses if node and node.status else None) or ()
    for kind in ("InternalIP", "ExternalIP"):
        for entry in addresses:
            address = canonical_address(entry.address) if entry.type == kind else None
            if address and address[0] is family:
                found[address[1]] = None
    return tuple(found)


def _detector(settings: Settings, family: Family, node: Node | None) -> LocalDetector:
    if settings.detect_local_mode == "BridgeInterface":
        return LocalDetector(LocalKind.BRIDGE, interface=settings.pod_bridge)
    if settings.detect_local_mode == "InterfaceNamePrefix":
        return LocalDetector(LocalKind.PREFIX, interface=settings.pod_interface_prefix)
    cidrs: tuple[str, ...] = settings.cluster_cidrs
    if settings.detect_local_mode == "NodeCIDR":
        spec = node.spec if node else None
        texts = (spec.pod_cidrs or ((spec.pod_cidr,) if spec.pod_cidr else ())) if spec else ()
        cidrs = tuple(network[1] for network in map(canonical_network, texts) if network)
    mine = tuple(network for network in cidrs if family_of(network) is family)
    return LocalDetector(LocalKind.CIDR, mine) if mine else LocalDetector()


def _node_port_addresses(settings: Settings, family: Family, node_ips: tuple[str, ...]) -> tuple[str, ...]:
    """Return the networks whose local addresses serve node ports; empty: all. A family that nothing names: all."""
    found: dict[str, None] = {}
    for entry in settings.node_port_addresses:
        if entry == "all" or (entry.endswith("/0") and family_of(entry) is family):
            return ()
        if entry == "primary":
            if node_ips:
                found[f"{node_ips[0]}/{128 if family is Family.V6 else 32}"] = None
        elif entry == "localhost":
            if family is Family.V4:
                found[LOCALHOST[family]] = None
        elif family_of(entry) is family:
            found[entry] = None
    return tuple(found)
