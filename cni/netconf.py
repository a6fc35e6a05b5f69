"""The plugin's configuration: the keys of the reference bridge, portmap and bandwidth plugins, and ours. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from cni import results, spec
from cni.ipam import ranges
from cni.spec import BAD_CONFIG, CniError

STATE_DIR = "/run/pynet"
KNOWN_ARGS = ("IP", "MAC", "GATEWAY")
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
SUBNETS = ("shapedSubnets", "unshapedSubnets")
UNSUPPORTED = {
    "conditionsV4": "the plugin forwards a host port whatever the packet is",
    "conditionsV6": "the plugin forwards a host port whatever the packet is",
    "externalSetMarkChain": "the plugin marks and masquerades by itself",
} | dict.fromkeys(SUBNETS, "the plugin shapes all traffic of a pod")
"""Keys of the reference portmap and bandwidth plugins that must not be passed over in silence, and why they are not
served."""
MARK_BIT = 13
"""Of `ruleset.HAIRPIN_MARK`, and portmap's default."""
NO_LIMIT = (1 << 32) - 1
"""The burst, in bytes, from which the reference refuses."""

_MAC = re.compile(r"(?:[0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}\Z|(?:[0-9a-fA-F]{4}\.){2}[0-9a-fA-F]{4}\Z")
"""The three ways of writing that Go's parser knows."""
_IFNAME = re.compile(r"[^/:\s]{1,15}\Z")


class PortMapping(NamedTuple):
    """One host port: `protocol` in lower case, `host_ip` empty for any, 0.0.0.0 or :: for any of one family."""

    host_port: int
    container_port: int
    protocol: str
    host_ip: str = ""


class Bandwidth(NamedTuple):
    """Rates in bits a second and bursts in bits; 0 is unlimited. Ingress is towards the pod."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0


class NetConf(NamedTuple):
    """The checked configuration of one network."""

    name: str
    bridge: str = "cni0"
    is_gateway: bool = False
    is_default_gateway: bool = False
    force_address: bool = False
    ip_masq: bool = False
    ip_masq_backend: str = "nftables"
    non_masquerade: tuple[str, ...] = ()
    mtu: int = 0
    hairpin: bool = False
    promisc: bool = False
    vlan: int = 0
    vlan_trunk: tuple[tuple[int, int], ...] = ()
    preserve_default_vlan: bool = False
    mac_spoof_check: bool = False
    enable_dad: bool = False
    disable_container_interface: bool = False
    port_isolation: bool = False
    mac: str = ""
    ipam_type: str = ""
    dns: results.Dns = results.Dns()
    port_mappings: tuple[PortMapping, ...] = ()
    port_masquerade: str = "own"
    """Whose connections through a host port are masqueraded: hostport's OWN, ALL or NONE."""
    bandwidth: Bandwidth = Bandwidth()
    state_dir: str = STATE_DIR
    previous: results.Result | None = None

    @property
    def port_hairpin(self) -> bool:
        """Whether the pod's bridge port sends back to where a frame came from.

        Host ports need it too: with br_netfilter a pod's packet to its own host port is translated inside the bridge.
        """
        return self.hairpin or bool(self.port_mappings and not self.promisc)


def parse(config: Mapping[str, Any], args: Mapping[str, str], version: str) -> NetConf:
    """Return the configuration, all of it checked. Raise `CniError` naming the field."""
    spec.known_arguments(args, KNOWN_ARGS)
    runtime = section(config, "runtimeConfig")
    _refuse_unsupported(config, runtime)
    is_default_gateway = flag(config, "isDefaultGateway")
    conf = NetConf(
        name=str(config.get("name", "")),
        bridge=_bridge(config),
        is_gateway=flag(config, "isGateway") or is_default_gateway,
        is_default_gateway=is_default_gateway,
        force_address=flag(config, "forceAddress"),
        ip_masq=flag(config, "ipMasq"),
        ip_masq_backend=_backend(config),
        non_masquerade=_networks(config, "nonMasqueradeCIDRs"),
        mtu=number(config, "mtu", 0, 65535),
        hairpin=flag(config, "hairpinMode"),
        promisc=flag(config, "promiscMode"),
        vlan=number(config, "vlan", 0, 4094),
        vlan_trunk=_trunk(config),
        preserve_default_vlan=flag(config, "preserveDefaultVlan"),
        mac_spoof_check=flag(config, "macspoofchk"),
        enable_dad=flag(config, "enabledad"),
        disable_container_interface=flag(config, "disableContainerInterface"),
        port_isolation=flag(config, "portIsolation"),
        mac=_mac(config, args, runtime),
        ipam_type=_ipam_type(config),
        dns=_dns(config, runtime),
        port_mappings=_port_mappings(runtime),
        port_masquerade=_port_masquerade(config),
        bandwidth=_bandwidth(config, runtime),
        state_dir=state_dir(config),
        previous=results.parse_result(config["prevResult"], version) if config.get("prevResult") is not None else None,
    )
    _refuse_contradictions(conf)
    return conf


