"""Nodes that come, go, change name or address, lose their cable, have a daemon restarted: while traffic runs."""

from __future__ import annotations

import json
import shutil
import time

import msgspec

from . import agents, daemons, lifecycle, machine, network, pods, runtime
from . import topology as plan
from .cluster import Lab, free_index, node_record
from .state import THING, LabError, NodeRecord


def add(lab: Lab, name: str = "", index: int = 0) -> NodeRecord:
    """Add a node: the lowest free index, unless told."""
    index = index or free_index(lab.spec.nodes)
    node = node_record(lab.folder, lab.topology, lab.spec.ipv6, index, name)
    taken = {each.name for each in lab.spec.nodes} | {pod.key for pod in lab.pods()} | set(pods.RESERVED)
    if node.name in taken or not THING.fullmatch(node.name):
        raise LabError(f"node {node.name!r}: that name is taken or not made of a-z, 0-9, '-' and '.'")
    lab.save(nodes=tuple(sorted((*lab.spec.nodes, node), key=lambda each: each.index)))
    network.attach_node(lab.folder, lab.topology, node)
    lifecycle.start_nodes(lab, [node])
    return node


def remove(lab: Lab, name: str) -> NodeRecord:
    """Remove a node as a machine that is switched off: its pods go with it."""
    node = lab.node(name)
    lost = [pod for pod in lab.pods() if pod.node == node.name]
    network.remove_node(node)
    for pod in lost:
        machine.end(machine.processes_in(pod.netns))
        machine.delete_namespace(pod.netns)
        lab.folder.forget_pod(pod)
    lab.drop(("Node", "", node.name))
    lab.save(nodes=tuple(each for each in lab.spec.nodes if each != node))
    lab.sync()
    shutil.rmtree(lab.folder.node(node.netns), ignore_errors=True)
    (lab.folder.agents / f"{node.name}.sock").unlink(missing_ok=True)
    return node


def _replace(lab: Lab, old: NodeRecord, new: NodeRecord) -> None:
    lab.save(nodes=tuple(new if each == old else each for each in lab.spec.nodes))


def rename(lab: Lab, name: str, new_name: str) -> NodeRecord:
    """Give a node another name: the old Node object goes, its daemons start again under the new name, its pods stay."""
    node = lab.node(name)
    if not THING.fullmatch(new_name) or new_name in {each.name for each in lab.spec.nodes} | set(pods.RESERVED):
        raise LabError(f"node rename {name} {new_name}: that name is taken or not made of a-z, 0-9, '-' and '.'")
    renamed = msgspec.structs.replace(node, name=new_name)
    _replace(lab, node, renamed)
    for program in daemons.PROGRAMS:
        daemons.stop(lab.folder, node, program)
    (lab.folder.agents / f"{node.name}.sock").rename(lab.folder.agents / f"{new_name}.sock")
    for pod in lab.pods():
        if pod.node == node.name:
            lab.folder.write_pod(msgspec.structs.replace(pod, node=new_name))
    lab.drop(("Node", "", node.name))
    lab.put_node(renamed)
    lab.sync()
    for program in daemons.PROGRAMS:
        daemons.start(lab.folder, lab.spec, renamed, program)
    for program in daemons.PROGRAMS:
        daemons.wait(lab.folder, lab.spec, renamed, program)
    return renamed


def readdress(lab: Lab, name: str, addresses: list[str]) -> NodeRecord:
    """Give a node other underlay addresses; families not named keep theirs."""
    node = lab.node(name)
    given: dict[str, str] = {}
    try:
        for word in addresses:
            given |= plan.addresses_named(lab.topology, node.subnet, word, lab.spec.ipv6)
    except plan.TopologyError as error:
        raise LabError(f"node address {name}: {error}") from None
    for other in lab.spec.nodes:
        if other != node and (taken := set(given.values()) & set(other.addresses.values())):
            raise LabError(f"node address {name}: {', '.join(sorted(taken))} is {other.name}'s")
    changed = msgspec.structs.replace(node, addresses={**node.addresses, **given})
    network.readdress(lab.folder, lab.topology, node, changed.addresses)
    _replace(lab, node, changed)
    lab.put_node(changed)
    lifecycle.route_load_balancers(lab)
    return changed


def recidr(lab: Lab, name: str, index: int) -> NodeRecord:
    """Give a node the pod CIDRs of another index; its pods, wired from the old ones, must be made anew."""
    node = lab.node(name)
    changed = msgspec.structs.replace(node, pod_cidrs=plan.pod_cidrs(lab.topology, index, lab.spec.ipv6))
    _replace(lab, node, changed)
    lab.put_node(changed)
    place = lab.folder.node(node.netns) / "cni"
    deadline = time.monotonic() + 10
    while changed.pod_cidrs[0] not in json.dumps(runtime.load_conflist(place)):
        if time.monotonic() > deadline:
            log = daemons.tail(daemons.log_path(lab.folder, changed, "pynetd"))
            raise LabError(f"pynetd of {node.name} does not write a network for {changed.pod_cidrs[0]}", log=log)
        time.sleep(0.02)
    return changed


def connect(lab: Lab, name: str, up: bool) -> NodeRecord:
    """Plug a node's cable in, or pull it: a partition."""
    node = lab.node(name)
    network.connect(lab.folder, node, up)
    return node


def restart(lab: Lab, name: str, program: str = "", *, kill: bool = False) -> NodeRecord:
    """Start a node's daemons (or one of them) again, after ending them orderly or as a crash does."""
    node = lab.node(name)
    chosen = [each for each in daemons.PROGRAMS if program in ("", each)]
    if not chosen:
        raise LabError(f"node restart {name} {program}: the daemons are {', '.join(daemons.PROGRAMS)}")
    for each in chosen:
        daemons.stop(lab.folder, node, each, kill=kill)
        daemons.start(lab.folder, lab.spec, node, each)
    for each in chosen:
        daemons.wait(lab.folder, lab.spec, node, each)
    return node


def agent_lives(lab: Lab, name: str) -> bool:
    """Return whether the lab's own process of a machine answers."""
    try:
        agents.ask(lab.folder, name, {"operation": "ping"}, timeout=2)
    except LabError:
        return False
    return True


FLUSH = """
for tool in iptables ip6tables; do
    for table in filter nat mangle; do
        $tool -w 5 -t $table -S 2>/dev/null | grep -e '-j PYNET-\\|-g PYNET-' | grep -v '^-A PYNET-' | sed 's/^-A/-D/' |
            while read -r rule; do eval "$tool -w 5 -t $table $rule"; done
        chains=$($tool -w 5 -t $table -S 2>/dev/null | sed -n 's/^-N \\(PYNET-.*\\)/\\1/p')
        for chain in $chains; do $tool -w 5 -t $table -F "$chain"; done
        for chain in $chains; do $tool -w 5 -t $table -X "$chain"; done
    done
done 2>/dev/null
nft list tables | grep 'pynet-proxy' | while read -r table family name; do nft delete table "$family" "$name"; done
true
"""


def flush(lab: Lab, name: str) -> NodeRecord:
    """Remove pyproxy's rules from a node's kernel behind its back."""
    node = lab.node(name)
    machine.run(machine.inside(node.netns, "sh", "-c", FLUSH))
    return node
