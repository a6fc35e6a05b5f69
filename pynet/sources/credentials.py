"""Who we are to an API server, and where it is: kubeconfig, flags, or the pod's service account.

The official client package reads them (it alone knows exec plugins, certificates and proxies whole). Ours is to notice
that they changed: rotated tokens and certificates, expired exec credentials, a 401. Then all is read anew.
"""

from __future__ import annotations

import os
import ssl
import tempfile
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from pynet.sources import kubeconfig
from pynet.sources.kubeconfig import BadCredentials

_EXPIRES_EARLY = timedelta(seconds=10)


class Login(msgspec.Struct, frozen=True):
    """Address and credentials as they were read at one time.

    `configuration`: the official client's. `number`: grows with each reading. `files`: what was read, with the state
    it had. `expiry`: when an exec plugin's credentials end. `folder`: holds its certificates while this is in use.
    """

    number: int
    configuration: Any
    files: tuple[tuple[str, object], ...]
    expiry: datetime | None
    folder: Any = None


class _Read(msgspec.Struct, frozen=True):
    """What was read: files by name, and of an exec plugin what `Login` keeps."""

    names: tuple[str, ...]
    expiry: datetime | None = None
    folder: Any = None


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

    def check(self) -> None:
        """Raise `BadCredentials` for what no waiting will mend: a kubeconfig without address, context or user."""
        if self._kubeconfig is not None:
            kubeconfig.read(self._kubeconfig, self._master)
        elif self._master:
            kubeconfig.address(self._master, "--master")

    def _read(self, number: int) -> Login:
        from kubernetes.client import Configuration
        from kubernetes.config import ConfigException

        configuration = Configuration()
        where = f"kubeconfig {self._kubeconfig}" if self._kubeconfig else "in-cluster configuration"
        try:
            if self._kubeconfig is not None:
                read = _from_kubeconfig(self._kubeconfig, self._master, configuration)
            elif self._master:
                read = _Read(())
            else:
                read = _Read(_from_pod(self._environ, configuration))
        except BadCredentials:
            raise
        except (ConfigException, OSError, TypeError, ValueError, KeyError) as error:
            raise BadCredentials(f"{where}: {error}") from None
        if self._master:
            configuration.host = kubeconfig.address(self._master, "--master")
        # The package would refresh by itself five minutes before the end, each time it is asked; `login` knows better.
        configuration.refresh_api_key_hook = None
        token = configuration.api_key.get("BearerToken")
        if token:
            configuration.api_key["BearerToken"] = token.strip()
        files = tuple((name, _state(name)) for name in read.names)
        return Login(number, configuration, files, read.expiry, read.folder)


def _from_pod(environ: Mapping[str, str], configuration: Any) -> tuple[str, ...]:
    from kubernetes.config import incluster_config

    token, authority = incluster_config.SERVICE_TOKEN_FILENAME, incluster_config.SERVICE_CERT_FILENAME
    incluster_config.InClusterConfigLoader(
        token_filename=token, cert_filename=authority, environ=environ, try_refresh_token=False
    ).load_and_set(configuration)
    return (str(token), str(authority))


def _from_kubeconfig(path: Path, master: str | None, configuration: Any) -> _Read:
    """Fill `configuration` as the file's current context says."""
    from kubernetes.config.kube_config import KubeConfigLoader

    chosen = kubeconfig.read(path, master)
    cluster, user = chosen.cluster, chosen.user
    base = path.absolute().parent  # not where a link leads: as client-go has it
    if user.get("tokenFile"):
        user.pop("token", None)  # as client-go has it: the file is the newer word
    names = [str(path)]
    for section, where in ((cluster, chosen.cluster_at), (user, chosen.user_at)):
        for field in kubeconfig.FILE_FIELDS:
            if section.get(field) and not section.get(f"{field}-data"):
                names.append(str(base / section[field]))
                if not os.path.isfile(names[-1]):
                    raise BadCredentials(f"{where}.{field}: {names[-1]}: no such file")
    expiry = folder = None
    if user.get("exec") and not (user.get("token") or user.get("tokenFile")):
        given = kubeconfig.plugin(chosen, base)
        expiry = given.expiry
        if given.token:
            user["token"] = given.token
        if given.certificate:
            folder = tempfile.TemporaryDirectory(prefix="pynet-exec-")
            for field, text in (("client-certificate", given.certificate), ("client-key", given.key)):
                user.pop(f"{field}-data", None)
                user[field] = os.path.join(folder.name, field)
                Path(user[field]).write_text(text)
    user.pop("exec", None)
    KubeConfigLoader(chosen.document, config_base_path=str(base)).load_and_set(configuration)
    _check_certificates(configuration, chosen)
    return _Read(tuple(names), expiry, folder)


def _check_certificates(configuration: Any, chosen: kubeconfig.Chosen) -> None:
    """Raise `BadCredentials` for certificates that no connection can be made with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    at = f"{chosen.cluster_at}.certificate-authority"
    try:
        if configuration.ssl_ca_cert:
            context.load_verify_locations(configuration.ssl_ca_cert)
        at = f"{chosen.user_at}.client-certificate with client-key"
        if configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise BadCredentials(f"{at}: {error}") from None


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
    return datetime.now(UTC) >= login.expiry - _EXPIRES_EARLY
