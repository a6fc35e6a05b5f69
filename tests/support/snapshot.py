"""What a machine looks like from outside of a lab: links, routes, namespaces, rules, mounts, processes, files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path


def _said(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True, check=False).stdout


def _without_counters(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def take() -> dict[str, object]:
    """Return a snapshot of this process's network, mount and PID namespaces."""
    links = [{key: link.get(key) for key in ("ifname", "mtu", "flags", "address")} for link in _json("link")]
    mounts = sorted(line.split(" ", 3)[3] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return {
        "links": links,
        "addresses": [[each["ifname"], each.get("addr_info")] for each in _json("address")],
        "routes": _said("ip", "route", "show", "table", "all") + _said("ip", "-6", "route", "show", "table", "all"),
        "rules": _said("ip", "rule") + _said("ip", "-6", "rule"),
        "netns": _said("ip", "netns"),
        "iptables": _without_counters(_said("iptables-save") + _said("ip6tables-save")),
        "legacy": _without_counters(_said("iptables-legacy-save")),
        "nft": _said("nft", "list", "ruleset"),
        "mounts": mounts,
        "processes": _processes(),
        "sysctls": {name: _read(f"/proc/sys/{name}") for name in SYSCTLS},
        "run": sorted(str(path) for path in Path("/run").rglob("*")),
    }


SYSCTLS = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _json(what: str) -> list[dict]:
    return list(json.loads(_said("ip", "-j", what) or "[]"))


def _processes() -> list[str]:
    """Return the command lines of all processes but this one; zombies do not count."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
        if command:
            found.append(command)
    return sorted(found)


def differences(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Return what differs, part by part: before and after."""
    return {part: (before[part], after[part]) for part in before if before[part] != after[part]}
