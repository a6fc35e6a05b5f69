"""The plugin's configuration, pure: what is accepted, what is refused and under which field's name."""

from __future__ import annotations

from typing import Any

import pytest

from cni import hostport, netconf
from cni.netconf import Bandwidth, PortMapping
from cni.spec import CniError


def parse(args: dict[str, str] | None = None, /, **keys: Any) -> netconf.NetConf:
    return netconf.parse({"name": "net", "type": "pynet-cni"} | keys, args or {}, "1.1.0")


REFUSED = [
    ({"bridge": "a/b"}, "bridge"),
    ({"bridge": "sixteen-letters-"}, "bridge"),
    ({"bridge": 3}, "bridge"),
    ({"isGateway": "yes"}, "isGateway"),
    ({"mtu": "1500"}, "mtu"),
    ({"mtu": -1}, "mtu"),
    ({"mtu": True}, "mtu"),
    ({"vlan": 4095}, "vlan"),
    ({"vlan": -1}, "vlan"),
    ({"vlanTrunk": [{}]}, "vlanTrunk[0]"),
    ({"vlanTrunk": [{"minID": 1}]}, "vlanTrunk[0]"),
    ({"vlanTrunk": [{"maxID": 1}]}, "vlanTrunk[0]"),
    ({"vlanTrunk": [{"minID": 10, "maxID": 5}]}, "vlanTrunk[0]"),
    ({"vlanTrunk": [{"minID": 0, "maxID": 5}]}, "vlanTrunk[0].minID"),
    ({"vlanTrunk": [{"minID": 1, "maxID": 4095}]}, "vlanTrunk[0].maxID"),
    ({"vlanTrunk": [{"id": 5}, {"id": 0}]}, "vlanTrunk[1].id"),
    ({"vlanTrunk": [{"id": 4095}]}, "vlanTrunk[0].id"),
    ({"vlanTrunk": ["5"]}, "vlanTrunk[0]"),
    ({"vlanTrunk": {"id": 5}}, "vlanTrunk"),
    ({"hairpinMode": True, "promiscMode": True}, "promiscMode"),
    ({"disableContainerInterface": True, "ipam": {"type": "pynet-ipam"}}, "disableContainerInterface"),
    ({"ipMasqBackend": "ebtables"}, "ipMasqBackend"),
    ({"nonMasqueradeCIDRs": ["10.0.0.0/99"]}, "nonMasqueradeCIDRs"),
    ({"ipam": {"subnet": "10.0.0.0/8"}}, "ipam.type"),
    ({"ipam": {"type": "../sh"}}, "ipam.type"),
    ({"ipam": []}, "ipam"),
    ({"dns": {"nameservers": "9.9.9.9"}}, "dns.nameservers"),
    ({"stateDir": "here"}, "stateDir"),
    ({"runtimeConfig": {"mac": "01:00:00:00:00:01"}}, "runtimeConfig.mac"),
    ({"args": {"cni": {"mac": "nonsense"}}}, "args.cni.mac"),
    ({"runtimeConfig": {"portMappings": [{"hostPort": 80}]}}, "portMappings[0].containerPort"),
    ({"runtimeConfig": {"portMappings": [{"containerPort": 80}]}}, "portMappings[0].hostPort"),
    ({"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 70000}]}}, "portMappings[0].containerPort"),
    ({"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "icmp"}]}}, "protocol"),
    ({"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "x"}]}}, "hostIP"),
    ({"ingressBurst": 5}, "ingressBurst"),
    ({"runtimeConfig": {"bandwidth": {"egressRate": -1}}}, "runtimeConfig.bandwidth.egressRate"),
    ({"egressRate": 1, "egressBurst": 8 << 32}, "egressBurst"),
    ({"prevResult": 5}, "prevResult"),
]


@pytest.mark.parametrize(("keys", "field"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_a_bad_field_is_named(keys: dict[str, Any], field: str) -> None:
    with pytest.raises(CniError) as refused:
        parse(**keys)
    assert refused.value.code in (6, 7)
    assert field in refused.value.message


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"conditionsV4": ["!", "-d", "192.0.2.0/24"]}, "conditionsV4"),
    ({"conditionsV6": ["-s", "2001:db8::/64"]}, "conditionsV6"),
    ({"externalSetMarkChain": "KUBE-MARK-MASQ"}, "externalSetMarkChain"),
    ({"markMasqBit": 20}, "markMasqBit"),
    ({"backend": "iptables"}, "backend"),
    ({"unshapedSubnets": ["10.0.0.0/8"]}, "unshapedSubnets"),
    ({"runtimeConfig": {"bandwidth": {"shapedSubnets": ["10.0.0.0/8"]}}}, "runtimeConfig.bandwidth.shapedSubnets"),
]


@pytest.mark.parametrize(("keys", "field"), UNSUPPORTED, ids=[row[1] for row in UNSUPPORTED])
def test_what_portmap_and_bandwidth_honour_and_we_do_not_is_refused(keys: dict[str, Any], field: str) -> None:
    with pytest.raises(CniError) as refused:
        parse(**keys)
    assert refused.value.code == 2
    value = next(iter(keys.values()))
    shown = "10.0.0.0/8" if field.endswith("hapedSubnets") else repr(value)
    assert f"field {field}: " in refused.value.message
    assert shown in refused.value.message


def test_portmaps_keys_that_ask_for_what_is_so_anyway() -> None:
    same = parse(conditionsV4=[], conditionsV6=None, markMasqBit=13, backend="nftables", snat=True, masqAll=False)
    assert same == parse()
    assert parse(snat=False, masqAll=True).port_masquerade == "none"
    assert parse(masqAll=True).port_masquerade == "all"
    with pytest.raises(CniError, match="field snat is not true or false"):
        parse(snat="yes")
    with pytest.raises(CniError, match="field markMasqBit: 32 is not between 0 and 31"):
        parse(markMasqBit=32)


def test_defaults_are_the_reference_plugins() -> None:
    conf = parse()
    assert (conf.bridge, conf.mtu, conf.ip_masq, conf.is_gateway, conf.hairpin) == ("cni0", 0, False, False, False)
    assert parse(isDefaultGateway=True).is_gateway


def test_null_is_absent() -> None:
    assert parse(bridge=None, mtu=None, isGateway=None, ipam=None, vlanTrunk=None, runtimeConfig=None) == parse()


def test_the_hardware_address_comes_from_three_places() -> None:
    args = {"MAC": "02:00:00:00:00:01", "IgnoreUnknown": "1"}
    of_args, of_runtime = {"cni": {"mac": "02-00-00-00-00-0A"}}, {"mac": "02:00:00:00:00:03"}
    assert parse(args).mac == "02:00:00:00:00:01"
    assert parse(runtimeConfig={"mac": "0200.00ab.CDEF"}).mac == "02:00:00:ab:cd:ef"
    assert parse(args, args=of_args).mac == "02:00:00:00:00:0a"
    assert parse(args, args=of_args, runtimeConfig=of_runtime).mac == "02:00:00:00:00:03"


def test_unknown_arguments_need_leave() -> None:
    with pytest.raises(CniError) as refused:
        parse({"COLOUR": "red"})
    assert refused.value.code == 4
    parse({"COLOUR": "red", "IgnoreUnknown": "true"})


def test_trunks_are_ranges() -> None:
    assert parse(vlanTrunk=[{"id": 101}, {"minID": 200, "maxID": 210}]).vlan_trunk == ((101, 101), (200, 210))


def test_static_bandwidth_beats_the_runtimes() -> None:
    capability = {"bandwidth": {"ingressRate": 8, "ingressBurst": 8}}
    assert parse(runtimeConfig=capability).bandwidth == Bandwidth(8, 8)
    assert parse(egressRate=16, egressBurst=9, runtimeConfig=capability).bandwidth == Bandwidth(0, 0, 16, 9)


def test_port_mappings() -> None:
    raw = [{"hostPort": 1, "containerPort": 2, "protocol": "UDP", "hostIP": "::1"}, {"hostPort": 1, "containerPort": 2}]
    found = parse(runtimeConfig={"portMappings": [*raw, raw[1]]}).port_mappings
    assert found == (PortMapping(1, 2, "udp", "::1"), PortMapping(1, 2, "tcp"))


def test_a_host_port_goes_to_one_container_port() -> None:
    pod = [("10.9.0.2", "10.9.0.0/24"), ("fd00:9::2", "fd00:9::/64")]
    to_80, to_81 = PortMapping(80, 80, "tcp"), PortMapping(80, 81, "tcp", "::")
    with pytest.raises(CniError, match="portMappings: tcp port 80 of :: is mapped to two container ports, 80 and 81"):
        hostport.forwards((to_80, to_81), pod)
    assert len(hostport.forwards((to_80, to_80._replace(host_ip="0.0.0.0")), pod)) == 2
    assert len(hostport.forwards((to_80, to_81._replace(host_ip="127.0.0.1")), pod)) == 3


def test_the_dns_capability_has_names_of_its_own() -> None:
    capability = {"dns": {"servers": ["9.9.9.9"], "searches": ["s"], "options": ["ndots:1"]}}
    dns = parse(dns={"nameservers": ["1.1.1.1"]}, runtimeConfig=capability).dns
    assert (dns.nameservers, dns.search, dns.options) == (("9.9.9.9",), ("s",), ("ndots:1",))
