"""How long the kernel takes to follow the cluster: cold sync and one-endpoint changes, beside kube-proxy's layouts.

Each point runs in a process and a network namespace of its own. A cold sync begins with decoded objects and ends when
the kernel has everything; a change begins with the decoded slice. "peer" rows load kube-proxy's layout for the same
cluster through the same tool; their change is the text that kube-proxy's partial sync (or its nft transaction) writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from functools import partial
from pathlib import Path

import peers
from form import Table, in_own_namespace, in_process_of_its_own, median, percentile, resident_mib, timed
from proxies import MODES, loaded, one_endpoint_change

ENDPOINTS = 10
PEER_TOOLS = {
    "iptables-legacy": ["iptables-legacy-restore", "--noflush"],
    "iptables-nft": ["iptables-nft-restore", "--noflush"],
    "nftables": ["nft", "-f", "-"],
}
# beyond these sizes the peer's layout takes minutes (reference, section 7), which says enough
PEER_LIMIT = {"iptables-legacy": 20_000, "iptables-nft": 1_000, "nftables": 5_000}


def ours(mode: str, services: int, changes: int) -> dict[str, float]:
    base = resident_mib()
    pipeline, cold = loaded(mode, services, ENDPOINTS)
    resident = resident_mib()
    totals = []
    for index in range(changes):
        number = index * 7919 % services
        totals.append(one_endpoint_change(pipeline, number, ENDPOINTS, index + 1).total)
    return {
        "cold": cold.total, "decide": cold.decide, "render": cold.render, "apply": cold.apply,
        "p50": median(totals), "p99": percentile(totals, 0.99), "resident": resident, "base": base,
    }  # fmt: skip


def peer(mode: str, services: int, changes: int) -> dict[str, float]:
    tool = PEER_TOOLS[mode]

    def load(script: str) -> None:
        subprocess.run(tool, input=script, text=True, check=True, stdout=subprocess.DEVNULL)

    nft = mode == "nftables"
    whole = peers.nftables(services, ENDPOINTS) if nft else peers.iptables(services, ENDPOINTS)
    cold = timed(lambda: load(whole))
    totals = []
    for index in range(min(changes, 10)):
        number = index * 7919 % services
        if nft:
            script = peers.nftables_change(ENDPOINTS, number, index + 1)
        else:
            script = peers.iptables_change(services, ENDPOINTS, number, index + 1)
        totals.append(timed(partial(load, script)))
    return {"cold": cold, "p50": median(totals), "p99": percentile(totals, 0.99)}


def point(kind: str, mode: str, services: int, changes: int) -> dict[str, float]:
    return in_process_of_its_own(__file__, kind, mode, services, changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="100,1000,5000,10000,20000")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--runs", type=int, default=3, help="cold syncs per point, after one that warms up")
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--point", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        kind, mode, services, changes, answer = args.point
        in_own_namespace()
        found = {"ours": ours, "peer": peer}[kind](mode, int(services), int(changes))
        Path(answer).write_text(json.dumps(found))
        return
    table = Table(
        "sync",
        "Cold sync and one-endpoint change, N Services of 10 endpoints",
        ["mode", "layout", "services", "cold s", "decide s", "render s", "apply s",
         "change p50 ms", "change p99 ms", "resident MiB"],
    )  # fmt: skip
    for mode in args.modes.split(","):
        for size in map(int, args.sizes.split(",")):
            began = time.monotonic()
            runs = [point("ours", mode, size, args.changes) for _ in range(args.runs)]
            middle = {key: median([run[key] for run in runs]) for key in runs[0]}
            table.add(
                mode, "pynet", size, middle["cold"], middle["decide"], middle["render"], middle["apply"],
                middle["p50"] * 1e3, middle["p99"] * 1e3, middle["resident"],
            )  # fmt: skip
            if not args.no_peers and size <= PEER_LIMIT[mode]:
                other = point("peer", mode, size, args.changes)
                table.add(
                    mode, "kube-proxy's", size, other["cold"], 0.0, 0.0, other["cold"],
                    other["p50"] * 1e3, other["p99"] * 1e3, 0.0,
                )  # fmt: skip
            print(f"  ({time.monotonic() - began:.0f} s for this size)")
    table.notes.append(f"medians of {args.runs} runs, {args.changes} changes each; peers: one load, 10 changes")
    table.notes.append(
        "kube-proxy's rows load its layout through the same tool; its own generator's time is not in them"
    )
    table.plot("Cold sync, s", x="services", y="cold s", series=["mode", "layout"], log=True)
    table.plot("One-endpoint change, median, ms", x="services", y="change p50 ms", series=["mode", "layout"], log=True)
    table.finish()


if __name__ == "__main__":
    main()
