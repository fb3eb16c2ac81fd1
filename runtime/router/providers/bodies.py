"""Bodies as they go out and come in, the same on every wire.

What came with status 200 and is no answer is the server's error: an HTML page, broken JSON, or JSON of another form.
So wires read an answer as if it were as documented, and whatever that raises (``MALFORMED``) is told here. The
alternative, a schema for each wire, refuses the answers of imitators, who leave out and add as they like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ridethrough.runtime.errors import ModelError, ServerError
from ridethrough.runtime.router.errors import Rule, classify
from ridethrough.runtime.router.providers.wire import Answer

MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
"""What reading something of an unexpected form raises. Some ``ModelError`` are a ``ValueError`` too: let them by."""


# --- out ------------------------------------------------------------------------------------------------------------


def dump(value: Any) -> bytes:
    """Write ``value`` as JSON without spaces; halves of surrogate pairs, which are no Unicode, become ``?``."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def dump_all(values: Iterable[Any]) -> bytes:
    """Write ``values`` as the inside of an array."""
    return b",".join([dump(value) for value in values])


def headers(*, stream: bool) -> dict[str, str]:
    """Return the headers of a request."""
    return {"content-type": "application/json", "accept": "text/event-stream" if stream else "application/json"}


# --- in -------------------------------------------------------------------------------------------------------------


def read_answer(
    body: bytes,
    deployment: str,
    table: tuple[Rule, ...],
    error_in: Callable[[Any], Any],
    read: Callable[[Any], Answer],
) -> Answer:
    """Read a body that came with status 200.

    Args:
        body: What came.
        deployment: Whose answer it is, for messages.
        table: The meaning of errors.
        error_in: Returns what says that the parsed body is an error, if it is one.
        read: Reads the parsed body; whatever of ``MALFORMED`` it raises means that it is no answer.

    Raises:
        ModelError: The body is an error, by its class; ``ServerError`` when it is no answer at all.
    """
    payload = load(body, deployment)
    if error := error_in(payload):
        raise classify(200, error, deployment=deployment, table=table)
    try:
        return read(payload)
    except ModelError:
        raise
    except MALFORMED as error:
        text = f"{deployment} sent no answer in its answer ({why(error)}): {excerpt(body)}"
        raise ServerError(text, deployment=deployment, status=200) from None


def load(body: bytes, deployment: str) -> Any:
    """Parse a body that came with status 200.

    Raises:
        ServerError: It is no JSON.
    """
    try:
        return unwrapped(json.loads(body))
    except (ValueError, RecursionError):
        what = "an HTML page" if body.lstrip()[:1] == b"<" else "broken JSON"
        text = f"{deployment} answered 200 with {what}: {excerpt(body)}; check base_url if this goes on"
        raise ServerError(text, deployment=deployment, status=200) from None


def unwrapped(payload: Any) -> Any:
    """Undo what proxies do to errors: JSON inside a string."""
    if isinstance(payload, str) and payload.lstrip()[:1] in ("{", "["):
        return json.loads(payload)
    return payload


def error_in(payload: Any) -> Any:
    """Return what says that a body or chunk with status 200 is an error, ``None`` when it is not one."""
    if isinstance(payload, list) and payload:
        payload = payload[0]
    if not isinstance(payload, Mapping):
        return None
    return payload if payload.get("error") or "error" in (payload.get("type"), payload.get("object")) else None


def excerpt(body: bytes) -> str:
    """Return the beginning of a body in one line, for a message."""
    return re.sub(r"\s+", " ", body[:200].decode("utf-8", "replace"))


def why(error: Exception) -> str:
    """Return what was wrong with the form of something, in short."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:120]


def count(value: Any) -> int:
    """Return a number of tokens as a server tells it; what is no such number counts nothing, since it costs nothing."""
    try:
        return max(0, int(value or 0))
    except (TypeError, ValueError, OverflowError):
        return 0
