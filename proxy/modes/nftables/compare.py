"""What the kernel holds of a table against what it should hold → the change that repairs it, a line for each find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

from proxy.modes.nftables.base import MARKER, Layout
from proxy.modes.nftables.names import WORDS
from proxy.modes.nftables.script import Change, is_base
from proxy.modes.nftables.table import Table
from proxy.modes.nftables.wire import decode
from proxy.plan import ServerKey
from pynet.kernel.nfnetlink import Element

Rules = dict[str, tuple[bytes, ...]]
Found = tuple[ServerKey | None, str]


class Observed(msgspec.Struct):
    """One table as read from the kernel. `chains`: name → its hook, empty for all but base chains."""

    sets: dict[str, bytes]
    chains: dict[str, bytes]
    rules: Rules
    elements: dict[str, list[Element]]


class Comparison(msgspec.Struct):
    """`change` repairs; `found` says what; `foreign`: no change can: the table must be made anew."""

    change: Change
    found: list[Found]
    foreign: bool = False


def is_packets_own(name: str) -> bool:
    """Whether packets fill a set, and not we."""
    return name.startswith("sticky-") or name.endswith("-counts")


def wanted_of(table: Table) -> tuple[Layout, dict[str, dict[str, ServerKey | None]], dict[str, ServerKey | None]]:
    """Return the whole layout of a table, who owns which element, and who owns which chain or map."""
    whole = Layout()
    owners: dict[str, dict[str, ServerKey | None]] = {}
    of_objects: dict[str, ServerKey | None] = {}
    uses: Counter[str] = Counter()
    for key, part in table.layouts():
        whole.sets.update(part.sets)
        whole.chains.update(part.chains)
        whole.live.update(part.live)
        uses.update(part.chains.keys())
        of_objects.update(dict.fromkeys((*part.sets, *part.chains), key))
        for name, elements in part.elements.items():
            whole.elements.setdefault(name, {}).update(elements)
            owners.setdefault(name, {}).update(dict.fromkeys(elements, key))
    return whole, owners, {name: key if uses[name] < 2 else None for name, key in of_objects.items()}


def compare(table: Table, observed: Observed, known: Mapping[str, tuple[bytes, ...]] | None) -> Comparison:
    """Compare. `known`: how the kernel showed the rules when we had written them; None: write all of them again."""
    whole, owners, of_objects = wanted_of(table)
    result = Comparison(Change(), [])
    _objects(result, whole, observed, known, of_objects)
    dropped = {*result.change.old_sets}
    for name in whole.sets:
        if is_packets_own(name) or name in dropped:
            continue
        _elements(result, table, name, whole.elements.get(name, {}), owners.get(name, {}), observed)
    return result


def _objects(
    result: Comparison,
    whole: Layout,
    observed: Observed,
    known: Mapping[str, tuple[bytes, ...]] | None,
    owners: Mapping[str, ServerKey | None],
) -> None:
    change = result.change
    for name, declaration in whole.sets.items():
        if name not in observed.sets:
            change.new_sets[name] = declaration
            result.found.append((owners.get(name), f"{declaration.split()[0]} {name} is missing"))
            result.foreign = result.foreign or name.startswith(MARKER)
    for name in observed.sets:
        if name not in whole.sets:
            change.old_sets.append(name)
            result.found.append((None, f"set {name} is not ours or no longer in use"))
            result.foreign = result.foreign or not name.startswith(("sticky-", "turn-"))
    for name, rules in whole.chains.items():
        if name not in observed.chains:
            change.new_chains[name] = rules
            result.found.append((owners.get(name), f"chain {name} is missing"))
        elif bool(observed.chains[name]) != is_base(rules):
            result.foreign = True
            result.found.append((owners.get(name), f"chain {name} has lost its hook, or has one that it should not"))
        elif known is None or known.get(name) != observed.rules.get(name, ()):
            change.new_chains[name] = rules
            if known is not None:
                result.found.append((owners.get(name), f"chain {name} has other rules"))
    for name in observed.chains:
        if name not in whole.chains:
            change.old_chains.append(name)
            result.found.append((None, f"chain {name} is not ours or no longer in use"))


def _elements(
    result: Comparison,
    table: Table,
    name: str,
    wanted: dict[str, str],
    owners: Mapping[str, ServerKey | None],
    observed: Observed,
) -> None:
    missing = dict(wanted)
    gone: list[Found] = []
    for key, value in decode(WORDS[table.family], name, observed.elements.get(name, [])):
        if missing.get(key) == value:
            del missing[key]
            continue
        owner = owners.get(key)
        gone.append((owner, key))
        what = f"is {value}" if key in wanted else "should not be there"
        result.found.append((owner, f"element {key} of {name} {what}"))
        if key not in wanted:
            missing.pop(key, None)
    if gone:
        result.change.old_elements[name] = gone
    come = [(owners.get(key), f"{key} : {value}" if value else key) for key, value in missing.items()]
    if come:
        result.change.new_elements[name] = come
        replaced = {key for _, key in gone}
        result.found += [
            (owners.get(key), f"element {key} of {name} is missing") for key in missing if key not in replaced
        ]
