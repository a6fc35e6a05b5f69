"""The files of `scenarios/`: read and checked. Pure but for reading them.

A scenario is manifests, and steps. A step is one of: a `path` (see `paths.Path`); `do`: a command of the lab, in its
own words; `apply` and `delete`: manifests; `flow` and `flow-end`: a connection kept in use while the steps between are
done; `case`: the name of the case that the steps after it play. Paths next to each other are tried at once, and again
until they hold or `within` seconds are over: a change may take a moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

import msgspec
import yaml

from . import topology as plan
from .paths import BadScenario, Path, Target

FOLDER = File(__file__).resolve().parent.parent / "scenarios"
NAMESPACE = "check"  # where scenarios' objects live, away from the user's


class Do(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command of the lab."""

    do: str
    fails: bool = False


class Put(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Objects are made or changed, as `lab apply` does."""

    apply: tuple[dict[str, Any], ...]


class Remove(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Objects go, as by `lab delete`."""

    delete: tuple[dict[str, Any], ...]


class Flow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"origin": "from", "target": "to"}):
    """A connection that is used every 20 ms from here on; `flow` is its name."""

    flow: str
    origin: str
    target: Target


class FlowEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A flow ends; of its messages at most `lost` may have got lost, and it must not have broken unless `broken`."""

    flow_end: str
    path: str
    lost: int = 0
    broken: bool = False
    longest: float = 0.0  # seconds without an answer that are allowed; 0: not looked at
    answered: bool = False  # whatever got lost before, at its end it must be answered again


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rows of the steps after this one belong to a case of that name; it passes when all of them hold."""

    case: str


Step = Case | Do | Put | Remove | Flow | FlowEnd | Path


class Scenario(msgspec.Struct, frozen=True):
    """One file. `needs`: what of a lab it needs: `topology`, `nodes` (at least), `ipv6`, `modes`."""

    name: str
    about: str
    manifests: tuple[dict[str, Any], ...]
    steps: tuple[Step, ...]
    topology: str = ""
    nodes: int = 2
    ipv6: bool = False
    modes: tuple[str, ...] = ()
    within: float = 5.0
    changes_nodes: bool = False

    def fits(self, *, topology: str, nodes: int, ipv6: bool, mode: str) -> bool:
        """Return whether a lab has what the scenario needs."""
        return (
            self.topology in ("", topology)
            and nodes >= self.nodes
            and ipv6 >= self.ipv6
            and (not self.modes or mode in self.modes)
        )


def names() -> list[str]:
    """Return the names of all scenarios."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "demo")


def load(name: str) -> Scenario:
    """Return a scenario by name."""
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        raise BadScenario(f"no scenario {name!r}; there are: {', '.join(names())}")
    return parse(path.read_text(), name)


def load_all(chosen: Sequence[str] = ()) -> list[Scenario]:
    """Return the scenarios of those names, or all."""
    return [load(name) for name in chosen or names()]


FIELDS = {"about", "manifests", "steps", "topology", "nodes", "ipv6", "modes", "within", "changes-nodes"}


def parse(text: str, name: str) -> Scenario:
    """Return the scenario that a file's text describes."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadScenario(f"{name}: {error}") from None
    if not isinstance(raw, Mapping) or set(raw) - FIELDS:
        unknown = ", ".join(sorted(set(raw or ()) - FIELDS))
        raise BadScenario(f"{name}: unknown field {unknown or raw!r}; there are {', '.join(sorted(FIELDS))}")
    steps = tuple(_step(each, f"{name}: steps[{index}]") for index, each in enumerate(raw.get("steps") or ()))
    if raw.get("topology", "") not in ("", *plan.names()):
        raise BadScenario(f"{name}: topology: no topology {raw['topology']!r}")
    return Scenario(
        name,
        raw.get("about", ""),
        tuple(_placed(each) for each in raw.get("manifests") or ()),
        steps,
        raw.get("topology", ""),
        raw.get("nodes", 2),
        raw.get("ipv6", False),
        tuple(raw.get("modes") or ()),
        raw.get("within", 5.0),
        raw.get("changes-nodes", False),
    )


def _placed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest in the scenarios' namespace."""
    return {**manifest, "metadata": {"namespace": NAMESPACE, **manifest["metadata"]}}


def _step(raw: Any, where: str) -> Step:
    kinds: dict[str, type[Step]] = {
        "case": Case, "do": Do, "apply": Put, "delete": Remove, "flow": Flow, "flow-end": FlowEnd, "path": Path,
    }  # fmt: skip
    for field, kind in kinds.items():
        if isinstance(raw, Mapping) and field in raw:
            try:
                step = msgspec.convert(raw, kind)
                if isinstance(step, Put):
                    return Put(tuple(_placed(each) for each in step.apply))
                return Remove(tuple(_placed(each) for each in step.delete)) if isinstance(step, Remove) else step
            except msgspec.ValidationError as error:
                raise BadScenario(f"{where}: {error}") from None
    raise BadScenario(f"{where}: expected one of {', '.join(kinds)}, found {raw!r}")


def batches(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps, paths next to each other together."""
    found: list[list[Step]] = []
    for step in steps:
        if isinstance(step, Path) and found and isinstance(found[-1][0], Path):
            found[-1].append(step)
        else:
            found.append([step])
    return found
