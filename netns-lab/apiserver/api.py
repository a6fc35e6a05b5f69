"""What the verbs do: admission of objects, and their way into the store. Knows no HTTP."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable
from typing import Any

from apiserver import allocation, errors, kinds, patches
from apiserver.resources import BY_KIND, NAMED, RESOURCES, Resource
from apiserver.store import Store, now

Json = dict[str, Any]
NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


class Api:
    """The verbs over one store."""

    def __init__(self, store: Store, allocator: allocation.Allocator) -> None:
        self.store = store
        self._allocator = allocator
        self._applied: dict[str, dict[str, Json]] = {}  # uid → manager → what it applied last
        for name in NAMESPACES:
            self.ensure_namespace(name)

    def ensure_namespace(self, name: str) -> None:
        """Make a namespace unless it is there."""
        space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        try:
            self.store.get(NAMED["namespaces"], "", name)
        except errors.ApiError:
            self.store.create(NAMED["namespaces"], kinds.with_defaults(NAMED["namespaces"], space))

    def put(self, obj: Json) -> Json:
        """Store an object as it is, new or changed, its namespace made where missing: for tests and for controllers."""
        resource = BY_KIND[obj["apiVersion"], obj["kind"]]
        meta = dict(obj["metadata"])
        if resource.namespaced:
            meta.setdefault("namespace", "default")
            self.ensure_namespace(meta["namespace"])
        with self.store.changed:
            try:
                self.store.get(resource, meta.get("namespace", ""), meta["name"])
            except errors.ApiError:
                return self.store.create(resource, {**obj, "metadata": meta})
            meta.pop("resourceVersion", None)
            return self.store.update(resource, {**obj, "metadata": meta})

    def create(
        self, resource: Resource, namespace: str, body: Json, *, dry: bool = False, strict: bool = False
    ) -> Json:
        """POST."""
        obj = kinds.named(self._addressed(resource, namespace, "", body))
        self._strict(obj, strict)
        if resource.namespaced:
            self.store.get(NAMED["namespaces"], "", namespace)
        if resource.kind in ("Service", "Pod"):
            obj = {key: value for key, value in obj.items() if key != "status"}
        with self.store.changed:
            obj = self._admitted(resource, obj, None)
            if dry:
                if any(
                    known["metadata"]["name"] == obj["metadata"]["name"]
                    for known in self.store.all(resource, namespace)
                ):
                    raise errors.already_exists(resource.group, resource.plural, obj["metadata"]["name"])
                return {**obj, "metadata": {**obj["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": now()}}
            return self.store.create(resource, obj)

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        body: Json,
        *,
        part: str = "",
        dry: bool = False,
        strict: bool = False,
    ) -> Json:
        """PUT, of the object or of its `status` or `scale`."""
        with self.store.changed:
            known = self.store.get(resource, namespace, name)
            if part == "scale":
                body = _scaled(known, body)
            obj = self._addressed(resource, namespace, name, body)
            self._strict(obj, strict)
            if obj["metadata"].get("uid") not in (None, known["metadata"]["uid"]):
                raise errors.conflict(resource.group, resource.plural, name)
            if part == "status":
                obj = {**known, "metadata": obj["metadata"], "status": obj.get("status") or {}}
            elif resource.status:
                obj = {key: value for key, value in obj.items() if key != "status"}
                if "status" in known:
                    obj["status"] = known["status"]
            if part != "status":
                obj = self._admitted(resource, obj, known)
            if dry:
                return obj
            return self.store.update(resource, obj, status=part == "status")

    def patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        content_type: str,
        patch: Any,
        *,
        part: str = "",
        manager: str = "",
        force: bool = False,
        dry: bool = False,
        strict: bool = False,
    ) -> tuple[Json, bool]:
        """PATCH; return the object, and whether it is new (an apply may create)."""
        with self.store.changed:
            if content_type == "application/apply-patch+yaml":
                options: Json = {"part": part, "manager": manager, "force": force, "dry": dry, "strict": strict}
                return self._apply(resource, namespace, name, patch, **options)
            known = self.store.get(resource, namespace, name)
            shown = scale_of(known) if part == "scale" else known
            if content_type == "application/json-patch+json":
                changed = patches.json_patch(shown, patch)
            elif content_type == "application/merge-patch+json":
                changed = patches.merge(shown, patch)
            elif content_type == "application/strategic-merge-patch+json":
                changed = patches.strategic(resource.kind, shown, patch)
            else:
                raise errors.ApiError(
                    415, "UnsupportedMediaType", f"the body of the request was in an unknown format - {content_type}"
                )
            if part != "scale" and isinstance(patch, dict) and "resourceVersion" not in (patch.get("metadata") or {}):
                changed["metadata"] = {**changed["metadata"], "resourceVersion": known["metadata"]["resourceVersion"]}
            return self.update(resource, namespace, name, changed, part=part, dry=dry, strict=strict), False

    def _apply(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        config: Json,
        *,
        part: str,
        manager: str,
        force: bool,
        dry: bool,
        strict: bool,
    ) -> tuple[Json, bool]:
        try:
            known = self.store.get(resource, namespace, name)
        except errors.ApiError:
            made = self.create(resource, namespace, config, dry=dry, strict=strict)
            if not dry:
                self._applied[made["metadata"]["uid"]] = {manager: copy.deepcopy(config)}
            return made, True
        managers = self._applied.setdefault(known["metadata"]["uid"], {})
        others = {each: theirs for each, theirs in managers.items() if each != manager}
        found = {each: patches.contested(resource.kind, config, theirs) for each, theirs in others.items()}
        if not force and any(found.values()):
            raise errors.contested({each: [path for path, _, _ in fields] for each, fields in found.items() if fields})
        changed = patches.applied(resource.kind, known, managers.get(manager, {}), config)
        result = self.update(resource, namespace, name, changed, part=part, dry=dry, strict=strict)
        if not dry:
            managers[manager] = copy.deepcopy(config)
            for _, theirs, field in (each for fields in found.values() for each in fields):
                del theirs[field]  # it is ours now
        return result, False

    def delete(
        self, resource: Resource, namespace: str, name: str, options: Json, *, dry: bool = False
    ) -> tuple[Json, bool]:
        """DELETE; return the object as it is then, and whether it is gone."""
        with self.store.changed:
            known = self.store.get(resource, namespace, name)
            wanted = options.get("preconditions") or {}
            for field in ("uid", "resourceVersion"):
                if wanted.get(field) and wanted[field] != known["metadata"][field]:
                    raise errors.conflict(resource.group, resource.plural, name)
            if dry:
                return known, True
            grace = _grace(resource, known, options)
            if grace or known["metadata"].get("finalizers"):
                return self.store.mark_deleted(resource, namespace, name, grace), False
            gone = self.store.delete(resource, namespace, name)
            self._applied.pop(known["metadata"]["uid"], None)
            if options.get("propagationPolicy") != "Orphan":
                self._collect(resource, known)
            return gone, True

    def delete_all(self, resource: Resource, chosen: Iterable[Json], options: Json) -> list[Json]:
        """DELETE of a collection."""
        return [
            self.delete(resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], options)[0]
            for obj in chosen
        ]

    def _collect(self, resource: Resource, owner: Json) -> None:
        """Delete what the deleted object owned: by ownerReferences, and a namespace's contents."""
        uid, name = owner["metadata"]["uid"], owner["metadata"]["name"]
        for other in RESOURCES:
            for obj in self.store.all(other):
                meta = obj["metadata"]
                owned = any(reference.get("uid") == uid for reference in meta.get("ownerReferences") or ())
                within = resource.kind == "Namespace" and meta.get("namespace") == name
                if owned or within:
                    self.delete(other, meta.get("namespace", ""), meta["name"], {"gracePeriodSeconds": 0})

    def _addressed(self, resource: Resource, namespace: str, name: str, body: Json) -> Json:
        """Return the body with what the path says. Raise 400 where both say something different."""
        if not isinstance(body, dict) or not isinstance(body.get("metadata", {}), dict):
            raise errors.bad_request("the object provided is unrecognized: expected a JSON object with metadata")
        found = (body.get("apiVersion", resource.api_version), body.get("kind", resource.kind))
        if found != (resource.api_version, resource.kind):
            raise errors.bad_request(
                f"{found[1]} in version {found[0]!r} cannot be handled as a {resource.kind}: "
                f"expected {resource.api_version} {resource.kind}"
            )
        meta = dict(body.get("metadata") or {})
        if name and meta.setdefault("name", name) != name:
            text = f"the name of the object ({meta['name']}) does not match the name on the URL ({name})"
            raise errors.bad_request(text)
        if resource.namespaced:
            if meta.get("namespace") not in (None, "", namespace):
                raise errors.bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request"
                )
            meta["namespace"] = namespace
        meta.pop("managedFields", None)
        return {**body, "apiVersion": resource.api_version, "kind": resource.kind, "metadata": meta}

    def _strict(self, obj: Json, strict: bool) -> None:
        unknown = kinds.unknown_fields(obj) if strict else []
        if unknown:
            listed = ", ".join(f'unknown field "{path}"' for path in unknown)
            version = obj["apiVersion"].rpartition("/")[2]
            text = f'{obj["kind"]} in version "{version}" cannot be handled as a {obj["kind"]}'
            raise errors.bad_request(f"{text}: strict decoding error: {listed}")

    def _admitted(self, resource: Resource, obj: Json, known: Json | None) -> Json:
        """Return the object as it is to be stored. Raise 422."""
        if resource.kind != "Service":
            if resource.kind == "EndpointSlice" and known and known.get("addressType") != obj.get("addressType"):
                text = f'Invalid value: "{obj.get("addressType")}": field is immutable'
                name = obj["metadata"]["name"]
                raise errors.invalid(resource.group, resource.kind, name, [errors.Cause("addressType", text)])
            obj = kinds.with_defaults(resource, obj)
            kinds.check(resource, obj)
            return obj
        kinds.check(resource, obj)
        uid = known["metadata"]["uid"] if known else None
        others = [other for other in self.store.all(resource) if other["metadata"]["uid"] != uid]
        return allocation.admitted(obj, known, others, self._allocator)


