"""Which connections are forgotten when an address or a UDP host port changes hands; both ways of finding them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.netns import Names

pytestmark = pytest.mark.root

FLOWS = {
    "from the address": "-s 10.9.0.2 -d 192.0.2.9 -p tcp --sport 1 --dport 2 --state ESTABLISHED",
    "to the address": "-s 192.0.2.9 -d 10.9.0.2 -p udp --sport 3 --dport 4",
    "translated to it": "-s 192.0.2.9 -d 192.0.2.1 -p tcp --sport 5 --dport 80 --state ESTABLISHED"
    " -r 10.9.0.2 -q 192.0.2.9 --reply-port-src 80 --reply-port-dst 5",
    "of its neighbour": "-s 10.9.0.20 -d 192.0.2.9 -p tcp --sport 1 --dport 2 --state ESTABLISHED",
    "of the other family": "-s fd00:9::2 -d 2001:db8::9 -p tcp --sport 1 --dport 2 --state ESTABLISHED",
    "to the UDP port": "-s 192.0.2.9 -d 192.0.2.1 -p udp --sport 7 --dport 5353",
    "to the UDP port over IPv6": "-s 2001:db8::9 -d 2001:db8::1 -p udp --sport 7 --dport 5353",
    "to the TCP port": "-s 192.0.2.9 -d 192.0.2.1 -p tcp --sport 9 --dport 5353 --state ESTABLISHED",
    "from the UDP port": "-s 192.0.2.1 -d 192.0.2.9 -p udp --sport 5353 --dport 8",
}
GONE = {
    "[10, 9, 0, 2], []": {"from the address", "to the address", "translated to it"},
    "[], [(5353, 2)]": {"to the UDP port"},
    "[], [(5353, 10)]": {"to the UDP port over IPv6"},
    "[10, 9, 0, 2], [(5353, 2), (5353, 10)]": {
        "from the address", "to the address", "translated to it", "to the UDP port", "to the UDP port over IPv6"
    },
    "[], []": set(),
}  # fmt: skip
FLUSH = """
import sys
from pynet.kernel import ctflush
address, ports = eval(sys.argv[1])
ctflush._FEW = int(sys.argv[2])
print(ctflush.flush([bytes(address)] if address else [], ports))
"""


def told(words: str) -> str:
    """Return a flow's first direction as the program lists it."""
    facts = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
    return f"src={facts['-s']} dst={facts['-d']} sport={facts['--sport']} dport={facts['--dport']} "


@pytest.mark.parametrize("few", [0, 4096])
def test_what_is_forgotten(netns: Names, few: int) -> None:
    host = netns("host")
    root = Path(__file__).resolve().parents[2]

    def left() -> set[str]:
        shown = host.run("conntrack", "-L", check=False) + host.run("conntrack", "-L", "-f", "ipv6", check=False)
        return {name for name, words in FLOWS.items() if told(words) in shown}

    for what, gone in GONE.items():
        for words in FLOWS.values():
            host.run("conntrack", "-I", "-t", "300", *words.split(), check=False)
        assert left() == FLOWS.keys()
        done = subprocess.run(
            ["nsenter", f"--net={host.path}", sys.executable, "-c", FLUSH, what, str(few)],
            text=True, capture_output=True, check=True, cwd=root,
        )  # fmt: skip
        assert FLOWS.keys() - left() == gone, what
        assert int(done.stdout) == len(gone)
