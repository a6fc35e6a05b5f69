"""What can be said to the lab: its grammar, and the commands that change a lab, which scenarios speak as well."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from . import api, daemons, kernel, nodes, pods, workloads
from . import topology as plan
from .cluster import Lab
from .progress import say
from .state import NodeRecord

DESCRIPTION = """\
A container cluster on one machine: each node is a network namespace with its own pynetd and pyproxy, pods are wired by
pynet-cni as a container runtime does it, `client` is a machine outside of the cluster. Nothing touches the machine's
own network; `lab down` leaves it as it was."""

EXAMPLES = """\
examples:
  lab up --nodes 3 --mode nftables       a cluster of three nodes
  lab check                              play every path and say what the pods saw
  lab pod add db-1 --node 2 --labels app=db --serve tcp:5432
  lab apply service.yaml; lab scale web 5; lab status
  lab exec client -- curl -s http://172.31.0.11:30080/
  lab down"""


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    name = argparse.ArgumentParser(add_help=False)
    name.add_argument(
        "--name",
        default=os.environ.get("LAB_NAME", "lab"),
        help="which lab, of several at once (default: $LAB_NAME, else lab)",
    )
    top = argparse.ArgumentParser(
        prog="lab", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(place: argparse._SubParsersAction, word: str, about: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
        return place.add_parser(word, help=about, description=about, parents=[name])  # type: ignore[no-any-return]

    one = command(commands, "up", "bring a cluster up; repair or replace the one that is there")
    one.add_argument("--nodes", type=int, help="how many nodes (default: the topology's; 2)")
    one.add_argument("--mode", choices=kernel.MODES, default="iptables", help="pyproxy's mode (default: %(default)s)")
    one.add_argument("--ipv6", action="store_true", help="IPv4 and IPv6")
    one.add_argument("--topology", choices=plan.names(), default="flat", help="default: %(default)s")
    one.add_argument("--scheduler", default="", help="how an endpoint is chosen: random, rr; IPVS: rr, wrr, lc, sh, …")
    one.add_argument("--iptables-backend", choices=("nft", "legacy"), default="", help="which iptables the nodes have")
    one.add_argument("--pyproxy-arg", action="append", default=[], metavar="ARG", help="passed on to every pyproxy")
    one.add_argument("--pynetd-arg", action="append", default=[], metavar="ARG", help="passed on to every pynetd")
    one.add_argument("--api", action="store_true", help="the daemons follow an API server; kubectl drives the lab")
    one.add_argument("--empty", action="store_true", help="deploy nothing")

    command(commands, "down", "remove the cluster and leave the machine as it was")

    group = commands.add_parser("pod", help="add, remove, change pods").add_subparsers(dest="verb", required=True)
    one = command(group, "add", "make a pod: namespace, CNI ADD, a server on its ports")
    one.add_argument("pod", metavar="NAME")
    one.add_argument("--node", required=True, help="name or number of the node")
    one.add_argument("--labels", default="", help="key=value,…")
    one.add_argument("--serve", default="", help="tcp:8080,udp:8081,…; with a port's name: http=tcp:8080")
    one.add_argument("--namespace", "-n", default="default", help="Kubernetes namespace (default: default)")
    for verb, about in (
        ("rm", "remove a pod"),
        ("ready", "let its Services use a pod"),
        ("unready", "keep Services from using a pod"),
        ("terminate", "begin a pod's end: it serves on, and is used where no other endpoint is left"),
        ("check", "ask the plugins (CNI CHECK) whether a pod's wiring is right"),
    ):
        command(group, verb, about).add_argument("pod", metavar="NAME")

    group = commands.add_parser("node", help="add, remove, change nodes").add_subparsers(dest="verb", required=True)
    one = command(group, "add", "add a node")
    one.add_argument("node", metavar="NAME", nargs="?", default="")
    one.add_argument("--index", type=int, default=0, help="which addresses it gets (default: the lowest free)")
    command(group, "rm", "switch a node off and remove it").add_argument("node", metavar="NAME")
    one = command(group, "rename", "give a node another name")
    one.add_argument("node", metavar="NAME")
    one.add_argument("new_name", metavar="NEW_NAME")
    one = command(group, "address", "give a node other underlay addresses")
    one.add_argument("node", metavar="NAME")
    one.add_argument("addresses", metavar="ADDRESS", nargs="+", help="of its subnet; or a host number, in each family")
    one = command(group, "cidr", "give a node the pod CIDRs of another index")
    one.add_argument("node", metavar="NAME")
    one.add_argument("index", type=int)
    command(group, "cut", "pull a node's cable").add_argument("node", metavar="NAME")
    command(group, "heal", "plug a node's cable in again").add_argument("node", metavar="NAME")
    command(group, "flush", "remove pyproxy's rules from a node's kernel, as a careless hand does").add_argument(
        "node", metavar="NAME"
    )
    one = command(group, "restart", "start a node's daemons again")
    one.add_argument("node", metavar="NAME")
    one.add_argument("program", nargs="?", default="", metavar="pynetd|pyproxy", help="default: both")
    one.add_argument("--kill", action="store_true", help="end them with KILL, as a crash does")

    one = command(commands, "api", "end the API server and start it again (lab up --api)")
    one.add_argument("verb", choices=("restart",))
    one.add_argument("--kill", action="store_true", help="end it with KILL, as a crash does")

    for verb, about in (("apply", "make objects of manifests"), ("delete", "remove the objects of manifests")):
        one = command(commands, verb, about + ": Service, EndpointSlice, Endpoints, Node, ServiceCIDR, Pod, Deployment")
        one.add_argument("files", metavar="FILE", nargs="+", help="YAML or JSON; - is the standard input")
    one = command(commands, "scale", "give a Deployment so many pods")
    one.add_argument("deployment", metavar="NAME")
    one.add_argument("replicas", type=int, metavar="N")

    one = command(commands, "exec", "run a command in a pod's, a node's or the client's namespace")
    one.add_argument("where", metavar="POD|NODE|client")
    one.add_argument("argv", metavar="-- CMD", nargs=argparse.REMAINDER)

    one = command(commands, "status", "nodes, pods, Services, and who serves what")
    one.add_argument("--json", action="store_true")
    one = command(commands, "check", "play the scenarios: every path, what is expected, what the pods saw")
    one.add_argument("scenarios", metavar="SCENARIO", nargs="*", help="names of scenarios/ (default: all that fit)")
    one.add_argument("--json", action="store_true")
    one.add_argument("--keep", action="store_true", help="leave the scenarios' pods and Services there")
    one = command(commands, "logs", "print the logs of daemons and pods")
    one.add_argument("who", metavar="NODE|POD|client", nargs="*", help="default: all nodes")
    one.add_argument("--program", choices=daemons.PROGRAMS)
    one.add_argument("--follow", "-f", action="store_true")
    one.add_argument("--lines", type=int, default=40, help="how many of the last lines (default: %(default)s)")
    return top


def pod(lab: Lab, arguments: argparse.Namespace) -> None:
    """`lab pod …`."""
    verb, key = arguments.verb, arguments.pod
    if verb == "add":
        wanted = pods.record(
            lab, key, arguments.node, namespace=arguments.namespace, labels=pods.parse_labels(arguments.labels),
            ports=pods.parse_ports(arguments.serve),
        )  # fmt: skip
        say(workloads.describe_pod(pods.create_all(lab, [wanted])[0]))
    elif verb == "rm":
        pods.remove_all(lab, [lab.pod(key)])
    elif verb == "check":
        pods.check(lab, lab.pod(key))
    else:
        pods.change(lab, key, **{"terminating" if verb == "terminate" else "ready": verb != "unready"})


NODE_VERBS: dict[str, Callable[[Lab, argparse.Namespace], NodeRecord]] = {
    "add": lambda lab, given: nodes.add(lab, given.node, given.index),
    "rm": lambda lab, given: nodes.remove(lab, given.node),
    "rename": lambda lab, given: nodes.rename(lab, given.node, given.new_name),
    "address": lambda lab, given: nodes.readdress(lab, given.node, given.addresses),
    "cidr": lambda lab, given: nodes.recidr(lab, given.node, given.index),
    "cut": lambda lab, given: nodes.connect(lab, given.node, False),
    "heal": lambda lab, given: nodes.connect(lab, given.node, True),
    "flush": lambda lab, given: nodes.flush(lab, given.node),
    "restart": lambda lab, given: nodes.restart(lab, given.node, given.program, kill=given.kill),
}


def change(lab: Lab, arguments: argparse.Namespace) -> None:
    """Do one of the commands that change a lab; scenarios speak the same words."""
    if arguments.command == "pod":
        pod(lab, arguments)
    elif arguments.command == "node":
        node = NODE_VERBS[arguments.verb](lab, arguments)
        say(f"node {node.name}: {', '.join(node.addresses.values())}, pods {', '.join(node.pod_cidrs)}")
    elif arguments.command == "api":
        if lab.spec.api:  # a lab without one has nothing to restart, and scenarios are for both
            api.stop(lab.folder, kill=arguments.kill)
            api.start(lab.folder)
            say("API server: started again")
        else:
            say("API server: this lab has none (lab up --api)")
    elif arguments.command == "scale":
        for line in workloads.scale(lab, arguments.deployment, arguments.replicas):
            say(line)
    else:
        work = workloads.apply if arguments.command == "apply" else workloads.delete
        manifests = [manifest for path in arguments.files for manifest in workloads.read(path)]
        for line in work(lab, manifests):
            say(line)
