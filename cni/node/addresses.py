"""How many pod addresses are used and free, read from the node's IPAM when somebody asks."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cni.ipam import allocator, ranges
from cni.ipam.store import Store
from cni.node import conflist


class Usage(msgspec.Struct, frozen=True):
    """The addresses of one family that pods may have; `cidr`: where they are, several with commas."""

    cidr: str
    used: int
    free: int


def usage(pod_cidrs: tuple[str, ...], state_dir: Path) -> list[Usage]:
    """Return the use of the pod CIDRs by the network that the agent configures. Raise `CniError`, `Damaged`."""
    if not pod_cidrs:
        return []
    content = conflist.conflist(pod_cidrs, 0, "", state_dir)
    config = {**content["plugins"][0], "name": content["name"]}
    conf = ranges.parse(config, {}, content["cniVersion"], str(state_dir))
    store = Store(conf.data_dir, conf.network)
    try:
        found = []
        for raw, range_set in zip(conflist.ranges(pod_cidrs), conf.sets, strict=True):
            free = store.free(range_set)
            cidr = ",".join(entry["subnet"] for entry in raw)
            found.append(Usage(cidr, allocator.capacity(range_set) - free, free))
        return found
    finally:
        store.close()
