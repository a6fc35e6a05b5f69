"""Who we are to an API server, and where it is: kubeconfig, flags, or the pod's service account.

The official client package reads them (it alone knows exec plugins, certificates and proxies whole). Ours is to notice
that they changed: rotated tokens and certificates, expired exec credentials, a 401. Then all is read anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import yaml

_EXPIRES_EARLY = timedelta(seconds=10)
_FILE_FIELDS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")


class BadCredentials(ValueError):
    """Credentials or address cannot be had; the message names the file and the field."""


class Login(msgspec.Struct, frozen=True):
    """Address and credentials as they were read at one time.

    `configuration`: the official client's. `number`: grows with each reading. `files`: what was read, with the state
    it had. `expiry`: when an exec plugin's credentials end.
    """

    number: int
    configuration: Any
    files: tuple[tuple[str, object], ...]
    expiry: datetime | None


class Credentials:
    """Address and credentials, always those of now. Safe to use from many threads."""

    def __init__(
        self, kubeconfig: Path | None = None, master: str | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        self._kubeconfig = kubeconfig
        self._master = master
        self._environ = os.environ if environ is None else environ
        self._lock = threading.Lock()
        self._login: Login | None = None
        self._refused = 0

    def login(self) -> Login:
        """Return what holds now, read anew where a file changed, time ran out or the server refused.

        Raise `BadCredentials`.
        """
        with self._lock:
            known = self._login
            if known is None or known.number <= self._refused or _expired(known) or _changed(known.files):
                self._login = known = self._read(known.number + 1 if known else 1)
            return known

    def refused(self, login: Login) -> None:
        """Say that the server answered 401 to `login`: the next one is read anew."""
        with self._lock:
            self._refused = max(self._refused, login.number)

    def _read(self, number: int) -> Login:
        from kubernetes.client import Configuration
        from kubernetes.config import ConfigException

        configuration = Configuration()
        try:
            if self._kubeconfig is not None:
                expiry, names = _from_kubeconfig(self._kubeconfig, configuration)
            elif self._master:
                expiry, names = None, ()
            else:
                expiry, names = None, _from_pod(self._environ, configuration)
        except ConfigException as error:
            raise BadCredentials(f"{self._kubeconfig or 'in-cluster configuration'}: {error}") from None
        except (OSError, yaml.YAMLError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, BadCredentials):
                raise
            raise BadCredentials(f"{self._kubeconfig or 'in-cluster configuration'}: {error}") from None
        if self._master:
            configuration.host = self._master.rstrip("/")
            if "://" not in configuration.host:
                configuration.host = f"http://{configuration.host}"
        # The package would refresh by itself five minutes before the end, each time it is asked; `login` knows better.
        configuration.refresh_api_key_hook = None
        token = configuration.api_key.get("BearerToken")
        if token:
            configuration.api_key["BearerToken"] = token.strip()
        return Login(number, configuration, tuple((name, _state(name)) for name in names), expiry)


def _from_pod(environ: Mapping[str, str], configuration: Any) -> tuple[str, ...]:
    from kubernetes.config import incluster_config

    token, authority = incluster_config.SERVICE_TOKEN_FILENAME, incluster_config.SERVICE_CERT_FILENAME
    incluster_config.InClusterConfigLoader(
        token_filename=token, cert_filename=authority, environ=environ, try_refresh_token=False
    ).load_and_set(configuration)
    return (str(token), str(authority))


def _from_kubeconfig(path: Path, configuration: Any) -> tuple[datetime | None, tuple[str, ...]]:
    """Fill `configuration`; return when the credentials end and every file that was read."""
    from kubernetes.config.kube_config import KubeConfigLoader

    document = yaml.load(path.read_bytes(), yaml.CSafeLoader)
    if not isinstance(document, dict):
        raise BadCredentials(f"{path}: expected a kubeconfig, found {type(document).__name__}")
    if not document.get("current-context"):
        raise BadCredentials(f"{path}: current-context: missing")
    base = path.resolve().parent
    cluster, user = _chosen(document, path)
    if user.get("tokenFile"):
        user.pop("token", None)  # as client-go has it: the file is the newer word
    names = [str(path)] + [
        str(base / section[field]) for section in (cluster, user) for field in _FILE_FIELDS if section.get(field)
    ]
    loader = KubeConfigLoader(document, config_base_path=str(base))
    loader.load_and_set(configuration)
    if "exec" in user and "token" not in vars(loader) and not vars(loader).get("cert_file"):
        raise BadCredentials(f"{path}: user exec: {user['exec'].get('command')!r} gave no credentials")
    expiry = vars(loader).get("expiry")
    return (expiry if isinstance(expiry, datetime) else None), tuple(names)


def _chosen(document: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return cluster and user of the current context, as they stand in `document`."""
    context = _named(document, "contexts", str(document["current-context"]), "context", path)
    cluster = _named(document, "clusters", str(context.get("cluster")), "cluster", path)
    user = _named(document, "users", str(context["user"]), "user", path) if context.get("user") else {}
    return cluster, user


def _named(document: dict[str, Any], section: str, name: str, field: str, path: Path) -> dict[str, Any]:
    for entry in document.get(section) or ():
        if isinstance(entry, dict) and entry.get("name") == name:
            value = entry.get(field) or {}
            if isinstance(value, dict):
                return value
    raise BadCredentials(f"{path}: {section}: none is named {name!r}")


def _state(name: str) -> object:
    """Return what changes when a file does, also when a symlink in its path is turned (as the kubelet rotates)."""
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _changed(files: tuple[tuple[str, object], ...]) -> bool:
    return any(_state(name) != state for name, state in files)


def _expired(login: Login) -> bool:
    if login.expiry is None:
        return False
    expiry = login.expiry if login.expiry.tzinfo else login.expiry.replace(tzinfo=UTC)
    return datetime.now(UTC) >= expiry - _EXPIRES_EARLY
