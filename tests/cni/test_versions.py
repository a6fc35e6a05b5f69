"""The families of the reference plugins' own tests, each over all versions of the specification."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from cni import spec
from support.cni import REFERENCE, CniFailure, Forking, Pod, Runtime, addresses, links, residue
from support.netns import Names

pytestmark = pytest.mark.root

V4, V6, MORE = {"subnet": "10.9.0.0/24"}, {"subnet": "fd00:9::/64"}, {"subnet": "fd00:a::/64"}
MAC = "02:00:00:00:00:77"


@pytest.fixture
def runtime(netns: Names, tmp_path: Path) -> Forking:
    return Forking(netns("host"), tmp_path / "state")


def ipam(*sets: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"ipam": {"type": "pynet-ipam", "ranges": [[one] for one in sets]} | keys}


def ports(*mappings: tuple[int, str]) -> dict[str, Any]:
    wanted = [{"hostPort": port, "containerPort": 80, "protocol": protocol} for port, protocol in mappings]
    return {"runtimeConfig": {"portMappings": wanted}}


CASES: dict[str, dict[str, Any]] = {
    "L2": {},
    "IPv4": {"isDefaultGateway": True} | ipam(V4),
    "IPv6": {"isDefaultGateway": True} | ipam(V6),
    "dual stack": {"isDefaultGateway": True} | ipam(V4, V6),
    "three subnets": {"isDefaultGateway": True} | ipam(V4, V6, MORE),
    "masquerade": {"isGateway": True, "ipMasq": True} | ipam(V4, V6),
    "masquerade by iptables": {"isGateway": True, "ipMasq": True, "ipMasqBackend": "iptables"} | ipam(V4),
    "spoof check": {"isGateway": True, "macspoofchk": True} | ipam(V4),
    "promiscuous and isolated": {"promiscMode": True, "portIsolation": True} | ipam(V6),
    "host ports": {"isGateway": True} | ipam(V4, V6) | ports((8080, "tcp"), (5353, "udp"), (9999, "sctp")),
    "bandwidth": {"isGateway": True, "ingressRate": 8_000_000, "egressRate": 8_000_000} | ipam(V4),
    "the interface stays down": {"disableContainerInterface": True},
    "capabilities": {"runtimeConfig": {"mac": MAC, "ips": ["10.9.0.77/24"], "dns": {"servers": ["9.9.9.9"]}}}
    | ipam(V4),
    "ranges of the runtime": {"runtimeConfig": {"ipRanges": [[{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.77"}]]}}
    | {"ipam": {"type": "pynet-ipam"}},
}


def readable(result: dict[str, Any], version: str) -> None:
    """Assert that a result has the keys of its version and no others, as libcni's types of each version have them."""
    old, one, newest = version < "0.3", version >= "1.0", version >= "1.1"
    allowed = {"cniVersion", "dns"} | ({"ip4", "ip6"} if old else {"interfaces", "ips", "routes"})
    assert set(result) <= allowed
    assert result["cniVersion"] == version
    assert ("dns" in result) or one
    for part in (result[key] for key in ("ip4", "ip6") if key in result):
        assert {"ip"} <= set(part) <= {"ip", "gateway", "routes"}
    interface_keys = {"name", "mac", "sandbox"} | ({"mtu"} if newest else set())
    assert all(set(each) <= interface_keys for each in result.get("interfaces", ()))
    address_keys = {"interface", "address", "gateway"} | (set() if one else {"version"})
    assert all(set(each) <= address_keys for each in result.get("ips", ()))
    assert all(("version" in each) != one for each in result.get("ips", ()))
    assert all(set(each) <= {"dst", "gw"} for each in result.get("routes", ()))


def told_addresses(result: dict[str, Any]) -> list[str]:
    old = [result[key]["ip"] for key in ("ip4", "ip6") if key in result]
    return old + [each["address"] for each in result.get("ips", ())]


@pytest.mark.parametrize("name", CASES)
def test_a_family_in_every_version(runtime: Forking, netns: Names, name: str) -> None:
    host, keys = runtime.host, CASES[name]
    before = residue(host)
    pod = Pod(runtime, netns("pod"))
    for version in spec.VERSIONS:
        conf = runtime.conf(version, name=f"v{version.replace('.', '')}", **keys)
        too_many = version < "0.3" and name in ("L2", "three subnets", "the interface stays down")
        if too_many:  # a result of one address a family cannot say it
            with pytest.raises(CniFailure) as refused:
                pod.add(conf)
            assert refused.value.code in (1, 7)
        else:
            result = pod.add(conf)
            readable(result, version)
            told = told_addresses(result)
            assert sorted(told) == sorted(addresses(pod.ns, "eth0") + addresses(pod.ns, "eth0", "-6"))
            shown = links(host)
            for interface in result.get("interfaces", ()):
                place = links(pod.ns) if "sandbox" in interface else shown
                assert interface["mac"] == place[interface["name"]]["address"]
                assert interface.get("sandbox", pod.ns.path) == pod.ns.path
            assert len(shown) == len(before["links"]) + (3 if name == "bandwidth" else 2)
            state = links(pod.ns)["eth0"]["operstate"]
            assert state == ("DOWN" if name == "the interface stays down" else "UP")
            if keys.get("isDefaultGateway"):
                families = {"-6" if ":" in address else "-4" for address in told}
                routes = {family: pod.ns.run("ip", family, "route", "show", "default") for family in families}
                assert all(routes.values())
            if name == "capabilities":
                assert told == ["10.9.0.77/24"]
                assert links(pod.ns)["eth0"]["address"] == MAC
                assert result["dns"] == {"nameservers": ["9.9.9.9"]}
            if name == "ranges of the runtime":
                assert told == ["10.9.0.77/24"]
            if version >= "0.4":
                pod.check()
            else:
                with pytest.raises(CniFailure) as too_old:
                    pod.check()
                assert too_old.value.code == 1
        for _ in range(2):
            pod.delete(conf)
        assert "eth0" not in links(pod.ns)
    host.run("ip", "link", "del", "cni0")
    after = residue(host)
    if name == "masquerade by iptables":
        after["nft"] = before["nft"]  # the table and chain of iptables-nft stay, as iptables has them
    assert after == before


