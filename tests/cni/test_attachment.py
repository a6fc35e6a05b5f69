"""ADD, CHECK and DEL through the executable: what a pod and its host have then, and that nothing is left after."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.cni import CniFailure, Pod, Runtime, addresses, links, residue
from support.netns import Names

pytestmark = pytest.mark.root

FOUR = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}]]}
DUAL = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]]}


@pytest.mark.parametrize(
    ("keys", "has_link_local"),
    [
        ({"isGateway": True, "ipam": FOUR}, False),
        ({"isGateway": True, "ipam": DUAL}, True),
        ({"ipam": FOUR}, True),  # a bridge that leads elsewhere: routers there may give IPv6 addresses
        ({}, True),
    ],
    ids=["routed", "dual stack", "not routed", "no addresses"],
)
def test_only_whom_it_may_serve_has_an_address_of_the_link(
    runtime: Runtime, pod: Pod, keys: dict[str, object], has_link_local: bool
) -> None:
    result = pod.add(runtime.conf(**keys))
    shown = pod.ns.run("ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link")
    assert bool(shown) is has_link_local
    port = result["interfaces"][1]["name"]
    assert not runtime.host.run("ip", "-6", "-o", "addr", "show", "dev", port)


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_a_life_in_every_version(runtime: Runtime, pod: Pod, version: str) -> None:
    conf = runtime.conf(version, isDefaultGateway=True, ipam=DUAL, mtu=1400)
    before = residue(runtime.host)
    result = pod.add(conf)
    assert result["cniVersion"] == version
    if version < "0.3":
        assert result["ip4"]["ip"] == "10.9.0.2/24"
        assert result["ip6"]["gateway"] == "fd00:9::1"
    else:
        bridge, host, inside = result["interfaces"]
        shown = links(runtime.host)
        assert (bridge["name"], bridge["mac"]) == ("cni0", shown["cni0"]["address"])
        assert host["mac"] == shown[host["name"]]["address"]
        assert shown[host["name"]]["master"] == "cni0"
        assert (inside["name"], inside["sandbox"]) == ("eth0", pod.ns.path)
        assert inside["mac"] == links(pod.ns)["eth0"]["address"]
        assert [(ip["address"], ip["interface"], ip.get("version")) for ip in result["ips"]] == [
            ("10.9.0.2/24", 2, "4" if version < "1" else None),
            ("fd00:9::2/64", 2, "6" if version < "1" else None),
        ]
    assert pod.addresses() == ["10.9.0.2/24"]
    assert pod.addresses("-6") == ["fd00:9::2/64"]
    assert links(pod.ns)["eth0"]["mtu"] == 1400
    assert addresses(runtime.host, "cni0") == ["10.9.0.1/24"]
    for place, link in ((pod.ns, "eth0"), (runtime.host, "cni0")):  # the bridge asks under its link-local address
        assert "tentative" not in place.run("ip", "-6", "addr", "show", "dev", link)
    assert json.loads(pod.ns.run("ip", "-j", "route", "get", "192.0.2.1"))[0]["gateway"] == "10.9.0.1"
    assert json.loads(pod.ns.run("ip", "-j", "-6", "route", "get", "2001:db8::1"))[0]["gateway"] == "fd00:9::1"
    pod.ns.run("ping", "-c1", "-W2", "10.9.0.1")
    pod.ns.run("ping", "-c1", "-W2", "fd00:9::1")
    if version >= "0.4":
        pod.check()
    for _ in range(3):
        pod.delete()
    assert "eth0" not in links(pod.ns)
    after = residue(runtime.host)
    after["links"].pop("cni0")
    after["addresses"] = [a for a in after["addresses"] if a not in ("10.9.0.1", "fd00:9::1")]
    after["qdisc"] = before["qdisc"]
    assert after == before


def test_delete_in_every_circumstance(runtime: Runtime, netns: Names) -> None:
    """Namespace gone, CNI_NETNS empty, bridge gone, state lost: success each time, and the address is free again."""
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=FOUR)
    gone, unnamed, orphan, amnesiac = (Pod(runtime, netns(name)) for name in ("gone", "unnamed", "orphan", "amnesiac"))
    for pod in (gone, unnamed, orphan, amnesiac):
        pod.add(conf)
    gone.ns.close()
    gone.delete()
    unnamed.delete(netns="")
    for path in runtime.state.glob("attachments*"):
        path.unlink()
    amnesiac.delete()
    runtime.host.run("ip", "link", "del", "cni0")
    orphan.delete()
    never = Pod(runtime, netns("never"))
    never.delete(conf)
    assert runtime.host.run("nft", "list", "ruleset") == "" or "10.9.0" not in runtime.host.run(
        "nft", "list", "ruleset"
    )
    with pytest.raises(CniFailure, match=r"no address is reserved|missing"):
        gone.runtime.call("CHECK", conf, orphan.container, orphan.ns.path)
    assert runtime.call("GC", conf | {"cni.dev/valid-attachments": []}) == {}
    assert runtime.host.run("nft", "list", "ruleset") == ""


@pytest.mark.parametrize("how", ["DEL", "GC", "GC without links"])
def test_masquerade_by_iptables_goes_without_a_record(runtime: Runtime, pod: Pod, how: str) -> None:
    conf = runtime.conf(isGateway=True, ipMasq=True, ipMasqBackend="iptables", ipam=FOUR)
    pod.add(conf)
    assert pod.container in runtime.host.run("iptables-save")
    for path in runtime.state.glob("attachments*"):
        path.unlink()
    if how == "DEL":
        pod.delete()
    else:
        if how == "GC without links":
            pod.ns.run("ip", "link", "del", "eth0")
        runtime.call("GC", conf | {"cni.dev/valid-attachments": []})
    assert "eth0" not in links(pod.ns)
    assert "PYNET" not in runtime.host.run("iptables-save")


def test_a_failed_add_undoes_itself(runtime: Runtime, pod: Pod) -> None:
    before = residue(runtime.host)
    ranges = {"ranges": [[{"subnet": "10.9.0.0/24", "gateway": "10.9.0.1"}]]}
    impossible = {"type": "pynet-ipam", "routes": [{"dst": "10.0.0.0/8", "gw": "192.0.2.77"}]} | ranges
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=impossible)
    for _ in range(2):
        with pytest.raises(CniFailure) as failed:
            pod.add(conf)
        assert "route 10.0.0.0/8 via 192.0.2.77" in failed.value.message
        assert residue(runtime.host) == before
        assert "eth0" not in links(pod.ns)
    assert pod.add(conf | {"ipam": {"type": "pynet-ipam"} | ranges})["ips"]


@pytest.mark.parametrize(
    "netns_path", ["/run/netns/not-there", "/etc/passwd", "/proc/self/ns/uts", "/proc/self/ns/net"]
)
def test_a_bad_namespace_leaves_no_bridge(runtime: Runtime, netns_path: str) -> None:
    before = residue(runtime.host)
    with pytest.raises(CniFailure) as failed:
        runtime.call("ADD", runtime.conf(isGateway=True, ipam=FOUR), "c1", netns_path)
    assert failed.value.code == 8
    assert "CNI_NETNS" in failed.value.message
    assert residue(runtime.host) == before


def test_an_interface_that_is_there_is_refused_and_stays(runtime: Runtime, pod: Pod) -> None:
    conf = runtime.conf(isGateway=True, ipam=FOUR)
    pod.add(conf)
    with pytest.raises(CniFailure, match="eth0 already exists"):
        runtime.call("ADD", conf, pod.container, pod.ns.path)
    pod.check()


def test_routes_carry_what_1_1_says_of_them(runtime: Runtime, pod: Pod) -> None:
    routes = [
        {"dst": "10.77.0.0/16", "mtu": 1300, "advmss": 1200, "priority": 50},
        {"dst": "10.78.0.0/16", "gw": "10.9.0.9", "table": 100},
        {"dst": "10.79.0.0/16", "scope": 253},
    ]
    result = pod.add(runtime.conf(isGateway=True, ipam=FOUR | {"routes": routes}))
    assert result["routes"] == routes
    shown = {route["dst"]: route for route in json.loads(pod.ns.run("ip", "-j", "route", "show", "table", "all"))}
    first = shown["10.77.0.0/16"]
    assert (first["gateway"], first["metric"]) == ("10.9.0.1", 50)
    assert first["metrics"][0] == {"mtu": 1300, "advmss": 1200}
    assert (shown["10.78.0.0/16"]["table"], shown["10.78.0.0/16"]["gateway"]) == ("100", "10.9.0.9")
    assert "gateway" not in shown["10.79.0.0/16"]
    pod.check()


def test_requested_addresses_mac_and_dns(runtime: Runtime, pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 9.9.9.9\nsearch a.example b.example\noptions ndots:2\n")
    conf = runtime.conf(
        isGateway=True, ipam=FOUR | {"resolvConf": str(tmp_path / "resolv.conf")},
        runtimeConfig={"mac": "02:00:00:00:00:77", "ips": ["10.9.0.77/24"]},
    )  # fmt: skip
    result = pod.add(conf, env={"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=x"})
    assert result["interfaces"][2]["mac"] == links(pod.ns)["eth0"]["address"] == "02:00:00:00:00:77"
    assert pod.addresses() == ["10.9.0.77/24"]
    assert result["dns"] == {"nameservers": ["9.9.9.9"], "search": ["a.example", "b.example"], "options": ["ndots:2"]}
    pod.check()


def test_duplicate_address_detection_where_it_is_asked_for(runtime: Runtime, netns: Names) -> None:
    squatter, pod = Pod(runtime, netns("squatter")), Pod(runtime, netns("pod"))
    squatter.add(runtime.conf(name="l2"))
    squatter.ns.run("ip", "addr", "add", "fd00:9::2/64", "dev", "eth0", "nodad")
    before = residue(runtime.host)
    conf = runtime.conf(enabledad=True, ipam={"type": "pynet-ipam", "subnet": "fd00:9::/64"})
    with pytest.raises(CniFailure, match=r"fd00:9::2: in use by another \(DAD\)"):
        pod.add(conf)
    assert residue(runtime.host) == before
    pod.add(conf)
    assert pod.ip == "fd00:9::3"
    assert "tentative" not in pod.ns.run("ip", "-6", "addr", "show", "dev", "eth0", "scope", "global")
    assert pod.ns.run("sysctl", "-n", "net.ipv6.conf.eth0.accept_dad").strip() == "1"


def test_an_mtu_below_what_ipv6_needs(runtime: Runtime, pod: Pod) -> None:
    """The kernel then gives a link no IPv6 at all: IPv4 works, and who asks for IPv6 is told why not."""
    pod.add(runtime.conf(isDefaultGateway=True, mtu=1000, ipam=FOUR))
    assert links(pod.ns)["eth0"]["mtu"] == links(runtime.host)["cni0"]["mtu"] == 1000
    pod.ns.run("ping", "-c1", "-W2", "10.9.0.1")
    pod.check()
    pod.delete()
    with pytest.raises(CniFailure, match="cannot have IPv6 addresses") as refused:
        pod.add(runtime.conf(isDefaultGateway=True, mtu=1000, ipam=DUAL))
    assert "1280" in refused.value.details


def test_an_l2_network(runtime: Runtime, pod: Pod) -> None:
    result = pod.add(runtime.conf(egressRate=8_000_000))
    for number in (0, 1, 3):  # bridge, veth, ifb: set addresses (NET_ADDR_SET), which systemd does not change
        name = result["interfaces"][number]["name"]
        assert runtime.host.run("cat", f"/sys/class/net/{name}/addr_assign_type") == "3\n"
    assert "ips" not in result
    assert len(result["interfaces"]) == 4
    assert links(pod.ns)["eth0"]["operstate"] == "UP"
    pod.check()
    pod.delete()


def test_a_container_interface_that_stays_down(runtime: Runtime, pod: Pod) -> None:
    pod.add(runtime.conf(disableContainerInterface=True))
    assert "UP" not in links(pod.ns)["eth0"]["flags"]
    pod.check()


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_masquerade_of_what_leaves(runtime: Runtime, pod: Pod, netns: Names, backend: str) -> None:
    from support.netns import connect

    outside = netns("outside")
    connect(runtime.host, outside, "up0", "eth0")
    runtime.host.run("ip", "addr", "add", "192.0.2.1/24", "dev", "up0")
    outside.run("ip", "addr", "add", "192.0.2.9/24", "dev", "eth0")
    outside.run("ip", "addr", "add", "198.51.100.9/32", "dev", "eth0")
    runtime.host.run("ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.9")
    outside.run("ip", "route", "add", "10.9.0.0/24", "via", "192.0.2.1")
    conf = runtime.conf(
        isDefaultGateway=True, ipMasq=True, ipMasqBackend=backend, ipam=FOUR, nonMasqueradeCIDRs=["198.51.100.0/24"]
    )
    pod.add(conf)
    pod.check()

    def source(destination: str) -> str:
        outside.run("nft", "add", "table", "ip", "t")
        outside.run("nft", "flush", "table", "ip", "t")
        outside.run("nft", "add", "chain", "ip", "t", "c", "{ type filter hook input priority 0; }")
        outside.run("nft", "add", "set", "ip", "t", "seen", "{ type ipv4_addr; flags dynamic; }")
        outside.run("nft", "flush", "set", "ip", "t", "seen")
        outside.run("nft", "add", "rule", "ip", "t", "c", "icmp type echo-request add @seen { ip saddr }")
        pod.ns.run("ping", "-c1", "-W2", destination)
        seen = json.loads(outside.run("nft", "-j", "list", "set", "ip", "t", "seen"))["nftables"][1]["set"]
        (found,) = seen["elem"]
        return str(found)

    assert source("192.0.2.9") == "192.0.2.1"
    assert source("198.51.100.9") == "10.9.0.2"
    pod.delete()
    assert "10.9.0.2" not in runtime.host.run("iptables-nft-save") + runtime.host.run("nft", "list", "ruleset")


def test_a_pod_that_lies_about_its_hardware_address_is_not_heard(runtime: Runtime, pod: Pod) -> None:
    pod.add(runtime.conf(isGateway=True, macspoofchk=True, ipam=DUAL))
    for gateway in ("10.9.0.1", "fd00:9::1"):
        pod.ns.run("ping", "-c1", "-W2", gateway)
    pod.ns.run("ip", "link", "set", "eth0", "address", "02:00:00:00:00:66")
    pod.ns.run("ip", "neigh", "flush", "all")
    for gateway in ("10.9.0.1", "fd00:9::1"):
        assert " 0 received" in pod.ns.run("ping", "-c1", "-W1", gateway, check=False)


def test_isolated_pods_do_not_reach_each_other(runtime: Runtime, netns: Names) -> None:
    one, two = Pod(runtime, netns("one")), Pod(runtime, netns("two"))
    for pod in (one, two):
        pod.add(runtime.conf(isGateway=True, portIsolation=True, ipam=FOUR))
    one.ns.run("ping", "-c1", "-W2", "10.9.0.1")
    assert " 0 received" in one.ns.run("ping", "-c1", "-W1", two.ip, check=False)


def test_bandwidth_of_the_runtime(runtime: Runtime, pod: Pod) -> None:
    limits = {
        "ingressRate": 8_000_000,
        "ingressBurst": 34_359_738_352,
        "egressRate": 16_000_000,
        "egressBurst": 800_000,
    }
    with pytest.raises(CniFailure, match="ingressBurst"):
        pod.add(
            runtime.conf(isGateway=True, ipam=FOUR, runtimeConfig={"bandwidth": limits | {"ingressBurst": 8 << 32}})
        )
    result = pod.add(runtime.conf(isGateway=True, ipam=FOUR, runtimeConfig={"bandwidth": limits}))
    ifb = result["interfaces"][3]["name"]
    shown = {q["dev"]: q for q in json.loads(runtime.host.run("tc", "-j", "qdisc", "show")) if q["kind"] == "tbf"}
    assert shown[ifb]["options"]["rate"] == 2_000_000
    assert shown[result["interfaces"][1]["name"]]["options"]["rate"] == 1_000_000
    pod.ns.run("ping", "-c1", "-W2", "10.9.0.1")
    pod.check()
    pod.delete()
    assert ifb not in links(runtime.host)


TAKE = """
import socket
listener = socket.create_server(("", 9000)); print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    while connection.recv(1 << 16): pass
    connection.sendall(b"all"); connection.close()
