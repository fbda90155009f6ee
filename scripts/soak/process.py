"""A server process for the soaks: started with flags, watched from outside, ended by its own pid."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300.0


class ServerProcess:
    """`with ServerProcess(port, flags, log) as server:` waits until it answers /health; leaving ends it."""

    def __init__(self, port: int, flags: list[str], log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [sys.executable, "-m", "server", "serve", "--port", str(port), *flags]
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.read("/health")
                return self
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"the server did not come up: {self._log.read_text()[-2000:]}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL a minute later; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def read(self, path: str) -> str:
        """The body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    def metrics(self) -> dict[str, float]:
        """Every series by its name with labels, as Prometheus writes it."""
        lines = (line.rpartition(" ") for line in self.read("/metrics").splitlines() if line[:1] not in ("#", ""))
        return {name: float(value) for name, _, value in lines}

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the process now."""
        return rss_bytes(self.process.pid)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


class RssSampler:
    """Samples a process' memory on a thread: `samples` are (seconds since the start, bytes)."""

    def __init__(self, pid: int, interval_seconds: float = 0.2) -> None:
        self.samples: list[tuple[float, int]] = []
        self._pid, self._interval = pid, interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(self._interval):
            self.samples.append((time.monotonic() - started, rss_bytes(self._pid)))

    @property
    def max_bytes(self) -> int:
        """The most seen."""
        return max((size for _, size in self.samples), default=0)
