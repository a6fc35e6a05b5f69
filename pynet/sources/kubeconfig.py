"""A kubeconfig's current context: cluster and user, checked, so that whatever is wrong is named by file and field.

Pure but for `plugin`, which runs an exec plugin. What the fields mean to a connection the official client knows.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from pynet.sources.execplugin import VERSIONS, Given, PluginFailed, ask

FILE_FIELDS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
_PAIR = ("client-certificate", "client-key")
Json = dict[str, Any]


class BadCredentials(ValueError):
    """Credentials or address cannot be had; the message names the file and the field."""


class Chosen(msgspec.Struct, frozen=True):
    """What the current context names. `cluster_at`, `user_at`: file and field of each, for messages."""

    document: Json
    cluster: Json
    user: Json
    cluster_at: str
    user_at: str


def read(path: Path, master: str | None = None) -> Chosen:
    """Return cluster and user of a file's current context; `master` stands for a server. Raise `BadCredentials`."""
    try:
        document = yaml.load(path.read_bytes(), yaml.CSafeLoader)
    except (OSError, yaml.YAMLError) as error:
        raise BadCredentials(f"kubeconfig {path}: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise BadCredentials(f"kubeconfig {path}: expected a kubeconfig, found {type(document).__name__}")
    current = document.get("current-context")
    if not current:
        raise BadCredentials(f"kubeconfig {path}: current-context: missing")
    context, context_at = _named(document, "contexts", current, "context", path)
    if not context.get("cluster"):
        raise BadCredentials(f"{context_at}.cluster: missing")
    cluster, cluster_at = _named(document, "clusters", context["cluster"], "cluster", path)
    user: Json = {}
    user_at = f"{context_at}.user"
    if context.get("user"):
        user, user_at = _named(document, "users", context["user"], "user", path)
    if master:
        cluster["server"] = address(master, "--master")
    elif not cluster.get("server"):
        raise BadCredentials(f"{cluster_at}.server: missing")
    secure = bool(cluster.get("certificate-authority") or cluster.get("certificate-authority-data"))
    cluster["server"] = address(cluster["server"], f"{cluster_at}.server", "https" if secure else "http")
    _check(cluster, cluster_at)
    _check(user, user_at)
    return Chosen(document, cluster, user, cluster_at, user_at)


def address(text: Any, where: str, scheme: str = "http") -> str:
    """Return an API server's address with its scheme. Raise `BadCredentials`."""
    url = str(text).strip().rstrip("/")
    if "://" not in url:
        url = f"{scheme}://{url}"
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        right = False
    if not right or re.search(r"\s", url):
        raise BadCredentials(f"{where}: {text!r} is no address: expected as in https://10.0.0.1:6443")
    return url


def plugin(chosen: Chosen, folder: Path) -> Given:
    """Return what the user's exec plugin gives; it runs in `folder`. Raise `BadCredentials`."""
    wanted = chosen.user["exec"]
    where = f"{chosen.user_at}.exec"
    try:
        return ask(wanted, chosen.cluster, folder)
    except PluginFailed as error:
        raise BadCredentials(f"{where}{error}") from None
    except FileNotFoundError as error:
        hint = f"; {' '.join(str(wanted['installHint']).split())}" if wanted.get("installHint") else ""
        raise BadCredentials(f"{where}.command: {error}{hint}") from None
    except OSError as error:
        raise BadCredentials(f"{where}.command: {error}") from None


def _named(document: Json, section: str, name: Any, field: str, path: Path) -> tuple[Json, str]:
    """Return the entry of that name, and where it stands."""
    entries = document.get(section) or ()
    if not isinstance(entries, list | tuple):
        raise BadCredentials(f"kubeconfig {path}: {section}: expected a list, found {type(entries).__name__}")
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == name:
            where = f"kubeconfig {path}: {section}[{name}].{field}"
            value = entry.get(field)
            if value is None:
                value = entry[field] = {}
            if not isinstance(value, dict):
                raise BadCredentials(f"{where}: expected a mapping, found {type(value).__name__}")
            return value, where
    raise BadCredentials(f"kubeconfig {path}: {section}: none is named {name!r}")


def _check(section: Json, where: str) -> None:
    """Raise `BadCredentials` for fields that cannot be right, whatever is in the files they name."""
    for field in FILE_FIELDS:
        data = section.get(f"{field}-data")
        if data is None:
            continue
        try:
            text = base64.b64decode("".join(str(data).split()), validate=True)
        except binascii.Error as error:
            raise BadCredentials(f"{where}.{field}-data: no base64: {error}") from None
        if b"-----BEGIN " not in text:
            raise BadCredentials(f"{where}.{field}-data: expected PEM within the base64")
    have = [bool(section.get(field) or section.get(f"{field}-data")) for field in _PAIR]
    if any(have) and not all(have):
        raise BadCredentials(f"{where}.{_PAIR[have.index(False)]}: missing beside {_PAIR[have.index(True)]}")
    wanted = section.get("exec")
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        raise BadCredentials(f"{where}.exec: expected a mapping, found {type(wanted).__name__}")
    if not wanted.get("command"):
        raise BadCredentials(f"{where}.exec.command: missing")
    if wanted.get("apiVersion") not in VERSIONS:
        found = wanted.get("apiVersion")
        raise BadCredentials(f"{where}.exec.apiVersion: expected {' or '.join(VERSIONS)}, found {found!r}")
    if wanted.get("interactiveMode") == "Always":
        raise BadCredentials(f"{where}.exec.interactiveMode: 'Always': a daemon has nobody to ask")
