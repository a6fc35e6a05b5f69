"""What pynetd refuses to start with, and the words that it says so with: the flag, and what was expected."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cni.node.main import main
from cni.node.status import STATUS

ALLOCATE = "--allocate-node-cidrs"
REFUSED = [
    ("", "no source: name one by --manifests DIR or --kubeconfig FILE"),
    ("--manifests=M --kubeconfig=/x", "--manifests and --kubeconfig or --master exclude each other"),
    ("--manifests=M --mtu=-5", "argument --mtu: '-5': expected 68 to 65535, or 0"),
    ("--manifests=M --mtu=40", "argument --mtu: '40': expected 68 to 65535, or 0"),
    ("--manifests=M --bridge=averyveryverylongname", "argument --bridge: 'averyveryverylongname' is no name of a link"),
    ("--manifests=M --bridge=a/b", "argument --bridge: 'a/b' is no name of a link"),
    ("--manifests=M --resync-period=0s", "argument --resync-period: must be above zero"),
    ("--manifests=M --resync-period=soon", "argument --resync-period: 'soon' is no duration"),
    ("--manifests=M --vxlan-vni=16777216", "argument --vxlan-vni: '16777216': expected 1 to 16777215"),
    ("--manifests=M --vxlan-port=0", "argument --vxlan-port: '0': expected 1 to 65535"),
    ("--manifests=M --backend=ipip", "argument --backend: invalid choice: 'ipip'"),
    ("--manifests=M --cluster-cidr=10.244.0.1/16", "argument --cluster-cidr: 10.244.0.1/16 has host bits set"),
    ("--manifests=M --non-masquerade-cidrs=all", "argument --non-masquerade-cidrs: 'all' does not appear to be"),
    (f"--manifests=M {ALLOCATE}", "--allocate-node-cidrs needs --cluster-cidr"),
    (f"--master=http://a {ALLOCATE} --cluster-cidr=10.0.0.0/16", "--allocate-node-cidrs is for --manifests"),
    (f"--manifests=M {ALLOCATE} --cluster-cidr=10.0.0.0/16 --node-cidr-mask-size=8", "--node-cidr-mask-size 8: no"),
    (f"--manifests=M {ALLOCATE} --cluster-cidr=10.0.0.0/16 --node-cidr-mask-size=0", "--node-cidr-mask-size 0: no"),
    (f"--manifests=M {ALLOCATE} --cluster-cidr=10.0.0.0/16 --node-cidr-mask-size=31", "--node-cidr-mask-size 31: no"),
    (f"--manifests=M {ALLOCATE} --cluster-cidr=10.0.0.0/16,10.1.0.0/16", "10.1.0.0/16: a second one of IPv4"),
    (f"--manifests=M {ALLOCATE} --cluster-cidr=10.0.0.0/16,fd00::/48 --node-cidr-mask-size=24", "is for one family"),
    ("status and more", "unrecognized arguments: and more"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_what_is_refused(
    flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(sys, "argv", ["pynetd", *flags.replace("=M", f"={tmp_path}").split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_status_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / STATUS).write_text('{"node": ')
    monkeypatch.setattr(sys, "argv", ["pynetd", "status", f"--state-dir={tmp_path}"])
    assert main() == 1
    assert f"pynetd status: {tmp_path / STATUS} cannot be read" in capsys.readouterr().err
