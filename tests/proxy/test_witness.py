"""iptables mode on the legacy back end, as python-iptables reads it through libiptc: it shares no code with ours.

What the daemon wrote is compared with the layout's rules, translated word by word into python-iptables' dicts, and
with a few Services' rules written down here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.modes.iptables import layout
from proxy.plan import Family, LocalDetector, LocalKind, NodeSettings
from proxy.planning import build
from pynet.objects import EndpointSlice, Object
from support import witness
from support.netns import Names, Namespace, programs
from support.nodes import write
from support.objects import endpoint, piece, service
from support.waiting import until

pytestmark = pytest.mark.root

HERE, THERE, THIRD = endpoint("10.244.1.2", "n1"), endpoint("10.244.2.2", "n2"), endpoint("10.244.2.3", "n2")
SIX = endpoint("fd00:244:1::2", "n1")
PODS = {Family.V4: "10.244.0.0/16", Family.V6: "fd00:244::/48"}
HTTP = {"name": "http", "port": 80, "nodePort": 30080}
SERVICES: tuple[Object, ...] = (
    service("web", "10.96.0.1", HTTP, type="LoadBalancer", ingress=[{"ip": "203.0.113.2"}],
            externalTrafficPolicy="Local", loadBalancerSourceRanges=["192.0.2.0/24"]),
    service("turn", "10.96.0.2", annotations={"pynet/scheduler": "rr", "pynet/weights": "n1=2"}),
    service("sticky", "10.96.0.3", sessionAffinity="ClientIP"),
    service("none", "10.96.0.4"),
    service("six", "fd00:96::1", HTTP),
    piece("turn", HERE, THERE), piece("sticky", HERE, THERE), piece("six", SIX, kind="IPv6"),
)  # fmt: skip
SHORT = {"-s": "src", "-d": "dst", "-p": "protocol", "-i": "in-interface", "-o": "out-interface"}


def translated(rule: str) -> dict[str, Any]:
    """Return a rule of iptables-save's spelling as python-iptables tells it."""
    found: dict[str, Any] = {}
    here: dict[str, Any] = found
    negated = False
    words = shlex.split(rule)
    while words:
        word = words.pop(0)
        if word == "!":
            negated = True
        elif word == "-m":
            here = found.setdefault(words.pop(0), {})
        elif word == "-j":
            target, here = words.pop(0), {}
            found["target"] = {target: here} if words else target
        elif word in SHORT:
            found[SHORT[word]] = f"{'!' * negated}{words.pop(0)}"
            negated = False
        else:
            value = words.pop(0) if words and not words[0].startswith("-") and words[0] != "!" else ""
            here[word.removeprefix("--")] = ["!", value] if negated else value
            negated = False
    return {key: value for key, value in found.items() if value != {}}


def expected(objects: list[Object], family: Family) -> dict[str, dict[str, witness.Table]]:
    """Return the layout's tables: chains that are ours, and the jumps to them."""
    settings = NodeSettings("n1", LocalDetector(LocalKind.CIDR, (PODS[family],)))
    plan = build(objects, family, settings)
    chains = {
        "nat": layout.nat_chains(plan, layout.directory(plan).chains()),
        "filter": layout.filter_chains(plan, drop_invalid=True),
    }
    for table, builtin, name in layout.JUMPS:
        chains[table][builtin] = [f"-j {name}"]
    return {
        table: {name: [translated(rule) for rule in rules] for name, rules in found.items() if rules}
        for table, found in chains.items()
    }


def seen(node: Namespace, family: Family) -> dict[str, dict[str, witness.Table]]:
    """Return what is in the kernel, without chains that have no rules."""
    return {
        table: {name: found for name, found in chains.items() if found}
        for table, chains in witness.rules(node, ipv6=family is Family.V6).items()
    }


def apply(folder: Path, name: str, *objects: Object) -> None:
    documents = [{"apiVersion": "discovery.k8s.io/v1" if isinstance(each, EndpointSlice) else "v1",
                  **msgspec.to_builtins(each)} for each in objects]  # fmt: skip
    write(folder / f"{name}.yaml", "\n---\n".join(map(json.dumps, documents)))


