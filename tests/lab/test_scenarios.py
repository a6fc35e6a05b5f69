"""The scenarios that `lab check` plays, in labs of every kind: the integration tests of all three programs."""

from __future__ import annotations

import pytest

from netnslab import play, stories

pytestmark = [pytest.mark.root, pytest.mark.lab]

KINDS = {
    "iptables": {},
    "iptables legacy, round robin, dual stack": {"iptables_backend": "legacy", "scheduler": "rr", "ipv6": True},
    "nftables dual stack": {"mode": "nftables", "ipv6": True},
    "userspace": {"mode": "userspace"},
    "ipvs": {"mode": "ipvs"},
    "routed, nftables": {"topology": "routed", "mode": "nftables"},
    "routed, iptables, dual stack": {"topology": "routed", "ipv6": True},
}
PATHS = [name for name in stories.names() if not stories.load(name).changes_nodes]
# the cases of `conformance` are played through the API: test_api.py
CHANGES = [name for name in stories.names() if stories.load(name).changes_nodes and name != "conformance"]


def assert_all_hold(rows: list[play.Row]) -> None:
    wrong = [
        f"{row.scenario}: {row.path}: expected {row.expected}; seen {row.seen}; {row.wrong}"
        for row in rows
        if not row.ok
    ]
    assert rows
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_holds(make_lab, kind):
    lab = make_lab(**KINDS[kind])
    fitting = [name for name in PATHS if play.fits(lab, stories.load(name))]
    assert_all_hold(play.play_all(lab, fitting))


@pytest.mark.parametrize("name", CHANGES)
def test_what_happens_to_nodes(make_lab, name):
    scenario = stories.load(name)
    lab = make_lab(scenario.nodes, topology=scenario.topology or "flat")
    assert_all_hold(play.play_all(lab, [name]))
