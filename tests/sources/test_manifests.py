"""The manifest directory: what it delivers first, what a change delivers, and that nothing broken costs what worked."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynet.files import replace
from pynet.objects import Node, Ref, Service, ref_of
from pynet.sources import Batch, nodecidrs
from pynet.sources.manifests import Manifests

SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}, creationTimestamp: 2026-01-01T00:00:00Z}}
spec: {{clusterIP: {ip}, ports: [{{port: 80, targetPort: http}}]}}
"""


def service(name: str = "web", ip: str = "10.96.0.10") -> str:
    return SERVICE.format(name=name, ip=ip)


class Running:
    """A source that runs in a thread, and the batches it delivers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.markers = itertools.count()
        self.batches: queue.Queue[Batch] = queue.Queue()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=Manifests(directory).run, args=(self.batches.put, self.stop))
        self.thread.start()

    def next(self) -> Batch:
        return self.batches.get(timeout=10)

    def silent(self) -> bool:
        """All that was written before has been looked at, and said nothing: the next word is on a new file."""
        marker = f"marker-{next(self.markers)}"
        (self.directory / f"{marker}.yaml").write_text(service(marker))
        batch = self.next()
        return [obj.metadata.name for obj in batch.upserts] == [marker] and not batch.deletes

    def close(self) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "web.yaml").write_text(service())
    source = Running(tmp_path)
    first = source.next()
    assert {"Service", "EndpointSlice", "Endpoints", "Node", "ServiceCIDR"} == first.replaced
    assert [obj.metadata.name for obj in first.upserts] == ["web"]
    yield source
    source.close()


def ips(batch: Batch) -> dict[str, str]:
    return {obj.metadata.name: obj.spec.cluster_ip for obj in batch.upserts if isinstance(obj, Service)}


def test_a_new_file_a_changed_file_and_a_deleted_file(tmp_path: Path, running: Running) -> None:
    (tmp_path / "db.yaml").write_text(service("db", "10.96.0.11"))
    assert ips(running.next()) == {"db": "10.96.0.11"}
    (tmp_path / "db.yaml").write_text(service("db", "10.96.0.12"))
    assert ips(running.next()) == {"db": "10.96.0.12"}
    (tmp_path / "db.yaml").unlink()
    assert running.next().deletes == (Ref("Service", "default", "db"),)


def test_only_what_differs_in_a_file_is_delivered(tmp_path: Path, running: Running) -> None:
    (tmp_path / "web.yaml").write_text(service() + "---" + service("db", "10.96.0.11"))
    assert ips(running.next()) == {"db": "10.96.0.11"}


def test_a_rename_over_a_file_counts_as_its_change(tmp_path: Path, running: Running) -> None:
    (tmp_path / ".web.tmp").write_text(service(ip="10.96.0.99"))
    (tmp_path / ".web.tmp").rename(tmp_path / "web.yaml")
    assert ips(running.next()) == {"web": "10.96.0.99"}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("", id="empty"),
        pytest.param("apiVersion: v1\nkind: Service\nmetadata: {name: we", id="half-written"),
        pytest.param("\x00\xff", id="binary"),
        pytest.param("[1, 2, 3]", id="no-object"),
        pytest.param("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", id="alias-bomb"),
        pytest.param("[" * 200_000, id="deep"),
        pytest.param(service().replace("port: 80", "port: many"), id="bad-field"),
        pytest.param(service().replace("v1", "v9"), id="bad-version"),
    ],
)
def test_a_broken_file_keeps_what_it_last_said(
    tmp_path: Path, running: Running, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (tmp_path / "web.yaml").write_text(broken, encoding="latin-1")
        assert running.silent()
    assert any("web.yaml" in str(vars(record)) for record in caplog.records)
    (tmp_path / "web.yaml").write_text(service(ip="10.96.0.77"))
    assert ips(running.next()) == {"web": "10.96.0.77"}


def test_a_bad_object_does_not_hold_back_its_neighbours(tmp_path: Path, running: Running) -> None:
    bad = service("bad").replace("port: 80", "port: many")
    (tmp_path / "two.yaml").write_text(bad + "---" + service("db", "10.96.0.11"))
    assert ips(running.next()) == {"db": "10.96.0.11"}


def test_an_object_in_two_files_comes_from_the_first_and_survives_its_going(tmp_path: Path, running: Running) -> None:
    (tmp_path / "a.yaml").write_text(service(ip="10.96.0.1"))
    assert ips(running.next()) == {"web": "10.96.0.1"}
    (tmp_path / "web.yaml").write_text(service(ip="10.96.0.2"))
    assert running.silent()
    (tmp_path / "a.yaml").unlink()
    assert ips(running.next()) == {"web": "10.96.0.2"}


def test_other_files_do_not_count(tmp_path: Path, running: Running) -> None:
    (tmp_path / "notes.txt").write_text(service("a"))
    (tmp_path / ".hidden.yaml").write_text(service("b"))
    (tmp_path / "folder.yaml").mkdir()
    assert running.silent()


def test_a_mounted_config_map_swaps_its_files_at_once(tmp_path: Path) -> None:
    for version, ip in (("1", "10.96.0.1"), ("2", "10.96.0.2")):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "web.yaml").write_text(service(ip=ip))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "web.yaml").symlink_to("..data/web.yaml")
    source = Running(tmp_path)
    try:
        assert ips(source.next()) == {"web": "10.96.0.1"}
        (tmp_path / "..tmp").symlink_to("..2")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
        assert ips(source.next()) == {"web": "10.96.0.2"}
    finally:
        source.close()


def test_a_directory_that_comes_later_and_comes_back(tmp_path: Path) -> None:
    directory = tmp_path / "later"
    source = Running(directory)
    try:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "web.yaml").write_text(service())
        (tmp_path / "made").rename(directory)
        assert ips(source.next()) == {"web": "10.96.0.10"}
        directory.rename(tmp_path / "away")
        directory.mkdir()
        (directory / "web.yaml").write_text(service(ip="10.96.0.20"))
        batch = source.next()
        while not batch.upserts:
            batch = source.next()
        assert ips(batch) == {"web": "10.96.0.20"}
    finally:
        source.close()


def test_a_list_and_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(
        '{"apiVersion": "v1", "kind": "ServiceList", "items": ['
        '{"metadata": {"name": "a", "namespace": "n"}, "spec": {"clusterIP": "10.96.0.1"}}]}'
    )
    (tmp_path / "list.yaml").write_text(
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: n1}}"
        "\n- {apiVersion: apps/v1, kind: Deployment, metadata: {name: other}}"
    )
    assert sorted(str(ref_of(obj)) for obj in Manifests(tmp_path).load()) == ["Node n1", "Service n/a"]


def node(name: str, cidr: str = "") -> str:
    spec = f"{{podCIDR: {cidr}, podCIDRs: [{cidr}]}}" if cidr else "{}"
    return f"{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}, spec: {spec}}}"


def pod_cidrs(batch: Batch) -> dict[str, tuple[str, ...]]:
    return {obj.metadata.name: obj.spec.pod_cidrs or () for obj in batch.upserts if isinstance(obj, Node)}


def test_a_node_has_the_pod_cidrs_that_the_agents_record_assigns_to_it(tmp_path: Path) -> None:
    for name, cidr in (("a", ""), ("b", "10.9.0.0/24"), ("z", "")):
        (tmp_path / f"{name}.yaml").write_text(node(name, cidr))
    source = Running(tmp_path)
    record = tmp_path / nodecidrs.FILE

    def write(**cidrs: str) -> None:
        replace(record, nodecidrs.encoded({name: (cidr,) for name, cidr in cidrs.items()}))

    try:
        assert pod_cidrs(source.next()) == {"a": (), "b": ("10.9.0.0/24",), "z": ()}
        write(a="10.1.0.0/24", b="10.2.0.0/24", gone="10.3.0.0/24")
        assert pod_cidrs(source.next()) == {"a": ("10.1.0.0/24",)}, "b has its own, z is not in the record"
        write(a="10.1.0.0/24", z="10.4.0.0/24")
        assert pod_cidrs(source.next()) == {"z": ("10.4.0.0/24",)}
        record.write_text("half of a rec")
        assert source.silent()
        (tmp_path / "a.yaml").write_text(node("a", "10.5.0.0/24"))
        assert pod_cidrs(source.next()) == {"a": ("10.5.0.0/24",)}
        record.unlink()
        assert pod_cidrs(source.next()) == {"z": ()}
    finally:
        source.close()
    write(a="10.1.0.0/24", z="10.4.0.0/24")
    found = {obj.metadata.name: obj for obj in Manifests(tmp_path, assigned=False).load() if isinstance(obj, Node)}
    assert (found["z"].spec.pod_cidrs, found["z"].spec.pod_cidr) == (None, "")
