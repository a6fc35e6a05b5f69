"""The record of pod CIDRs that agents assign: a ConfigMap in a file of the manifest directory, and Nodes with what it
says of them. People can read it; whoever reads the directory's Nodes finds in them what it says.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pynet.objects import Node

FILE = "pynet-node-cidrs.json"
Record = dict[str, tuple[str, ...]]  # pod CIDRs by the name of the Node


class _Metadata(msgspec.Struct, frozen=True):
    name: str = "pynet-node-cidrs"
    namespace: str = "kube-system"


class _ConfigMap(msgspec.Struct, frozen=True, rename="camel"):
    data: dict[str, str]
    api_version: str = "v1"
    kind: str = "ConfigMap"
    metadata: _Metadata = _Metadata()


def decoded(data: bytes) -> Record:
    """Return the record that a file holds. Raise ValueError where that is none."""
    entries = msgspec.json.decode(data, type=_ConfigMap).data
    return {name: tuple(cidr for cidr in text.split(",") if cidr) for name, text in entries.items()}


def encoded(record: Mapping[str, tuple[str, ...]]) -> bytes:
    """Return the file's contents for a record."""
    content = _ConfigMap({name: ",".join(cidrs) for name, cidrs in sorted(record.items())})
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def with_assigned(node: Node, record: Mapping[str, tuple[str, ...]]) -> Node:
    """Return a Node with the pod CIDRs that the record has for it, where it has none of its own."""
    cidrs = record.get(node.metadata.name, ())
    if not cidrs or node.spec.pod_cidrs or node.spec.pod_cidr:
        return node
    spec = msgspec.structs.replace(node.spec, pod_cidr=cidrs[0], pod_cidrs=cidrs)
    return msgspec.structs.replace(node, spec=spec)
