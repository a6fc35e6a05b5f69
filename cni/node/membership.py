"""Who is in the cluster, from what the source said of Nodes; with the pod CIDRs that we assign, where that is asked."""

from __future__ import annotations

import threading

from cni.node.ledger import Ledger
from cni.node.nodes import Member, Problem, member_of, pod_cidrs_of
from cni.node.podcidrs import Pool, assign
from pynet.daemon import logs
from pynet.objects import Node
from pynet.sources import Batch

log = logs.get(__name__)
Cidrs = tuple[str, ...]


class Membership:
    """The cluster's nodes. `ledger`: where pod CIDRs from `pools` are assigned, if they are, by the node `own`."""

    def __init__(self, ledger: Ledger | None = None, pools: tuple[Pool, ...] = (), own: str = "") -> None:
        self._ledger, self._pools, self._own = ledger, pools, own
        self._lock = threading.Lock()
        self._nodes: dict[str, Node] | None = None
        self._read: dict[str, tuple[Node, Cidrs, Member]] = {}

    def take(self, batch: Batch) -> None:
        """Take what a source says; from any thread."""
        with self._lock:
            if "Node" in batch.replaced:
                self._nodes = {}
            if self._nodes is None:
                return
            for obj in batch.upserts:
                if isinstance(obj, Node):
                    self._nodes[obj.metadata.name] = obj
            for ref in batch.deletes:
                if ref.kind == "Node":
                    self._nodes.pop(ref.name, None)

    def current(self) -> tuple[dict[str, Member], list[Problem]] | None:
        """Return the nodes now, and what is wrong with the assignment; None while the source has said nothing."""
        with self._lock:
            if self._nodes is None:
                return None
            nodes = dict(self._nodes)
        problems: list[Problem] = []
        assigned = self._assigned(self._ledger, nodes, problems) if self._ledger else {}
        read: dict[str, tuple[Node, Cidrs, Member]] = {}
        for name, node in nodes.items():
            cidrs = assigned.get(name, ())
            known = self._read.get(name)
            fresh = known is not None and known[0] is node and known[1] == cidrs
            read[name] = known if known is not None and fresh else (node, cidrs, member_of(node, cidrs))
        self._read = read
        return {name: member for name, (_, _, member) in read.items()}, problems

    def _assigned(self, ledger: Ledger, nodes: dict[str, Node], problems: list[Problem]) -> dict[str, Cidrs]:
        """Return the assigned pod CIDRs of the Nodes that have none of their own; assign where that was not done."""
        names = [name for name, node in nodes.items() if not pod_cidrs_of(node)]
        taken = [cidr for node in nodes.values() for cidr in pod_cidrs_of(node)]
        record = ledger.read()
        if assign(names, taken, record, self._pools, self._own) != record:
            try:
                record = ledger.update(lambda before: assign(names, taken, before, self._pools, self._own))
                log.info("pod CIDRs assigned", extra=logs.fields(nodes=len(record)))
            except OSError as error:
                problems.append(Problem("pod CIDRs", f"the record cannot be written: {error}"))
                return {name: record[name] for name in names if name in record}
        short = [name for name in names if len(record.get(name, ())) < len(self._pools)]
        problems += [Problem(f"Node {name}", "--cluster-cidr has no room for its pod CIDR") for name in short]
        return {name: record[name] for name in names if name in record}
