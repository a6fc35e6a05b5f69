"""iptables mode on the real kernel, both back ends: what it writes is what it reads back, and what it repairs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from proxy.modes import ApplyError
from proxy.modes.iptables.balance import client_lists
from proxy.modes.iptables.mode import IptablesMode, parse
from proxy.plan import Endpoint, Family, Plan, PlanChange
from pynet.kernel import recent
from pynet.kernel.iptables import Backend, backend_of_host
from support.netns import Names, Namespace
from support.plans import CLUSTER, CLUSTER_MASQ, DROP, LOCAL, cluster_ip, load_balancer, node_port, plan, server
from support.servicenet import inside

pytestmark = pytest.mark.root
both = pytest.mark.parametrize("backend", ["legacy", "nft"])

POD1, POD2 = Endpoint("10.244.1.2", 8080, True), Endpoint("10.244.1.3", 8080, True)
FAR = Endpoint("10.244.2.2", 8080)
WEIGHED = (Endpoint("10.244.1.2", 8080, True, 3), Endpoint("10.244.2.2", 8080, False, 4))
SIX = (Endpoint("fd00:244:1::2", 8080, True), Endpoint("fd00:244:2::2", 8080), Endpoint("fd00:244:2::3", 8080))


def full() -> Plan:
    """Return a plan with one of everything, and enough of some things for the trees to branch."""
    many = [server(f"a/many{n}", cluster_ip(f"10.97.{n % 7}.{n}", 80), cluster=(POD1,)) for n in range(60)]
    ports = [server("a/ports", node_port(30100 + 7 * n), load_balancer("203.0.113.9", 1000 + n),
                    cluster=(FAR,), port_name=f"p{n}") for n in range(40)]  # fmt: skip
    return plan(
        server("a/web", cluster_ip("10.96.0.1", 80), node_port(30080, CLUSTER, CLUSTER_MASQ, LOCAL),
               load_balancer("203.0.113.1", 80, CLUSTER, CLUSTER_MASQ, LOCAL, ranges=("192.168.77.0/24", "10.0.0.0/8")),
               cluster=(POD1, POD2, FAR), local=(POD1, POD2)),
        server("a/dns", cluster_ip("10.96.0.2", 53), cluster=(POD1,), protocol="UDP"),
        server("a/turn", cluster_ip("10.96.0.3", 80), node_port(30081), cluster=(POD1, POD2, FAR), scheduler="rr"),
        server("a/weights", cluster_ip("10.96.0.8", 80), cluster=WEIGHED),
        server("a/weights-rr", cluster_ip("10.96.0.9", 80), cluster=WEIGHED, scheduler="rr"),
        server("a/sticky", cluster_ip("10.96.0.4", 80), cluster=(POD1, POD2), affinity=60),
        server("a/sctp", cluster_ip("10.96.0.5", 80), cluster=(POD1, FAR), affinity=9, scheduler="rr", protocol="SCTP"),
        server("a/none", cluster_ip("10.96.0.6", 80)),
        server("a/kept", cluster_ip("10.96.0.7", 80, DROP, DROP, DROP), cluster=(FAR,)),
        server('a/"; -j ACCEPT\n-A INPUT -j DROP', cluster_ip("10.96.0.11", 80), cluster=(FAR,)),
        *many, *ports,
    )  # fmt: skip


def six() -> Plan:
    """Return the same in IPv6, in short."""
    ranges = ("fd00:77::/64",)
    return plan(
        server("a/web", cluster_ip("fd00:96::1", 80), node_port(30080), load_balancer("fd00:113::1", 80, ranges=ranges),
               cluster=SIX, local=SIX[:1]),
        server("a/turn", cluster_ip("fd00:96::3", 80), cluster=SIX, scheduler="rr", protocol="UDP"),
        server("a/sticky", cluster_ip("fd00:96::4", 80), cluster=SIX, affinity=60, protocol="SCTP"),
        *[server(f"a/many{n}", cluster_ip(f"fd00:96::1:{n:x}", 80), cluster=SIX[:1]) for n in range(40)],
        family=Family.V6,
    )  # fmt: skip


def dump(namespace: Namespace, backend: Backend) -> str:
    """Return the rules of both families, sorted, without dates and counters."""
    text = "".join(namespace.run(f"{program}-{backend}-save") for program in ("iptables", "ip6tables"))
    return "\n".join(sorted(line for line in re.sub(r"\[\d+:\d+\]", "", text).splitlines() if line[:1] in "*:-"))


@both
def test_what_is_written_is_what_is_read_back(netns: Names, backend: Backend) -> None:
    with inside(netns("node")):
        mode = IptablesMode(backend)
        assert mode.sync([full(), six()]).objects > 300
        assert mode.audit().found == ()
        assert mode.sync([full(), six()]).objects == 0
        assert not mode.tampered()


@both
def test_service_cidrs_come_and_go(netns: Names, backend: Backend) -> None:
    six_cidrs = replace(six(), settings=replace(six().settings, service_cidrs=("fd00:96::/112",)))
    with inside(netns("node")):
        mode = IptablesMode(backend)
        mode.sync([full(), six()])
        without = mode.rule_counts()
        for cidrs, more in ((("10.96.0.0/16",), 2), (("10.96.0.0/16", "10.100.0.0/24"), 4), ((), 0)):
            mode.sync([replace(full(), settings=replace(full().settings, service_cidrs=cidrs)), six_cidrs])
            assert mode.rule_counts()[Family.V4, "filter"] == without[Family.V4, "filter"] + more
            assert mode.audit().found == ()
            assert not mode.tampered()


def steps() -> list[Plan]:
    """Return plans that follow one another: each changes something of another kind."""
    web = full().servers

    def having(*made: object, without: tuple[str, ...] = ()) -> Plan:
        kept = [each for each in web.values() if not each.key.service.startswith(without or "-")]
        return plan(*{each.key: each for each in (*kept, *made)}.values())  # type: ignore[misc, attr-defined]

    return [
        having(server("a/web", cluster_ip("10.96.0.1", 80), cluster=(POD1, FAR))),
        having(server("a/web", cluster_ip("10.96.0.1", 80))),
        having(server("a/web", cluster_ip("10.96.0.1", 81), node_port(30080), cluster=(POD2,))),
        having(without=("a/many", "a/ports")),
        having(server("a/new", cluster_ip("10.96.0.1", 443), cluster=(POD2,)), without=("a/web", "a/sticky")),
        having(),
        plan(),
    ]


@both
def test_changes_leave_what_a_full_sync_would(netns: Names, backend: Backend) -> None:
    here, other = netns("node"), netns("other")
    with inside(here):
        mode = IptablesMode(backend)
        last = full()
        mode.sync([last, six()])
    for wanted in steps():
        keys = tuple(k for k in last.servers | wanted.servers if last.servers.get(k) != wanted.servers.get(k))
        with inside(here):
            mode.update([PlanChange(last, wanted, keys)])
            assert not mode.tampered()
            assert mode.audit().found == ()
        with inside(other):
            IptablesMode(backend).sync([wanted, six()])
        assert dump(here, backend) == dump(other, backend)
        last = wanted


@both
def test_a_restart_with_another_plan_leaves_only_that(netns: Names, backend: Backend) -> None:
    here, other = netns("node"), netns("other")
    wanted = steps()[3]
    with inside(here):
        IptablesMode(backend).sync([full(), six()])
        IptablesMode(backend).sync([wanted, six()])
    with inside(other):
        IptablesMode(backend).sync([wanted, six()])
    assert dump(here, backend) == dump(other, backend)


@both
@pytest.mark.parametrize(
    "harm",
    [
        "-t nat -F PYNET-IPS",
        "-t nat -F",
        "-D INPUT -j PYNET-INPUT",
        "-t nat -D OUTPUT -j PYNET-SERVICES",
        "-t filter -F PYNET-REFUSE",
    ],
)
def test_harm_is_noticed_and_repaired(netns: Names, backend: Backend, harm: str) -> None:
    here = netns("node")
    with inside(here):
        mode = IptablesMode(backend)
        mode.sync([full(), six()])
        before = dump(here, backend)
        here.run(f"iptables-{backend}", *harm.split())
        assert mode.tampered()
        assert mode.audit().found
        assert dump(here, backend) == before
        assert not mode.tampered()


@both
def test_other_peoples_rules_are_neither_harm_nor_ours(netns: Names, backend: Backend) -> None:
    here = netns("node")
    for words in ("-N MINE", "-A MINE -j ACCEPT", "-t nat -A POSTROUTING -s 10.9.9.0/24 -j MASQUERADE"):
        here.run(f"iptables-{backend}", *words.split())
    before = dump(here, backend)
    with inside(here):
        mode = IptablesMode(backend)
        mode.sync([full(), six()])
        here.run(f"iptables-{backend}", "-A", "MINE", "-j", "DROP")
        assert not mode.tampered()
        here.run(f"iptables-{backend}", "-D", "MINE", "-j", "DROP")
        mode.cleanup()
        IptablesMode(backend).cleanup()
    after = dump(here, backend)
    builtin = re.compile(r":[A-Z]+ ACCEPT|\*")
    assert [line for line in after.splitlines() if not builtin.match(line)] == [
        line for line in before.splitlines() if not builtin.match(line)
    ]


def test_the_back_end_in_use_is_found(netns: Names) -> None:
    here = netns("node")
    with inside(here):
        assert backend_of_host() == "nft"  # what `iptables` means on Debian 12
        IptablesMode("legacy").sync([full()])
        assert backend_of_host() == "legacy"
        here.run("iptables-nft", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
        assert backend_of_host() == "nft"


@pytest.mark.parametrize(("first", "second"), [("legacy", "nft"), ("nft", "legacy")])
def test_a_change_of_back_end_leaves_nothing_behind(netns: Names, first: Backend, second: Backend) -> None:
    here = netns("node")
    with inside(here):
        IptablesMode(first).sync([full()])
        IptablesMode(second).sync([full()])
        assert not parse(here.run(f"iptables-{first}-save")).chains
        assert IptablesMode(second).sync([full()]).objects == 0


@both
def test_the_service_at_fault_is_named(netns: Names, backend: Backend) -> None:
    bad = server("a/bad", cluster_ip("10.96.0.99", 80), cluster=(Endpoint("999.1.1.1", 8080),))
    with inside(netns("node")):
        mode = IptablesMode(backend)
        with pytest.raises(ApplyError) as caught:
            mode.sync([plan(*full().servers.values(), bad)])
        assert [key.service for key in caught.value.servers] == ["a/bad"]
        mode.sync([full()])
        with pytest.raises(ApplyError) as caught:
            mode.update([PlanChange(full(), plan(*full().servers.values(), bad), (bad.key,))])
        assert [key.service for key in caught.value.servers] == ["a/bad"]
        mode.sync([full()])
        assert mode.audit().found == ()


@both
def test_after_a_refusal_the_next_change_makes_all_right(netns: Names, backend: Backend) -> None:
    moved = server("a/web", cluster_ip("10.96.0.77", 80), cluster=(Endpoint("999.1.1.1", 8080),))
    right = server("a/web", cluster_ip("10.96.0.78", 80), cluster=(POD2,))
    refused, wanted = (plan(*{**full().servers, each.key: each}.values()) for each in (moved, right))
    with inside(netns("node")):
        mode = IptablesMode(backend)
        mode.sync([full()])
        with pytest.raises(ApplyError):
            mode.update([PlanChange(full(), refused, (moved.key,))])
        mode.update([PlanChange(full(), wanted, (right.key,))])
        assert not mode.tampered()
        assert mode.audit().found == ()
        mode.update([PlanChange(wanted, full(), (right.key,))])
        assert mode.audit().found == ()


@both
def test_a_full_list_of_clients_is_told_once(netns: Names, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    sticky = server("a/sticky", cluster_ip("10.96.0.4", 80), cluster=(POD1, POD2), affinity=60)
    with inside(netns("node")):
        mode = IptablesMode(backend)
        mode.sync([plan(sticky)])
        most = recent.most_addresses()
        name = client_lists(sticky)[1]
        for number in range(most + 50):
            if number == most:
                assert mode.audit().found == ()
                assert len(caplog.records) == 1
            Path("/proc/thread-self/net/xt_recent", name).write_text(f"+10.9.{number // 250}.{number % 250 + 1}")
            if number == most - 2:
                mode.audit()
                assert caplog.records == []
        assert recent.addresses_in(name) == most
        mode.audit()
        assert [record.getMessage()[:31] for record in caplog.records] == ["session affinity forgets client"]


@both
def test_load_balancers_reach_health_check_node_ports_as_they_come_and_go(netns: Names, backend: Backend) -> None:
    """Also through an INPUT chain that drops: as kube-proxy has it. Twenty of them make a tree."""
    base = plan(server("a/web", cluster_ip("10.96.0.1", 80), cluster=(POD1,)))
    checked = [
        replace(server(f"a/lb{n}", cluster_ip(f"10.96.1.{n}", 80), cluster=(POD1,)), health_check_port=30100 + 7 * n)
        for n in range(20)
    ]

    def accepted() -> list[str]:
        saved = node.run(f"iptables-{backend}-save", "-t", "filter")
        return re.findall(r"--dport (\d+) .*lb\d+ health check node port\" -j ACCEPT", saved)

    node = netns("node")
    with inside(node):
        mode = IptablesMode(backend)
        mode.sync([base])
        now = base
        for count in (1, 20, 2, 0):
            then = plan(*base.servers.values(), *checked[:count])
            keys = tuple({**now.servers, **then.servers})
            mode.update([PlanChange(now, then, keys)])
            assert sorted(accepted()) == sorted(str(each.health_check_port) for each in checked[:count])
            assert not mode.tampered()
            assert mode.audit().found == ()
            now = then
        mode.cleanup()
        assert "PYNET" not in dump(node, backend)
