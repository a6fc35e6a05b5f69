"""iptables mode's text means what the plan means, after a full sync and after any sequence of changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.modes.iptables import layout
from proxy.modes.iptables.dispatch import Chains
from proxy.plan import Family, NodeSettings, Plan, verdict
from support.packetmodel.iptables import Ruleset
from support.packetmodel.outcomes import differ, ends_of
from support.plans import World, packets_of, servers_of, settings_of

WORLDS = {family: World(family) for family in Family}
quick = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


def whole(plan: Plan) -> Chains:
    return layout.nat_chains(plan, layout.directory(plan).chains())


def fresh(plan: Plan) -> Ruleset:
    rules = Ruleset(WORLDS[plan.family].node)
    filters = layout.filter_chains(plan, drop_invalid=True)
    for table, chains in (("filter", filters), ("nat", whole(plan))):
        jumps = [f"-I {builtin} -j {ours}" for name, builtin, ours in layout.JUMPS if name == table]
        for part in layout.in_parts(table, chains, (), jumps, 40):
            rules.run(part)
    return rules


def check(data: st.DataObject, world: World, plan: Plan, rules: Ruleset) -> None:
    for packet in data.draw(st.lists(packets_of(world), min_size=4, max_size=12)):
        told, wanted = rules.send(packet), ends_of(verdict(plan, packet, world.node))
        assert not differ(told, wanted), f"{packet}\n{differ(told, wanted)}"


def plan_of(data: st.DataObject, world: World, around: NodeSettings) -> Plan:
    return Plan(world.family, around, {server.key: server for server in data.draw(servers_of(world))})


@pytest.mark.parametrize("family", list(Family))
@quick
@given(data=st.data())
def test_full_sync_means_the_plan(family: Family, data: st.DataObject) -> None:
    world = WORLDS[family]
    plan = plan_of(data, world, data.draw(settings_of(world)))
    check(data, world, plan, fresh(plan))


@pytest.mark.parametrize("family", list(Family))
@quick
@given(data=st.data())
def test_changes_leave_what_a_full_sync_would(family: Family, data: st.DataObject) -> None:
    world = WORLDS[family]
    plan = Plan(family, data.draw(settings_of(world)))
    rules = fresh(plan)
    directory = layout.directory(plan)
    for _ in range(data.draw(st.integers(1, 4))):
        then = plan_of(data, world, plan.settings)
        before, after = whole(plan), whole(then)
        assert change(directory, plan, then, before) == after
        differing = {name: lines for name, lines in after.items() if before.get(name) != lines}
        gone = [name for name in before if name not in after]
        for part in layout.in_parts("nat", differing, gone, (), 40):
            rules.run(part)
        plan = then
    assert rules.tables == fresh(plan).tables
    check(data, world, plan, rules)


def change(directory: Any, old: Plan, new: Plan, chains: Chains) -> Chains:
    """Return `chains` after the steps that the mode takes for a change: by what is kept, not from the plan anew."""
    around = new.settings
    trees = directory.chains()
    keys = {**old.servers, **new.servers}
    before: Chains = {}
    after: Chains = {}
    for key in keys:
        was, now = old.servers.get(key), new.servers.get(key)
        before |= layout.server_chains(was, around) if was else {}
        after |= layout.server_chains(now, around) if now else {}
    for key in keys:
        directory.remove(*layout.entrances(old.servers.get(key), around))
    for key in keys:
        directory.add(*layout.entrances(new.servers.get(key), around))
    kept = {name: rules for name, rules in chains.items() if name not in before and name not in trees}
    return kept | after | directory.chains()
