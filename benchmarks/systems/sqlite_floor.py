"""The floor: plain `sqlite3` in this file system, WAL and synchronous=FULL. No engine at all, only its commits."""

from __future__ import annotations

import sqlite3

from _measure import FLEET_RUNS, FLEET_STEPS, SEQUENTIAL_STEPS, Meter, arguments, report

case, directory, _ = arguments()
connection = sqlite3.connect(directory / "floor.sqlite", isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL")
connection.execute("PRAGMA synchronous=FULL")
connection.execute("CREATE TABLE steps (id INTEGER PRIMARY KEY, run TEXT, seq INTEGER, result TEXT, UNIQUE (run, seq))")
n = SEQUENTIAL_STEPS if case == "sequential" else FLEET_RUNS * FLEET_STEPS
for i in range(-20, 0):  # warm-up
    connection.execute("INSERT INTO steps (run, seq, result) VALUES (?, ?, ?)", ("warm-up", i, "1"))
with Meter() as meter:
    for i in range(n):
        connection.execute("INSERT INTO steps (run, seq, result) VALUES (?, ?, ?)", ("x", i, "1"))
report("sqlite3 alone", case, meter, n)
