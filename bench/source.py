"""A big cluster through the API: how long from the first request to a whole plan, how much memory, and event rates.

The server in small runs in a process of its own and serves what a real one would send (managedFields and all); what is
measured is this process: the daemon's source, its cluster and its planner. Lag is from the server's write to the
planner's answer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "netns-lab"))
from cluster import cluster_ip, pod_ip
from form import Table, percentile

ENDPOINTS = 10
FIELDS = {
    "manager": "kube-controller-manager",
    "operation": "Update",
    "apiVersion": "discovery.k8s.io/v1",
    "time": "2026-11-21T11:34:10Z",
    "fieldsType": "FieldsV1",
    "fieldsV1": {
        "f:addressType": {},
        "f:endpoints": {},
        "f:metadata": {"f:annotations": {".": {}}, "f:generateName": {}, "f:labels": {".": {}, "f:app": {}}},
        "f:ports": {},
    },
}


def service(number: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"svc-{number}", "namespace": "bench", "managedFields": [FIELDS]},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ip(number),
            "clusterIPs": [cluster_ip(number)],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            "selector": {"app": f"svc-{number}"},
        },
    }


def endpoint_slice(number: int, shift: int = 0, stamp: str = "") -> dict[str, Any]:
    pods = [number * ENDPOINTS + index for index in range(ENDPOINTS)]
    pods[-1] += shift * 1_000_000
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"svc-{number}-x",
            "namespace": "bench",
            "labels": {"kubernetes.io/service-name": f"svc-{number}", "app": f"svc-{number}"},
            "annotations": {"bench/sent": stamp, "endpoints.kubernetes.io/last-change-trigger-time": ""},
            "managedFields": [FIELDS],
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [pod_ip(pod)],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": f"node-{pod % 50}",
                "zone": f"zone-{pod % 3}",
                "targetRef": {"kind": "Pod", "name": f"svc-{number}-{pod}", "namespace": "bench", "uid": f"{pod:036d}"},
            }
            for pod in pods
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def serve(size: int, control: Connection) -> None:
    """Run the server; on each (rate, seconds), change slices at that rate."""
    from apiserver import Server

    with Server() as server:
        for number in range(size):
            server.api.put(service(number))
            server.api.put(endpoint_slice(number))
        for kind in ("services", "endpointslices"):  # the JSON is made beforehand, as a real server's cache holds it
            from apiserver.resources import NAMED

            for stored in server.store.shelf(NAMED[kind]).objects.values():
                assert stored.item
        control.send(server.url)
        while (order := control.recv()) is not None:
            rate, seconds = order
            begin = time.monotonic()
            for count in range(int(rate * seconds)):
                due = begin + count / rate
                if (pause := due - time.monotonic()) > 0:
                    time.sleep(pause)
                server.api.put(endpoint_slice(count % size, count // size % 3 + 1, str(time.monotonic())))
            control.send(int(rate * seconds))


def run(size: int, rates: list[int], seconds: float, streaming: bool, table: Table) -> None:
    """Measure one size in this process."""
    from proxy.cluster import Cluster
    from proxy.plan import Family, NodeSettings
    from proxy.planning import Planner, Surroundings
    from pynet.objects import EndpointSlice
    from pynet.sources import Batch
    from pynet.sources.apiserver import ApiServer
    from pynet.sources.credentials import Credentials
    from pynet.sources.transport import Transport

    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(size, theirs), daemon=True)
    server.start()
    url = ours.recv()
    cluster, planner = Cluster("node-1"), Planner(Family.V4, Surroundings(NodeSettings()))
    known: set[str] = set()
    lags: list[float] = []
    events = 0
    ready, stop = threading.Event(), threading.Event()

    def deliver(batch: Batch) -> None:
        nonlocal events
        touched = cluster.apply(batch)
        known.update(batch.replaced)
        if known < {"Service", "EndpointSlice"}:
            return
        if not ready.is_set():
            planner.update(cluster, cluster.services.keys())
            ready.set()
            return
        planner.update(cluster, touched.services)
        now = time.monotonic()
        for obj in batch.upserts:
            if isinstance(obj, EndpointSlice) and (sent := (obj.metadata.annotations or {}).get("bench/sent")):
                lags.append(now - float(sent))
                events += 1

    source = ApiServer(Transport(Credentials(None, url)), frozenset({"Service", "EndpointSlice"}), streaming=streaming)
    begin, cpu = time.monotonic(), time.process_time()
    thread = threading.Thread(target=source.run, args=(deliver, stop), daemon=True)
    thread.start()
    ready.wait()
    took, used = time.monotonic() - begin, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    list_kind = "streaming" if streaming else "paged"
    table.add(size, size * ENDPOINTS, list_kind, "start to plan", took, used, 0, 0.0, 0.0, peak)
    for rate in rates:
        lags.clear()
        events, cpu, begin = 0, time.process_time(), time.monotonic()
        ours.send((rate, seconds))
        sent = ours.recv()
        elapsed = time.monotonic() - begin
        time.sleep(0.5)
        used = time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        table.add(
            size, size * ENDPOINTS, list_kind, f"{rate} events/s", elapsed, used, sent - events,
            percentile(lags, 0.5) * 1000, percentile(lags, 0.99) * 1000, peak,
        )  # fmt: skip
    ours.send(None)
    stop.set()
    thread.join(5)
    server.join(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=10_000, help="EndpointSlices (and Services)")
    parser.add_argument("--rates", default="1000", help="events a second, with commas")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--lists", default="streaming,paged")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    size, seconds = (1000, 1.0) if args.quick else (args.size, args.seconds)
    table = Table(
        "source",
        "A cluster through the API: start, and changes",
        ["slices", "endpoints", "list", "what", "seconds", "CPU s", "not told", "lag p50 ms", "lag p99 ms", "peak MiB"],
    )
    table.notes.append("not told: events that a later one on the same slice overtook within a batch; none is lost.")
    rates = [int(rate) for rate in args.rates.split(",")]
    for kind in args.lists.split(","):
        one = multiprocessing.get_context("fork")  # a process for each, so that peaks are its own
        reader, writer = one.Pipe(duplex=False)

        def measure(kind: str = kind, writer: Connection = writer) -> None:
            run(size, rates, seconds, kind == "streaming", table)
            writer.send(table.rows)

        child = one.Process(target=measure)
        child.start()
        table.rows = reader.recv()
        child.join()
    table.finish()


if __name__ == "__main__":
    main()
