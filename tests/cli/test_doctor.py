"""`doctor` asks each kind of provider which models it has, and knows what the answers mean."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ridethrough.runtime.doctor import Finding, examine
from ridethrough.runtime.options import Options

KEY = "sk-planted-0123456789"


class Server(ThreadingHTTPServer):
    """Answers every question with ``status`` and ``body``, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body = 200, '{"data": []}'
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One question."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        body = server.body.encode()
        self.send_response(server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCTOR_TEST_KEY", KEY)
    return tmp_path


def ask(folder: Path, kind: str, base_url: str, more: str = "", *, name: str = "provider p") -> Finding:
    """What is found out about the only provider, or of another ``name``."""
    path = folder / "ridethrough.toml"
    path.write_text(
        f'[providers.p]\nkind = "{kind}"\nbase_url = "{base_url}"\napi_key = "env:DOCTOR_TEST_KEY"\n{more}\n'
    )
    findings = examine(Options(config=str(path)), offline=False)
    assert KEY not in json.dumps([finding.as_json() for finding in findings])
    [found] = [finding for finding in findings if finding.name == name]
    return found


@pytest.mark.parametrize(
    ("kind", "base", "path", "header", "value"),
    [
        ("openai", "/v1", "/v1/models", "authorization", f"Bearer {KEY}"),
        ("openai-responses", "/v1/", "/v1/models", "authorization", f"Bearer {KEY}"),
        ("anthropic", "", "/v1/models", "x-api-key", KEY),
        ("gemini", "", "/v1beta/models", "x-goog-api-key", KEY),
    ],
)
def test_each_kind_is_asked_where_and_how_its_vendor_wants_it(
    folder: Path, server: Server, kind: str, base: str, path: str, header: str, value: str
) -> None:
    assert ask(folder, kind, server.url + base).status == "ok"
    [(asked, headers)] = server.asked
    assert asked == path
    assert headers[header] == value
    assert [name for name, sent in headers.items() if KEY in sent] == [header]


def test_headers_of_the_configuration_are_sent_too(folder: Path, server: Server) -> None:
    ask(folder, "openai", server.url, 'headers = { x-team = "blue", x-token = "env:DOCTOR_TEST_KEY" }')
    [(_, headers)] = server.asked
    assert (headers["x-team"], headers["x-token"]) == ("blue", KEY)


def test_a_password_in_the_address_is_sent_and_not_shown(folder: Path, server: Server) -> None:
    found = ask(folder, "anthropic", server.url.replace("//", f"//me:{KEY}@"))
    assert found.detail == f"{server.url}/v1/models answers 200"
    [(_, headers)] = server.asked
    assert headers["authorization"].startswith("Basic ")


GEMINI_REFUSES = json.dumps(
    {
        "error": {
            "code": 400,
            "message": "API key not valid. Please pass a valid API key.",
            "status": "INVALID_ARGUMENT",
            "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}],
        }
    }
)
OUT_OF_CREDIT = json.dumps({"error": {"type": "insufficient_quota", "code": "insufficient_quota", "message": "no"}})


@pytest.mark.parametrize(
    ("kind", "answer", "body", "status", "words"),
    [
        ("openai", 401, f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}', "wrong", "credential"),
        ("gemini", 400, GEMINI_REFUSES, "wrong", "credential"),
        ("openai", 429, OUT_OF_CREDIT, "wrong", "out of credit"),
        ("openai", 429, "{}", "doubtful", "limits the rate"),
        ("anthropic", 529, '{"error": {"type": "overloaded_error"}}', "doubtful", "unwell"),
        ("openai", 404, "<html>not here</html>", "doubtful", "404"),
        ("openai", 307, "", "doubtful", "points elsewhere"),
    ],
)
def test_what_a_provider_answers_is_told_apart(
    folder: Path, server: Server, kind: str, answer: int, body: str, status: str, words: str
) -> None:
    server.status, server.body = answer, body
    found = ask(folder, kind, server.url)
    assert (found.status, words in found.detail, bool(found.mend)) == (status, True, True)


def test_a_server_that_is_not_there_is_wrong(folder: Path) -> None:
    found = ask(folder, "anthropic", "http://127.0.0.1:9")
    assert found.status == "wrong"
    assert "cannot be reached" in found.detail


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "127.0.0.1:8000", "http://[::1"])
def test_an_address_that_is_none_is_told_with_its_line(folder: Path, url: str) -> None:
    found = ask(folder, "anthropic", url, name="configuration")
    assert found.status == "wrong"
    assert "ridethrough.toml:3: providers.p.base_url: " in found.detail
