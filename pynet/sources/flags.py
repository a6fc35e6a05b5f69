"""The flags by which a daemon is told where its objects come from, and the source that they name.

Knows no consumer. The API server's source is imported only when it is the one asked for: a node without a cluster
never loads its client.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from pynet.sources import Source
from pynet.sources.events import Events, NoEvents

if TYPE_CHECKING:
    from pynet.sources.transport import Transport

CONTENT_TYPES = ("application/json", "application/vnd.kubernetes.protobuf")
IN_CLUSTER = "KUBERNETES_SERVICE_HOST"  # the kubelet sets it in every container


class NoSource(ValueError):
    """The flags name no source, or two of them."""


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a source; `source_from` and `events_from` read what they parse."""
    group = parser.add_argument_group("source of Services, EndpointSlices, Nodes and ServiceCIDRs (one of them)")
    group.add_argument("--manifests", type=Path, metavar="DIR", help="directory of YAML or JSON manifests, watched")
    group.add_argument("--kubeconfig", type=Path, metavar="FILE", help="API server: address and credentials")
    group.add_argument("--master", metavar="URL", help="API server: address; overrides the one of --kubeconfig")
    group.add_argument("--kube-api-qps", type=float, metavar="N", help="requests a second to the API server (5)")
    group.add_argument("--kube-api-burst", type=int, metavar="N", help="requests at once to the API server (10)")
    group.add_argument(
        "--kube-api-content-type",
        choices=CONTENT_TYPES,
        help="accepted as kube-proxy takes it; JSON is what is spoken, whichever is named",
    )


def source_from(args: argparse.Namespace, kinds: Collection[str], *, node: str | None = None) -> Source:
    """Return the source that the flags name, delivering `kinds`; in a pod without flags, the cluster's API server.

    `node`: of the kind Node, only this one is wanted (None: all). Raise `NoSource` when the flags name none or two,
    or when what they name cannot be used.
    """
    _settle(args)
    if args.manifests is not None:
        from pynet.sources.manifests import Manifests

        return Manifests(args.manifests, frozenset(kinds))
    from pynet.sources.apiserver import ApiServer

    return ApiServer(_connection(args), frozenset(kinds), node=node)


def events_from(args: argparse.Namespace, component: str, node: str) -> Events:
    """Return where Kubernetes Events of `component` on `node` go: the API server, where it is the source; or nowhere.

    Raise as `source_from` does.
    """
    _settle(args)
    if args.manifests is not None:
        return NoEvents()
    from pynet.sources.apievents import ApiEvents

    return ApiEvents(_connection(args), component, node)


def _settle(args: argparse.Namespace) -> None:
    remote = args.kubeconfig is not None or bool(args.master)
    if args.manifests is not None and remote:
        raise NoSource("--manifests and --kubeconfig or --master exclude each other: name one source")
    if args.manifests is None and not remote and not os.environ.get(IN_CLUSTER):
        raise NoSource("no source: name one by --manifests DIR or --kubeconfig FILE (or run in a pod of the cluster)")
    if args.kubeconfig is not None and not args.kubeconfig.is_file():
        raise NoSource(f"--kubeconfig {args.kubeconfig}: no such file")


def _connection(args: argparse.Namespace) -> Transport:
    """Return a way to the API server that the flags describe."""
    from pynet.sources.credentials import Credentials
    from pynet.sources.kubeconfig import BadCredentials
    from pynet.sources.transport import Transport

    qps = 5.0 if args.kube_api_qps is None else args.kube_api_qps
    burst = 10 if args.kube_api_burst is None else args.kube_api_burst
    credentials = Credentials(args.kubeconfig, args.master)
    try:
        credentials.check()
    except BadCredentials as error:
        raise NoSource(str(error)) from None
    return Transport(credentials, qps=qps, burst=burst)
