"""CHECK: whatever is missing or changed of what ADD made is found, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from support.cni import CniFailure, Forking, Pod, links
from support.netns import Names

pytestmark = pytest.mark.root

FOUR = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}]]}
DUAL = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """One host for all tests here: a process that has the plugin loaded takes long to start."""
    names = Names()
    try:
        yield Forking(names("host"), tmp_path_factory.mktemp("host") / "state")
    finally:
        names.close()


@pytest.fixture
def forking(shared: Forking) -> Iterator[Forking]:
    """The host, as it was made."""
    yield shared
    shared.host.run("sh", "-c", "nft flush ruleset; ip link del cni0", check=False)
    shutil.rmtree(shared.state, ignore_errors=True)


def refusal(pod: Pod) -> str:
    """Return what CHECK says is wrong, nothing when all is well."""
    try:
        pod.check()
    except CniFailure as failed:
        return failed.message if failed.code == 100 else str(failed)
    return ""


SPOILED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "host: ip link set VETH nomaster", "master"),
    ({}, "host: ip link set VETH down", "down"),
    ({}, "host: ip link set cni0 down", "bridge cni0 is down"),
    ({}, "host: ip link del VETH", "missing"),
    ({}, "host: ip addr del 10.9.0.1/24 dev cni0", "gateway address"),
    ({}, "host: sysctl -qw net.ipv4.ip_forward=0", "ip_forward"),
    ({"hairpinMode": True}, "host: bridge link set dev VETH hairpin off", "hairpin"),
    ({"portIsolation": True}, "host: bridge link set dev VETH isolated off", "isolation"),
    ({"mtu": 1400}, "host: ip link set VETH mtu 1300", "MTU"),
    ({"promiscMode": True}, "host: ip link set cni0 promisc off", "promiscuous"),
    ({}, "pod: ip addr del 10.9.0.2/24 dev eth0", "address 10.9.0.2/24"),
    ({}, "pod: ip route del default", "route 0.0.0.0/0"),
    ({}, "pod: ip link set eth0 down", "down"),
    ({}, "pod: ip link set eth0 address 02:00:00:00:00:55", "hardware address"),
    ({"ipMasq": True}, "host: nft flush map inet pynet-cni masquerade4", "masquerade of 10.9.0.2"),
    ({"ipMasq": True}, "host: nft flush chain inet pynet-cni postrouting", "masquerade"),
    ({"ipMasq": True, "ipMasqBackend": "iptables"}, "host: iptables-nft -t nat -F POSTROUTING", "of 10.9.0.2"),
    ({"macspoofchk": True}, "host: nft flush set bridge pynet-cni allowed", "spoof check"),
    ({"macspoofchk": True}, "host: nft delete table bridge pynet-cni", "spoof check"),
    ({"ingressRate": 8000000}, "host: tc qdisc del dev VETH root", "shaping"),
    ({"egressRate": 8000000}, "host: tc qdisc del dev VETH ingress", "shaping"),
    ({"egressRate": 8000000}, "host: ip link del IFB", "shaping"),
    ({"ipMasq": True}, "host: nft delete element inet pynet-cni masquerade4 { 10.9.0.2 }", "no nftables element"),
    ({"ingressRate": 8000000}, "host: tc qdisc change dev VETH root tbf rate 9mbit burst 20kb latency 25ms", "rate"),
    ({"ingressRate": 8000000}, "host: tc qdisc change dev VETH root tbf rate 8mbit burst 99kb latency 25ms", "burst"),
    ({"egressRate": 8000000}, "host: tc qdisc change dev IFB root tbf rate 9mbit burst 20kb latency 25ms", "rate"),
    ({"egressRate": 8000000}, "host: ip link set IFB down", "is down"),
    ({}, "ipam", "reserved"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "spoil", "words"), SPOILED, ids=[row[1] + str(row[0] or "") for row in SPOILED])
def test_check_names_what_is_missing_or_changed(
    forking: Forking, netns: Names, keys: dict[str, Any], spoil: str, words: str
) -> None:
    runtime, pod = forking, Pod(forking, netns("pod"))
    result = pod.add(runtime.conf(isDefaultGateway=True, ipam=FOUR, **keys))
    pod.check()
    veth = result["interfaces"][1]["name"]
    where, _, command = spoil.partition(": ")
    if where == "ipam":
        (runtime.state / "ipam" / "net.db").unlink()
    else:
        place = runtime.host if where == "host" else pod.ns
        place.run(*command.replace("VETH", veth).replace("IFB", veth.replace("veth", "ifbp")).split())
    with pytest.raises(CniFailure) as found:
        pod.check()
    assert words in found.value.message
    assert found.value.code == 100
    pod.delete()
    assert veth not in links(runtime.host)


ROUTES = [
    {"dst": "10.77.0.0/16", "mtu": 1300, "advmss": 1200, "priority": 50},
    {"dst": "10.78.0.0/16", "gw": "10.9.0.9", "table": 100},
    {"dst": "10.79.0.0/16", "scope": 253},
    {"dst": "fd00:77::/64", "mtu": 1300, "priority": 50, "scope": 0},
]
CHANGED = [
    ("10.77.0.0/16 via 10.9.0.1 mtu 1400 advmss 1200 metric 50", "mtu is 1400, expected 1300"),
    ("10.77.0.0/16 via 10.9.0.1 mtu 1300 advmss 1100 metric 50", "advmss is 1100, expected 1200"),
    ("10.77.0.0/16 via 10.9.0.1 mtu 1300 advmss 1200 metric 60", "priority is 60, expected 50"),
    ("10.77.0.0/16 via 10.9.0.8 mtu 1300 advmss 1200 metric 50", "gateway is 10.9.0.8, expected 10.9.0.1"),
    ("10.77.0.0/16 scope link mtu 1300 advmss 1200 metric 50", "gateway is none, expected 10.9.0.1"),
    ("10.77.0.0/16 via 10.9.0.1 metric 50", "mtu is 0, expected 1300, advmss is 0, expected 1200"),
    ("10.78.0.0/16 via 10.9.0.9 table 101", "table is 101, expected 100"),
    ("10.78.0.0/16 via 10.9.0.9", "table is 254, expected 100"),
    ("10.79.0.0/16 scope host", "scope is 254, expected 253"),
    ("10.79.0.0/16 via 10.9.0.1", "scope is 0, expected 253"),
    ("fd00:77::/64 via fd00:9::1 mtu 1400 metric 50", "mtu is 1400, expected 1300"),
    ("fd00:77::/64 via fd00:9::1 mtu 1300 metric 51", "priority is 51, expected 50"),
]


def test_each_field_of_a_route(forking: Forking, netns: Names) -> None:
    pod = Pod(forking, netns("pod"))
    result = pod.add(forking.conf(isGateway=True, ipam=DUAL | {"routes": ROUTES}))
    assert result["routes"] == ROUTES
    assert refusal(pod) == ""
    for line, words in CHANGED:
        destination = line.split()[0]
        family = "-6" if ":" in destination else "-4"
        saved = [f"{destination} {one}" for one in ("table 100", "table main")]
        kept = pod.ns.run("ip", family, "route", "show", "table", "all", destination).strip()
        for one in saved:
            pod.ns.run("ip", family, "route", "flush", *one.split(), check=False)
        assert f"route {destination} via" in refusal(pod), "missing"
        assert "is missing in the pod" in refusal(pod)
        pod.ns.run("ip", family, "route", "add", *line.split(), "dev", "eth0")
        said = refusal(pod)
        assert f"route {destination} via" in said, line
        assert words in said, line
        pod.ns.run("ip", family, "route", "del", *line.split())
        pod.ns.run("ip", family, "route", "add", *kept.replace("proto boot", "").split())
        assert refusal(pod) == "", line


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0"])
def test_what_an_old_result_does_not_say_of_a_route_is_not_missed(forking: Forking, netns: Names, version: str) -> None:
    """Before 1.1 a result has neither table nor scope: CHECK right after ADD must succeed."""
    pod = Pod(forking, netns("pod"))
    pod.add(forking.conf(version, isGateway=True, ipam=DUAL | {"routes": ROUTES}))
    assert refusal(pod) == ""
    pod.ns.run("ip", "route", "del", "10.78.0.0/16", "table", "100")
    assert "route 10.78.0.0/16 via 10.9.0.9 is missing" in refusal(pod)


def test_what_other_plugins_of_the_chain_made_is_theirs(forking: Forking, netns: Names) -> None:
    """Their addresses need no gateway on our bridge, and their routes are on their interface."""
    pod = Pod(forking, netns("pod"))
    pod.ns.batch(
        "link add net0 type bridge", "link set net0 up", "addr add 192.0.2.5/24 dev net0",
        "route add default via 192.0.2.1 dev net0",
    )  # fmt: skip
    before = {
        "cniVersion": "1.1.0", "interfaces": [{"name": "net0", "sandbox": pod.ns.path}],
        "ips": [{"address": "192.0.2.5/24", "gateway": "192.0.2.1", "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "192.0.2.1"}],
    }  # fmt: skip
    pod.add(forking.conf(isGateway=True, ipMasq=True, ipam=FOUR, prevResult=before))
    assert refusal(pod) == ""
    pod.ns.run("ip", "route", "del", "default")
    assert "route 0.0.0.0/0 via 192.0.2.1 is missing" in refusal(pod)


def test_each_rule_of_a_chain_and_each_value_of_an_element(forking: Forking, netns: Names) -> None:
    pod = Pod(forking, netns("pod"))
    mappings = {"portMappings": [{"hostPort": 8080, "containerPort": 80}]}
    pod.add(forking.conf(isGateway=True, ipMasq=True, macspoofchk=True, ipam=FOUR, runtimeConfig=mappings))
    host, tag = forking.host, f"net {pod.container}/eth0"
    text = host.run("nft", "list", "ruleset")

    def rules() -> list[dict[str, Any]]:
        listed = json.loads(host.run("nft", "-j", "list", "ruleset"))["nftables"]
        return [entry["rule"] for entry in listed if "rule" in entry]

    assert len(rules()) > 15
    for number in range(len(rules())):
        rule = rules()[number]
        host.run("nft", "delete", "rule", rule["family"], rule["table"], rule["chain"], "handle", str(rule["handle"]))
        assert f"chain {rule['family']} {rule['table']} {rule['chain']} has" in refusal(pod), rule
        host.run("nft", "-f", "-", input=f"flush ruleset\n{text}")
    assert refusal(pod) == ""
    network, hairpin = (
        next(rule["chain"] for rule in rules() if word in rule["chain"]) for word in ("network-", "hairpin-")
    )
    for name, key, value in [
        ("anyports4", "tcp . 8080", "10.9.0.77 . 80"),
        ("masquerade4", "10.9.0.2", f"goto {hairpin}"),
        ("hairpin4", "10.9.0.2 . tcp . 80", f"goto {network}"),
    ]:
        change = f"delete element inet pynet-cni {name} {{ {key} }}\n"
        change += f'add element inet pynet-cni {name} {{ {key} comment "{tag}" : {value} }}\n'
        host.run("nft", "-f", "-", input=change)
        assert f"is {value}, expected" in refusal(pod)
        host.run("nft", "-f", "-", input=f"flush ruleset\n{text}")
    assert refusal(pod) == ""
