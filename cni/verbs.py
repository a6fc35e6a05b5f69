"""The verbs, dispatched: one call in, one answer out, whatever happens between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cni import adding, check, ctl, readiness, removal, results, spec
from cni.context import Context
from cni.database import Damaged
from cni.ipam import verbs as ipam
from cni.spec import CniError, Request
from pynet.kernel import netlink, nftables


class Answer(NamedTuple):
    """Exit code and standard output; standard error is written where the work is done."""

    code: int
    output: str


def serve(
    environment: Mapping[str, str], stdin: bytes, context: Context, *, only_ipam: bool = False, pod_netns: int = -1
) -> Answer:
    """Serve one call. Whatever happens, the answer is the specification's: a result, nothing, or an error object."""
    try:
        if spec.command_of(environment) == "VERSION":
            return Answer(0, spec.version_answer())
        request = spec.request(environment, stdin)
        if only_ipam:
            return Answer(0, _serve_ipam(request, context))
        return Answer(0, _VERBS[request.command](request, environment, context, pod_netns))
    except CniError as error:
        return Answer(1, error.render(_version_for_errors(stdin)))
    except netlink.NetlinkError as error:
        return _failed(spec.FAILED, str(error.strerror), environment, stdin)
    except nftables.NftError as error:
        return _failed(spec.FAILED, f"nftables: {ctl.said(error)}", environment, stdin)
    except (Damaged, OSError) as error:
        return _failed(spec.IO_FAILURE, str(error), environment, stdin)
    except Exception as error:  # the runtime must get an answer it can read, whatever is wrong with us
        import traceback

        traceback.print_exc(file=sys.stderr)
        return _failed(spec.FAILED, f"{type(error).__name__}: {ctl.said(error)}", environment, stdin)


def _failed(code: int, message: str, environment: Mapping[str, str], stdin: bytes) -> Answer:
    keys = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME")
    details = " ".join(f"{key}={environment[key]}" for key in keys if environment.get(key))
    return Answer(1, CniError(code, message, details).render(_version_for_errors(stdin)))


def _version_for_errors(stdin: bytes) -> str:
    try:
        return spec.version_of(spec.decode(stdin))
    except CniError:
        return spec.NEWEST


def _serve_ipam(request: Request, context: Context) -> str:
    if request.command == "ADD":
        return results.render(ipam.add(request, context), request.version)
    if request.command == "DEL":
        ipam.delete(request, context)
    elif request.command == "CHECK":
        ipam.check(request, context)
    elif request.command == "STATUS":
        ipam.status(request, context)
    elif request.command == "GC":
        ipam.collect(request, context, removal.valid_attachments(request.config))
    return ""


_VERBS: dict[str, Callable[[Request, Mapping[str, str], Context, int], str]] = {
    "ADD": adding.add,
    "DEL": removal.delete,
    "CHECK": check.check,
    "GC": removal.collect,
    "STATUS": readiness.status,
}
