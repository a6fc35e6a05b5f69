"""A path of traffic: who asks whom, who should answer, which source address the answering pod should have seen. Pure.

`Path` is what a scenario's file says; `expectation` turns it into addresses with what is known of the lab; `judge`
compares that with what came back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from .agents import Answer

AT_ONCE_MS = 500.0  # a refusal that takes longer is not "at once"
OUTCOMES = {  # what a connection may come to, by the outcome expected
    "ok": {"ok"},
    "refused": {"refused"},
    "unreachable": {"unreachable"},
    "lost": {"timeout", "unreachable"},  # the latter when the neighbour is known to be gone
}
SIGMAS = 5.0  # how far chance may carry an even spread: once in 1.7 million checks


class BadScenario(ValueError):
    """A scenario that cannot be played; the message names the place."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a path leads: one of `pod`, `service`, `machine` (the client or a node), `address`.

    `port`: PROTO:NUMBER, of a Service the name or number of its port. `service`: its cluster IP, or with `node` its
    node port there, or with `external` its load-balancer address.
    """

    port: str | int
    pod: str = ""
    service: str = ""
    machine: str = ""
    address: str = ""
    node: str = ""
    external: bool = False


class Expect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What should come of it.

    `backends`: pods, or a Deployment's name for all of its pods, or `client`; each of them must have answered, nobody
    else. `source`: `own`: the asker's address; `node`: the address with which the node that forwarded reaches the
    backend. `outcome`: ok, refused (at once), unreachable (the same, by a router's word), lost (no answer at all).
    """

    backends: tuple[str, ...] = ()
    source: Literal["own", "node", "any"] = "own"
    outcome: Literal["ok", "refused", "unreachable", "lost"] = "ok"
    even: bool = False
    one: bool = False  # all answers from one and the same of the backends


class Path(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"origin": "from", "target": "to"}):
    """One path of a scenario: `count` connections from `origin` to `target`."""

    path: str
    origin: str
    target: Target
    expect: Expect
    count: int = 1


class Place(msgspec.Struct, frozen=True):
    """A machine or pod that can be met: its name, its node (empty: outside), and addresses in one family.

    `from_node`: the address with which its own node reaches it (the bridge's); empty for what is no pod.
    """

    name: str
    node: str
    address: str
    from_node: str = ""


class Wanted(msgspec.Struct, frozen=True):
    """An expectation in addresses: which source address each backend should have seen (None: any)."""

    outcome: str
    sources: dict[str, str | None]
    even: bool = False
    one: bool = False


def expectation(
    path: Path,
    origin: Place,
    backends: Sequence[Place],
    leaving: Callable[[str, str], str],
    *,
    via: str,
    keeps_source: bool = True,
) -> Wanted:
    """Return what should come of a path.

    `leaving`: the address with which one node (by name) sends to pods of another, or to the outside (no name);
    `via`: the node that the traffic enters by; `keeps_source`: false in a mode that opens connections of its own.
    """
    sources: dict[str, str | None] = {}
    through_proxy = bool(path.target.service) and not keeps_source
    for backend in backends:
        if path.expect.source == "any":
            sources[backend.name] = None
        elif path.expect.source == "own" and not through_proxy:
            sources[backend.name] = origin.address
        elif backend.node == via and backend.from_node:
            sources[backend.name] = backend.from_node
        else:
            sources[backend.name] = leaving(via, backend.node)
    return Wanted(path.expect.outcome, sources, path.expect.even, path.expect.one)


class Seen(msgspec.Struct, frozen=True):
    """What came back: how often each outcome, each backend; which sources each backend saw; the slowest answer."""

    outcomes: dict[str, int]
    backends: dict[str, int]
    sources: dict[str, tuple[str, ...]]
    slowest: float


def seen(answers: Sequence[Answer]) -> Seen:
    """Return a summary of answers."""
    good = [answer for answer in answers if answer.outcome == "ok"]
    sources: dict[str, set[str]] = {}
    for answer in good:
        sources.setdefault(answer.pod, set()).add(answer.source_address)
    return Seen(
        dict(Counter(answer.outcome for answer in answers)),
        dict(sorted(Counter(answer.pod for answer in good).items())),
        {pod: tuple(sorted(found)) for pod, found in sources.items()},
        max((answer.milliseconds for answer in answers), default=0.0),
    )


def judge(wanted: Wanted, found: Seen) -> str:
    """Return what is wrong; empty: nothing."""
    if not found.outcomes or not set(found.outcomes) <= OUTCOMES[wanted.outcome]:
        return f"expected {wanted.outcome}, got {_counts(found.outcomes) or 'nothing'}"
    if wanted.outcome in ("refused", "unreachable") and found.slowest > AT_ONCE_MS:
        return f"{wanted.outcome} only after {found.slowest:.0f} ms"
    if wanted.outcome != "ok":
        return ""
    strangers = set(found.backends) - set(wanted.sources)
    if strangers:
        return f"{', '.join(sorted(strangers))} should not have answered"
    silent = set(wanted.sources) - set(found.backends)
    if wanted.one and len(found.backends) != 1:
        return f"expected one and the same backend, got {_counts(found.backends)}"
    if silent and not wanted.one:
        return f"{', '.join(sorted(silent))} never answered"
    for pod, sources in found.sources.items():
        expected = wanted.sources[pod]
        if expected is not None and sources != (expected,):
            return f"{pod} saw {', '.join(sources)}, expected {expected}"
    return uneven(found.backends) if wanted.even else ""


def uneven(counts: Mapping[str, int]) -> str:
    """Return how a spread differs from an even one by more than chance allows; empty: it does not."""
    total, share = sum(counts.values()), 1 / len(counts)
    allowed = SIGMAS * math.sqrt(total * share * (1 - share))
    for pod, count in counts.items():
        if abs(count - total * share) > allowed:
            return f"{pod} got {count} of {total}; {total * share:.0f} ± {allowed:.0f} is what chance allows"
    return ""


def describe_wanted(wanted: Wanted) -> str:
    """Return an expectation in words: backends by the source they should see."""
    if wanted.outcome != "ok":
        return {"lost": "no answer"}.get(wanted.outcome, f"{wanted.outcome} at once")
    by_source: dict[str | None, list[str]] = {}
    for pod, source in wanted.sources.items():
        by_source.setdefault(source, []).append(pod)
    words = "; ".join(
        f"{', '.join(pods)} sees {source}" if source else ", ".join(pods) for source, pods in by_source.items()
    )
    return words + (", evenly" if wanted.even else "") + (", always the same" if wanted.one else "")


def describe_seen(found: Seen) -> str:
    """Return what came back in words."""
    bad = {outcome: count for outcome, count in found.outcomes.items() if outcome != "ok"}
    words = [f"{_counts(bad)} ({found.slowest:.0f} ms)"] if bad else []
    by_source: dict[str, list[str]] = {}
    for pod, count in found.backends.items():
        label = f"{pod} ×{count}" if count > 1 else pod
        by_source.setdefault(", ".join(found.sources[pod]), []).append(label)
    words += [f"{', '.join(pods)} saw {source}" for source, pods in by_source.items()]
    return "; ".join(words)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts.items())
