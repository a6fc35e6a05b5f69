"""The same calls to our plugin and to Debian's reference plugins: same result, same pod; docs/cni.md tells the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.cni import REFERENCE, CniFailure, Pod, Runtime
from support.netns import Names

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not (REFERENCE / "bridge").exists(), reason="needs the package containernetworking-plugins"),
]

V4 = [[{"subnet": "10.9.0.0/24"}]]
DUAL = [*V4, [{"subnet": "fd00:9::/64", "rangeStart": "fd00:9::10"}]]
DEFAULT = {"dst": "0.0.0.0/0", "gw": "10.9.0.1"}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("L2", {}, {}),
    ("IPv4", {"isGateway": True}, {"ranges": V4}),
    ("no gateway", {}, {"ranges": V4, "routes": [{"dst": "10.77.0.0/16"}]}),
    ("default gateway", {"isDefaultGateway": True, "mtu": 1400, "hairpinMode": True}, {"ranges": V4}),
    ("default route of IPAM", {"isDefaultGateway": True}, {"ranges": V4, "routes": [DEFAULT]}),
    ("default route without gateway", {"isGateway": True}, {"ranges": V4, "routes": [{"dst": "0.0.0.0/0"}]}),
    ("dual stack", {"isDefaultGateway": True}, {"ranges": DUAL}),
    ("three sets", {"isGateway": True}, {"ranges": [*DUAL, [{"subnet": "fd00:a::/64"}]]}),
    ("old keys", {"isGateway": True}, {"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.20", "gateway": "10.9.0.254"}),
    ("a range set of two", {}, {"ranges": [[{"subnet": "10.9.0.0/30"}, {"subnet": "10.9.1.0/30"}]]}),
    ("dns", {"dns": {"nameservers": ["9.9.9.9"], "domain": "d"}}, {"ranges": V4}),
]  # fmt: skip


def outcome(runtime: Runtime, pod: Pod, program: Path, conf: dict[str, Any]) -> dict[str, Any]:
    """Return what a plugin answered and what the pod has, without what is chosen at random."""
    result = pod.add(conf, program=program)
    if not result.get("dns"):
        result.pop("dns", None)  # from 1.0.0 on it may be left out when empty; Debian's 1.1.1 does not
    for interface in result.get("interfaces", ()):
        interface.pop("mac", None)
        interface.pop("mtu", None)
        if interface["name"].startswith("veth"):
            interface["name"] = "veth"
        if "sandbox" in interface:
            interface["sandbox"] = "pod"
    routes = [
        {key: route.get(key) for key in ("dst", "gateway", "dev", "scope")}
        for family in ("-4", "-6")
        for route in json.loads(pod.ns.run("ip", "-j", family, "route"))
        if not route["dst"].startswith("fe80")
    ]
    forwarding = runtime.host.run("sysctl", "-n", "net.ipv4.ip_forward").strip()
    seen = {"addresses": pod.addresses() + pod.addresses("-6"), "routes": routes, "forwarding": forwarding}
    pod.delete(program=program)
    return {"result": result, **seen}


@pytest.mark.parametrize(("name", "keys", "ipam"), CASES, ids=[row[0] for row in CASES])
def test_same_answer_and_same_pod(
    netns: Names, tmp_path: Path, name: str, keys: dict[str, Any], ipam: dict[str, Any]
) -> None:
    found = []
    for kind, program in (("pynet-ipam", None), ("host-local", REFERENCE / "bridge")):
        runtime = Runtime(netns("host"), tmp_path / kind)
        conf = runtime.conf("0.3.1" if "range" in name else "1.0.0", **keys)
        if ipam:
            conf["ipam"] = ipam | {"type": kind, "dataDir": str(tmp_path / kind)}
        found.append(outcome(runtime, Pod(runtime, netns("pod"), "same"), program or runtime.program, conf))
    assert found[0] == found[1]


REFUSED: list[dict[str, Any]] = [
    {"ipam": {"ranges": []}},
    {"ipam": {"ranges": [[{"subnet": "10.9.0.0/31"}]]}},
    {"ipam": {"ranges": [[{"subnet": "10.9.0.5/24"}]]}},
    {"ipam": {"ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "10.9.0.0/25"}]]}},
    {"ipam": {"ranges": V4}, "args": {"cni": {"ips": ["10.8.0.1"]}}},
    {"ipam": {"ranges": V4}, "args": {"cni": {"ips": ["10.9.0.1"]}}},
    {"hairpinMode": True, "promiscMode": True},
    {"vlan": 5000},
]


@pytest.mark.parametrize("keys", REFUSED, ids=[str(row) for row in REFUSED])
def test_both_refuse(netns: Names, tmp_path: Path, keys: dict[str, Any]) -> None:
    runtime, pod = Runtime(netns("host"), tmp_path), Pod(Runtime(netns("other"), tmp_path), netns("pod"))
    for kind, program in (("pynet-ipam", runtime.program), ("host-local", REFERENCE / "bridge")):
        conf = runtime.conf("1.0.0", **keys)
        if "ipam" in keys:
            conf["ipam"] = keys["ipam"] | {"type": kind, "dataDir": str(tmp_path / kind)}
        with pytest.raises(CniFailure):
            runtime.call("ADD", conf, "c1", pod.ns.path, program=program)
