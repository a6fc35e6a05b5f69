"""`lab check`: scenarios played in a lab, and the table of what was expected and what the pods saw."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.markup import escape
from rich.table import Table

from . import agents, machine, pods, stories, workloads
from .cluster import Lab
from .commands import change, parser
from .paths import (
    BadScenario,
    Path,
    Place,
    Seen,
    Target,
    Wanted,
    describe_seen,
    describe_wanted,
    expectation,
    judge,
    seen,
)
from .progress import err, out, step
from .state import LabError, PodRecord, key_of
from .stories import NAMESPACE, Case, Do, Flow, FlowEnd, Put, Remove, Scenario

TIMEOUT = 2.0 * machine.SLOWNESS  # seconds that one connection may take
# the same at the first try, when a change may not have taken effect yet; doubled at each further
FIRST_TIMEOUT = 0.25 * machine.SLOWNESS
ANSWERED = 1.0 * machine.SLOWNESS  # seconds since the last answer, for a flow that is said to be answered
PAUSE = 0.03 * machine.SLOWNESS  # seconds between tries while a change takes effect


class Row(msgspec.Struct, frozen=True):
    """One line of the table. `wrong`: why it is not ok; `took`: seconds until it held; `case`: what it is a part of."""

    scenario: str
    path: str
    expected: str
    seen: str
    ok: bool
    wrong: str = ""
    took: float = 0.0
    case: str = ""


class Stage:
    """What is known of a lab at one moment: looked up once for a batch of paths."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pods = {pod.key: pod for pod in lab.pods()}
        self.nodes = {node.name: node for node in lab.spec.nodes}

    def pod(self, name: str) -> PodRecord | None:
        """Return a pod by its name in the scenarios' namespace, or by its key."""
        return self.pods.get(key_of(NAMESPACE, name)) or self.pods.get(name)

    def agent(self, name: str) -> str:
        """Return what the agent of a pod, a node (name or number) or the client is called."""
        pod = self.pod(name)
        if pod:
            return pod.key
        return name if name == "client" else self.lab.node(name).name

    def place(self, name: str, family: str) -> Place:
        """Return a pod, node or the client, with its address in a family."""
        pod = self.pod(name)
        if pod:
            if family not in pod.addresses:
                raise BadScenario(f"pod {name} has no {family} address")
            return Place(pod.key, pod.node, pod.addresses[family], _gateway(pod, family))
        if name == "client":
            return Place("client", "", self.lab.client_addresses()[family])
        node = self.lab.node(name)
        return Place(node.name, node.name, node.addresses[family])

    def backends(self, names: Sequence[str], family: str) -> list[Place]:
        """Return the places that names mean: a Deployment stands for its pods."""
        found = []
        for name in names:
            owned = self._owned(key_of(NAMESPACE, name)) or self._owned(name)
            if name != "client" and not self.pod(name) and not owned:
                raise BadScenario(f"no pod or Deployment {name!r}")
            found += [self.place(pod.key, family) for pod in owned] if owned else [self.place(name, family)]
        return found

    def _owned(self, deployment: str) -> list[PodRecord]:
        return [pod for pod in self.pods.values() if pod.owner == deployment]

    def leaving(self, via: str, to: str, family: str) -> str:
        """Return the address with which a node sends to pods of node `to`: through the overlay it has its own."""
        node = self.nodes[via]
        if not to or self.nodes[to].subnet == node.subnet:
            return node.addresses[family]
        cidr = next(cidr for cidr in node.pod_cidrs if (":" in cidr) == (family == "IPv6"))
        return cidr.split("/")[0]

    def find(self, target: Target, family: str) -> tuple[str, str, int]:
        """Return protocol, address and port of a target."""
        if target.service:
            return self._service(target, family)
        protocol, _, port = str(target.port).partition(":")
        if target.address:
            return protocol, target.address, int(port)
        place = self.place(target.pod or target.machine, family)
        return protocol, place.address, int(port)

    def _service(self, target: Target, family: str) -> tuple[str, str, int]:
        service = self.lab.service(key_of(NAMESPACE, target.service))
        spec = service["spec"]
        port = next((port for port in spec["ports"] if target.port in (port.get("name"), port["port"])), None)
        if port is None:
            raise BadScenario(f"Service {target.service} has no port {target.port!r}")
        protocol = port["protocol"].lower()
        if target.node:
            return protocol, self.place(target.node, family).address, port["nodePort"]
        if target.external:
            ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
            addresses = [*(each["ip"] for each in ingress), *(spec.get("externalIPs") or ())]
        else:
            addresses = spec["clusterIPs"]
        address = next((each for each in addresses if (":" in each) == (family == "IPv6")), None)
        if address is None:
            raise BadScenario(f"Service {target.service} has no {family} address of that kind")
        return protocol, address, port["port"]


