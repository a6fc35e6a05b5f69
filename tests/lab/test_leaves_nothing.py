"""`lab down` leaves the machine as it was, whatever happened: on a machine of its own, compared in every part."""

from __future__ import annotations

import pytest

from support import sandbox

pytestmark = [pytest.mark.root, pytest.mark.lab]

HEAD = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from support import snapshot
LAB = str(Path(sys.argv[1]) / "netns-lab" / "lab")

def lab(*words, check=True):
    return subprocess.run([LAB, *words], check=check, stdout=sys.stderr)

def killed(seconds, *words):
    child = subprocess.Popen([LAB, *words], stdout=sys.stderr)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
    return child.wait()

def reap():
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return

def end():
    reap()
    print(json.dumps(snapshot.differences(before, snapshot.take())))

before = snapshot.take()
"""


def play(story: str) -> None:
    root = str(sandbox.TESTS.parent)
    assert sandbox.run(HEAD + story + "\nend()\n", root) == {}


def test_after_up_and_down():
    play("""
lab("up")
lab("pod", "add", "one", "--node", "1", "--serve", "tcp:80")
lab("down")
""")


def test_two_labs_at_once_and_a_name_that_begins_alike():
    play("""
lab("up", "--name", "a", "--empty", "--nodes", "1")
lab("up", "--name", "ab", "--empty", "--nodes", "1")
lab("down", "--name", "a")
assert "lab-ab-node1" in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
lab("status", "--name", "ab")
lab("down", "--name", "ab")
""")


def test_after_up_was_killed_at_any_moment():
    play("""
for tenths in (3, 4, 5, 7, 10):
    killed(tenths / 10, "up", "--nodes", "1")
    lab("down")
    reap()
    found = snapshot.differences(before, snapshot.take())
    assert not found, (tenths, found)
""")


def test_up_after_up_was_killed():
    play("""
killed(0.4, "up")
killed(0.8, "up")
lab("up", "--empty")
lab("pod", "add", "one", "--node", "2", "--serve", "tcp:80")
lab("down")
""")


def test_after_down_was_killed():
    play("""
lab("up", "--nodes", "1")
killed(0.3, "down")
lab("down")
""")


def test_a_lab_whose_files_are_half_written():
    play("""
lab("up", "--empty", "--nodes", "1")
path = Path("/run/pynet-lab/lab/lab.json")
path.write_bytes(path.read_bytes()[:40])
lab("up", "--empty", "--nodes", "1")
path.write_bytes(b"")
lab("down")
""")


def test_down_without_a_lab():
    play('lab("down")')


def test_down_while_up_is_at_work():
    play("""
child = subprocess.Popen([LAB, "up"], stdout=sys.stderr)
while not Path("/run/netns/lab-lab-client").exists():
    assert child.poll() is None
    time.sleep(0.01)
lab("down")
child.wait()
""")


def test_namespaces_of_others_are_left_alone():
    play("""
subprocess.run(["ip", "netns", "add", "theirs"], check=True)
before = snapshot.take()
lab("up", "--empty", "--nodes", "1")
lab("down")
""")


def test_a_machine_that_cannot_carry_a_lab_is_left_as_it_was():
    play("""
folder = Path("/run/bin")
folder.mkdir()
(folder / "nft").write_text("#!/bin/sh\\necho no such thing >&2; exit 1\\n")
(folder / "nft").chmod(0o755)
before = snapshot.take()
os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
done = subprocess.run([LAB, "up", "--mode", "nftables"], capture_output=True, text=True)
os.environ["PATH"] = os.environ["PATH"].partition(":")[2]
assert done.returncode == 77, done
assert "this kernel lacks NAT and maps in nftables" in done.stderr, done
""")
