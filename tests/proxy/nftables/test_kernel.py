"""nftables mode on the real kernel: what it writes, takes over, notices and repairs. No packets here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from msgspec.structs import replace

from proxy.modes import ApplyError
from proxy.modes.nftables.base import pick_chain
from proxy.modes.nftables.mode import Nftables
from proxy.modes.nftables.names import KINDS, PROTOCOLS, TABLE, WORDS
from proxy.modes.nftables.picks import own_bytes
from proxy.plan import (
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    LocalDetector,
    LocalKind,
    NodeSettings,
    Plan,
    PlanChange,
)
from pynet.kernel.nfnetlink import Nfnetlink, new_chain
from support.netns import Names, Namespace
from support.plans import (
    CLUSTER,
    CLUSTER_MASQ,
    DROP,
    LOCAL,
    cluster_ip,
    load_balancer,
    node_port,
    plan,
    server,
)
from support.servicenet import inside

pytestmark = pytest.mark.root

POD1, POD2 = Endpoint("10.244.1.2", 8080, True), Endpoint("10.244.1.3", 8080, True)
FAR, FAR2 = Endpoint("10.244.2.2", 8080), Endpoint("10.244.2.3", 9090)
SIX = (Endpoint("fd00:244:1::2", 8080, True), Endpoint("fd00:244:2::2", 8080))


def full() -> Plan:
    """Return a plan with one of everything."""
    return plan(
        server("a/web", cluster_ip("10.96.0.1", 80), node_port(30080, CLUSTER, CLUSTER_MASQ, LOCAL),
               load_balancer("203.0.113.1", 80, CLUSTER, CLUSTER_MASQ, LOCAL, ranges=("192.168.77.0/24", "10.0.0.0/8")),
               cluster=(POD1, POD2, FAR), local=(POD1, POD2)),
        server("a/web", cluster_ip("10.96.0.1", 443), port_name="https", cluster=(POD1, FAR)),
        server("a/dns", cluster_ip("10.96.0.2", 53), cluster=(POD1,), protocol="UDP"),
        server("a/turn", cluster_ip("10.96.0.3", 80), node_port(30081), cluster=(POD1, POD2, FAR), scheduler="rr"),
        server("a/sticky", cluster_ip("10.96.0.4", 80), cluster=(POD1, POD2), affinity=60),
        server("a/both", cluster_ip("10.96.0.5", 80), cluster=(POD1, FAR2), affinity=60, scheduler="rr",
               protocol="SCTP"),
        server("a/none", cluster_ip("10.96.0.6", 80)),
        server("a/held", cluster_ip("10.96.0.7", 80, LOCAL, LOCAL, LOCAL), cluster=(FAR,), local=(POD2,)),
        server("a/kept", cluster_ip("10.96.0.8", 80, DROP, DROP, DROP), cluster=(FAR,)),
    )  # fmt: skip


def six() -> Plan:
    return plan(
        server("a/web", cluster_ip("fd00:96::1", 80), node_port(30080),
               load_balancer("fd00:113::1", 80, ranges=("fd00:77::/64",)), cluster=SIX, local=SIX[:1]),
        server("a/turn", cluster_ip("fd00:96::3", 80), cluster=SIX, scheduler="rr", protocol="UDP"),
        server("a/sticky", cluster_ip("fd00:96::4", 80), cluster=SIX, affinity=60, protocol="SCTP"),
        family=Family.V6,
    )  # fmt: skip


@contextmanager
def watching(namespace: Namespace) -> Iterator[Nftables]:
    """A mode in a namespace; the thread is in there too."""
    with inside(namespace):
        yield Nftables()


def dump(namespace: Namespace) -> str:
    """Return the rules as `nft` lists them, sorted, without what packets and time change."""
    text = namespace.run("nft", "list", "ruleset")
    blocks = re.split(r"\n\n|(?<=\{)\n(?=\t(?:map|set|chain))|\n\}\n", text)
    return "\n".join(
        sorted("\n".join(sorted(re.split(r"\n|, ?", block.replace("elements = {", "")))) for block in blocks)
    )


def test_sync_writes_what_an_audit_expects(netns: Names) -> None:
    here = netns("node")
    with watching(here) as mode:
        written = mode.sync([full(), six()])
        assert written.objects > 100
        assert mode.audit().found == ()
        assert not mode.tampered()


def test_a_restart_takes_over_what_stands(netns: Names) -> None:
    here = netns("node")
    with watching(here) as mode:
        mode.sync([full(), six()])
        before = dump(here)
        sticky = re.search(r"map (sticky-\w+-cluster-60-8080)", here.run("nft", "list", "table", "ip", TABLE))
        assert sticky
        here.run("nft", f"add element ip {TABLE} {sticky[1]} {{ 10.9.9.9 : 10.244.1.2 }}")
        again = Nftables()
        again.sync([full(), six()])
        assert "10.9.9.9" in here.run("nft", "list", "map", "ip", TABLE, sticky[1]), "affinity survives a restart"
        here.run("nft", "flush", "map", "ip", TABLE, sticky[1])
        assert dump(here) == before
        assert again.audit().found == ()


def test_a_restart_with_another_plan_leaves_only_that(netns: Names) -> None:
    here, other = netns("node"), netns("other")
    smaller = plan(*[each for each in full().servers.values() if each.key.service != "a/web"])
    with watching(here) as mode:
        mode.sync([full(), six()])
        Nftables().sync([smaller])
    with watching(other) as mode:
        mode.sync([smaller])
    assert dump(here) == dump(other)


def test_a_table_of_another_layout_is_replaced(netns: Names) -> None:
    here, other = netns("node"), netns("other")
    here.run(
        "nft", "-f", "-", input=f"table ip {TABLE} {{\n set hairpin {{ type inet_service ; }}\n chain x {{\n }}\n}}\n"
    )
    with watching(here) as mode:
        mode.sync([full()])
    with watching(other) as mode:
        mode.sync([full()])
    assert dump(here) == dump(other)


def steps() -> list[Plan]:
    """Return plans that follow one another: each changes something of another kind."""
    web = full().servers

    def having(*made: object, without: str = "") -> Plan:
        kept = [each for each in web.values() if each.key.service != without]
        return plan(*{each.key: each for each in (*kept, *made)}.values())  # type: ignore[misc, attr-defined]

    return [
        having(server("a/web", cluster_ip("10.96.0.1", 80), cluster=(POD1, FAR2))),
        having(server("a/web", cluster_ip("10.96.0.1", 80), cluster=(POD2, FAR2))),
        having(server("a/turn", cluster_ip("10.96.0.3", 80), cluster=(POD1, FAR), scheduler="rr")),
        having(server("a/sticky", cluster_ip("10.96.0.4", 80), cluster=(POD2, FAR2), affinity=60)),
        having(server("a/sticky", cluster_ip("10.96.0.4", 80), cluster=(POD2, FAR2), affinity=90)),
        having(server("a/none", cluster_ip("10.96.0.6", 80), cluster=(POD1,) * 1)),
        having(without="a/web"),
        having(server("a/new", load_balancer("203.0.113.9", 80, ranges=("1.2.3.0/24",)), cluster=tuple(
            Endpoint(f"10.244.3.{n}", 80, weight=n % 3 + 1) for n in range(1, 40)))),
        having(without="a/dns"),
        plan(),
        full(),
    ]  # fmt: skip


def test_changes_leave_what_a_full_sync_would(netns: Names) -> None:
    here, other = netns("node"), netns("other")
    now = full()
    with watching(here) as mode:
        mode.sync([now])
        for then in steps():
            keys = tuple({**now.servers, **then.servers})
            mode.update([PlanChange(now, then, keys)])
            assert mode.audit().found == ()
            assert not mode.tampered()
            now = then
            changed = dump(here)
            with inside(other):
                fresh = Nftables()
                fresh.cleanup()
                fresh.sync([then])
            assert changed == dump(other)


def test_other_settings_come_with_an_update(netns: Names) -> None:
    here, other = netns("node"), netns("other")
    narrow = NodeSettings("node", LocalDetector(LocalKind.BRIDGE, interface="cni0"), ("192.168.77.0/24",), False)
    then = Plan(Family.V4, narrow, full().servers)
    with watching(here) as mode:
        mode.sync([full()])
        mode.update([PlanChange(full(), then, ())])
        assert mode.audit().found == ()
    with watching(other) as mode:
        mode.sync([then])
    assert dump(here) == dump(other)


def test_service_cidrs_come_and_go(netns: Names) -> None:
    node = netns("node")
    six_cidrs = replace(six(), settings=replace(six().settings, service_cidrs=("fd00:96::/112",)))
    with watching(node) as mode:
        mode.sync([full(), six_cidrs])
        without = dump(node)
        for cidrs in (("10.96.0.0/16",), ("10.96.0.0/16", "10.100.0.0/24"), ()):
            wanted = replace(full(), settings=replace(full().settings, service_cidrs=cidrs))
            mode.update([PlanChange(full(), wanted, ())])
            assert (dump(node) == without) == (not cidrs)
            assert mode.audit().found == ()
            assert not mode.tampered()


def test_our_encoder_writes_the_rules_that_nft_writes(netns: Names) -> None:
    here = netns("node")
    with watching(here) as mode:
        mode.sync([plan(), plan(family=Family.V6)])
        kernel = Nfnetlink()
        for words in WORDS.values():
            chains = [
                pick_chain(words, kind, w, p, 3) for kind in KINDS for w in ("cluster", "local") for p in PROTOCOLS
            ]
            for protocol in PROTOCOLS:
                name = f"turn-{protocol}"
                kind = f"{{ typeof numgen inc mod 2 : {words.ip} daddr . {protocol} dport ; }}"
                here.run("nft", f"add map {words.ip} {TABLE} {name} {kind}")
                choice = f"dnat {words.ip} addr . port to numgen inc mod 5 map @{name}"
                chains.append((f"{name}-5", (f"meta l4proto {protocol} {choice}",)))
            for name, rules in chains:
                here.run("nft", f"add chain {words.ip} {TABLE} {name}; add rule {words.ip} {TABLE} {name} {rules[0]}")
                by_nft = kernel.rules(words.ip, TABLE, name)[name]
                here.run("nft", f"delete chain {words.ip} {TABLE} {name}")
                ours = own_bytes(words, name, rules)
                assert ours is not None
                kernel.batch(list(new_chain(words.ip, TABLE, name, ours)))
                assert kernel.rules(words.ip, TABLE, name)[name] == by_nft
        kernel.close()


INTRUSIONS = {
    "flush ruleset": lambda ns: ns.run("nft", "flush", "ruleset"),
    "delete table": lambda ns: ns.run("nft", "delete", "table", "ip6", TABLE),
    "flush map": lambda ns: ns.run("nft", "flush", "map", "ip", TABLE, "service-endpoints-tcp"),
    "flush chain": lambda ns: ns.run("nft", "flush", "chain", "ip", TABLE, "services"),
    "delete element": lambda ns: ns.run("nft", f"delete element ip {TABLE} frontends {{ 10.96.0.1 . tcp . 80 }}"),
    "change element": lambda ns: ns.run(
        "nft",
        f"delete element ip {TABLE} service-endpoints-tcp {{ 10.96.0.1 . 80 . 0 }};"
        f"add element ip {TABLE} service-endpoints-tcp {{ 10.96.0.1 . 80 . 0 : 6.6.6.6 . 66 }}",
    ),
    "add element": lambda ns: ns.run("nft", f"add element ip {TABLE} hairpin {{ 6.6.6.6 . 6.6.6.6 }}"),
    "add source range": lambda ns: ns.run(
        "nft", f"add element ip {TABLE} service-source-ranges {{ 203.0.113.1 . tcp . 80 . 6.6.6.0/24 }}"
    ),
    "add pod network": lambda ns: ns.run("nft", f"add element ip {TABLE} pod-networks {{ 6.6.6.0/24 }}"),
    "insert rule": lambda ns: ns.run("nft", f"insert rule ip {TABLE} service-cluster drop"),
    "add chain": lambda ns: ns.run("nft", f"add chain ip {TABLE} intruder"),
    "add set": lambda ns: ns.run("nft", f"add set ip {TABLE} intruder {{ type ipv4_addr ; }}"),
}  # fmt: skip


@pytest.mark.parametrize("name", INTRUSIONS)
def test_an_intrusion_is_noticed_and_undone(netns: Names, name: str) -> None:
    here = netns("node")
    intrude: Callable[[Namespace], str] = INTRUSIONS[name]
    with watching(here) as mode:
        mode.sync([full(), six()])
        before = dump(here)
        assert not mode.tampered()
        intrude(here)
        assert mode.tampered()
        found = mode.audit().found
        assert found
        assert dump(here) == before
        assert mode.audit().found == ()
        assert not mode.tampered()


def test_what_an_audit_finds_names_the_service(netns: Names) -> None:
    with watching(here := netns("node")) as mode:
        mode.sync([full()])
        INTRUSIONS["change element"](here)
        ((key, line),) = {(key, line) for key, line in mode.audit().found}
        assert key is not None
        assert str(key) == "a/web/TCP"
        assert line == "element 10.96.0.1 . 80 . 0 of service-endpoints-tcp is 6.6.6.6 . 66"


def test_other_peoples_tables_do_not_concern_us(netns: Names) -> None:
    with watching(here := netns("node")) as mode:
        mode.sync([full()])
        here.run("nft", "add table ip other; add chain ip other x; delete table ip other")
        assert not mode.tampered()
        here.run("nft", "add table ip other")
        mode.cleanup()
        assert here.run("nft", "list", "tables").strip() == "table ip other"
        mode.cleanup()


def test_clients_of_an_endpoint_that_is_gone_are_forgotten(netns: Names) -> None:
    sticky = [each for each in full().servers.values() if each.key.service == "a/sticky"]
    now = plan(*sticky)
    then = plan(server("a/sticky", cluster_ip("10.96.0.4", 80), cluster=(POD2, FAR), affinity=60))
    with watching(here := netns("node")) as mode:
        mode.sync([now])
        (name,) = re.findall(r"map (sticky-[\w-]+)", here.run("nft", "list", "table", "ip", TABLE))
        here.run("nft", f"add element ip {TABLE} {name} {{ 10.9.9.1 : 10.244.1.2, 10.9.9.2 : 10.244.1.3 }}")
        mode.update([PlanChange(now, then, tuple(now.servers))])
        left = here.run("nft", "list", "map", "ip", TABLE, name)
        assert "10.9.9.1" not in left
        assert "10.9.9.2" in left


def test_an_address_that_no_rule_can_hold_names_its_service(netns: Names) -> None:
    bad = server("a/bad", cluster_ip("10.96.0.9 ; flush ruleset", 80), cluster=(POD1,))
    worse = server("a/worse", cluster_ip("10.96.0.9", 80), cluster=(Endpoint("10.244.1.300", 80),))
    with watching(here := netns("node")) as mode:
        mode.sync([full()])
        before = dump(here)
        for each in (bad, worse):
            for attempt in (
                lambda each=each: mode.update([PlanChange(full(), plan(*full().servers.values(), each), (each.key,))]),
                lambda each=each: Nftables().sync([plan(*full().servers.values(), each)]),
            ):
                with pytest.raises(ApplyError) as refused:
                    attempt()
                assert refused.value.servers == (each.key,)
        assert dump(here) == before


def test_after_a_refusal_the_next_change_makes_all_right(netns: Names) -> None:
    """An intruder's element is in the way of a change: it fails, and whatever comes next is a full sync."""
    then = plan(*full().servers.values(), server("a/new", cluster_ip("10.96.0.20", 80), cluster=(POD1,)))
    with watching(here := netns("node")) as mode:
        mode.sync([full(), six()])
        for name, value in (("frontends", "goto no-endpoint"), ("service-cluster-picks", "goto no-endpoint")):
            here.run("nft", f"add element ip {TABLE} {name} {{ 10.96.0.20 . tcp . 80 : {value} }}")
        with pytest.raises(ApplyError):
            mode.update([PlanChange(full(), then, tuple(then.servers))])
        mode.update([PlanChange(full(), then, ())])
        assert mode.audit().found == ()
        assert here.run("nft", "list", "tables").split() == ["table", "ip", TABLE, "table", "ip6", TABLE]


def test_what_is_in_the_way_of_a_repair_goes_with_its_table(netns: Names) -> None:
    with watching(here := netns("node")) as mode:
        mode.sync([full(), six()])
        before = dump(here)
        # a rule of the intruder's chain holds on to a chain of ours that must go
        here.run(
            "nft", f"add chain ip {TABLE} stray; add chain ip {TABLE} holder; add rule ip {TABLE} holder jump stray"
        )
        assert mode.audit().found
        assert dump(here) == before


def test_an_external_ip_without_endpoints_is_refused(netns: Names) -> None:
    frontend = Frontend(FrontendKind.EXTERNAL_IP, "203.0.113.5", 80, CLUSTER, CLUSTER_MASQ, CLUSTER_MASQ)
    with watching(here := netns("node")) as mode:
        mode.sync([plan(server("a/none", frontend))])
        assert "203.0.113.5 . tcp . 80" in here.run("nft", "list", "map", "ip", TABLE, "frontends")
        assert "203.0.113.5" not in here.run("nft", "list", "set", "ip", TABLE, "cluster-ips")
