"""The workflow through SLURM for real, where its packages are installed, and what Kubernetes would be sent."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.workflow.conftest import BITS, GREEDY, LOCAL, MODEL, ROOT, tiny_config

SLURM = ROOT / "workflow" / "profiles" / "slurm"
PLAN = f"data/plans/{MODEL}_{BITS}bits.greedy.json"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")


def environment() -> dict[str, str]:
    names = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MLFLOW", "SLURM"))}
    return {**names, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a running SLURM cluster of this machine."""
    if MISSING:
        pytest.skip(f"SLURM is not installed: no {', '.join(MISSING)}")
    if os.getuid() != 0:
        pytest.skip("slurmd has to be root")
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine belongs to a SLURM cluster")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SLURM / "loopback", "start", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run([SLURM / "loopback", "stop", folder], check=True)


@pytest.fixture(scope="module")
def folder(clone: Callable[[], Path], tiny_model_folder: Path, text_file: Path) -> Path:
    """A clone with the tiny model, nothing made."""
    made = clone()
    shutil.copytree(tiny_model_folder, made / LOCAL / "model")
    shutil.copy(text_file, made / LOCAL / "text.txt")
    (made / "config" / "config.yaml").write_text(yaml.safe_dump(tiny_config(Path(LOCAL))))
    return made


def submit(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    profile = ["--workflow-profile", "workflow/profiles/slurm", "--cores", "1"]
    polling = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
    return subprocess.Popen(
        [SNAKEMAKE, *profile, *polling, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_over_its_memory_limit_names_the_log_that_says_so(cluster: Path, folder: Path) -> None:
    target = f"resources/models/{MODEL}"
    done = submit(folder, "--retries", "0", "--set-resources", "model:mem_mb=120", "--", target)
    output, _ = done.communicate(timeout=300)
    assert done.returncode != 0
    assert "Error in rule model" in output
    logs = list((folder / ".snakemake" / "slurm_logs" / "rule_model").rglob("*.log"))
    assert any(str(log) in output for log in logs)
    assert any("memory limit" in log.read_text() for log in logs)
    assert not (folder / target).exists()


def test_the_whole_workflow_makes_what_it_makes_here_and_a_killed_job_is_submitted_again(
    cluster: Path, folder: Path, finished_once: Path
) -> None:
    running = submit(folder, GREEDY, "--config", "units={jobs: 2}")
    killed = None
    deadline = time.monotonic() + 60
    while killed is None and time.monotonic() < deadline:
        found = subprocess.run(["squeue", "--noheader", "--states=R", "--format=%i"], capture_output=True, text=True)
        if found.stdout.strip():
            killed = found.stdout.split()[0]
            subprocess.run(["scancel", "--signal=KILL", "--full", killed], check=True)
        time.sleep(0.2)
    assert killed is not None
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 0, output[-4000:]
    assert "Trying to restart job" in output
    assert (folder / PLAN).read_bytes() == (finished_once / PLAN).read_bytes()
    done = re.findall(r"^Finished jobid: \d+ \(Rule: (\w+)\)", output, re.MULTILINE)
    counts = {rule: done.count(rule) for rule in ("bank_part", "bank", "zero_shot_original", "zero_shot")}
    assert counts == {"bank_part": 2, "bank": 1, "zero_shot_original": 1, "zero_shot": 1}
    there, here = (json.loads((base / GREEDY).read_text()) for base in (folder, finished_once))
    for key in ("perplexity", "zero_shot", "actions", "effective_bits"):
        assert there[key] == here[key]


class Cluster(BaseHTTPRequestHandler):
    """As much of Kubernetes' API as takes a job, says that it failed, and writes down what it was."""

    jobs: ClassVar[list[dict[str, Any]]] = []

    def answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/jobs"):
            self.jobs.append(sent)
        self.answer(sent)

    def do_GET(self) -> None:
        job = self.jobs[-1] if self.jobs else {}
        failed = {"failed": 1, "conditions": [{"type": "Failed", "status": "True", "reason": "test"}]}
        self.answer({**job, "status": failed, "items": []})

    def do_DELETE(self) -> None:
        self.answer({})

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def test_the_jobs_that_kubernetes_is_sent(clone: Callable[[], Path], tmp_path: Path) -> None:
    storage = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    storage.start()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entries: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "c", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(entries))
    host, port = storage.get_host_and_port()
    names = {
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), ""),
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "test",
        "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "test",
    }
    profile = [
        "--workflow-profile",
        "workflow/profiles/kubernetes",
        "--default-storage-prefix",
        "s3://bucket/windquant",
    ]
    made = clone()

    def snakemake(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [SNAKEMAKE, *profile, *arguments],
            cwd=made,
            env={**environment(), **names},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    try:
        planned = snakemake("--dry-run", "--", "results/qwen3-0.6b_2.0bits.json")
        done = snakemake("--retries", "0", "--cores", "2", "--", "resources/models/qwen3-0.6b")
    finally:
        server.shutdown()
        storage.stop()
    assert planned.returncode == 0, planned.stdout[-4000:]
    assert {"statistics", "bank", "quantize", "result"} <= set(
        re.findall(r"^(\w+) +\d+$", planned.stdout, re.MULTILINE)
    )
    assert len(Cluster.jobs) == 1, done.stdout[-4000:]
    (container,) = Cluster.jobs[0]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "windquant:latest"
    requests = container["resources"]["requests"]
    assert requests["cpu"].endswith("m")
    assert int(requests["memory"].removesuffix("M")) > 500
    assert int(requests["ephemeral-storage"].removesuffix("M")) > 0
    assert "nvidia.com/gpu" not in requests, "the model's step computes nothing"
    assert "--allowed-rules model" in container["args"][1]
    assert Cluster.jobs[0]["spec"]["backoffLimit"] == 0, "Snakemake tries again, with more memory"