def test_the_mac_of_each_place_in_every_version(runtime: Forking, netns: Names) -> None:
    pod = Pod(runtime, netns("pod"))
    places: list[tuple[dict[str, Any], str]] = [
        ({}, f"MAC={MAC}"),
        ({"args": {"cni": {"mac": MAC}}}, "MAC=02:00:00:00:00:01"),
        ({"args": {"cni": {"mac": "02:00:00:00:00:02"}}, "runtimeConfig": {"mac": MAC}}, "MAC=02:00:00:00:00:01"),
    ]
    for version, (keys, args) in itertools.product(spec.VERSIONS, places):
        conf = runtime.conf(version, name="macs", **ipam(V4), **keys)
        pod.add(conf, env={"CNI_ARGS": f"IgnoreUnknown=1;{args};K8S_POD_NAME=x"})
        assert links(pod.ns)["eth0"]["address"] == MAC, (version, keys)
        pod.delete(env={"CNI_ARGS": args})


def test_what_every_version_refuses(runtime: Forking, netns: Names) -> None:
    """And an address that was reserved before the refusal is free again."""
    pod = Pod(runtime, netns("pod"))
    before = residue(runtime.host)
    refused = [
        {"vlan": 5000}, {"vlanTrunk": [{"minID": 5}]}, {"hairpinMode": True, "promiscMode": True},
        {"disableContainerInterface": True} | ipam(V4), ipam(V4, routes=[{"dst": "10.0.0.0/8", "gw": "192.0.2.9"}]),
        ipam(V4) | {"args": {"cni": {"ips": ["10.7.0.1"]}}}, ipam(V4) | {"args": {"cni": {"ips": ["10.9.0.1"]}}},
        ipam(V4, V4), {"runtimeConfig": {"portMappings": [{"hostPort": 70000, "containerPort": 1}]}} | ipam(V4),
        {"ingressBurst": 5} | ipam(V4), {"ipMasqBackend": "ebtables"} | ipam(V4), {"ipam": {"type": "nobody"}},
    ]  # fmt: skip
    for version in spec.VERSIONS:
        for keys in refused:
            with pytest.raises(CniFailure) as said:
                pod.add(runtime.conf(version, name="refused", **keys))
            assert said.value.answer["cniVersion"] == version
            assert said.value.code in (6, 7, 100)
        last = runtime.conf(version, name="refused", ipam={"type": "pynet-ipam", "subnet": "10.9.0.0/30"})
        pod.add(last)  # the only address there is
        pod.delete()
    runtime.host.run("ip", "link", "del", "cni0")
    assert residue(runtime.host) == before


# --- the reference plugins, in the versions that Debian's speak


@pytest.mark.skipif(not (REFERENCE / "bridge").exists(), reason="needs the package containernetworking-plugins")
@pytest.mark.parametrize("name", ["L2", "IPv4", "IPv6", "dual stack"])
def test_the_reference_answers_the_same_in_every_version(netns: Names, tmp_path: Path, name: str) -> None:
    hosts = {kind: netns(kind) for kind in ("ours", "theirs")}
    pods = {
        "ours": Pod(Forking(hosts["ours"], tmp_path / "ours"), netns("pod1"), "same"),
        "theirs": Pod(Runtime(hosts["theirs"], tmp_path, REFERENCE / "bridge"), netns("pod2"), "same"),
    }
    for version in spec.VERSIONS[:-1]:
        said = {}
        for kind, pod in pods.items():
            conf = pod.runtime.conf(version, name=f"v{version.replace('.', '')}", **CASES[name])
            if "ipam" in conf and kind == "theirs":
                conf["ipam"] = conf["ipam"] | {"type": "host-local", "dataDir": str(tmp_path / "theirs")}
            try:
                said[kind] = plain(pod.add(conf))
            except CniFailure:
                said[kind] = "refused"
            pod.delete(conf | {"cniVersion": "1.0.0"})  # the reference's DEL refuses what its ADD refuses
        assert said["ours"] == said["theirs"], version


def plain(result: dict[str, Any]) -> str:
    """Return a result without what is chosen at random, and without an empty dns, which Debian's prints always."""
    for interface in result.get("interfaces", ()):
        interface["mac"] = len(interface["mac"])
        interface["name"] = interface["name"][:4]
        interface["sandbox"] = "sandbox" in interface
    if not result.get("dns"):
        result.pop("dns", None)
    return json.dumps(result, sort_keys=True)
