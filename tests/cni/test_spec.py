"""The protocol, pure: environment, configuration, each version's result shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cni import results, spec
from cni.results import Dns, Interface, Ip, Result, Route
from cni.spec import CniError

WHOLE = {
    "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/n", "CNI_IFNAME": "eth0", "CNI_PATH": "/p",
}  # fmt: skip


def stdin(**keys: Any) -> bytes:
    return json.dumps({"cniVersion": "1.1.0", "name": "net", "type": "pynet-cni"} | keys).encode()


REFUSED = [
    ({"CNI_COMMAND": ""}, stdin(), 4, "CNI_COMMAND"),
    ({"CNI_COMMAND": "NEVER"}, stdin(), 4, "unknown CNI_COMMAND: NEVER"),
    ({"CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": ""}, stdin(), 4, "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME"),
    ({"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "", "CNI_PATH": ""}, stdin(), 4, "[CNI_CONTAINERID,CNI_PATH]"),
    ({"CNI_COMMAND": "GC", "CNI_PATH": ""}, stdin(), 4, "CNI_PATH"),
    ({"CNI_CONTAINERID": "/etc"}, stdin(), 4, "containerID"),
    ({"CNI_CONTAINERID": "c1\n"}, stdin(), 4, "containerID"),
    ({"CNI_IFNAME": "."}, stdin(), 4, ". or .."),
    ({"CNI_IFNAME": ".."}, stdin(), 4, ". or .."),
    ({"CNI_IFNAME": "a/b"}, stdin(), 4, "/ or :"),
    ({"CNI_IFNAME": "a:b"}, stdin(), 4, "/ or :"),
    ({"CNI_IFNAME": "a b"}, stdin(), 4, "whitespace"),
    ({"CNI_IFNAME": "abcdefghijklmnop"}, stdin(), 4, "too long"),
    ({"CNI_ARGS": "A"}, stdin(), 4, "CNI_ARGS"),
    ({"CNI_ARGS": "A=B=C"}, stdin(), 4, "CNI_ARGS"),
    ({}, b"", 6, "JSON"),
    ({}, b"[]", 6, "object"),
    ({}, b"\xff", 6, "JSON"),
    ({}, b"[" * 100000, 6, "JSON"),
    ({}, b'{"a":' * 200 + b"1" + b"}" * 200, 6, "deep"),
    ({}, stdin(cniVersion="one"), 6, "cniVersion"),
    ({}, stdin(cniVersion=1), 6, "cniVersion"),
    ({}, stdin(cniVersion="2.0.0"), 1, "incompatible"),
    ({}, stdin(name=""), 7, "name"),
    ({}, stdin(name="a b"), 7, "name"),
    ({"CNI_COMMAND": "CHECK"}, stdin(cniVersion="0.3.1"), 1, "CHECK"),
    ({"CNI_COMMAND": "GC"}, stdin(cniVersion="1.0.0"), 1, "GC"),
    ({"CNI_COMMAND": "STATUS"}, stdin(cniVersion="1.0.0"), 1, "STATUS"),
]


@pytest.mark.parametrize(("env", "config", "code", "words"), REFUSED)
def test_what_is_refused_says_why(env: dict[str, str], config: bytes, code: int, words: str) -> None:
    with pytest.raises(CniError) as refused:
        spec.request(WHOLE | env, config)
    assert refused.value.code == code
    assert words in f"{refused.value.message} {refused.value.details}"


@pytest.mark.parametrize("command", ["DEL", "GC", "STATUS", "VERSION"])
def test_what_a_verb_does_not_need(command: str) -> None:
    env = {key: value for key, value in WHOLE.items() if key in ("CNI_COMMAND", *spec.REQUIRED[command])}
    assert spec.request(env | {"CNI_COMMAND": command}, stdin()).command == command


def test_keys_are_read_in_any_case() -> None:
    """Go's decoder does so, and containerd relies on it: its capabilities have Go's capitals."""
    raw = stdin(
        ISGATEWAY=True, runtimeConfig={"portMappings": [{"HostPort": 1, "ContainerPort": 2, "Protocol": "tcp"}]}
    )
    config = spec.request(WHOLE, raw).config
    assert config["isGateway"] is True
    assert config["runtimeConfig"]["portMappings"] == [{"hostPort": 1, "containerPort": 2, "protocol": "tcp"}]
    assert spec.request(WHOLE, stdin(mtu=1, MTU=2)).config["mtu"] == 1


def test_without_cniversion_it_is_the_first() -> None:
    assert spec.request(WHOLE, b'{"name": "net"}').version == "0.1.0"


FULL = Result(
    interfaces=(Interface("cni0", "02:00:00:00:00:01", mtu=1400), Interface("eth0", "02:00:00:00:00:02", "/n", 1400)),
    ips=(Ip("10.0.0.2/24", "10.0.0.1", 1), Ip("fd00::2/64", "fd00::1", 1), Ip("10.0.1.2/24", "10.0.1.1", 1)),
    routes=(Route("0.0.0.0/0", "10.0.0.1", mtu=1300, priority=5, table=100, scope=0), Route("::/0", "fd00::1")),
    dns=Dns(("9.9.9.9",), "", ("a.example",), ()),
)
DNS = {"nameservers": ["9.9.9.9"], "search": ["a.example"]}


def shape(version: str, result: Result = FULL) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(results.render(result, version))
    return answer


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_the_first_shape_has_one_address_a_family(version: str) -> None:
    assert shape(version) == {
        "cniVersion": version,
        "ip4": {"ip": "10.0.0.2/24", "gateway": "10.0.0.1", "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}]},
        "ip6": {"ip": "fd00::2/64", "gateway": "fd00::1", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
        "dns": DNS,
    }
    with pytest.raises(CniError):
        shape(version, FULL._replace(ips=()))


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_the_newer_shapes(version: str) -> None:
    old = not spec.at_least(version, "1.0.0")
    newest = version == "1.1.0"
    answer = shape(version)
    assert answer["ips"][1] == {"interface": 1, "address": "fd00::2/64", "gateway": "fd00::1"} | (
        {"version": "6"} if old else {}
    )
    assert answer["interfaces"][0] == {"name": "cni0", "mac": "02:00:00:00:00:01"} | ({"mtu": 1400} if newest else {})
    assert answer["routes"][0] == {"dst": "0.0.0.0/0", "gw": "10.0.0.1"} | (
        {"mtu": 1300, "priority": 5, "table": 100, "scope": 0} if newest else {}
    )
    assert ("dns" in shape(version, FULL._replace(dns=Dns()))) == old


@pytest.mark.parametrize("version", spec.VERSIONS)
def test_a_result_reads_back(version: str) -> None:
    back = results.parse_result(shape(version), version)
    assert shape(version, back) == shape(version)


IP = {"address": "10.0.0.2/24"}
BROKEN: list[tuple[Any, str]] = [
    ([], "prevResult is not an object"),
    ({"ips": [1]}, "prevResult.ips is not a list of objects"),
    ({"ips": {}, "routes": "x"}, "prevResult.routes is not a list of objects"),
    ({"ips": [{}]}, "prevResult.ips[0].address"),
    ({"ips": [IP, IP | {"address": 5}]}, "prevResult.ips[1].address is not text"),
    ({"ips": [IP | {"gateway": "x"}]}, "prevResult.ips[0].gateway"),
    ({"ips": [IP | {"gateway": "fd00::1"}]}, "prevResult.ips[0].gateway: fd00::1 is not of the family of 10.0.0.2/24"),
    ({"ips": [IP | {"interface": "0"}]}, "prevResult.ips[0].interface is not a whole number"),
    ({"interfaces": "x"}, "prevResult.interfaces is not a list of objects"),
    ({"interfaces": [{"name": []}, {"name": 5}]}, "prevResult.interfaces[1].name is not text"),
    ({"interfaces": [{"name": "a", "mtu": "x"}]}, "prevResult.interfaces[0].mtu is not a whole number"),
    ({"routes": [{"dst": "x"}]}, "prevResult.routes[0].dst"),
    ({"routes": [{"dst": "10.0.0.0/8", "gw": "x"}]}, "prevResult.routes[0].gw"),
    ({"routes": [{}]}, "prevResult.routes[0]"),
    ({"dns": 5}, "prevResult.dns"),
    ({"ip4": {}, "ip6": 3}, "prevResult.ip4.ip"),
    ({"ip4": 3}, "prevResult.ip4 is not an object"),
]


@pytest.mark.parametrize(("raw", "words"), BROKEN, ids=[row[1] for row in BROKEN])
def test_a_broken_result_is_named(raw: Any, words: str) -> None:
    with pytest.raises(CniError) as refused:
        results.parse_result(raw, "1.0.0")
    assert refused.value.code in (6, 7)
    assert f"field {words}" in refused.value.message


def test_an_error_object_has_what_the_specification_asks() -> None:
    answer = json.loads(CniError(7, "field x", "more").render("0.4.0"))
    assert answer == {"cniVersion": "0.4.0", "code": 7, "msg": "field x", "details": "more"}