def state_dir(config: Mapping[str, Any]) -> str:
    """Return the folder of the agent's socket and of our databases."""
    path = text(config, "stateDir") or STATE_DIR
    if not path.startswith("/"):
        raise CniError(BAD_CONFIG, f"field stateDir: {path} is not an absolute path")
    return path.rstrip("/")


def _refuse_contradictions(conf: NetConf) -> None:
    if conf.hairpin and conf.promisc:
        raise CniError(BAD_CONFIG, "fields hairpinMode and promiscMode: cannot set both")
    if conf.disable_container_interface and conf.ipam_type:
        raise CniError(
            BAD_CONFIG,
            "fields disableContainerInterface and ipam: cannot use IPAM when the container interface is down",
        )


def _refuse_unsupported(config: Mapping[str, Any], runtime: Mapping[str, Any]) -> None:
    """Refuse what the reference portmap and bandwidth plugins would do and we do not. Raise `CniError` 2."""
    limits = section(runtime, "bandwidth", "runtimeConfig.bandwidth")
    mark = number(config, "markMasqBit", 0, 31, missing=MARK_BIT)
    found = [(key, config.get(key), why) for key, why in UNSUPPORTED.items()]
    found += [(f"runtimeConfig.bandwidth.{key}", limits.get(key), UNSUPPORTED[key]) for key in SUBNETS]
    found.append(("markMasqBit", None if mark == MARK_BIT else mark, f"the plugin marks with bit {MARK_BIT} only"))
    backend = text(config, "backend")
    found.append(("backend", None if backend == "nftables" else backend, "host ports are elements of nftables"))
    for key, value, why in found:
        if value not in (None, "", []):
            raise CniError(spec.UNSUPPORTED_FIELD, f"field {key}: {value!r} is not supported: {why}")


def _port_masquerade(config: Mapping[str, Any]) -> str:
    everybody = flag(config, "masqAll")
    if not flag(config, "snat", missing=True):
        return "none"
    return "all" if everybody else "own"


def _bridge(config: Mapping[str, Any]) -> str:
    name = text(config, "bridge") or "cni0"
    if not _IFNAME.match(name) or name in (".", "..") or len(name.encode()) > 15:
        raise CniError(BAD_CONFIG, f"field bridge: {name!r} is no interface name")
    return name


def _backend(config: Mapping[str, Any]) -> str:
    backend = text(config, "ipMasqBackend") or "nftables"
    if backend not in ("iptables", "nftables"):
        raise CniError(BAD_CONFIG, f"field ipMasqBackend: {backend!r} is neither iptables nor nftables")
    return backend


