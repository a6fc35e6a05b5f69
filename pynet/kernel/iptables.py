"""iptables through its own programs: rule files in, rule files out. The only place that runs them.

Two back ends exist on a host, `legacy` and `nft`, and rules of both are in force at once; a `Tool` writes one of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
import subprocess
from pathlib import Path
from typing import Literal

Backend = Literal["legacy", "nft"]
Version = Literal[4, 6]
BACKENDS: tuple[Backend, ...] = ("legacy", "nft")
_VERSIONS: tuple[Version, ...] = (4, 6)
_WAIT_SECONDS = 10
_RESOURCE_PROBLEM = 4  # exit code: the lock is held, or the kernel says to try again
_GET_INFO, _GET_ENTRIES = 64, 65
_GET_INFO_SIZE = 32 + 4 * 13
_ENTRIES_HEAD = 40  # of struct ipt_get_entries: a name of 32 bytes, a size, a hole
_FORWARD = 2  # NF_INET_FORWARD
_TARGET_OFFSET = {4: 88, 6: 140}  # of struct ipt_entry, ip6t_entry: after the address part and `nfcache`
_TARGET_HEAD = 32  # of struct xt_standard_target: the verdict follows
_HINTS = re.compile(r"^:(KUBE-IPTABLES-HINT|KUBE-KUBELET-CANARY) ", re.MULTILINE)
_TABLE = re.compile(r"^\*", re.MULTILINE)
_LINE = re.compile(r"(?:line:? )(\d+)")
_COUNT = re.compile(r" -c (\d+) \d+( |$)")
_libc = ctypes.CDLL(None, use_errno=True)


class IptablesError(Exception):
    """A program refused: what it said. `line`: the number of the rule file's line at fault, where it said that.

    `transient`: it is not the rules' fault: another program holds the lock, or the program is missing.
    """

    def __init__(self, message: str, line: int | None = None, *, transient: bool = False) -> None:
        super().__init__(message)
        self.line = line
        self.transient = transient


class Tool:
    """The programs of one back end and IP version."""

    def __init__(self, backend: Backend, version: Version) -> None:
        self.backend = backend
        self.version = version
        self._stem = f"{'ip6tables' if version == 6 else 'iptables'}-{backend}"

    def restore(self, rules: str) -> None:
        """Apply a rule file on top of what is there: each of its tables at once, or not. Raise `IptablesError`."""
        arguments = ["--noflush"]
        if self.backend == "legacy":
            arguments += ["--wait", str(_WAIT_SECONDS)]
        _run([f"{self._stem}-restore", *arguments], rules)

    def save(self, table: str) -> str:
        """Return a table as a rule file; empty where the kernel has no such table in use."""
        if self.backend == "legacy" and table not in _legacy_tables(self.version):
            return ""
        return _run([f"{self._stem}-save", "-t", table])

    def tables(self) -> dict[str, str]:
        """Return every table in use as a rule file, by its name, from one process. Raise `IptablesError`."""
        if self.backend == "legacy" and not _legacy_tables(self.version):
            return {}
        saved = _run([f"{self._stem}-save"])
        return {body.partition("\n")[0]: f"*{body}" for body in _TABLE.split(saved)[1:]}

    def rules_of(self, table: str, chain: str) -> list[str]:
        """Return one chain's rules as `-S` prints them; none where the chain is missing."""
        if self.backend == "legacy" and table not in _legacy_tables(self.version):
            return []
        try:
            return _run([self._stem, *self._wait(), "-t", table, "-S", chain]).splitlines()
        except IptablesError as error:
            # the last one is how iptables-nft 1.8.9 speaks of a chain that is missing from a table that is there
            absent = ("No chain/target/match", "does not exist", "Bad rule", "is incompatible, use 'nft' tool")
            if any(words in str(error) for words in absent):
                return []
            raise

    def packets(self, table: str, chain: str) -> list[tuple[str, int]]:
        """Return one chain's rules, each with how many packets it has seen. Raise `IptablesError`."""
        if self.backend == "legacy" and table not in _legacy_tables(self.version):
            return []
        lines = _run([self._stem, *self._wait(), "-t", table, "-v", "-S", chain]).splitlines()
        return [(line, int(found[1])) for line in lines if (found := _COUNT.search(line))]

    def change(self, table: str, arguments: list[str]) -> None:
        """Run one command, as `["-I", "INPUT", …]`. Raise `IptablesError`."""
        _run([self._stem, *self._wait(), "-t", table, *arguments])

    def _wait(self) -> list[str]:
        return ["-w", str(_WAIT_SECONDS)]


