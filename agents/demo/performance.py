"""The demonstration from its beginning to its account."""

from __future__ import annotations

import time
from pathlib import Path

import anyio

from ridethrough.agents.demo.account import Account, account_of
from ridethrough.agents.demo.acts import perform
from ridethrough.agents.demo.stage import set_stage, shown
from ridethrough.agents.demo.tell import teller


def give(folder: Path, database: str | None, *, json: bool) -> Account:
    """Play it, tell it (unless for a program), and count.

    Args:
        folder: Where its files go.
        database: Where the run is kept; ``runs.db`` in ``folder`` when left out.
        json: Tell nothing.
    """
    return anyio.run(_give, folder, database, json)


async def _give(folder: Path, database: str | None, json: bool) -> Account:
    began, telling = time.monotonic(), teller(json=json)
    async with set_stage(folder, database) as stage:
        telling.opening(shown(stage.folder))
        evidence = await perform(stage, telling)
        account = account_of(stage, evidence, time.monotonic() - began)
    telling.account(account)
    return account
