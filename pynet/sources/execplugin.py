"""Exec plugins: programs that a kubeconfig names to give credentials (client.authentication.k8s.io).

Knows how one is asked and what it may answer; knows neither files nor connections. Ours, as the official client's
waits for a plugin for ever, hands it our standard input, and tells it of the cluster what is not in the API.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from pynet.daemon import logs

log = logs.get(__name__)
SLOW = 10.0  # seconds without an answer after which that is told
LIMIT = 60.0  # and after which the plugin is ended, to be asked anew
VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
_OF_CLUSTER = ("server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data", "proxy-url",
               "disable-compression")  # fmt: skip
_CONFIG = "client.authentication.k8s.io/exec"  # the extension of a cluster that is meant for plugins
Json = dict[str, Any]


class PluginFailed(Exception):
    """A plugin gave no credentials; the message says why, beginning with the field where one is at fault."""


class Given(msgspec.Struct, frozen=True):
    """What an exec plugin gave. `certificate` and `key`: PEM, both or neither."""

    token: str = ""
    certificate: str = ""
    key: str = ""
    expiry: datetime | None = None


def ask(plugin: Json, cluster: Json, folder: Path, *, slow: float = SLOW, limit: float = LIMIT) -> Given:
    """Return what a user's plugin gives for a cluster; it runs in `folder`. Raise `PluginFailed`."""
    command = [str(plugin["command"]), *map(str, plugin.get("args") or ())]
    try:
        own = {str(each["name"]): str(each["value"]) for each in plugin.get("env") or ()}
    except (TypeError, KeyError) as error:
        raise PluginFailed(f".env: expected a list of name and value: {error!r}") from None
    info = json.dumps(request(plugin, cluster, folder))
    text = run(command, {**os.environ, **own, "KUBERNETES_EXEC_INFO": info}, folder, slow, limit)
    try:
        return given(text, plugin["apiVersion"])
    except PluginFailed as error:
        raise PluginFailed(f": {command[0]!r}: {error}") from None


def request(plugin: Json, cluster: Json, folder: Path) -> Json:
    """Return the ExecCredential that a plugin is given."""
    spec: Json = {"interactive": False}
    if plugin.get("provideClusterInfo"):
        told = {key: cluster[key] for key in _OF_CLUSTER if cluster.get(key)}
        if (path := cluster.get("certificate-authority")) and "certificate-authority-data" not in told:
            told["certificate-authority-data"] = base64.b64encode((folder / path).read_bytes()).decode()
        for each in cluster.get("extensions") or ():
            if each.get("name") == _CONFIG:
                told["config"] = each.get("extension")
        spec["cluster"] = told
    return {"apiVersion": plugin["apiVersion"], "kind": "ExecCredential", "spec": spec}


def run(command: list[str], environment: dict[str, str], folder: Path, slow: float, limit: float) -> str:
    """Return a plugin's output; it is ended with all it has started when it takes longer than `limit` seconds."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            try:
                said, complaint = process.communicate(timeout=min(slow, limit))
            except subprocess.TimeoutExpired:
                log.warning("exec plugin has not answered yet", extra=logs.fields(command=command[0], limit=limit))
                said, complaint = process.communicate(timeout=max(limit - slow, 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise PluginFailed(f": {command[0]!r}: no answer within {limit:.0f} s, it was ended") from None
    if process.returncode:
        told = " ".join(complaint.split())[-500:]
        raise PluginFailed(f": {command[0]!r}: process returned {process.returncode}{f'. {told}' if told else ''}")
    return said


def given(text: str, version: str) -> Given:
    """Return what a plugin's output gives. Raise `PluginFailed`."""
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise PluginFailed(f"failed to decode process output: {error}") from None
    if not isinstance(answer, dict):
        raise PluginFailed("malformed response: expected an ExecCredential")
    if answer.get("apiVersion") != version:
        raise PluginFailed(f"plugin api version {answer.get('apiVersion')} does not match {version}")
    status = answer.get("status")
    if not isinstance(status, dict):
        raise PluginFailed("status: expected an object")
    token, certificate, key = (status.get(each) for each in ("token", "clientCertificateData", "clientKeyData"))
    if not (token or certificate) or bool(certificate) != bool(key):
        raise PluginFailed(
            "gave no credentials: expected status.token, or status.clientCertificateData with status.clientKeyData"
        )
    expiry = None
    if until := status.get("expirationTimestamp"):
        try:
            expiry = datetime.fromisoformat(str(until))
        except ValueError:
            raise PluginFailed(f"status.expirationTimestamp: {until!r} is no time") from None
        expiry = expiry if expiry.tzinfo else expiry.replace(tzinfo=UTC)
    return Given(str(token or ""), str(certificate or ""), str(key or ""), expiry)
