"""What the server says it serves: plain and aggregated discovery, version, and as much OpenAPI as kubectl asks for."""

from __future__ import annotations

import hashlib
from typing import Any

from apiserver.resources import RESOURCES, Resource, groups

Json = dict[str, Any]
VERSION = {
    "major": "1",
    "minor": "36",
    "emulationMajor": "1",
    "emulationMinor": "36",
    "minCompatibilityMajor": "1",
    "minCompatibilityMinor": "35",
    "gitVersion": "v1.36.3",
    "gitCommit": "pynet-lab",
    "gitTreeState": "clean",
    "buildDate": "2026-08-21T00:00:00Z",
    "goVersion": "go1.26.6",
    "compiler": "gc",
    "platform": "linux/amd64",
}
_PATCH_TYPES = ("application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml")
_PART_VERBS = ("get", "patch", "update")


def api_versions(address: str) -> Json:
    """GET /api."""
    near = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": near}


def group_list() -> Json:
    """GET /apis."""
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(*pair) for pair in groups() if pair[0]]}


def _group(group: str, version: str) -> Json:
    entry = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [entry], "preferredVersion": entry}


def group(name: str) -> Json | None:
    """GET /apis/GROUP."""
    version = dict(groups()).get(name) if name else None
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, version)} if version else None


def resource_list(base: str) -> Json | None:
    """GET /api/v1 or /apis/GROUP/VERSION."""
    served = [resource for resource in RESOURCES if resource.base == base]
    if not served:
        return None
    entries: list[Json] = []
    for resource in served:
        entry: Json = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": list(resource.verbs),
        }
        if resource.short:
            entry["shortNames"] = list(resource.short)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        entries.append(entry)
        for part, group_name, its_version, kind in _parts(resource):
            entry = {"name": f"{resource.plural}/{part}", "singularName": "", "namespaced": resource.namespaced}
            if group_name:
                entry |= {"group": group_name, "version": its_version}
            entries.append({**entry, "kind": kind, "verbs": list(_PART_VERBS)})
    version = {"apiVersion": "v1"} if served[0].group else {}
    return {"kind": "APIResourceList", **version, "groupVersion": served[0].api_version, "resources": entries}


def _parts(resource: Resource) -> list[tuple[str, str, str, str]]:
    parts = [("scale", "autoscaling", "v1", "Scale")] if resource.scale else []
    return parts + ([("status", "", "", resource.kind)] if resource.status else [])


def aggregated(*, core: bool) -> Json:
    """GET /api (`core`) or /apis, as the aggregated discovery document."""
    items = []
    for name, version in groups():
        if bool(name) is core:
            continue
        served = [resource for resource in RESOURCES if (resource.group, resource.version) == (name, version)]
        listed = {"version": version, "resources": [_aggregated(resource) for resource in served]}
        meta = {"name": name} if name else {}
        items.append({"metadata": meta, "versions": [{**listed, "freshness": "Current"}]})
    return {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}


def _aggregated(resource: Resource) -> Json:
    entry: Json = {
        "resource": resource.plural,
        "responseKind": {"group": "", "version": "", "kind": resource.kind},
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.singular,
        "verbs": list(resource.verbs),
    }
    if resource.short:
        entry["shortNames"] = list(resource.short)
    if resource.categories:
        entry["categories"] = list(resource.categories)
    parts = [
        {
            "subresource": part,
            "responseKind": {"group": group_name, "version": version, "kind": kind},
            "verbs": list(_PART_VERBS),
        }
        for part, group_name, version, kind in _parts(resource)
    ]
    return {**entry, "subresources": parts} if parts else entry


def openapi_index() -> Json:
    """GET /openapi/v3."""
    bases = dict.fromkeys(resource.base for resource in RESOURCES)
    return {
        "paths": {base.lstrip("/"): {"serverRelativeURL": f"/openapi/v3{base}?hash={_hash(base)}"} for base in bases}
    }


def openapi(base: str, *, schemas: Json | None = None) -> Json | None:
    """GET /openapi/v3/GROUP/VERSION: the operations, from which kubectl learns what a PATCH may carry.

    Strategic merge is not named: kubectl would merge by the schemas, and they tell of the fields in use only; it merges
    by the types that are compiled into it then.
    """
    served = [resource for resource in RESOURCES if resource.base == base]
    if not served:
        return None
    paths: Json = {}
    for resource in served:
        scope = "/namespaces/{namespace}" if resource.namespaced else ""
        path = f"{base}{scope}/{resource.plural}"
        kind = {"group": resource.group, "version": resource.version, "kind": resource.kind}
        paths[path] = {"post": _operation("post", kind, ("application/json",))}
        paths[f"{path}/{{name}}"] = {
            "get": {"x-kubernetes-action": "get", "x-kubernetes-group-version-kind": kind, "responses": {}},
            "put": _operation("put", kind, ("application/json",)),
            "patch": _operation("patch", kind, _PATCH_TYPES),
        }
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas or {}}}


def _operation(action: str, kind: Json, types: tuple[str, ...]) -> Json:
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
        for name in ("dryRun", "fieldManager", "fieldValidation", "force")
    ]
    return {
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": kind,
        "parameters": parameters,
        "requestBody": {"content": {name: {"schema": {}} for name in types}},
        "responses": {},
    }


def _hash(base: str) -> str:
    return hashlib.sha512(f"{base} {sorted(resource.plural for resource in RESOURCES)}".encode()).hexdigest().upper()
