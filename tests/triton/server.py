"""A real tritonserver of this run's own, on free ports of 127.0.0.1."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRITON = ROOT / ".triton" / "server" / "pytriton" / "tritonserver"
READY_SECONDS = 60
PATIENCE = 60.0
RUNNING = 'nova_running{model="nova"}'


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass(frozen=True)
class Server:
    """url: of gRPC. log: what it prints."""

    process: subprocess.Popen[bytes]
    url: str
    http: str
    metrics_url: str
    log: Path

    def metrics(self) -> dict[str, float]:
        """By name and labels, as they stand in the text."""
        text = urllib.request.urlopen(f"http://{self.metrics_url}/metrics", timeout=5).read().decode()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def settled_metrics(self) -> dict[str, float]:
        """When no loop runs: what a loop did is told after its last answer."""
        wait_until(lambda: self.metrics().get(RUNNING, 0) == 0)
        return self.metrics()

    def stubs(self) -> list[int]:
        """Process ids of the python backend's processes, one an instance of a model."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                name = (entry / "cmdline").read_bytes().split(b"\0")[0]
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if name.endswith(b"triton_python_backend_stub") and parent == self.process.pid:
                found.append(int(entry.name))
        return found

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def triton(
    repository: Path, log: Path, models: Sequence[str] = ("*",), wait: bool = True
) -> Iterator[Server]:
    """Started, and stopped at the end. Models are loaded and unloaded by clients (explicit mode).

    wait: until all is loaded; raises RuntimeError with the log where that fails.
    """
    http, grpc, metrics = free_ports(3)
    command: list[Any] = [
        TRITON / "bin" / "tritonserver",
        f"--model-repository={repository.absolute()}",
        f"--backend-directory={TRITON / 'backends'}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        f"--http-address=127.0.0.1 --http-port={http}",
        f"--grpc-address=127.0.0.1 --grpc-port={grpc}",
        f"--metrics-address=127.0.0.1 --metrics-port={metrics}",
        "--allow-gpu-metrics=false --exit-timeout-secs=2 --exit-on-error=false",
    ]
    command = [part for each in command for part in str(each).split(" ")]
    bins = str(
        Path(sys.executable).parent
    )  # the stub takes its packages from the python that is first in PATH
    environment = {
        **os.environ,
        "PATH": f"{bins}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    server = Server(process, f"127.0.0.1:{grpc}", f"127.0.0.1:{http}", f"127.0.0.1:{metrics}", log)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while wait and not server.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"tritonserver is not ready:\n{log.read_text()[-4000:]}")
            time.sleep(0.1)
        yield server
    finally:
        stubs = server.stubs()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stub in stubs:  # its children end with it, but not when it is killed
            try:
                os.kill(stub, signal.SIGKILL)
            except ProcessLookupError:
                continue
