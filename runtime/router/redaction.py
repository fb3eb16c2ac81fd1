"""Secrets in what a server says: taken out before anybody sees it.

A provider that refuses a key likes to repeat it, in the message, in a code, in a header; and what repeats it may be
written as JSON or a URL writes it, or be cut off in its middle. So every form is looked for, and a beginning is enough.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

MARK = "***"

TELLING = 12
"""Characters that are enough to recognise the beginning of a secret; what is shorter has to be there as a whole."""


_ANSWERED = "receive_response_headers.complete"


def keep_headers_out_of_logs() -> None:
    """Let the HTTP library not log the headers of answers at DEBUG: nobody knows there what is a secret."""
    for protocol in ("http11", "http2"):
        logging.getLogger(f"httpcore2.{protocol}").addFilter(_without_headers)


def _without_headers(record: logging.LogRecord) -> bool:
    if str(record.msg).startswith(_ANSWERED):
        record.msg, record.args = f"{_ANSWERED} (without its headers, which may repeat a secret)", ()
    return True


def redact(text: str, secrets: Iterable[str]) -> str:
    """Return ``text`` with a mark in the place of each of the secrets, whole or cut off."""
    for secret in secrets:
        if secret:
            text = _without(text, _forms(secret))
    return text


def _forms(secret: str) -> set[str]:
    """As it is, and as JSON (with and without escaped slashes), Python and URLs write it, one in the other too."""
    written = json.dumps(secret)[1:-1]
    forms = {secret, written, written.replace("/", "\\/"), repr(secret)[1:-1]}
    forms |= {json.dumps(form)[1:-1] for form in forms}
    return forms | {quote(secret), quote_plus(secret), quote(secret, safe="")}


def _without(text: str, forms: Iterable[str]) -> str:
    starts = {form[:TELLING] for form in forms}
    parts: list[str] = []
    while (at := min((found for start in starts if (found := text.find(start)) >= 0), default=-1)) >= 0:
        parts += [text[:at], MARK]
        text = text[at + max(_shared(text, at, form) for form in forms) :]
    return "".join([*parts, text])


def _shared(text: str, at: int, form: str) -> int:
    """How much of ``form`` stands at that place."""
    size = min(len(form), len(text) - at)
    return next((index for index in range(size) if text[at + index] != form[index]), size)
