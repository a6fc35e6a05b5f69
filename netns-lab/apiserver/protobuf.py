"""Kubernetes' protobuf, as far as `kubectl create` sends it: namespaces, Services, config maps, Deployments. Pure.

Truth as data: for each message its fields by number (the API's generated.proto), with how each is written in JSON.
A field that is not in the table is passed over; what is sent for it is lost, so the table holds what kubectl can say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\0"
Json = dict[str, Any]
# number → (name, kind); kind: a message's name, or text, int, bool, map, bytes-map, int-or-string; "…*": a list of it
Fields = dict[int, tuple[str, str]]
MESSAGES: dict[str, Fields] = {
    "ObjectMeta": {
        1: ("name", "text"),
        2: ("generateName", "text"),
        3: ("namespace", "text"),
        6: ("resourceVersion", "text"),
        11: ("labels", "map"),
        12: ("annotations", "map"),
    },
    "Namespace": {1: ("metadata", "ObjectMeta")},
    "ConfigMap": {1: ("metadata", "ObjectMeta"), 2: ("data", "map")},
    "ServiceAccount": {1: ("metadata", "ObjectMeta")},
    "Service": {1: ("metadata", "ObjectMeta"), 2: ("spec", "ServiceSpec")},
    "ServiceSpec": {
        1: ("ports", "ServicePort*"),
        2: ("selector", "map"),
        3: ("clusterIP", "text"),
        4: ("type", "text"),
        5: ("externalIPs", "text*"),
        7: ("sessionAffinity", "text"),
        9: ("loadBalancerSourceRanges", "text*"),
        10: ("externalName", "text"),
        11: ("externalTrafficPolicy", "text"),
        13: ("publishNotReadyAddresses", "bool"),
        17: ("ipFamilyPolicy", "text"),
        18: ("clusterIPs", "text*"),
        19: ("ipFamilies", "text*"),
        22: ("internalTrafficPolicy", "text"),
    },
    "ServicePort": {
        1: ("name", "text"),
        2: ("protocol", "text"),
        3: ("port", "int"),
        4: ("targetPort", "int-or-string"),
        5: ("nodePort", "int"),
    },
    "Deployment": {1: ("metadata", "ObjectMeta"), 2: ("spec", "DeploymentSpec")},
    "DeploymentSpec": {1: ("replicas", "int"), 2: ("selector", "LabelSelector"), 3: ("template", "PodTemplate")},
    "LabelSelector": {1: ("matchLabels", "map")},
    "PodTemplate": {1: ("metadata", "ObjectMeta"), 2: ("spec", "PodSpec")},
    "Pod": {1: ("metadata", "ObjectMeta"), 2: ("spec", "PodSpec")},
    "PodSpec": {2: ("containers", "Container*"), 3: ("restartPolicy", "text"), 10: ("nodeName", "text")},
    "Container": {
        1: ("name", "text"),
        2: ("image", "text"),
        3: ("command", "text*"),
        4: ("args", "text*"),
        6: ("ports", "ContainerPort*"),
    },
    "ContainerPort": {
        1: ("name", "text"),
        2: ("hostPort", "int"),
        3: ("containerPort", "int"),
        4: ("protocol", "text"),
    },
}


def decode(data: bytes) -> Json:
    """Return the object in a request's body. Raise ValueError for what is none, or of a kind not in the table."""
    if not data.startswith(MAGIC):
        raise ValueError("expected Kubernetes' protobuf")
    kind = version = ""
    raw = b""
    for number, value in _fields(data[len(MAGIC) :]):
        if number == 1 and isinstance(value, bytes):
            words = {at: part.decode() for at, part in _fields(value) if isinstance(part, bytes)}
            version, kind = words.get(1, ""), words.get(2, "")
        elif number == 2 and isinstance(value, bytes):
            raw = value
    if kind not in MESSAGES:
        raise ValueError(f"{kind or 'an object without kind'} as protobuf is not known here; send JSON")
    return {"apiVersion": version, "kind": kind, **_message(kind, raw)}


def _message(name: str, data: bytes) -> Json:
    result: Json = {}
    for number, value in _fields(data):
        field, kind = MESSAGES[name].get(number, ("", ""))
        if not field:
            continue
        if kind in ("map", "bytes-map"):
            entry = dict(_fields(value if isinstance(value, bytes) else b""))
            result.setdefault(field, {})[_text(entry.get(1, b""))] = _text(entry.get(2, b""))
        elif kind.endswith("*"):
            result.setdefault(field, []).append(_value(kind[:-1], value))
        else:
            made = _value(kind, value)
            if made not in ("", None, {}) and not (made == 0 and kind == "int" and field != "replicas"):
                result[field] = made
    return result


def _value(kind: str, value: bytes | int) -> Any:
    if kind == "int":
        return value
    if kind == "bool":
        return bool(value)
    if kind == "text":
        return _text(value)
    data = value if isinstance(value, bytes) else b""
    if kind == "int-or-string":
        parts = dict(_fields(data))
        return _text(parts.get(3, b"")) if parts.get(1) else parts.get(2) or None
    return _message(kind, data)


def _text(value: bytes | int) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field; a number for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("the message is cut off")
            yield tag >> 3, data[at : at + length]
            at += length
        else:
            at += 8 if tag & 7 == 1 else 4


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("the message is cut off")
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at