def scale_of(obj: Json) -> Json:
    """Return the `scale` of a Deployment and the like."""
    spec, status, meta = obj.get("spec") or {}, obj.get("status") or {}, obj["metadata"]
    chosen = (spec.get("selector") or {}).get("matchLabels") or {}
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {field: meta[field] for field in kept if field in meta},
        "spec": {"replicas": spec.get("replicas", 1)},
        "status": {
            "replicas": status.get("replicas", 0),
            "selector": ",".join(f"{key}={value}" for key, value in sorted(chosen.items())),
        },
    }


def _scaled(known: Json, scale: Json) -> Json:
    spec = {**(known.get("spec") or {}), "replicas": int((scale.get("spec") or {}).get("replicas", 0))}
    meta = dict(known["metadata"])
    wanted = (scale.get("metadata") or {}).get("resourceVersion")
    if wanted:
        meta["resourceVersion"] = wanted
    return {**known, "metadata": meta, "spec": spec}


def _grace(resource: Resource, obj: Json, options: Json) -> int:
    """Return how long a pod lives after its deletion, seconds: only one that runs on a node does."""
    spec = obj.get("spec") or {}
    if resource.kind != "Pod" or not spec.get("nodeName"):
        return 0
    if (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    asked = options.get("gracePeriodSeconds")
    return int(spec.get("terminationGracePeriodSeconds", 30) if asked is None else asked)
