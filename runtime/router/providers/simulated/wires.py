"""The four wires, and which of them a path belongs to."""

from __future__ import annotations

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated.chat import Chat
from ridethrough.runtime.router.providers.simulated.draft import Wire
from ridethrough.runtime.router.providers.simulated.gemini import TARGET, Gemini
from ridethrough.runtime.router.providers.simulated.messages import Messages
from ridethrough.runtime.router.providers.simulated.responses import Responses

WIRES: dict[WireName, Wire] = {"openai": Chat(), "openai-responses": Responses(), "anthropic": Messages()}
WIRES["gemini"] = Gemini()

_PATHS = {
    "/v1/chat/completions": WIRES["openai"],
    "/v1/responses": WIRES["openai-responses"],
    "/v1/messages": WIRES["anthropic"],
}


def wire_of(target: str) -> Wire | None:
    """Return the wire whose requests are posted to ``target`` (a path with its query), ``None`` when it is no such."""
    found = _PATHS.get(target.partition("?")[0])
    if found is None and TARGET.fullmatch(target):
        return WIRES["gemini"]
    return found
