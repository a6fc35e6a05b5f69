"""A Kubernetes API server in small: for the lab's `up --api`, and for the tests of whatever reads the API.

True to what kube-apiserver 1.36 sends, for the resources of its table; without etcd, admission and authorisation.
"""

from apiserver.faults import Fault
from apiserver.server import Server
from apiserver.store import Store

__all__ = ["Fault", "Server", "Store"]