def _trunk(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    found = []
    raws = listed(config, "vlanTrunk")
    for at, raw in enumerate(raws):
        where = f"vlanTrunk[{at}]"
        if not isinstance(raw, dict):
            raise CniError(BAD_CONFIG, f"field {where} is not an object")
        minimum, maximum, single = (raw.get(key) for key in ("minID", "maxID", "id"))
        if single is None and minimum is None and maximum is None:
            raise CniError(BAD_CONFIG, f"field {where}: expected id, or minID and maxID")
        if (minimum is None) != (maximum is None):
            raise CniError(BAD_CONFIG, f"field {where}: minID and maxID go together")
        for key, value in (("minID", minimum), ("maxID", maximum), ("id", single)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 4095):
                raise CniError(BAD_CONFIG, f"field {where}.{key}: incorrect trunk {key} {value!r}: 1 to 4094")
        if minimum is not None and maximum is not None:
            if minimum > maximum:
                raise CniError(BAD_CONFIG, f"field {where}: minID {minimum} is greater than maxID {maximum}")
            found.append((minimum, maximum))
        if single is not None:
            found.append((single, single))
    return tuple(sorted(set(found)))


def _mac(config: Mapping[str, Any], args: Mapping[str, str], runtime: Mapping[str, Any]) -> str:
    """Return the pod's hardware address: runtimeConfig.mac before args.cni.mac before CNI_ARGS."""
    of_args = section(section(config, "args", "args"), "cni", "args.cni")
    for where, found in (
        ("runtimeConfig.mac", text(runtime, "mac", "runtimeConfig.mac")),
        ("args.cni.mac", text(of_args, "mac", "args.cni.mac")),
        ("CNI_ARGS: MAC", args.get("MAC", "")),
    ):
        if not found:
            continue
        digits = re.sub("[:.-]", "", found.lower())
        if not _MAC.match(found) or int(digits[:2], 16) & 1 or not int(digits, 16):
            raise CniError(BAD_CONFIG, f"field {where}: {found!r} is no unicast hardware address")
        return ":".join(digits[at : at + 2] for at in range(0, 12, 2))
    return ""


def _ipam_type(config: Mapping[str, Any]) -> str:
    ipam = section(config, "ipam")
    kind = text(ipam, "type", "ipam.type")
    if ipam and not kind:
        raise CniError(BAD_CONFIG, "field ipam.type is missing")
    if "/" in kind or kind in (".", ".."):
        raise CniError(BAD_CONFIG, f"field ipam.type: {kind!r} is no plugin name")
    return kind


def _dns(config: Mapping[str, Any], runtime: Mapping[str, Any]) -> results.Dns:
    """Return the configuration's resolver settings; the dns capability's, with its other key names, come first."""
    capability = section(runtime, "dns", "runtimeConfig.dns")
    if capability:
        renamed = {"nameservers": "servers", "search": "searches", "options": "options"}
        return results.parse_dns({new: capability.get(old) for new, old in renamed.items()}, "runtimeConfig.dns")
    return results.parse_dns(config.get("dns"), "dns")


def _port_mappings(runtime: Mapping[str, Any]) -> tuple[PortMapping, ...]:
    found: dict[PortMapping, None] = {}
    for at, raw in enumerate(listed(runtime, "portMappings", "runtimeConfig.portMappings")):
        where = f"runtimeConfig.portMappings[{at}]"
        if not isinstance(raw, dict):
            raise CniError(BAD_CONFIG, f"field {where} is not an object")
        protocol = (text(raw, "protocol", f"{where}.protocol") or "tcp").lower()
        if protocol not in PROTOCOLS:
            raise CniError(BAD_CONFIG, f"field {where}.protocol: {protocol!r} is none of {', '.join(PROTOCOLS)}")
        host_ip = text(raw, "hostIP", f"{where}.hostIP")
        if host_ip:
            host_ip = str(ranges.address(host_ip, f"{where}.hostIP"))
        mapping = PortMapping(
            number(raw, "hostPort", 1, 65535, f"{where}.hostPort"),
            number(raw, "containerPort", 1, 65535, f"{where}.containerPort"),
            protocol,
            host_ip,
        )
        found[mapping] = None
    return tuple(found)


def _bandwidth(config: Mapping[str, Any], runtime: Mapping[str, Any]) -> Bandwidth:
    keys = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")
    static = any(config.get(key) for key in keys)
    source = config if static else section(runtime, "bandwidth", "runtimeConfig.bandwidth")
    where = "" if static else "runtimeConfig.bandwidth."
    rates = [number(source, key, 0, 1 << 63, f"{where}{key}", missing=0) for key in keys]
    for way, rate, burst in (("ingress", rates[0], rates[1]), ("egress", rates[2], rates[3])):
        if burst and not rate:
            raise CniError(BAD_CONFIG, f"field {where}{way}Burst: is set, so {where}{way}Rate must be set")
        if burst // 8 >= NO_LIMIT:
            raise CniError(BAD_CONFIG, f"field {where}{way}Burst: {burst} bits is 4 GiB or more")
    return Bandwidth(*rates)


def _networks(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    import ipaddress

    found = []
    for raw in listed(config, key):
        try:
            found.append(str(ipaddress.ip_network(raw, strict=False)))
        except (ValueError, TypeError) as error:
            raise CniError(BAD_CONFIG, f"field {key}: {error}") from None
    return tuple(found)


# --- one value each, with the field's name in the error


def flag(config: Mapping[str, Any], key: str, *, missing: bool = False) -> bool:
    """Return a boolean; absent and null are `missing`."""
    value = config.get(key)
    if value is None:
        return missing
    if isinstance(value, bool):
        return value
    raise CniError(BAD_CONFIG, f"field {key} is not true or false: {value!r}")


def number(
    config: Mapping[str, Any], key: str, low: int, high: int, where: str = "", missing: int | None = None
) -> int:
    """Return a whole number between two bounds; an absent one is `missing`, or 0 for the bounds to judge."""
    value = config.get(key)
    if value is None:
        value = 0 if missing is None else missing
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CniError(BAD_CONFIG, f"field {where or key} is not a whole number: {value!r}")
    if not low <= value <= high:
        raise CniError(BAD_CONFIG, f"field {where or key}: {value} is not between {low} and {high}")
    return value


def text(config: Mapping[str, Any], key: str, where: str = "") -> str:
    """Return text; absent and null are empty."""
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CniError(BAD_CONFIG, f"field {where or key} is not text: {value!r}")
    return value


def section(config: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    """Return an object; absent and null are empty."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CniError(BAD_CONFIG, f"field {where or key} is not an object: {value!r}")
    return value


def listed(config: Mapping[str, Any], key: str, where: str = "") -> list[Any]:
    """Return a list; absent and null are empty."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise CniError(BAD_CONFIG, f"field {where or key} is not a list: {value!r}")
    return value
