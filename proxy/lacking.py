"""Service ports whose Local policy finds no local endpoint though others exist: what kube-proxy counts. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.plan import Action, FrontendKind, Plan, ServerKey, VirtualServer

POLICIES = ("internal", "external")


def policies_lacking(server: VirtualServer) -> tuple[str, ...]:
    """Return the traffic policies under which a Service port drops what comes from outside."""
    dropped = {frontend.kind for frontend in server.frontends if frontend.outside.action is Action.DROP}
    is_lacking = {"internal": FrontendKind.CLUSTER_IP in dropped, "external": bool(dropped - {FrontendKind.CLUSTER_IP})}
    return tuple(policy for policy in POLICIES if is_lacking[policy])


class Lacking:
    """How many there are in one family's plan, kept up by what changes in it."""

    def __init__(self) -> None:
        self._keys: dict[str, set[ServerKey]] = {policy: set() for policy in POLICIES}

    def follow(self, plan: Plan, changed: Iterable[ServerKey]) -> dict[str, int]:
        """Take in the Service ports that differ from last time; return the count by policy."""
        for key in changed:
            server = plan.servers.get(key)
            found = policies_lacking(server) if server else ()
            for policy, keys in self._keys.items():
                (keys.add if policy in found else keys.discard)(key)
        return {policy: len(keys) for policy, keys in self._keys.items()}
