"""What may become of a packet, with probabilities: the word in which rule text and `verdict` are compared."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import NamedTuple

from proxy.plan import Outcome, OutcomeKind


class UnknownRule(AssertionError):
    """Rule text that the model cannot read."""


class End(NamedTuple):
    """One end of a packet's way. `kind`: pass, forward, reject or drop; `to`: address and port of an endpoint."""

    kind: str
    to: tuple[str, int] | None = None
    masquerade: bool = False


Ends = dict[End, Fraction]


def ends_of(outcome: Outcome) -> Ends:
    """Return what the plan says, in the model's words; the probabilities as fractions."""
    if outcome.kind is not OutcomeKind.FORWARD:
        return {End(outcome.kind.value): Fraction(1)}
    found: defaultdict[End, Fraction] = defaultdict(Fraction)
    for choice in outcome.choices:
        end = End("forward", (choice.endpoint.address, choice.endpoint.port), choice.masquerade)
        found[end] += Fraction(choice.probability).limit_denominator(1_000_000)
    return dict(found)


def differ(told: Ends, wanted: Ends) -> str:
    """Return how two answers differ, empty if they agree (probabilities to a hundred-thousandth)."""
    lines = []
    for end in sorted({*told, *wanted}, key=repr):
        one, other = told.get(end, Fraction(0)), wanted.get(end, Fraction(0))
        if abs(one - other) > Fraction(1, 100_000):
            lines.append(f"{end}: rules {float(one):.6f}, plan {float(other):.6f}")
    return "\n".join(lines)
