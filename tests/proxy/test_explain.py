"""`pyproxy explain`: for each way in which a connection can fail, the answer names the field behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.inspect.command import main

NODE = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n1"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}  # fmt: skip
FLAGS = ["--hostname-override", "n1", "--cluster-cidr", "10.244.0.0/16"]


def service(
    name: str = "web", ip: str = "10.96.0.10", created: str = "2026-01-01T00:00:00Z", **spec: Any
) -> dict[str, Any]:
    port = {"name": "http", "port": 80, "nodePort": spec.pop("node_port", 0)}
    return {"kind": "Service", "apiVersion": "v1", "metadata": {"name": name, "creationTimestamp": created},
            "spec": {"clusterIP": ip, "ports": [port], **spec}, "status": spec.pop("status", {})}  # fmt: skip


def pods(*endpoints: dict[str, Any], port: str = "http") -> dict[str, Any]:
    return {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4",
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "endpoints": list(endpoints), "ports": [{"name": port, "port": 8080}]}  # fmt: skip


def pod(address: str, node: str = "n1", **fields: Any) -> dict[str, Any]:
    return {"addresses": [address], "nodeName": node, **fields}


CIDR = {"kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}}  # fmt: skip
BALANCER = {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}}
HERE, THERE = pod("10.244.1.5"), pod("10.244.2.5", "n2")


@pytest.mark.parametrize(
    ("objects", "question", "flags", "code", "expected"),
    [
        pytest.param([service(), pods(HERE)], ["10.244.1.9", "10.96.0.10:80"], [], 0,
                     ["spec.clusterIPs", "10.244.1.5:8080 (on this node), 100%", "sees 10.244.1.9"], id="it works"),
        pytest.param([service(), pods(HERE)], ["10.244.1.5", "10.96.0.10:80"], [], 0,
                     ["sees one of this node's addresses"], id="a pod that reaches itself"),
        pytest.param([service()], ["10.244.1.9", "10.96.0.10:80"], [], 1,
                     ["no EndpointSlice", "refused"], id="no slice"),
        pytest.param([service(), pods(pod("10.244.1.5", conditions={"ready": False}))], ["10.244.1.9", "10.96.0.10:80"],
                     [], 1, ["not to 10.244.1.5:8080: not ready", "conditions.ready"], id="not ready"),
        pytest.param([service(), pods(HERE, port="web")], ["10.244.1.9", "10.96.0.10:80"], [], 1,
                     ["no slice has a port named 'http'/TCP; there is 'web'/TCP"], id="another port name"),
        pytest.param([service(internalTrafficPolicy="Local"), pods(THERE)], ["10.244.1.9", "10.96.0.10:80"], [], 1,
                     ["spec.internalTrafficPolicy", "it has none"], id="a Local policy"),
        pytest.param([service(), pods(HERE)], ["10.244.1.9", "10.96.0.10:81"], [], 1,
                     ["has 80/TCP here, not this port"], id="another port"),
        pytest.param([service(), pods(HERE)], ["10.244.1.9", "10.96.0.99:80"], [], 0,
                     ["no Service has this address"], id="another address"),
        pytest.param([service(), pods(HERE), CIDR], ["10.244.1.9", "10.96.0.99:80"], [], 1,
                     ["10.96.0.99 is in a network of cluster IPs", "ServiceCIDR spec.cidrs"], id="nobody's cluster IP"),
        pytest.param([service(), pods(HERE), CIDR], ["10.244.1.9", "10.96.0.10:81"], [], 1,
                     ["has 80/TCP here, not this port"], id="another port in a ServiceCIDR"),
        pytest.param([service(node_port=30080, type="NodePort"), pods(HERE)], ["203.0.113.1", "192.0.2.1:30080"],
                     ["--nodeport-addresses", "10.0.0.0/8"], 0, ["--nodeport-addresses"], id="no node-port address"),
        pytest.param([service(node_port=30080, type="NodePort"), pods(HERE)], ["203.0.113.1", "192.0.2.9:30080"], [], 0,
                     ["192.0.2.9 is no address of this node"], id="not this node"),
        pytest.param([service(type="LoadBalancer", status=BALANCER, loadBalancerSourceRanges=["198.18.0.0/15"]),
                      pods(HERE)], ["203.0.113.1", "198.51.100.1:80"], [], 1,
                     ["spec.loadBalancerSourceRanges", "none of those"], id="outside of the source ranges"),
        pytest.param([service(), pods(HERE), service("late", created="2026-02-01T00:00:00Z")],
                     ["10.244.1.9", "10.96.0.10:80"], [], 0, ["10.244.1.5:8080"], id="an older claim wins"),
        pytest.param([service(), pods(pod("10.244.1.5", hints={"forZones": [{"name": "a"}]}),
                                      pod("10.244.2.5", "n2", hints={"forZones": [{"name": "b"}]})),
                      {**NODE, "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}}}],
                     ["10.244.1.9", "10.96.0.10:80"], [], 0, ["meant for b", "in zone a"], id="meant for another zone"),
    ],
)  # fmt: skip
def test_answers(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    objects: list[dict[str, Any]],
    question: list[str],
    flags: list[str],
    code: int,
    expected: list[str],
) -> None:
    named = objects if any(obj["kind"] == "Node" for obj in objects) else [*objects, NODE]
    (tmp_path / "all.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": named}))
    assert main([*question, "--manifests", str(tmp_path), *FLAGS, *flags]) == code
    answer = capsys.readouterr().out
    for text in expected:
        assert text in answer


@pytest.mark.parametrize(
    "question",
    [
        ["10.244.1.9", "10.96.0.10"],
        ["pod", "10.96.0.10:80"],
        ["::1", "10.96.0.10:80"],
        ["10.244.1.9", "10.96.0.10:80/icmp"],
        ["10.244.1.9", "10.96.0.10:0"],
    ],
)
def test_bad_questions_are_told_apart_from_bad_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], question: list[str]
) -> None:
    assert main([*question, "--manifests", str(tmp_path)]) == 2
    assert "pyproxy explain:" in capsys.readouterr().err
