"""The schemas that `kubectl explain` reads, made of `schemas.yaml`. Pure but for reading it.

They tell of the fields that the lab acts on; nothing is validated or merged by them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from apiserver.resources import Resource

Json = dict[str, Any]
_META = {
    "name": "string: unique among its kind and namespace",
    "namespace": "string: the space that its name is unique in",
    "labels": "map: what selectors look at",
    "annotations": "map: what programs keep with it",
    "uid": "string: of this object only, never again",
    "resourceVersion": "string: changes with every change",
    "creationTimestamp": "string: when it was made",
    "deletionTimestamp": "string: when it is to be gone",
    "generateName": "string: the beginning of a name to be made up",
}
_TYPES: dict[str, Json] = {
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
    "[string]": {"type": "array", "items": {"type": "string"}},
    "IntOrString": {"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]},
}


@functools.cache
def _told() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text())
    return told


def schemas(resources: list[Resource]) -> Json:
    """Return components.schemas of those resources that something is told of."""
    found: Json = {}
    for resource in resources:
        if resource.kind not in _told():
            continue
        fields = {
            "apiVersion": "string: group and version of the kind",
            "kind": "string: the kind",
            "metadata": _META,
            **_told()[resource.kind],
        }
        group = resource.group.split(".")[0] or "core"
        found[f"io.k8s.api.{group}.{resource.version}.{resource.kind}"] = {
            **_schema(fields),
            "x-kubernetes-group-version-kind": [
                {"group": resource.group, "version": resource.version, "kind": resource.kind}
            ],
        }
    return found


def _schema(told: Any) -> Json:
    """Return the schema of a field: of an object from its fields, else from "TYPE: description"."""
    if isinstance(told, str):
        kind, _, about = told.partition(": ")
        schema = _TYPES.get(kind, {"type": kind})
        return {**schema, "description": about} if about else schema
    properties = {
        name.removesuffix("[]"): {"type": "array", "items": _schema(each)} if name.endswith("[]") else _schema(each)
        for name, each in told.items()
        if name != "_"
    }
    described = {"description": told["_"]} if "_" in told else {}
    return {"type": "object", **described, "properties": properties}
