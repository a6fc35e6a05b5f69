"""Any mixture of keys: ADD works or refuses by the specification, CHECK agrees right after it, nothing is left."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cni import spec
from support.cni import CniFailure, Forking, Pod, Runtime, links, residue
from support.netns import Names

pytestmark = pytest.mark.root

FLAGS = (
    "isGateway", "isDefaultGateway", "forceAddress", "ipMasq", "hairpinMode", "promiscMode", "macspoofchk",
    "portIsolation", "snat", "masqAll",
)  # fmt: skip
SETS = [
    [{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}], [{"subnet": "10.9.1.0/24", "gateway": "10.9.1.254"}],
    [{"subnet": "fd00:a::/64", "gateway": "fd00:a::ff"}],
]  # fmt: skip
ROUTES = [
    {"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "10.77.0.0/16", "mtu": 1300, "priority": 5},
    {"dst": "10.78.0.0/16", "gw": "10.9.0.1", "table": 77}, {"dst": "10.79.0.0/16", "scope": 253},
    {"dst": "fd00:b::/64", "advmss": 1200, "priority": 7}, {"dst": "10.80.0.0/16", "gw": "192.0.2.1"},
]  # fmt: skip
HOSTS = ["", "0.0.0.0", "::", "127.0.0.1", "192.0.2.1", "::1"]


def mixture(chance: random.Random, runtime: Runtime) -> dict[str, Any]:
    """Return a configuration whose every key is well formed."""
    keys: dict[str, Any] = {flag: chance.random() < 0.8 for flag in FLAGS if chance.random() < 0.3}
    for name, values in (
        ("ipMasqBackend", ["iptables", "nftables"]), ("mtu", [0, 1000, 1280, 1400, 9000]),
        ("nonMasqueradeCIDRs", [["192.0.2.0/24", "2001:db8::/32"]]), ("dns", [{"search": ["a.b"]}]),
    ):  # fmt: skip
        if chance.random() < 0.3:
            keys[name] = chance.choice(values)
    sets = chance.sample(SETS, chance.choice([0, 1, 1, 2, 2, 3]))
    if sets:
        routes = chance.sample(ROUTES, chance.choice([0, 0, 1, 2]))
        keys["ipam"] = {"type": "pynet-ipam", "ranges": sets, "routes": routes}
    limits = {f"{way}Rate": chance.choice([0, 8_000, 8_000_000, 10**12]) for way in ("ingress", "egress")}
    mapping = {"hostPort": chance.choice([80, 81]), "containerPort": 80, "hostIP": chance.choice(HOSTS)}
    protocols = [mapping | {"protocol": protocol} for protocol in ("tcp", "udp", "sctp") if chance.random() < 0.5]
    keys["runtimeConfig"] = {
        name: value
        for name, value in (("portMappings", protocols), ("bandwidth", limits), ("mac", "02:00:00:00:00:77"))
        if chance.random() < 0.4
    }
    return runtime.conf(chance.choice(spec.VERSIONS), **keys)


@pytest.mark.parametrize("seed", range(2))
def test_any_mixture_of_keys(netns: Names, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    runtime = Forking(netns("host"), tmp_path / "state")
    pod = Pod(runtime, netns("pod"))
    runtime.host.run("sh", "-c", "iptables-nft -t nat -L; ip6tables-nft -t nat -L")  # they keep the table they make
    before = residue(runtime.host)
    added = 0
    for _ in range(15):
        conf = mixture(chance, runtime)
        try:
            pod.add(conf)
        except CniFailure as refused:
            said = refused
        else:
            said = None
            added += 1
            if spec.at_least(conf["cniVersion"], "0.4.0"):
                pod.check()
            pod.delete()
            runtime.host.run("ip", "link", "del", "cni0")
        if said is not None:
            assert (said.exit, said.answer["cniVersion"]) == (1, conf["cniVersion"]), said
            assert said.code in (1, 7, 100), said
        after = residue(runtime.host)
        assert "pynet-cni" not in after["nft"], conf
        after["nft"] = before["nft"]  # iptables adds its empty chains by and by
        assert after == before, conf
        assert "eth0" not in links(pod.ns), conf
    assert added > 4
