"""`python -m apiserver`: serve until interrupted; the kubeconfig is written where --kubeconfig says."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from apiserver.server import Server


def main() -> None:
    """Run a server of its own."""
    parser = argparse.ArgumentParser(prog="apiserver", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--service-cidr", default="10.96.0.0/16", help="one range, or two of different families")
    parser.add_argument("--kubeconfig", type=Path, help="file to write")
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Server(host=args.host, port=args.port, service_ranges=tuple(args.service_cidr.split(","))) as server:
        if args.kubeconfig:
            args.kubeconfig.write_text(server.kubeconfig())
        print(server.url, flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
