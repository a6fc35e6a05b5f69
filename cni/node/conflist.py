"""The network configuration that the agent writes for the container runtime: decided here, written by rename.

A runtime reloads on a rename and ignores other writes (go-cni), so that is how it is written; mode 0600, as it may hold
what only the runtime should know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from cni.node.nodes import claim_of
from pynet import files
from pynet.netstate import family_of

NAME = "10-pynet.conflist"
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
SUFFIXES = (".conf", ".conflist", ".json")  # what libcni takes for a configuration


def conflist(pod_cidrs: tuple[str, ...], mtu: int, bridge: str, state_dir: Path) -> dict[str, Any]:
    """Return the configuration list: one plugin does all; the agent masquerades, so it does not."""
    return {
        "cniVersion": "1.0.0",  # what every runtime in use reads; newer ones choose from the list
        "cniVersions": list(VERSIONS),
        "name": "pynet",
        "plugins": [
            {
                "type": "pynet-cni",
                "bridge": bridge,
                "isGateway": True,
                "isDefaultGateway": True,
                "forceAddress": True,  # the bridge is ours: a changed pod CIDR takes the place of the old one
                "ipMasq": False,
                "hairpinMode": True,
                "mtu": mtu,
                "stateDir": str(state_dir),
                "ipam": {"type": "pynet-ipam", "ranges": ranges(pod_cidrs)},
                "capabilities": {"portMappings": True, "bandwidth": True},
            }
        ],
    }


def with_room(pod_cidrs: tuple[str, ...]) -> tuple[str, ...]:
    """Return those that hold a pod: beside it there are the network's address, the gateway's and the broadcast's."""
    return tuple(cidr for cidr in pod_cidrs if (claim := claim_of(cidr)).last - claim.first >= 3)


def ranges(pod_cidrs: tuple[str, ...]) -> list[list[dict[str, str]]]:
    """Return IPAM's range sets: one for each family, as a pod gets one address of each set."""
    by_family: dict[int, list[dict[str, str]]] = {}
    for cidr in pod_cidrs:
        by_family.setdefault(family_of(cidr), []).append({"subnet": cidr})
    return list(by_family.values())


def write(folder: Path, content: dict[str, Any]) -> bool:
    """Put the configuration into `folder`; return whether that changed it."""
    data = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    path = folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    if files.read(path) == data and path.stat().st_mode & 0o777 == 0o600:
        return False
    files.replace(path, data, 0o600)
    return True


def remove(folder: Path) -> bool:
    """Take the configuration away; return whether it was there."""
    try:
        (folder / NAME).unlink()
    except FileNotFoundError:
        return False
    return True


def preferred_over_ours(folder: Path) -> list[str]:
    """Return the configurations in `folder` that a runtime takes before ours, as their names sort first."""
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES and entry.name < NAME)