def _gateway(pod: PodRecord, family: str) -> str:
    for each in (pod.attachment.result if pod.attachment else {}).get("ips", ()):
        if (":" in each["address"]) == (family == "IPv6"):
            return str(each.get("gateway", ""))
    return ""


def play_all(lab: Lab, chosen: Sequence[str], *, keep: bool = False, quiet: bool = False) -> list[Row]:
    """Play scenarios (by name, or all that fit the lab and leave its nodes alone); print the table; return its rows."""
    try:
        found = stories.load_all(chosen)
    except BadScenario as error:
        raise LabError(str(error)) from None
    fitting = [each for each in found if fits(lab, each) and (chosen or not each.changes_nodes)]
    for scenario in found:
        if chosen and scenario not in fitting:
            raise LabError(f"scenario {scenario.name} does not fit this lab: {needs(scenario)}")
    rows: list[Row] = []
    begin = time.monotonic()
    try:
        for scenario in fitting:
            with step(f"scenario {scenario.name}: {scenario.about}"):
                rows += play(lab, scenario)
    finally:
        if not keep:
            with step("removing what the scenarios made"):
                clean(lab)
    if not quiet:
        show(rows, time.monotonic() - begin)
    return rows


def fits(lab: Lab, scenario: Scenario) -> bool:
    """Return whether a lab has what a scenario needs."""
    spec = lab.spec
    return scenario.fits(topology=spec.topology, nodes=len(spec.nodes), ipv6=spec.ipv6, mode=spec.mode)


def needs(scenario: Scenario) -> str:
    """Return what a scenario needs, in words."""
    parts = [f"at least {scenario.nodes} nodes"]
    parts += [f"topology {scenario.topology}"] if scenario.topology else []
    parts += ["--ipv6"] if scenario.ipv6 else []
    parts += [f"mode {' or '.join(scenario.modes)}"] if scenario.modes else []
    return "it needs " + ", ".join(parts)


def clean(lab: Lab) -> None:
    """Remove everything in the scenarios' namespace."""
    for identity in lab.objects():
        if identity[1] == NAMESPACE:
            lab.drop(identity)
    for deployment in lab.folder.read_deployments():
        if deployment.namespace == NAMESPACE:
            lab.folder.forget_deployment(deployment.key)
    pods.remove_all(lab, [pod for pod in lab.pods() if pod.namespace == NAMESPACE])


def play(lab: Lab, scenario: Scenario) -> list[Row]:
    """Play one scenario; return its rows. Every step is played, whatever became of those before it."""
    workloads.apply(lab, list(scenario.manifests))
    rows: list[Row] = []
    case = ""
    for batch in stories.batches(scenario.steps):
        first = batch[0]
        before = len(rows)
        if isinstance(first, Case):
            case = first.case
        elif isinstance(first, Do):
            rows += _do(lab, scenario, first)
        elif isinstance(first, Put):
            workloads.apply(lab, first.apply)
            lab.sync()
        elif isinstance(first, Remove):
            workloads.delete(lab, first.delete)
        elif isinstance(first, Flow):
            _begin(lab, first)
        elif isinstance(first, FlowEnd):
            rows.append(_end(lab, scenario, first))
        else:
            rows += _try_paths(lab, scenario, [path for path in batch if isinstance(path, Path)])
        rows[before:] = [msgspec.structs.replace(row, case=case) for row in rows[before:]]
    return rows


def passed(rows: Sequence[Row]) -> dict[str, bool]:
    """Return the cases that were played, in their order, and whether each holds."""
    found: dict[str, bool] = {}
    for row in rows:
        if row.case:
            found[row.case] = found.get(row.case, True) and row.ok
    return found


def _do(lab: Lab, scenario: Scenario, given: Do) -> list[Row]:
    words = [NAMESPACE + "." + word[1:] if word.startswith("@") else word for word in shlex.split(given.do)]
    try:
        with out.capture():
            change(lab, parser().parse_args([*words, "--name", lab.spec.name]))
    except LabError as error:
        if not given.fails:
            raise
        return [Row(scenario.name, given.do, "refused by the lab", str(error), True)]
    return []


def _begin(lab: Lab, flow: Flow) -> None:
    stage = Stage(lab)
    protocol, address, port = stage.find(flow.target, lab.families[0])
    request = {"operation": "flow_begin", "name": flow.flow, "proto": protocol, "address": address, "port": port}
    agents.ask(lab.folder, stage.agent(flow.origin), request)
    _flows[flow.flow] = stage.agent(flow.origin)


_flows: dict[str, str] = {}  # name → the agent that keeps it


