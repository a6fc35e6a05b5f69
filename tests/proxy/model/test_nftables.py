"""nftables mode's text means what the plan means, after a full sync and after any sequence of changes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.modes.nftables.names import WORDS
from proxy.modes.nftables.script import render
from proxy.modes.nftables.table import Table
from proxy.plan import Family, Plan, verdict
from support.packetmodel.nft import Ruleset
from support.packetmodel.outcomes import differ, ends_of
from support.plans import World, packets_of, servers_of, settings_of

WORLDS = {family: World(family) for family in Family}
quick = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


def fresh(plan: Plan) -> tuple[Table, Ruleset]:
    table = Table(plan.family, plan.settings)
    step = table.start(plan)
    table.commit(step)
    rules = Ruleset(WORDS[plan.family].ip, (*WORLDS[plan.family].node,))
    rules.run(render([(WORDS[plan.family].ip, step.change)], fresh=True).text)
    return table, rules


def check(data: st.DataObject, world: World, plan: Plan, rules: Ruleset) -> None:
    for packet in data.draw(st.lists(packets_of(world), min_size=4, max_size=12)):
        told, wanted = rules.send(packet), ends_of(verdict(plan, packet, world.node))
        assert not differ(told, wanted), f"{packet}\n{differ(told, wanted)}"


@pytest.mark.parametrize("family", list(Family))
@quick
@given(data=st.data())
def test_full_sync_means_the_plan(family: Family, data: st.DataObject) -> None:
    world = WORLDS[family]
    servers = data.draw(servers_of(world))
    plan = Plan(family, data.draw(settings_of(world)), {server.key: server for server in servers})
    _, rules = fresh(plan)
    check(data, world, plan, rules)


@pytest.mark.parametrize("family", list(Family))
@quick
@given(data=st.data())
def test_changes_leave_what_a_full_sync_would(family: Family, data: st.DataObject) -> None:
    world = WORLDS[family]
    around = data.draw(settings_of(world))
    table, rules = fresh(Plan(family, around))
    servers: dict = {}
    for _ in range(data.draw(st.integers(1, 4))):
        wanted = {server.key: server for server in data.draw(servers_of(world))}
        step = table.step({key: wanted.get(key) for key in {**servers, **wanted}})
        rules.run(render([(WORDS[family].ip, step.change)]).text)
        table.commit(step)
        servers = wanted
    plan = Plan(family, around, servers)
    _, anew = fresh(plan)
    assert (rules.chains, rules.declared, rules.elements, rules.hooks) == (
        anew.chains, anew.declared, anew.elements, anew.hooks,
    )  # fmt: skip
    check(data, world, plan, rules)
