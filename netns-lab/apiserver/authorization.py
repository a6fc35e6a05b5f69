"""Who may do what: the cluster's own ClusterRoles and ClusterRoleBindings, as kube-apiserver's RBAC reads them.

Known are rules of groups, resources and verbs, bound to users, groups and service accounts. A user without a name, and
one of `system:masters`, may do everything.
"""

from __future__ import annotations

from typing import Any

from apiserver.errors import ApiError
from apiserver.resources import NAMED
from apiserver.store import Store

Json = dict[str, Any]
MASTERS = "system:masters"
_ACCOUNT = "system:serviceaccount:"


def forbid(store: Store, user: str, verb: str, group: str, plural: str, namespace: str, part: str = "") -> None:
    """Raise 403 where no rule allows `user` the request."""
    if user in ("", MASTERS):
        return
    resource = f"{plural}/{part}" if part else plural
    roles = {each["metadata"]["name"]: each.get("rules") or () for each in store.all(NAMED["clusterroles"])}
    for binding in store.all(NAMED["clusterrolebindings"]):
        if any(_is(subject, user) for subject in binding.get("subjects") or ()):
            for rule in roles.get(binding["roleRef"]["name"], ()):
                if allows(rule, verb, group, resource):
                    return
    where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    message = f'{plural} is forbidden: User "{user}" cannot {verb} resource "{resource}" in API group "{group}" {where}'
    raise ApiError(403, "Forbidden", message, {"kind": plural, **({"group": group} if group else {})})


def allows(rule: Json, verb: str, group: str, resource: str) -> bool:
    """Return whether one rule allows a request of any name."""
    asked = {"verbs": verb, "apiGroups": group, "resources": resource}
    return not rule.get("resourceNames") and all(
        value in (named := rule.get(field) or ()) or "*" in named for field, value in asked.items()
    )


def _is(subject: Json, user: str) -> bool:
    if subject["kind"] == "ServiceAccount":
        return user == f"{_ACCOUNT}{subject.get('namespace', '')}:{subject['name']}"
    groups = {"system:authenticated"} | ({"system:serviceaccounts"} if user.startswith(_ACCOUNT) else set())
    return subject["name"] in ({user} if subject["kind"] == "User" else groups)
