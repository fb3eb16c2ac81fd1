"""What a simulated provider was asked, in a file that other processes can read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ridethrough.runtime.router.providers.simulated.draft import dump


class Ledger:
    """An append-only file: one line is one write, so several processes may share it."""

    def __init__(self, path: Path | str | None) -> None:
        """Without ``path`` nothing is kept."""
        self._path = Path(path) if path is not None else None

    @property
    def kept(self) -> bool:
        """Whether lines go anywhere."""
        return self._path is not None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        if self._path is None:
            return
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, dump(line) + b"\n")
        finally:
            os.close(file)