def _end(lab: Lab, scenario: Scenario, given: FlowEnd) -> Row:
    agent = _flows.pop(given.flow_end)
    deadline = time.monotonic() + (scenario.within * machine.SLOWNESS if given.answered else 0)
    look = {"operation": "flow_look", "name": given.flow_end}
    while time.monotonic() < deadline and agents.ask(lab.folder, agent, look)["silence"] > ANSWERED / 2:
        time.sleep(PAUSE)
    reply = agents.ask(lab.folder, agent, {"operation": "flow_end", "name": given.flow_end})
    expected = f"at most {given.lost} lost" if given.lost else "none lost"
    found = f"{reply['lost']} of {reply['sent']} lost, longest silence {reply['longest'] * 1000:.0f} ms"
    if given.answered:
        good = not reply["broken"] and reply["silence"] < ANSWERED
        shown = f"{found}, last answer {reply['silence'] * 1000:.0f} ms ago"
        return Row(scenario.name, given.path, "answered at the end", shown, good, "" if good else "it is stuck")
    if given.broken:  # whether it broke was a matter of chance
        return Row(scenario.name, given.path, "goes on or breaks", reply["broken"] or found, True)
    wrong = reply["broken"]
    if not wrong and reply["sent"] == 0:
        wrong = "nothing was sent"
    if not wrong and reply["lost"] > given.lost:
        wrong = f"{reply['lost']} messages lost"
    if not wrong and given.longest and reply["longest"] > given.longest * machine.SLOWNESS:
        wrong = f"{reply['longest']:.1f} s without an answer"
    return Row(scenario.name, given.path, expected, found + (f"; {wrong}" if wrong else ""), not wrong, wrong)


def _try_paths(lab: Lab, scenario: Scenario, paths: Sequence[Path]) -> list[Row]:
    stage = Stage(lab)
    jobs = [(path, family) for path in paths for family in lab.families if _has(path.target, family)]

    def attempt(job: tuple[Path, str]) -> Row:
        path, family = job
        begin = time.monotonic()
        deadline = begin + scenario.within * machine.SLOWNESS
        patience = FIRST_TIMEOUT
        held = False
        while True:
            row = _attempt(stage, scenario, path, family, patience)
            if (row.ok and held) or time.monotonic() > deadline:
                return msgspec.structs.replace(row, took=time.monotonic() - begin)
            held = row.ok  # the try in which a change took effect is half of before: another one has to hold wholly
            if not held:
                patience = min(2 * patience, TIMEOUT)
                time.sleep(PAUSE)

    return pods.each_at_once(attempt, jobs, at_once=6)


def _has(target: Target, family: str) -> bool:
    return not target.address or (":" in target.address) == (family == "IPv6")


def _attempt(stage: Stage, scenario: Scenario, path: Path, family: str, timeout: float) -> Row:
    title = path.path if len(stage.lab.families) == 1 else f"{path.path}, {family}"
    try:
        protocol, address, port = stage.find(path.target, family)
        origin = stage.place(path.origin, family)
        wanted: Wanted = expectation(
            path,
            origin,
            stage.backends(path.expect.backends, family),
            lambda via, to: stage.leaving(via, to, family),
            via=stage.lab.node(path.target.node).name if path.target.node else origin.node,
            keeps_source=stage.lab.spec.mode != "userspace",
        )
    except BadScenario as error:
        return Row(scenario.name, title, "", "", False, str(error))
    answers = agents.probe(
        stage.lab.folder, stage.agent(path.origin), protocol, address, port, count=path.count, timeout=timeout
    )
    found: Seen = seen(answers)
    wrong = judge(wanted, found)
    words = (text.replace(f"{NAMESPACE}.", "") for text in (describe_wanted(wanted), describe_seen(found), wrong))
    expected, came, why = words
    return Row(scenario.name, title, expected, came, not wrong, why)


def as_json(row: Row) -> dict[str, Any]:
    """Return a row for programs."""
    return msgspec.structs.asdict(row)


def show(rows: Sequence[Row], seconds: float) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("path", "expected", "seen", "ok"):
        table.add_column(column, overflow="fold")
    scenario = case = ""
    cases = passed(rows)
    for row in rows:
        if row.scenario != scenario:
            scenario = row.scenario
            table.add_row(f"[bold cyan]{escape(scenario)}[/]")
        if row.case != case:
            case = row.case
            table.add_row(f" [bold]{escape(case)}[/]", "", "", "[green]pass[/]" if cases[case] else "[red]fail[/]")
        good = "[green]✓[/]" if row.ok else "[red]✗[/]"
        found = escape(row.seen) + ("" if row.ok else f"\n[red]{escape(row.wrong)}[/]")
        table.add_row(f"  {escape(row.path)}", escape(row.expected), found, good)
    out.print(table)
    bad = [row for row in rows if not row.ok]
    words = f"{len(rows)} paths checked in {seconds:.1f} s: "
    if cases:
        words = f"{sum(cases.values())} of {len(cases)} cases pass; {words}"
    if bad or not rows:
        err.print(f"[red]{words}{len(bad)} wrong[/] (lab logs shows what the daemons say)")
    else:
        out.print(f"[green]{words}all as expected[/]")
