"""The four ways to change an object: JSON patch, merge patch, strategic merge patch, server-side apply. Pure.

Strategic merge keys are data (`MERGE_KEYS`), as the API's own types carry them in their tags.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from apiserver.errors import ApiError, bad_request

Json = dict[str, Any]
_POD = {
    "containers": "name",
    "containers.env": "name",
    "containers.ports": "containerPort",
    "containers.volumeMounts": "mountPath",
    "initContainers": "name",
    "initContainers.env": "name",
    "initContainers.ports": "containerPort",
    "initContainers.volumeMounts": "mountPath",
    "volumes": "name",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
_TEMPLATE = {f"spec.template.spec.{path}": key for path, key in _POD.items()}
_CONDITIONS = {"status.conditions": "type"}
_META = {"metadata.ownerReferences": "uid", "metadata.finalizers": ""}
# kind → path of a list → the field that tells its items apart ("": the items themselves); other lists are replaced
MERGE_KEYS: dict[str, dict[str, str]] = {
    "Service": {"spec.ports": "port"} | _CONDITIONS,
    "Node": {"status.addresses": "type", "spec.podCIDRs": ""} | _CONDITIONS,
    "Pod": {f"spec.{path}": key for path, key in _POD.items()} | {"status.podIPs": "ip"} | _CONDITIONS,
    "Namespace": _CONDITIONS,
    "ServiceAccount": {"secrets": "name", "imagePullSecrets": "name"},
    "Deployment": _TEMPLATE | _CONDITIONS,
    "DaemonSet": _TEMPLATE | _CONDITIONS,
    "ReplicaSet": _TEMPLATE | _CONDITIONS,
    "StatefulSet": _TEMPLATE | _CONDITIONS,
}


def merge(obj: Any, patch: Any) -> Any:
    """Return `obj` changed by a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(obj) if isinstance(obj, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def json_patch(obj: Json, operations: list[Json]) -> Json:
    """Return `obj` changed by a JSON patch (RFC 6902). Raise 422 as the API does."""
    result: Any = _copy(obj)
    for operation in operations:
        name, path = operation.get("op"), str(operation.get("path", ""))
        try:
            if name == "test":
                if _at(result, path) != operation.get("value"):
                    raise KeyError(path)
            elif name == "remove":
                result = _change(result, path, None, "remove")
            elif name in ("add", "replace"):
                if name == "replace":
                    _at(result, path)
                result = _change(result, path, _copy(operation.get("value")), name)
            elif name in ("move", "copy"):
                value = _copy(_at(result, str(operation["from"])))
                if name == "move":
                    result = _change(result, str(operation["from"]), None, "remove")
                result = _change(result, path, value, "add")
            else:
                raise bad_request(f"json patch: unexpected op {name!r}")
        except (KeyError, IndexError, TypeError, ValueError):
            raise ApiError(422, "Invalid", "the server rejected our request due to an error in our request") from None
    return dict(result)


def _pointer(path: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _at(obj: Any, path: str) -> Any:
    for part in _pointer(path):
        obj = obj[int(part)] if isinstance(obj, list) else obj[part]
    return obj


def _change(obj: Any, path: str, value: Any, name: str) -> Any:
    parts = _pointer(path)
    if not parts:
        return value
    parent = obj
    for part in parts[:-1]:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    last = parts[-1]
    if isinstance(parent, list):
        index = len(parent) if last == "-" else int(last)
        if name == "remove":
            del parent[index]
        elif name == "add":
            parent.insert(index, value)
        else:
            parent[index] = value
    elif name == "remove":
        del parent[last]
    else:
        parent[last] = value
    return obj


def strategic(kind: str, obj: Json, patch: Json) -> Json:
    """Return `obj` changed by a strategic merge patch."""
    return dict(_strategic(MERGE_KEYS.get(kind, {}) | _META, "", _copy(obj), patch))


def _strategic(keys: dict[str, str], path: str, obj: Any, patch: Json) -> Any:
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    result = dict(obj) if isinstance(obj, dict) else {}
    if "$retainKeys" in patch:
        result = {key: value for key, value in result.items() if key in patch["$retainKeys"]}
    for key, value in patch.items():
        if key in ("$patch", "$retainKeys") or key.startswith("$setElementOrder/"):
            continue
        if key.startswith("$deleteFromPrimitiveList/"):
            field = key.partition("/")[2]
            result[field] = [item for item in result.get(field) or () if item not in value]
            continue
        below = f"{path}.{key}".lstrip(".")
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = _strategic(keys, below, result.get(key), value)
        elif isinstance(value, list) and below in keys:
            result[key] = _merged_list(keys, below, result.get(key) or [], value)
        else:
            result[key] = value
    for key, order in patch.items():
        if key.startswith("$setElementOrder/"):
            field = key.partition("/")[2]
            if field in result:
                result[field] = _ordered(keys.get(f"{path}.{field}".lstrip("."), ""), result[field], order)
    return result


def _merged_list(keys: dict[str, str], path: str, items: list[Any], patch: list[Any]) -> list[Any]:
    if any(isinstance(item, dict) and item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if not (isinstance(item, dict) and item.get("$patch") == "replace")]
    key = keys[path]
    if not key:
        return items + [item for item in patch if item not in items]
    result = list(items)
    for change in patch:
        at = next((index for index, item in enumerate(result) if item.get(key) == change.get(key)), None)
        if change.get("$patch") == "delete":
            if at is not None:
                del result[at]
        elif at is None:
            result.append({name: value for name, value in change.items() if name != "$patch"})
        else:
            result[at] = _strategic(keys, path, result[at], change)
    return result


def _ordered(key: str, items: list[Any], order: list[Any]) -> list[Any]:
    wanted = [item.get(key) if isinstance(item, dict) else item for item in order]

    def place(item: Any) -> int:
        name = item.get(key) if isinstance(item, dict) and key else item
        return wanted.index(name) if name in wanted else len(wanted)

    return sorted(items, key=place)


def applied(kind: str, obj: Json, last: Json, config: Json) -> Json:
    """Return `obj` after a server-side apply of `config` by one who applied `last` before: what it dropped goes."""
    keys = MERGE_KEYS.get(kind, {}) | _META
    return dict(_strategic(keys, "", _without(keys, "", _copy(obj), last, config), config))


def _without(keys: dict[str, str], path: str, obj: Any, last: Any, config: Any) -> Any:
    if not (isinstance(obj, dict) and isinstance(last, dict) and isinstance(config, dict)):
        return obj
    for field, value in last.items():
        below = f"{path}.{field}".lstrip(".")
        if field not in config:
            obj.pop(field, None)
        elif isinstance(value, dict):
            obj[field] = _without(keys, below, obj.get(field), value, config[field])
        elif isinstance(value, list) and keys.get(below):
            key = keys[below]
            kept = {item.get(key) for item in config[field]}
            dropped = {item.get(key) for item in value} - kept
            obj[field] = [item for item in obj.get(field) or () if item.get(key) not in dropped]
    return obj


def contested(kind: str, config: Json, other: Json) -> list[tuple[str, Json, str]]:
    """Return the fields that two applied configurations both set, and differently.

    Of each its path as the API spells it, and where it stands in `other`: the object and the field in it.
    """
    keys = MERGE_KEYS.get(kind, {}) | _META
    fields = {name: value for name, value in config.items() if name not in ("apiVersion", "kind")}
    return list(_contested(keys, "", "", fields, other))


def _contested(
    keys: dict[str, str], path: str, shown: str, config: Json, other: Json
) -> Iterator[tuple[str, Json, str]]:
    for field in sorted(config.keys() & other.keys()):
        ours, theirs = config[field], other[field]
        below, told = f"{path}.{field}".lstrip("."), f"{shown}.{field}"
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _contested(keys, below, told, ours, theirs)
        elif isinstance(ours, list) and isinstance(theirs, list) and below in keys:
            known = {_identity(keys[below], item): item for item in theirs if isinstance(item, dict)}
            for item in ours:
                identity = _identity(keys[below], item) if isinstance(item, dict) else ""
                if identity in known:
                    yield from _contested(keys, below, told + identity, item, known[identity])
        elif ours != theirs:
            yield told, other, field


def _identity(key: str, item: Json) -> str:
    """Return how the API tells an item of a list in a path; ports are told apart by their protocol, too."""
    parts = {key: item.get(key)} | (
        {"protocol": item.get("protocol", "TCP")} if key in ("port", "containerPort") else {}
    )
    return "[" + ",".join(f"{name}={json.dumps(value)}" for name, value in parts.items()) + "]"


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value
