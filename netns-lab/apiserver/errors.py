"""How the API says no: meta/v1 Status, with the texts of kube-apiserver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cause:
    """One field that is wrong."""

    field: str
    message: str
    reason: str = "FieldValueInvalid"

    def shown(self) -> dict[str, str]:
        """Return it as a Status carries it."""
        return {"reason": self.reason, "message": self.message, "field": self.field}


@dataclass
class ApiError(Exception):
    """An answer other than 2xx."""

    code: int
    reason: str
    message: str
    details: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        """Return the Status object."""
        body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
        }
        if self.reason:
            body["reason"] = self.reason
        if self.details:
            body["details"] = self.details
        return {**body, "code": self.code}


def _details(group: str, plural: str, name: str) -> dict[str, Any]:
    return {"name": name, **({"group": group} if group else {}), "kind": plural}


def _qualified(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


def not_found(group: str, plural: str, name: str) -> ApiError:
    """404."""
    text = f'{_qualified(group, plural)} "{name}" not found'
    return ApiError(404, "NotFound", text, _details(group, plural, name))


def no_such_path() -> ApiError:
    """404 for a resource that is not served."""
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(group: str, plural: str, name: str) -> ApiError:
    """409 of a POST."""
    text = f'{_qualified(group, plural)} "{name}" already exists'
    return ApiError(409, "AlreadyExists", text, _details(group, plural, name))


def conflict(group: str, plural: str, name: str) -> ApiError:
    """409 of an update that started from an older version."""
    text = (
        f'Operation cannot be fulfilled on {_qualified(group, plural)} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    return ApiError(409, "Conflict", text, _details(group, plural, name))


def contested(fields: dict[str, list[str]]) -> ApiError:
    """409: others have applied other values; `fields`: theirs, by manager."""
    causes = [
        Cause(path, f'conflict with "{manager}"', "FieldManagerConflict")
        for manager, paths in fields.items()
        for path in paths
    ]
    if len(causes) == 1:
        told = f"{causes[0].message}: {causes[0].field}"
    else:
        told = "\n".join(
            f'conflicts with "{manager}":\n' + "\n".join(f"- {path}" for path in paths)
            for manager, paths in fields.items()
        )
    message = f"Apply failed with {len(causes)} conflict{'s' if len(causes) > 1 else ''}: {told}"
    return ApiError(409, "Conflict", message, {"causes": [cause.shown() for cause in causes]})


def invalid(group: str, kind: str, name: str, causes: list[Cause]) -> ApiError:
    """422: fields of an object are wrong."""
    texts = [f"{cause.field}: {cause.message}" for cause in causes]
    whole = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    qualified = f"{kind}.{group}" if group else kind
    details = {
        "name": name,
        **({"group": group} if group else {}),
        "kind": kind,
        "causes": [cause.shown() for cause in causes],
    }
    return ApiError(422, "Invalid", f'{qualified} "{name}" is invalid: {whole}', details)


def bad_request(message: str) -> ApiError:
    """400."""
    return ApiError(400, "BadRequest", message)


def unauthorized() -> ApiError:
    """401."""
    return ApiError(401, "Unauthorized", "Unauthorized")


def expired(message: str) -> ApiError:
    """410."""
    return ApiError(410, "Expired", message)


def too_large_version(asked: int, current: int) -> ApiError:
    """504: a version of the future."""
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    return ApiError(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {asked}, current: {current}",
        {"causes": [cause], "retryAfterSeconds": 1},
        {"Retry-After": "1"},
    )
