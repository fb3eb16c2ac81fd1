"""CPU and wall time of one command in a fresh interpreter; BENCH_VARIANT says which.

Median of three starts after one that is not counted: byte code is on disk, the page cache is warm.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from _measure import Meter, arguments, report

COMMANDS = {  # -P: a folder of the working directory must not shadow a package (`agents` is the OpenAI SDK's too)
    "python": ["-P", "-c", "pass"],
    "ridethrough": ["-P", "-c", "import ridethrough"],
    "ridethrough, Runtime and Agent": ["-P", "-c", "from ridethrough import Runtime, workflow, step, Agent, tool"],
    "ridethrough --help": [str(Path(sys.executable).with_name("ridethrough")), "--help"],  # the console script
    "dbos": ["-P", "-c", "import dbos"],
    "langgraph": ["-P", "-c", "import langgraph.graph, langgraph.prebuilt, langgraph.checkpoint.sqlite"],
    "openai-agents": ["-P", "-c", "import agents"],
    "pydantic-ai": ["-P", "-c", "import pydantic_ai"],
}


def start(name: str) -> Meter:
    """A Meter filled with the figures of a child process."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *COMMANDS[name]], check=True, stdout=subprocess.DEVNULL)
    meter, after = Meter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    meter.wall = time.perf_counter() - begun
    meter.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return meter


case, _, _ = arguments()
name = os.environ["BENCH_VARIANT"]
start(name)
report(name, case, sorted((start(name) for _ in range(3)), key=lambda meter: meter.cpu)[1], 1)
