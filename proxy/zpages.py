"""/statusz and /flagz, as the components of Kubernetes have them (KEPs 4827, 4828): text for people, or an object of
the group config.k8s.io as JSON or YAML, where `Accept` asks for it by kind, version and group.

kube-proxy names itself in the first line, and so do we: whoever looks for it finds it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import yaml

from pynet.daemon import lifecycle
from pynet.daemon.http import ByAccept, Reply

_NAME = "kube-proxy"
_GROUP = "config.k8s.io"
_VERSIONS = ("v1alpha1", "v1beta1")  # since Kubernetes 1.35 and 1.36
_WARNING = "Warning: for people to read; the form of this page may change at any time.\n"
_DEPRECATED = ("Warning", f'299 - "{_GROUP}/v1alpha1 is superseded by v1beta1"')
_NOT_ACCEPTABLE = Reply(
    406,
    body=f"not acceptable: expected text/plain, or application/json or application/yaml with g={_GROUP}, "
    f"v={' or v='.join(_VERSIONS)} and as=Statusz (Flagz)\n".encode(),
)


def uptime(seconds: float) -> str:
    """Return a time span as /statusz spells it."""
    whole = int(seconds)
    return f"{whole // 3600} hr {whole // 60 % 60:02} min {whole % 60:02} sec"


def page(accept: str, kind: str, text: str, fields: Mapping[str, Any]) -> Reply:
    """Return a page in the form that `accept` (the request's header) likes best: `text`, or `fields` as an object."""
    for media, parameters in _liked(accept or "*/*"):
        if media in ("*/*", "text/*", "text/plain") and parameters in ({}, {"charset": "utf-8"}):
            return Reply(200, body=f"\n{_NAME} {kind.lower()}\n{_WARNING}\n{text}".encode())
        version = parameters.get("v", "")
        is_ours = parameters == {"as": kind, "g": _GROUP, "v": version} and version in _VERSIONS
        if not is_ours or media not in ("application/json", "application/yaml"):
            continue
        document = {"kind": kind, "apiVersion": f"{_GROUP}/{version}", "metadata": {"name": _NAME}, **fields}
        is_json = media == "application/json"
        body = msgspec.json.encode(document) if is_json else yaml.safe_dump(document, sort_keys=False).encode()
        return Reply(200, media, body + b"\n", (_DEPRECATED,) if version != _VERSIONS[-1] else ())
    return _NOT_ACCEPTABLE


def _liked(accept: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the media types of an Accept header with their parameters, best liked first (RFC 9110, 12.5.1)."""
    found = []
    for entry in accept.split(","):
        media, *rest = (part.strip() for part in entry.split(";"))
        pairs = (part.partition("=") for part in rest if part)
        parameters = {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 0.0
        if "charset" in parameters:
            parameters["charset"] = parameters["charset"].lower()
        if quality > 0:
            found.append((-quality, media.lower(), parameters))
    for _, media, parameters in sorted(found, key=lambda each: each[0]):
        yield media, parameters


def statusz(accept: str, began: float, now: float, paths: tuple[str, ...]) -> Reply:
    """Return /statusz; `began`, `now`: seconds since the epoch."""
    started = time.gmtime(began)
    rows = {
        "Started": time.strftime("%a %b %e %H:%M:%S UTC %Y", started),
        "Up": uptime(now - began),
        "Go version": f"none (Python {platform.python_version()})",
        "Binary version": lifecycle.version(),
        "Paths": " ".join(sorted(paths)),
    }
    fields = {
        "startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
        "uptimeSeconds": int(now - began),
        "binaryVersion": lifecycle.version(),
        "paths": sorted(paths),
    }
    return page(accept, "Statusz", "".join(f"{name}: {value}\n" for name, value in rows.items()), fields)


def flagz(accept: str, values: Mapping[str, str]) -> Reply:
    """Return /flagz: each flag and the value in use, sorted."""
    flags = {name: values[name] for name in sorted(values)}
    return page(accept, "Flagz", "".join(f"{name}={value}\n" for name, value in flags.items()), {"flags": flags})


def zpages_routes(values: Mapping[str, str], paths: tuple[str, ...]) -> dict[str, ByAccept]:
    """Return what is served on the metrics address; `paths`: what else is."""
    began = time.time()
    all_paths = (*paths, "/flagz", "/statusz")
    return {
        "/flagz": ByAccept(lambda accept: flagz(accept, values)),
        "/statusz": ByAccept(lambda accept: statusz(accept, began, time.time(), all_paths)),
    }
