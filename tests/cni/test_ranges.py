"""IPAM's configuration, pure: host-local's schema and its refusals."""

from __future__ import annotations

from typing import Any

import pytest

from cni.ipam import ranges
from cni.spec import CniError


def parse(
    ipam: dict[str, Any], version: str = "1.1.0", args: dict[str, str] | None = None, **keys: Any
) -> ranges.IpamConf:
    return ranges.parse(
        {"name": "net", "ipam": {"type": "pynet-ipam"} | ipam} | keys, args or {}, version, "/run/pynet"
    )


REFUSED = [
    ({}, "ipam.ranges"),
    ({"ranges": [[]]}, "ipam.ranges[0]"),
    ({"ranges": [{"subnet": "10.0.0.0/24"}]}, "ipam.ranges[0]"),
    ({"ranges": [[{}]]}, "ipam.ranges[0][0].subnet"),
    ({"ranges": [[{"subnet": "10.0.0.0/31"}]]}, "too small"),
    ({"ranges": [[{"subnet": "fd00::/127"}]]}, "too small"),
    ({"ranges": [[{"subnet": "10.0.0.7/24"}]]}, "host bits"),
    ({"ranges": [[{"subnet": "10.0.0.0"}]]}, "subnet"),
    ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.1.1"}]]}, "rangeStart"),
    ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeEnd": "10.0.1.1"}]]}, "rangeEnd"),
    ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.8"}]]}, "rangeEnd"),
    ({"ranges": [[{"subnet": "10.0.0.0/24", "gateway": "fd00::1"}]]}, "gateway"),
    ({"ranges": [[{"subnet": "10.0.0.0/24", "gateway": "x"}]]}, "gateway"),
    ({"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "fd00::/64"}]]}, "mixed"),
    ({"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.0.0.0/16"}]]}, "overlap"),
    ({"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "10.0.0.0/24"}]]}, "overlap"),
    ({"subnet": "10.0.0.0/24", "ranges": [[{"subnet": "10.0.0.0/24"}]]}, "overlap"),
    ({"subnet": "10.0.0.0/24", "routes": [{"dst": "x"}]}, "ipam.routes"),
    ({"subnet": "10.0.0.0/24", "routes": [{}]}, "ipam.routes"),
    ({"subnet": "10.0.0.0/24", "routes": [{"dst": "10.0.0.0/8", "gw": "fd00::1"}]}, "ipam.routes"),
    ({"subnet": "10.0.0.0/24", "dataDir": 5}, "ipam.dataDir"),
    ({"subnet": "10.0.0.0/24", "dataDir": "here"}, "ipam.dataDir: here is not an absolute path"),
    ({"subnet": "10.0.0.0/24", "gateway": 5}, "field ipam.gateway is not text"),
]


@pytest.mark.parametrize(("ipam", "words"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_a_bad_range_is_named(ipam: dict[str, Any], words: str) -> None:
    with pytest.raises(CniError) as refused:
        parse(ipam)
    assert refused.value.code == 7
    assert words in refused.value.message


def test_defaults_of_a_range() -> None:
    (four,), (six,) = parse({"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/126"}]]}).sets
    assert [ranges.shown(n, 4) for n in four[3:]] == ["10.0.0.1", "10.0.0.254", "10.0.0.1"]
    assert [ranges.shown(n, 6) for n in six[3:]] == ["fd00::1", "fd00::3", "fd00::1"]


def test_precedence_of_range_sets() -> None:
    conf = parse(
        {"subnet": "10.1.0.0/24", "ranges": [[{"subnet": "10.2.0.0/24"}]]},
        runtimeConfig={"ipRanges": [[{"subnet": "10.0.0.0/24"}]]},
    )
    assert [one[0].subnet for one in conf.sets] == ["10.0.0.0/24", "10.1.0.0/24", "10.2.0.0/24"]


def test_parts_of_one_subnet_may_stand_side_by_side() -> None:
    halves = [{"subnet": "10.0.0.0/24", "rangeEnd": "10.0.0.99"}, {"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.100"}]
    assert len(parse({"ranges": [halves]}).sets[0]) == 2


def test_old_versions_hold_one_address_a_family() -> None:
    two = {"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.0.1.0/24"}]]}
    parse(two, "0.3.0")
    with pytest.raises(CniError):
        parse(two, "0.2.0")


def test_requested_addresses_of_three_places() -> None:
    config = {
        "name": "net", "ipam": {"type": "pynet-ipam", "subnet": "10.0.0.0/24"},
        "args": {"cni": {"ips": ["10.0.0.10"]}}, "runtimeConfig": {"ips": ["10.0.0.11/24"]},
    }  # fmt: skip
    conf = ranges.parse(config, {"IP": "10.0.0.9"}, "1.1.0", "/run/pynet")
    assert conf.requested == ("10.0.0.9", "10.0.0.10", "10.0.0.11")


def test_the_databases_place() -> None:
    assert parse({"subnet": "10.0.0.0/24"}).data_dir == "/run/pynet/ipam"
    assert parse({"subnet": "10.0.0.0/24", "dataDir": "/x"}).data_dir == "/x"
