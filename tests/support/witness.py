"""Second witnesses of what is in a kernel: pyroute2 and python-iptables, which share no code with ours, as plain dicts.

Most readers are processes of their own inside the namespace: pyroute2 given a namespace's name forks one a socket
and makes a namespace that it does not find, and python-iptables keeps the tables of the namespace it first looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from support.netns import Namespace
from support.servicenet import inside

Table = list[dict[str, Any]]


def network(namespace: Namespace) -> dict[str, Any]:
    """Return links by name, and lists of addresses, routes, neighbours and forwarding entries, as pyroute2 reads them.

    Links are named rather than numbered. Left out: what the kernel sets itself, which is lo, link-local IPv6, multicast
    and the routes of the local table.
    """
    found: dict[str, Any] = _ask(namespace, "network")
    return found


def virtual_servers(namespace: Namespace) -> Table:
    """Return IPVS's virtual servers, each with its `destinations`, as pyroute2 reads them.

    In this process: an emulated processor imports pyroute2 for six seconds, and a socket opened inside is enough here.
    """
    with inside(namespace):
        return _virtual_servers()


def rules(namespace: Namespace, *, ipv6: bool = False) -> dict[str, dict[str, Table]]:
    """Return legacy nat's and filter's chains and their rules, in order, as python-iptables reads them; no counters."""
    found: dict[str, dict[str, Table]] = _ask(namespace, "rules", "6" if ipv6 else "4")
    return found


def _ask(namespace: Namespace, *words: str) -> Any:
    folder = Path(__file__).parents[1]
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); from support import witness; witness.testify()"
    return json.loads(namespace.run(sys.executable, "-c", program, *words))


def testify() -> None:
    """Print what the words of this process ask for; runs inside the namespace."""
    what, *words = sys.argv[1:]
    readers: dict[str, Callable[..., Any]] = {
        "network": _network, "rules": _rules,
    }  # fmt: skip
    print(json.dumps(readers[what](*words)))


def _network() -> dict[str, Any]:
    from pyroute2 import IPRoute

    with IPRoute(ext_ack=True, strict_check=True) as kernel:
        messages = list(kernel.get_links())
        names = {each["index"]: each.get("ifname") for each in messages}
        bridges = {each["index"] for each in messages if each.get(("linkinfo", "kind")) == "bridge"}
        return {
            "links": {
                each.get("ifname"): _link(each, names, bridges) for each in messages if each.get("ifname") != "lo"
            },
            "addresses": sorted(
                f"{names[each['index']]} {each.get('local') or each.get('address')}/{each['prefixlen']}"
                for each in kernel.get_addr()
                if each["scope"] == 0
            ),
            "routes": [_route(each, names) for family in (2, 10) for each in _main_table(kernel, family)],
            "neighbours": [
                {"dev": names[each["ifindex"]], "dst": each.get("dst"), "mac": each.get("lladdr")}
                for family in (2, 10)
                for each in kernel.get_neighbours(family=family)
                if each["state"] & 0x80  # NUD_PERMANENT
            ],
            "forwarding": [
                {"dev": names[each["ifindex"]], "mac": each.get("lladdr"), "dst": each.get("dst")}
                for each in kernel.fdb("dump")
                if each.get("dst")
            ],
        }


def _link(message: Any, names: dict[int, str], bridges: Iterable[int]) -> dict[str, Any]:
    found = {
        "mac": message.get("address"),
        "mtu": message.get("mtu"),
        "up": message["state"] == "up",
        "kind": message.get(("linkinfo", "kind")),
        "master": names.get(message.get("master")),
    }
    if message.get("master") in bridges:
        port = message.get(("linkinfo", "slave_data"))
        found["hairpin"] = bool(port.get("IFLA_BRPORT_MODE"))
    if found["kind"] == "vxlan":
        data = message.get(("linkinfo", "data"))
        found["vxlan"] = {
            name: data.get(f"vxlan_{name}") for name in ("id", "local", "local6", "port", "learning")
        }  # fmt: skip
    return found


def _main_table(kernel: Any, family: int) -> list[Any]:
    return [each for each in kernel.get_routes(family=family, table=254) if not _is_the_kernels_own(each)]


def _is_the_kernels_own(route: Any) -> bool:
    return str(route.get("dst", "")).startswith(("fe80:", "ff00:"))


def _route(message: Any, names: dict[int, str]) -> dict[str, Any]:
    dst = message.get("dst")
    found = {
        "dst": f"{dst}/{message['dst_len']}" if dst else "default",
        "family": 4 if message["family"] == 2 else 6,
        "type": message["type"],
        "protocol": message["proto"],
        "via": message.get("gateway"),
        "dev": names.get(message.get("oif")),
        "source": message.get("prefsrc"),
        "metric": message.get("priority"),
        "onlink": bool(message["flags"] & 4),  # RTNH_F_ONLINK
        "mtu": message.get(("metrics", "mtu")),
    }
    return {key: value for key, value in found.items() if value is not None}


def _virtual_servers() -> Table:
    from pyroute2 import IPVS, IPVSService

    found = []
    with IPVS() as kernel:
        for message in kernel.service("dump"):
            # The messages themselves: pyroute2's from_message keeps its own defaults for flags, timeout and method.
            server = message.get("IPVS_CMD_ATTR_SERVICE")
            known = {"af": "af", "fwmark": "mark", "protocol": "protocol", "addr": "address", "port": "port"}
            identity = {
                key: value for key in known if (value := server.get(f"IPVS_SVC_ATTR_{key.upper()}")) is not None
            }
            found.append(
                {known[key]: value for key, value in identity.items()}
                | {
                    "scheduler": server.get("IPVS_SVC_ATTR_SCHED_NAME"),
                    "flags": server.get("IPVS_SVC_ATTR_FLAGS")["flags"],
                    "timeout": server.get("IPVS_SVC_ATTR_TIMEOUT"),
                    "netmask": server.get("IPVS_SVC_ATTR_NETMASK"),
                    "destinations": [
                        _destination(each.get("IPVS_CMD_ATTR_DEST"))
                        for each in kernel.dest("dump", service=IPVSService(**identity))
                    ],
                }
            )
    return found


def _destination(message: Any) -> dict[str, Any]:
    names = {"addr": "address", "port": "port", "weight": "weight", "fwd_method": "method", "addr_family": "af"}
    return {name: message.get(f"IPVS_DEST_ATTR_{key.upper()}") for key, name in names.items()}


def _rules(family: str) -> dict[str, dict[str, Table]]:
    import iptc

    found: dict[str, dict[str, Table]] = {
        table: iptc.easy.dump_table(table, ipv6=family == "6") for table in ("nat", "filter")
    }
    for chains in found.values():
        for listed in chains.values():
            for rule in listed:
                rule.pop("counters", None)
    return found
