"""A secret is found however a server writes it, and cut off, and nothing else is taken for it."""

from __future__ import annotations

import json
import logging
from urllib.parse import quote, quote_plus

import pytest

from ridethrough.runtime.router.redaction import keep_headers_out_of_logs, redact

SECRET = 'sk-planted/"0123456789+abcdef=ü'


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        json.dumps(SECRET)[1:-1],
        json.dumps(json.dumps(SECRET)[1:-1])[1:-1],
        json.dumps(SECRET)[1:-1].replace("/", "\\/"),
        repr(SECRET)[1:-1],
        quote(SECRET),
        quote(SECRET, safe=""),
        quote_plus(SECRET),
    ],
)
def test_every_form_whole_cut_off_and_twice(written: str) -> None:
    for text in (written, written[:20], f"{written} and {written}", f"{written[:-1]} and {written}"):
        for before, after in (("", ""), ("key=", "&x"), ("'", "…")):
            left = redact(f"{before}{text}{after}", ["", SECRET])
            assert "0123" not in left
            assert "abc" not in left
            assert left.startswith(f"{before}***")


def test_the_rest_stays() -> None:
    text = "sk-plan is a prefix of many keys; 0123456789 is a number"
    assert redact(text, [SECRET]) == text
    assert redact("a short one: abc, and abcd", ["abc"]) == "a short one: ***, and ***d"
    assert redact("", [SECRET]) == ""


def test_headers_of_answers_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        keep_headers_out_of_logs()
    logger = logging.getLogger("httpcore2.http11")
    assert len(logger.filters) == 1
    with caplog.at_level(logging.DEBUG, logger="httpcore2.http11"):
        logger.debug(f"receive_response_headers.complete return_value={SECRET}")
        logger.debug("send_request_body.complete")
    assert [SECRET in message for message in caplog.messages] == [False, False]
    assert caplog.messages[1] == "send_request_body.complete"