def legacy_size(version: Version, table: str) -> tuple[int, int]:
    """Return how many entries a legacy table has and how many bytes they take, unread; (0, 0): no table."""
    *_, entries, size = _legacy_info(version, table)
    return entries, size


def legacy_forward_policy(version: Version) -> int:
    """Return the verdict (-1 drops) of the legacy FORWARD chain for what no rule decides; 0: no table. Changes of it
    leave the table's size as it is. Raise `IptablesError`, also when the table changes meanwhile.
    """
    info = _legacy_info(version, "filter")
    size = info[-1]
    if not size:
        return 0
    head = b"filter".ljust(32, b"\0") + struct.pack("=I", size)
    raw = _legacy_option(version, _GET_ENTRIES, head, _ENTRIES_HEAD + size, "entries of the filter table")
    policy = _ENTRIES_HEAD + info[1 + 5 + _FORWARD]
    (target,) = struct.unpack_from("=H", raw, policy + _TARGET_OFFSET[version])
    return int(struct.unpack_from("=i", raw, policy + target + _TARGET_HEAD)[0])


def _legacy_info(version: Version, table: str) -> tuple[int, ...]:
    """Return which hooks a legacy table has, where each begins and where its policy is (five each), the number of
    entries, and their size; zeros where there is no such table.

    IPT_SO_GET_INFO of linux/netfilter_ipv4/ip_tables.h: a name of 32 bytes in, 13 further numbers of 4 bytes out.
    """
    if table not in _legacy_tables(version):
        return (0,) * 13
    raw = _legacy_option(version, _GET_INFO, table.encode(), _GET_INFO_SIZE, f"size of the {table} table")
    return struct.unpack_from("=13I", raw, 32)


def _legacy_option(version: Version, option: int, head: bytes, size: int, what: str) -> bytes:
    family, level = (socket.AF_INET6, socket.IPPROTO_IPV6) if version == 6 else (socket.AF_INET, socket.IPPROTO_IP)
    buffer = ctypes.create_string_buffer(head, size)
    length = ctypes.c_uint32(size)
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as sock:
        if _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(length)):
            raise IptablesError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return buffer.raw


def backend_of_host() -> Backend:
    """Return the back end in use in this network namespace: the one that holds rules, else what `iptables` means.

    As the iptables wrapper of the Kubernetes project: kubelet's hint chains first, then the greater number of rules.
    Reads legacy tables only where the kernel already has some: reading would create them.
    """
    saved = {backend: _rules_in(backend) for backend in BACKENDS}
    for backend in ("nft", "legacy"):
        if _HINTS.search(saved[backend]):
            return backend
    rules = {backend: sum(line.startswith("-A") for line in text.splitlines()) for backend, text in saved.items()}
    if rules["legacy"] != rules["nft"]:
        return "legacy" if rules["legacy"] > rules["nft"] else "nft"
    return "nft" if "nf_tables" in _run(["iptables", "--version"]) else "legacy"


def _rules_in(backend: Backend) -> str:
    """Return all rules of a back end; none where its programs are missing."""
    found = ""
    for version in _VERSIONS:
        try:
            found += "".join(Tool(backend, version).tables().values())
        except IptablesError as error:
            if not error.transient:
                raise
    return found


def _legacy_tables(version: Version) -> list[str]:
    """Return the legacy tables of this thread's network namespace; asking creates none."""
    names = Path(f"/proc/thread-self/net/ip{'6' if version == 6 else ''}_tables_names")
    try:
        return names.read_text().split()
    except OSError:
        return []


def _run(command: list[str], rules: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=rules, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        message = f"the program {command[0]} is missing: install the package iptables"
        raise IptablesError(message, transient=True) from None
    if done.returncode:
        said = done.stderr.strip()
        found = _LINE.findall(said)
        raise IptablesError(
            f"{' '.join(command)}: exit {done.returncode}: {said}",
            int(found[-1]) if found else None,
            transient=done.returncode == _RESOURCE_PROBLEM,
        )
    return done.stdout