def balance(nat: dict[str, witness.Table], address: str) -> list[tuple[str, dict[str, str]]]:
    """Follow a cluster IP's rule to its Service port's chain: (destination, how it is chosen) in order."""
    (way,) = (rule["target"] for rule in nat["PYNET-IPS"] if rule.get("dst") == f"{address}/32" and "tcp" in rule)
    return [(rule["target"]["DNAT"]["to-destination"], rule.get("statistic", {})) for rule in nat[way]]


def has_jumps(saved: str) -> bool:
    """Say whether iptables-save's text has all that leads to our chains."""
    return all(f"-A {builtin} -j {name}\n" in saved for _, builtin, name in layout.JUMPS)


@pytest.fixture
def node(netns: Names, tmp_path: Path) -> Iterator[Namespace]:
    """A node with pyproxy in it, on the legacy back end."""
    made = netns("node")
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    apply(manifests, "services", *SERVICES)
    apply(manifests, "web", piece("web", HERE, THERE, THIRD))
    with (tmp_path / "log").open("w") as log:
        daemon = made.start(
            str(programs() / "pyproxy"), "--mode=iptables", "--iptables-backend=legacy", f"--manifests={manifests}",
            "--hostname-override=n1", f"--cluster-cidr={','.join(PODS.values())}", stderr=log,
        )  # fmt: skip
    for program in ("iptables-legacy-save", "ip6tables-legacy-save"):
        until("the jumps, which come last", lambda program=program: has_jumps(made.run(program)))  # type: ignore[misc]
    yield made
    daemon.terminate()
    assert daemon.wait(20) == 0


def random(probability: str) -> dict[str, str]:
    return {"mode": "random", "probability": probability}


def test_the_daemon_s_rules_as_python_iptables_reads_them(node: Namespace, tmp_path: Path) -> None:
    before = [*SERVICES, piece("web", HERE, THERE, THIRD)]
    found = seen(node, Family.V4)
    assert found == expected(before, Family.V4)
    assert seen(node, Family.V6) == expected(before, Family.V6)
    assert balance(found["nat"], "10.96.0.1") == [
        ("10.244.1.2:8080", random("0.33333333349")),  # the kernel's 31 bits of a third, as printed
        ("10.244.2.2:8080", random("0.50000000000")),
        ("10.244.2.3:8080", {}),
    ]
    assert balance(found["nat"], "10.96.0.2") == [
        ("10.244.1.2:8080", {"mode": "nth", "every": "3", "packet": "0"}),
        ("10.244.2.2:8080", {"mode": "nth", "every": "2", "packet": "0"}),
        ("10.244.1.2:8080", {}),
    ]

    # the one destination that only the Service port that changes has
    apply(tmp_path / "manifests", "web", piece("web", HERE, THERE))
    until("the update", lambda: "10.244.2.3:8080" not in node.run("iptables-legacy-save", "-t", "nat"))
    found = seen(node, Family.V4)
    assert balance(found["nat"], "10.96.0.1") == [("10.244.1.2:8080", random("0.50000000000")), ("10.244.2.2:8080", {})]
    assert found == expected([*SERVICES, piece("web", HERE, THERE)], Family.V4)


def test_what_is_not_the_layout_s_is_seen(netns: Names) -> None:
    """The comparison can fail: each chain with one wrong word differs, and no other does."""
    node = netns("node")
    settings = NodeSettings("n1", LocalDetector(LocalKind.CIDR, (PODS[Family.V4],)))
    plan = build([service("web", "10.96.0.1"), piece("web", HERE, THERE, THIRD)], Family.V4, settings)
    chains = layout.nat_chains(plan, layout.directory(plan).chains())
    (own,) = (name for name in chains if name.startswith("PYNET-SVC-"))
    wrong = {
        own: ("probability 0.50", "probability 0.25"),
        "PYNET-IPS": ("--dport 80 ", "--dport 81 "),
        "PYNET-SERVICES": ("! -s 10.244.0.0/16", "-s 10.244.0.0/16"),
        "PYNET-POSTROUTING": ("--random-fully", "--random"),
    }
    written = {name: [rule.replace(*wrong.get(name, ("", ""))) for rule in rules] for name, rules in chains.items()}
    node.run("iptables-legacy-restore", input=layout.render("nat", written))
    found = witness.rules(node)["nat"]
    assert {name for name, rules in chains.items() if found[name] != [translated(rule) for rule in rules]} == set(wrong)
    assert {name: found[name] for name in wrong} == {
        name: [translated(rule) for rule in written[name]] for name in wrong
    }
