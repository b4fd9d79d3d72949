"""A lean HTTP client: on two cores a client takes its time from the server's. And a server as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def request(body: bytes, path: str = "/predict", method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self):
        self._answer: asyncio.Future | None = None
        self._data = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        length = re.search(rb"content-length: (\d+)", self._data[:end])
        if length is None or len(self._data) >= end + 4 + int(length[1]):
            self._tell((int(self._data[9:12]), self._data[end + 4 :]))

    def connection_lost(self, error: Exception | None) -> None:
        self._tell((0, b""))

    def _tell(self, answer: tuple[int, bytes]) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    async def ask(self, raw: bytes, patience: float | None = None) -> tuple[int, bytes]:
        """(status, body); (0, b"") if the connection ends before. patience: seconds after which it is cut."""
        self._answer, self._data = asyncio.get_running_loop().create_future(), b""
        self.transport.write(raw)
        if patience is not None:
            await asyncio.wait({self._answer}, timeout=patience)
            if not self._answer.done():
                self.transport.abort()
        return await self._answer


async def connected(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


class Server:
    """A server that was begun, its processes and what they use."""

    def __init__(self, process: subprocess.Popen, told: dict):
        self.process, self.port = process, int(told["url"].rpartition(":")[2])

    @property
    def pids(self) -> dict[str, int]:
        """server: the process that listens. engine: its child that computes."""
        found = {"server": self.process.pid}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found["engine"] = int(child)
        return found

    def memory(self) -> dict[str, float]:
        """Resident megabytes of each process."""
        pages = {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for name, pid in self.pids.items()}
        return {name: count * os.sysconf("SC_PAGE_SIZE") / 1e6 for name, count in pages.items()}

    def cpu(self) -> dict[str, float]:
        """Seconds of a core that each process has used, and the caller too, as client."""
        pids = {**self.pids, "client": os.getpid()}
        stats = {name: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for name, pid in pids.items()}
        return {name: (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") for name, stat in stats.items()}

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """Summed over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if re.match(rf"{name}(\{{|\s)", line)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@contextlib.contextmanager
def serving(*command: object) -> Iterator[Server]:
    """`python COMMAND`, which prints a line of JSON when it is ready, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"no server: {' '.join(map(str, command))}")
        yield Server(process, json.loads(line))
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
