"""The model itself: what it does not know fails, and a rule that is wrong makes it disagree."""

from __future__ import annotations

from fractions import Fraction

import pytest

from proxy.modes.iptables import layout
from proxy.modes.nftables.script import render
from proxy.modes.nftables.table import Table
from proxy.plan import Endpoint, Packet, Plan, verdict
from support.packetmodel import iptables, nft
from support.packetmodel.outcomes import End, UnknownRule, differ, ends_of
from support.plans import DROP, LOCAL, cluster_ip, node_port, plan, server

NODE = ("192.168.77.1", "10.244.1.1")
POD, FAR = Endpoint("10.244.1.2", 8080, True), Endpoint("10.244.2.2", 8080, weight=3)
PLAN = plan(
    server("a/web", cluster_ip("10.96.0.1", 80), node_port(30080, LOCAL, DROP, DROP), cluster=(POD, FAR), local=(POD,))
)
FROM_POD, FROM_OUTSIDE = ("10.244.1.3", "cni0"), ("198.51.100.7", "eth0")
PACKETS = [
    # source, destination, port → kind, endpoints with probability, masquerade
    (FROM_POD, "10.96.0.1", 80,
     {End("forward", ("10.244.1.2", 8080)): 0.25, End("forward", ("10.244.2.2", 8080)): 0.75}),
    (("10.244.1.2", "cni0"), "10.96.0.1", 80,
     {End("forward", ("10.244.1.2", 8080), True): 0.25, End("forward", ("10.244.2.2", 8080)): 0.75}),
    (FROM_OUTSIDE, "10.96.0.1", 80,
     {End("forward", ("10.244.1.2", 8080), True): 0.25, End("forward", ("10.244.2.2", 8080), True): 0.75}),
    (FROM_OUTSIDE, "10.96.0.1", 81, {End("reject"): 1}),
    (FROM_OUTSIDE, "192.168.77.1", 30080, {End("drop"): 1}),
    (FROM_OUTSIDE, "198.51.100.9", 30080, {End("pass"): 1}),
    (FROM_POD, "192.168.77.1", 30080, {End("forward", ("10.244.1.2", 8080)): 1}),
]  # fmt: skip


def of_nft(wanted: Plan) -> nft.Ruleset:
    rules = nft.Ruleset("ip", NODE)
    rules.run(render([("ip", Table(wanted.family, wanted.settings).start(wanted).change)], fresh=True).text)
    return rules


def of_iptables(wanted: Plan) -> iptables.Ruleset:
    rules = iptables.Ruleset(NODE)
    nat = layout.nat_chains(wanted, layout.directory(wanted).chains())
    chains = {"filter": layout.filter_chains(wanted, drop_invalid=True), "nat": nat}
    for table, content in chains.items():
        jumps = [f"-I {builtin} -j {ours}" for name, builtin, ours in layout.JUMPS if name == table]
        rules.run(layout.render(table, content, (), jumps))
    return rules


@pytest.mark.parametrize(("source", "to", "port", "wanted"), PACKETS)
@pytest.mark.parametrize("made", [of_nft, of_iptables])
def test_the_model_and_the_plan_say_what_a_reader_would(made, source, to, port, wanted) -> None:  # type: ignore[no-untyped-def]
    packet = Packet(source[0], to, "TCP", port, source[1])
    expected = {end: Fraction(share) for end, share in wanted.items()}
    assert differ(made(PLAN).send(packet), expected) == ""
    assert differ(ends_of(verdict(PLAN, packet, NODE)), expected) == ""


def test_a_wrong_rule_is_noticed() -> None:
    rules = of_nft(PLAN)
    rules.chains["service-cluster"].insert(0, "ip saddr 10.244.1.3 drop")
    assert rules.send(Packet("10.244.1.3", "10.96.0.1", "TCP", 80, "cni0")) == {End("drop"): 1}
    other = of_iptables(PLAN)
    other.tables["nat"]["PYNET-SERVICES"].clear()
    assert other.send(Packet("10.244.1.3", "10.96.0.1", "TCP", 80, "cni0")) == {End("pass"): 1}


def test_what_is_not_known_fails() -> None:
    rules = of_nft(PLAN)
    rules.chains["services"].insert(0, "ip ttl 5 drop")
    with pytest.raises(UnknownRule):
        rules.send(Packet("10.244.1.3", "10.96.0.1", "TCP", 80, "cni0"))
    with pytest.raises(UnknownRule):
        rules.run("rename chain ip pynet-proxy services other\n")
    other = of_iptables(PLAN)
    other.tables["nat"]["PYNET-SERVICES"].insert(0, "-m ttl --ttl 5 -j DROP")
    with pytest.raises(UnknownRule):
        other.send(Packet("10.244.1.3", "10.96.0.1", "TCP", 80, "cni0"))


def test_a_chain_in_use_cannot_be_deleted() -> None:
    with pytest.raises(AssertionError, match="still in use"):
        of_nft(PLAN).run("delete chain ip pynet-proxy service-cluster\n")
    with pytest.raises(AssertionError, match="still used"):
        of_iptables(PLAN).run("*nat\n:PYNET-REJECT - [0:0]\n-X PYNET-REJECT\nCOMMIT\n")
