"""A lab whose daemons follow an API server: kubectl drives it, and the conformance cases hold through it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from netnslab import api, play

pytestmark = [pytest.mark.root, pytest.mark.lab]

WEB = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: any, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
"""


def test_the_conformance_cases_hold_through_the_api(make_lab):
    lab = make_lab(mode="nftables", api=True)
    rows = play.play_all(lab, ["conformance"])
    wrong = [f"{row.case}: {row.path}: {row.wrong}" for row in rows if not row.ok]
    assert not wrong, "\n".join(wrong)
    assert all(play.passed(rows).values())


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_kubectl_drives_the_lab(make_lab, tmp_path: Path):
    lab = make_lab(api=True)
    environment = {**os.environ, "KUBECONFIG": str(api.kubeconfig(lab.folder)), "HOME": str(tmp_path)}

    def kubectl(*words: str, given: str | None = None) -> str:
        done = subprocess.run(
            ["kubectl", *words], input=given, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def eventually(count: int) -> None:
        deadline = time.monotonic() + 30
        while True:
            slices = json.loads(kubectl("get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", "json"))
            found = [each for one in slices["items"] for each in one["endpoints"] if each["conditions"]["ready"]]
            if len(found) == count:
                return
            assert time.monotonic() < deadline, f"{len(found)} endpoints, not {count}"
            time.sleep(0.1)

    kubectl("apply", "-f", "-", given=WEB)
    eventually(2)
    assert {pod.name for pod in lab.pods()} == {"web-1", "web-2"}
    kubectl("scale", "deploy/web", "--replicas=3")
    eventually(3)
    kubectl("delete", "pod", "web-2", "--wait=false")
    eventually(3)
    kubectl("delete", "deploy/web", "svc/web")
    deadline = time.monotonic() + 30
    while (lab.pods() or lab.objects("Service")) and time.monotonic() < deadline:  # each is watched by itself
        time.sleep(0.1)
    assert not lab.pods()
    assert not lab.objects("Service")
