"""Elements written over netlink are those that `nft` writes from the same text; the program itself is the witness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cni import hostport, masquerade, ruleset, spoofcheck
from cni.netconf import PortMapping
from support.netns import Names, Namespace

TAG = "net c-1/eth0"
FOUR, SIX = ("10.9.0.2", "10.9.0.0/24"), ("fd00:9::2", "fd00:9::/64")
MAPPINGS = tuple(
    PortMapping(8000 + number, 80, protocol, host)
    for number, (protocol, host) in enumerate(
        [("tcp", ""), ("udp", "192.0.2.1"), ("sctp", "2001:db8::1"), ("tcp", "0.0.0.0"), ("udp", "::")]
    )
)
FORWARDS = hostport.forwards(MAPPINGS, [FOUR, SIX])
ADDED = [
    *(masquerade.element(*each, (), TAG) for each in (FOUR, SIX)),
    *(element for forward in FORWARDS for element in hostport.elements(forward, TAG)),
    *spoofcheck.elements("veth0123456789a", "02:00:00:00:00:0f", TAG),
]
KEYS = [
    *(masquerade.key(each[0]) for each in (FOUR, SIX)),
    *(key for forward in FORWARDS for key in hostport.keys(forward)),
    *spoofcheck.keys("veth0123456789a", "02:00:00:00:00:0f"),
]
BASE = (
    ruleset.BASE
    + spoofcheck.BASE
    + hostport.chains(FORWARDS)
    + "".join(masquerade.chain(subnet, ()) for _, subnet in (FOUR, SIX))
)
OVER_NETLINK = """
import sys
from cni import ruleset
from pynet.kernel import nftelements
nftelements.apply([ruleset.encoded(line) for line in sys.stdin.read().splitlines()], add=sys.argv[1] == "add")
"""


def over_netlink(host: Namespace, verb: str, lines: list[str]) -> None:
    subprocess.run(
        ["nsenter", f"--net={host.path}", sys.executable, "-c", OVER_NETLINK, verb],
        input="\n".join(lines), text=True, check=True, capture_output=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip


def listed(host: Namespace) -> str:
    return host.run("nft", "list", "ruleset")


@pytest.mark.root
def test_elements_are_nfts_own(netns: Names) -> None:
    ours, theirs = netns("ours"), netns("theirs")
    lines = list(dict.fromkeys(ADDED))
    for host in (ours, theirs):
        host.run("nft", "-f", "-", input=BASE)
    empty = listed(ours)
    over_netlink(ours, "add", lines)
    theirs.run("nft", "-f", "-", input="".join(f"add element {line}\n" for line in lines))
    assert listed(ours) == listed(theirs)
    assert listed(ours).count(TAG) == len(lines)
    over_netlink(ours, "add", lines)  # what is there already is no error
    over_netlink(ours, "delete", list(dict.fromkeys(KEYS)))
    assert listed(ours) == empty


@pytest.mark.root
def test_all_of_them_or_none(netns: Names) -> None:
    host = netns("host")
    host.run("nft", "-f", "-", input=BASE)
    empty = listed(host)
    missing = masquerade.element("10.8.0.2", "10.8.0.0/24", (), TAG)  # its network has no chain
    with pytest.raises(subprocess.CalledProcessError) as refused:
        over_netlink(host, "add", [*ADDED, missing])
    assert "No such file or directory" in refused.value.stderr
    assert "pynet-cni masquerade4" in refused.value.stderr
    assert listed(host) == empty


def test_what_is_no_element_is_refused() -> None:
    with pytest.raises(ValueError, match="is no nftables element"):
        ruleset.encoded("inet pynet-cni")
