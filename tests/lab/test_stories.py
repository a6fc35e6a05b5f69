"""The scenarios' files: all of them can be read, and a bad one is refused where it is bad."""

from __future__ import annotations

import shlex

import pytest

from netnslab import commands, play, stories, workloads
from netnslab.paths import BadScenario, Path
from netnslab.stories import Do, Flow, FlowEnd, Scenario


@pytest.mark.parametrize("name", stories.names())
def test_every_scenario_is_read_and_every_word_of_it_understood(name):
    scenario = stories.load(name)
    assert scenario.about
    assert scenario.steps
    assert [each for manifest in scenario.manifests for each in workloads.flatten(manifest, name)]
    for step in scenario.steps:
        if isinstance(step, Do):
            commands.parser().parse_args(shlex.split(step.do))
    begun = {step.flow for step in scenario.steps if isinstance(step, Flow)}
    assert begun == {step.flow_end for step in scenario.steps if isinstance(step, FlowEnd)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("about: x\nstories: []", "unknown field 'stories'"),
        ("steps: [{walk: there}]", r"steps\[0\]: expected one of"),
        ("steps: [{path: x, from: a, to: {port: 80}, expect: {}, often: 3}]", r"steps\[0\]: .*often"),
        ("steps: [{path: x, from: a, to: {port: 80}, expect: {source: mine}}]", r"steps\[0\]: .*source"),
        ("topology: ring", "topology: no topology 'ring'"),
        ("{", "bad"),
    ],
)
def test_a_bad_scenario_is_refused_by_field(text, says):
    with pytest.raises(BadScenario, match=says):
        stories.parse(text, "bad")


def test_paths_next_to_each_other_are_tried_together():
    steps = stories.parse(
        """
steps:
- {path: a, from: x, to: {port: 1}, expect: {}}
- {path: b, from: x, to: {port: 1}, expect: {}}
- {do: scale w 1}
- {path: c, from: x, to: {port: 1}, expect: {}}
""",
        "s",
    ).steps
    shapes = [[each.path if isinstance(each, Path) else "do" for each in batch] for batch in stories.batches(steps)]
    assert shapes == [["a", "b"], ["do"], ["c"]]


@pytest.mark.parametrize(
    ("needs", "fits"),
    [
        ({}, True),
        ({"topology": "routed"}, False),
        ({"nodes": 3}, False),
        ({"ipv6": True}, False),
        ({"modes": ("ipvs",)}, False),
        ({"modes": ("iptables", "nftables"), "topology": "flat"}, True),
    ],
)
def test_which_lab_a_scenario_fits(needs, fits):
    scenario = Scenario("s", "x", (), (), **needs)
    assert scenario.fits(topology="flat", nodes=2, ipv6=False, mode="iptables") == fits


# The data-path cases of sig-network's Service tests that are asked for, by words that their names have there.
CASES = (
    "basic endpoint",
    "multiport endpoints",
    "named target ports",
    "functioning NodePort",
    "same port and different protocols",
    "hairpin",
    "preserve source pod IP",
    "session affinity work",
    "switch session affinity",
    "from ExternalName to ClusterIP",
    "from ExternalName to NodePort",
    "from ClusterIP to ExternalName",
    "from NodePort to ExternalName",
    "unready pods",
    "fall back to terminating endpoints",
    "internalTrafficPolicy=Local",
    "externalTrafficPolicy=Local",
    "UDP traffic when the server",
    "UDP traffic when initial unready",
    "restarting kube-proxy",
    "restarting apiserver",
    "recreate its rules",
    "recreated",
    "service-proxy-name",
)


def test_no_case_of_conformance_is_missing() -> None:
    steps = stories.load("conformance").steps
    cases = [step.case for step in steps if isinstance(step, stories.Case)]
    assert [words for words in CASES if not any(words in case for case in cases)] == []
    assert len(cases) == len({*cases})
    # a path before the first case would count for none of them
    assert next(type(step) for step in steps if isinstance(step, stories.Case | Path)) is stories.Case


def test_a_case_passes_when_all_of_its_paths_hold() -> None:
    rows = [play.Row("s", path, "", "", ok, case=case) for path, ok, case in (
        ("1", True, "a"), ("2", False, "a"), ("3", True, "b"), ("4", False, ""),
    )]  # fmt: skip
    assert play.passed(rows) == {"a": False, "b": True}