"""
GIVE = """
import socket, sys, time
begun = time.monotonic()
with socket.create_connection((sys.argv[1], 9000)) as connection:
    connection.sendall(bytes(1 << 19)); connection.shutdown(socket.SHUT_WR); connection.recv(3)
print(time.monotonic() - begun)
"""


def test_bandwidth_by_real_traffic(runtime: Runtime, pod: Pod) -> None:
    """Half a megabyte at 4 Mbit/s is a second each way; without a limit a few milliseconds."""
    pod.add(runtime.conf(isGateway=True, ipam=FOUR, ingressRate=4_000_000, egressRate=4_000_000))
    for taker, giver, address in ((pod.ns, runtime.host, pod.ip), (runtime.host, pod.ns, "10.9.0.1")):
        child = taker.start(sys.executable, "-c", TAKE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert float(giver.run(sys.executable, "-c", GIVE, address)) > 0.8


def test_a_chain_extends_the_previous_result(runtime: Runtime, pod: Pod) -> None:
    before = {
        "cniVersion": "1.1.0", "interfaces": [{"name": "tap0"}, {"name": "net0", "sandbox": "/x"}],
        "ips": [{"address": "192.0.2.5/24", "interface": 1}], "dns": {"nameservers": ["9.9.9.9"]},
    }  # fmt: skip
    result = pod.add(runtime.conf(isGateway=True, ipam=FOUR, prevResult=before))
    assert [interface["name"] for interface in result["interfaces"][:3]] == ["tap0", "net0", "cni0"]
    assert [(ip["address"], ip["interface"]) for ip in result["ips"]] == [("192.0.2.5/24", 1), ("10.9.0.2/24", 4)]
    assert result["dns"] == {"nameservers": ["9.9.9.9"]}


def test_two_interfaces_of_one_pod(runtime: Runtime, pod: Pod) -> None:
    pod.add(runtime.conf(isGateway=True, ipam=FOUR))
    second = runtime.conf(
        name="two", bridge="cni1", isGateway=True, ipam={"type": "pynet-ipam", "subnet": "10.8.0.0/24"}
    )
    runtime.call("ADD", second, pod.container, pod.ns.path, ifname="net1")
    assert addresses(pod.ns, "net1") == ["10.8.0.2/24"]
    pod.delete()
    assert addresses(pod.ns, "net1") == ["10.8.0.2/24"]


def test_vlans_are_refused_by_name_where_the_kernel_has_none(runtime: Runtime, pod: Pod) -> None:
    runtime.host.run("ip", "link", "add", "probe", "type", "bridge", "vlan_filtering", "1", check=False)
    if "probe" in links(runtime.host):
        pytest.skip("this kernel filters VLANs")
    before = residue(runtime.host)
    with pytest.raises(CniFailure) as refused:
        pod.add(runtime.conf(vlan=100))
    assert "CONFIG_BRIDGE_VLAN_FILTERING" in refused.value.details
    assert residue(runtime.host) == before
