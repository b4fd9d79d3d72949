"""The log: a line of JSON for each thing that happened, written by a thread, so that a slow reader stops no server."""

from __future__ import annotations

import json
import queue
import threading
from datetime import UTC, datetime
from typing import TextIO

MOST = 10_000  # lines that wait to be written; more are dropped, and counted


class Lines:
    """Takes lines, from any thread, until it is closed."""

    def __init__(self, file: TextIO):
        self._file, self._waiting, self._dropped = file, queue.SimpleQueue(), 0
        self._thread = threading.Thread(target=self._write, daemon=True, name="log")
        self._thread.start()

    def __call__(self, line: dict) -> None:
        if self._waiting.qsize() < MOST:
            self._waiting.put({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line})
        else:
            self._dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Writes what is left, unless nobody reads it for so many seconds."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _write(self) -> None:
        while (line := self._waiting.get()) is not None:
            text = json.dumps(line) + "\n"
            if self._dropped and self._waiting.empty():
                dropped, self._dropped = self._dropped, 0
                text += json.dumps({"level": "warning", "warning": f"{dropped} lines were dropped"}) + "\n"
            try:
                self._file.write(text)
                self._file.flush()
            except (OSError, ValueError):  # nobody reads it any more
                return
