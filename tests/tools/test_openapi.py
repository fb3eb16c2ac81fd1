"""OpenAPI documents as tools, against a real HTTP server on loopback."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.agents.support import PATIENCE, Scripted, call, open_runtime

from ridethrough import Agent, ConfigError, Tool, ToolFailed, ToolInterrupted, workflow
from ridethrough.tools.openapi import openapi_tools
from ridethrough.tools.openapi.document import Document
from ridethrough.tools.openapi.sending import MAX_ANSWER
from ridethrough.tools.output import Image
from ridethrough.tools.schema import ArgumentsInvalid

pytestmark = pytest.mark.anyio

SECRET = "s3cret-of-the-harbour"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Service(ThreadingHTTPServer):
    """Notes what it is asked, and answers by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        self.elsewhere = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    @property
    def service(self) -> Service:
        assert isinstance(self.server, Service)
        return self.server

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = {"method": self.command, "path": self.path, "headers": headers, "body": body.decode()}
        self.service.seen.append(seen)
        path = self.path.partition("?")[0]
        if path == "/gone":
            self.connection.close()
        elif path.startswith("/redirect/"):
            self._redirect(path.rsplit("/", 1)[1])
        elif path == "/missing":
            self._send(404, "application/problem+json", json.dumps({"title": f"not here {SECRET}"}).encode())
        elif path == "/empty":
            self._send(204, "", b"")
        elif path == "/text":
            self._send(200, "text/plain; charset=latin-1", "grün".encode("latin-1"))
        elif path == "/picture":
            self._send(200, "image/png", b"\x89PNG")
        elif path == "/film":
            self._send(200, "video/mp4", b"film")
        elif path == "/huge":
            self._send(200, "text/plain", b"x" * (MAX_ANSWER + 1))
        elif path == "/packed":
            self._send(200, "application/json", gzip.compress(b"0" * 10_000_000), ("content-encoding", "gzip"))
        elif path == "/broken":
            self._send(200, "application/json", b"{not json")
        else:
            self._send(200, "application/json", json.dumps(seen).encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_one

    def _redirect(self, where: str) -> None:
        target = {"elsewhere": f"{self.service.elsewhere}/echo", "here": "/echo", "round": "/redirect/round"}[where]
        self._send(302 if self.command == "POST" else 307, "", b"", ("location", target))

    def _send(self, status: int, kind: str, body: bytes, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("content-type", kind), ("content-length", str(len(body))), *more):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def services() -> Iterator[tuple[Service, Service]]:
    both = Service(), Service()
    threads = [threading.Thread(target=each.serve_forever, args=(0.02,)) for each in both]
    for thread in threads:
        thread.start()
    both[0].elsewhere = both[1].url
    yield both
    for each, thread in zip(both, threads, strict=True):
        each.shutdown()
        thread.join()
        each.server_close()


@pytest.fixture
def service(services: tuple[Service, Service]) -> Service:
    for each in services:
        each.seen.clear()
    return services[0]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARBOUR_TOKEN", SECRET)


def document(paths: dict[str, Any], version: str = "3.1.0", **more: Any) -> dict[str, Any]:
    return {"openapi": version, "info": {"title": "t", "version": "1"}, "paths": paths, **more}


def get(path: str = "/echo", **operation: Any) -> dict[str, Any]:
    """A document with one GET."""
    return document({path: {"get": {"operationId": "ask", **operation}}})


def parameter(name: str, where: str, kind: str = "string", **more: Any) -> dict[str, Any]:
    return {"name": name, "in": where, "schema": {"type": kind}, **more}


def one(given: dict[str, Any], service: Service, **choices: Any) -> Tool[..., Any]:
    (made,) = openapi_tools(given, base_url=service.url, **choices)
    return made


def holding(folder: Path, text: str) -> list[Path]:
    """The files that have a text in them."""
    return [file for file in folder.iterdir() if text.encode() in file.read_bytes()]


# --- what is sent ---------------------------------------------------------------------------------------------------


async def test_parameters_go_where_the_document_says(service: Service) -> None:
    parameters = [
        parameter("id", "path", required=True),
        parameter("id", "query", "integer"),
        parameter("X-Trace", "header"),
        parameter("Authorization", "header", required=True),
        parameter("visit", "cookie"),
    ]
    paths = {"/echo/{id}": {"parameters": parameters, "get": {"operationId": "ask"}}}
    ask = one(document(paths), service, headers={"Authorization": "Bearer env:HARBOUR_TOKEN"})
    assert set(ask.parameters.json["properties"]) == {"id", "id_query", "X-Trace"}
    assert ask.parameters.json["required"] == ["id"]
    seen = await ask(id="a/b c", id_query=7, **{"X-Trace": "t1"})
    assert seen["path"] == "/echo/a%2Fb%20c?id=7"
    assert seen["headers"]["x-trace"] == "t1"
    assert seen["headers"]["authorization"] == "Bearer ***"  # the server repeats it; nobody is told
    assert service.seen[0]["headers"]["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("style", "value", "query"),
    [
        ({}, ["a", "b c"], "p=a&p=b%20c"),
        ({"explode": False}, [1, True], "p=1%2Ctrue"),
        ({"style": "pipeDelimited", "explode": False}, ["a", "b"], "p=a%7Cb"),
        ({"style": "spaceDelimited", "explode": False}, ["a", "b"], "p=a%20b"),
        ({}, {"x": 1, "y": "ä"}, "x=1&y=%C3%A4"),
        ({"explode": False}, {"x": 1, "y": 2}, "p=x%2C1%2Cy%2C2"),
        ({"style": "deepObject"}, {"x": {"y": [1, 2]}}, "p%5Bx%5D%5By%5D=1&p%5Bx%5D%5By%5D=2"),
        ({"allowReserved": True}, "a/b?c", "p=a/b?c"),
        ({}, "a&b=c#d", "p=a%26b%3Dc%23d"),
    ],
)
async def test_styles_of_a_query(service: Service, style: dict[str, Any], value: Any, query: str) -> None:
    ask = one(get(parameters=[{"name": "p", "in": "query", "schema": {}, **style}]), service)
    assert (await ask(p=value))["path"].partition("?")[2] == query


@pytest.mark.parametrize(("explode", "written"), [(False, "x,1,y,2"), (True, "x=1,y=2")])
async def test_objects_in_a_header(service: Service, explode: bool, written: str) -> None:
    ask = one(get(parameters=[parameter("X-P", "header", "object", explode=explode)]), service)
    assert (await ask(**{"X-P": {"x": 1, "y": 2}}))["headers"]["x-p"] == written


async def test_a_parameter_with_a_content_is_json(service: Service) -> None:
    given = {"name": "p", "in": "query", "content": {"application/json": {"schema": {"type": "object"}}}}
    assert (await one(get(parameters=[given]), service)(p={"a": 1}))["path"] == "/echo?p=%7B%22a%22%3A%201%7D"


@pytest.mark.parametrize("value", ["..", ".", ""])
async def test_a_value_never_becomes_another_path(service: Service, value: str) -> None:
    ask = one(get("/users/{name}/mail", parameters=[parameter("name", "path", required=True)]), service)
    with pytest.raises(ToolFailed, match="another path"):
        await ask(name=value)
    assert service.seen == []


async def test_a_value_never_becomes_another_header(service: Service) -> None:
    ask = one(get(parameters=[parameter("X-P", "header")]), service)
    with pytest.raises(ToolFailed, match="printable"):
        await ask(**{"X-P": "a\r\nX-Admin: yes"})
    assert service.seen == []


@pytest.mark.parametrize(
    ("media", "value", "sent"),
    [
        ("application/json", {"a": [1, "ä"]}, '{"a":[1,"ä"]}'),
        ("application/merge-patch+json", {"a": None}, '{"a":null}'),
        (
            "application/x-www-form-urlencoded",
            {"a": "x y", "b": [1, 2], "c": {"d": 1}},
            "a=x%20y&b=1&b=2&c=%7B%22d%22%3A%201%7D",
        ),
        ("text/plain", "words", "words"),
    ],
)
async def test_bodies(service: Service, media: str, value: Any, sent: str) -> None:
    body = {"required": True, "content": {"image/png": {}, media: {"schema": {}}}}
    post = one(document({"/echo": {"post": {"operationId": "put", "requestBody": body}}}), service)
    seen = await post(body=value)
    assert (seen["body"], seen["headers"]["content-type"]) == (sent, media)
    with pytest.raises(ArgumentsInvalid, match="body"):
        await post()


async def test_a_key_in_the_query_is_configured_and_not_asked_for(service: Service) -> None:
    ask = one(
        get(parameters=[parameter("api_key", "query", required=True)]), service, query={"api_key": "env:HARBOUR_TOKEN"}
    )
    assert ask.parameters.json["properties"] == {}
    await ask()
    assert service.seen[0]["path"] == f"/echo?api_key={SECRET}"


async def test_a_variable_that_is_not_set_is_told_when_it_is_needed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARBOUR_TOKEN")
    ask = one(get(), service, headers={"Authorization": "env:HARBOUR_TOKEN"})
    with pytest.raises(ConfigError, match="HARBOUR_TOKEN is not set"):
        await ask()
    assert service.seen == []


# --- effects --------------------------------------------------------------------------------------------------------


def test_effects_are_those_of_http_unless_told_otherwise(service: Service) -> None:
    paths: dict[str, Any] = {
        "/x": {method: {} for method in ("get", "head", "put", "delete", "post", "patch", "options")}
    }
    made = openapi_tools(document(paths), base_url=service.url, effects={"PATCH /x": "idempotent"})
    assert {each.name: each.effect for each in made} == {
        "GET_x": "read",
        "HEAD_x": "read",
        "PUT_x": "idempotent",
        "DELETE_x": "idempotent",
        "POST_x": "write",
        "PATCH_x": "idempotent",
    }


async def test_a_write_carries_the_key_of_its_call(service: Service, tmp_path: Path) -> None:
    header = parameter("Idempotency-Key", "header", required=True)
    paths = {"/echo": {"post": {"operationId": "pay", "parameters": [header]}, "get": {"operationId": "look"}}}
    tools = openapi_tools(document(paths), base_url=service.url)
    assert "Idempotency-Key" not in tools[1].parameters.json["properties"]
    model = Scripted([call("look"), call("pay")], "done")
    async with open_runtime(tmp_path):
        with anyio.fail_after(PATIENCE):
            await Agent("payer", model=model, tools=tools).run("pay")
    asked = {seen["method"]: seen["headers"].get("idempotency-key") for seen in service.seen}
    assert asked["GET"] is None
    assert str(asked["POST"]).startswith("rt-")


async def test_the_header_of_the_key_can_be_another_or_none(service: Service) -> None:
    post = document({"/echo": {"post": {}}})
    assert "x-key" in (await one(post, service, idempotency_header="X-Key")())["headers"]
    assert "idempotency-key" not in (await one(post, service, idempotency_header=None)())["headers"]


async def test_a_broken_connection_leaves_a_write_in_doubt(service: Service) -> None:
    post, ask = one(document({"/gone": {"post": {}}}), service), one(get("/gone"), service)
    with pytest.raises(ToolInterrupted, match="may or may not have taken effect"):
        await post()
    with pytest.raises(ToolFailed, match="the connection broke"):
        await ask()


async def test_a_server_that_is_not_there_is_no_doubt(service: Service) -> None:
    (post,) = openapi_tools(document({"/echo": {"post": {}}}), base_url="http://127.0.0.1:9")
    with pytest.raises(ToolFailed, match="no connection"):
        await post()


async def test_a_workflow_calls_one_too(service: Service, tmp_path: Path) -> None:
    path = [parameter("odd-name", "query"), parameter("n", "query", "integer")]
    ask = one(get(parameters=path), service)

    @workflow
    async def flow() -> str:
        return str((await ask(n=3, **{"odd-name": "x"}))["path"])

    async with open_runtime(tmp_path) as runtime:
        with anyio.fail_after(PATIENCE):
            assert await (await runtime.start(flow)).result() == "/echo?odd-name=x&n=3"


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/empty", "HTTP 204, without a body"),
        ("/text", "grün"),
        ("/picture", Image(data=b"\x89PNG", media_type="image/png")),
        ("/film", "[video/mp4, 4 bytes, not shown]"),
        ("/broken", "{not json"),
    ],
)
async def test_answers(service: Service, path: str, found: Any) -> None:
    assert await one(get(path), service)() == found


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/missing", r'ask: HTTP 404: {"title": "not here \*{3}"}'),
        ("/huge", "ask: HTTP 200: the answer has more than 8 MiB"),
        ("/packed", "compressed"),
        ("/redirect/elsewhere", "redirects to 127.0.0.1, another place"),
        ("/redirect/round", "more than 5 times"),
    ],
)
async def test_answers_that_are_failures(service: Service, path: str, told: str) -> None:
    with pytest.raises(ToolFailed, match=told) as failed:
        await one(get(path), service, headers={"X-Token": "env:HARBOUR_TOKEN"})()
    assert SECRET not in str(failed.value)


async def test_credentials_stay_with_their_server(services: tuple[Service, Service], service: Service) -> None:
    with pytest.raises(ToolFailed):
        await one(get("/redirect/elsewhere"), service, headers={"X-Token": "env:HARBOUR_TOKEN"})()
    assert services[1].seen == []


async def test_a_redirect_on_the_same_server_is_followed_unless_it_would_lose_the_body(service: Service) -> None:
    assert (await one(get("/redirect/here"), service)())["path"] == "/echo"
    with pytest.raises(ToolFailed, match="would become a GET"):
        await one(document({"/redirect/here": {"post": {}}}), service)()


async def test_no_secret_reaches_the_model_or_the_journal(service: Service, tmp_path: Path) -> None:
    ask = one(get("/missing"), service, headers={"Authorization": "env:HARBOUR_TOKEN"})
    model = Scripted([call("ask")], "done")
    async with open_runtime(tmp_path):
        with anyio.fail_after(PATIENCE):
            await Agent("asker", model=model, tools=[ask]).run("ask")
    assert "HTTP 404" in model.results[0]
    assert holding(tmp_path, SECRET) == []
    assert SECRET not in json.dumps(ask.parameters.json)


# --- schemas --------------------------------------------------------------------------------------------------------


def schema_of(given: Any, version: str = "3.0.3", **components: Any) -> dict[str, Any]:
    """The JSON Schema of a body."""
    body = {"content": {"application/json": {"schema": given}}}
    made = document({"/x": {"post": {"requestBody": body}}}, version, components={"schemas": components})
    (tool,) = openapi_tools(made, base_url="http://127.0.0.1:9")
    return tool.parameters.json


def test_references_are_gathered_once_and_cycles_end() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/components/schemas/Node"}}}
    found = schema_of({"$ref": "#/components/schemas/Node"}, Node=node)
    assert found["properties"]["body"] == {"$ref": "#/$defs/Node"}
    assert found["$defs"]["Node"]["properties"]["next"] == {"$ref": "#/$defs/Node"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
        ({"enum": ["a"], "nullable": True}, {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}),
        ({"minimum": 1, "exclusiveMinimum": True}, {"exclusiveMinimum": 1}),
        ({"maximum": 1, "exclusiveMaximum": False}, {"maximum": 1}),
        (
            {"oneOf": [{"type": "string"}, {"type": "integer", "example": 1}]},
            {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        ),
        ({"allOf": [{"type": "object", "x-internal": 1}]}, {"allOf": [{"type": "object"}]}),
        (
            {"required": ["id", "a"], "properties": {"id": {"readOnly": True}, "a": {}}},
            {"properties": {"a": {}}, "required": ["a"]},
        ),
    ],
)
def test_schemas_of_3_0_become_json_schema(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert schema_of(old)["properties"]["body"] == new


def test_schemas_of_3_1_stay_as_they_are() -> None:
    given = {"type": ["string", "null"], "exclusiveMinimum": 1, "examples": ["a"]}
    assert schema_of(given, "3.1.0")["properties"]["body"] == given


async def test_arguments_are_checked_against_the_references(service: Service) -> None:
    parameters = [{"$ref": "#/components/parameters/Size"}]
    schemas = {"Size~/x": {"type": "integer", "minimum": 1}}
    size = {"name": "size", "in": "query", "schema": {"$ref": "#/components/schemas/Size~0~1x"}}
    made = get(parameters=parameters) | {"components": {"parameters": {"Size": size}, "schemas": schemas}}
    ask = one(made, service)
    assert (await ask(size=2))["path"] == "/echo?size=2"
    with pytest.raises(ArgumentsInvalid, match=r"\$\.size: must be at least 1; got 0"):
        await ask(size=0)


# --- documents ------------------------------------------------------------------------------------------------------


def test_a_document_is_data_text_or_a_file(tmp_path: Path) -> None:
    given = get()
    (tmp_path / "api.json").write_text(json.dumps(given))
    for each in (given, json.dumps(given), tmp_path / "api.json", str(tmp_path / "api.json")):
        assert [tool.name for tool in openapi_tools(each, base_url="http://h")] == ["ask"]


def test_yaml_needs_a_library_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "api.yaml").write_text("openapi: 3.0.0\n")
    with pytest.raises(ConfigError, match="YAML"):
        openapi_tools(tmp_path / "api.yaml")


def test_the_url_comes_from_the_nearest_server() -> None:
    root = [
        {"url": "https://{region}.example/{base}", "variables": {"region": {"default": "eu", "enum": ["eu", "us"]}}}
    ]
    given = document({"/a": {"get": {}}, "/b": {"get": {"servers": [{"url": "http://b.example"}]}}}, servers=root)
    variables = {"base": "v1", "region": "us"}
    assert len(openapi_tools(given, variables=variables)) == 2
    with pytest.raises(ConfigError, match="'base' of the server's URL needs a value"):
        openapi_tools(given)
    with pytest.raises(ConfigError, match="'region' is one of eu, us; got 'xx'"):
        openapi_tools(given, variables={"base": "v1", "region": "xx"})


async def test_the_url_of_a_server_is_where_requests_go(service: Service) -> None:
    (ask,) = openapi_tools(get() | {"servers": [{"url": f"{service.url}/v1/"}]})
    assert (await ask())["path"] == "/v1/echo"


BAD: list[tuple[Any, str]] = [
    ({"swagger": "2.0"}, "it is Swagger 2.0"),
    ({"openapi": "4.0"}, "it is OpenAPI 4.0"),
    ("{", "no valid JSON"),
    ("/nowhere/api.json", "cannot be read"),
    ("https://api.example/openapi.json", "not fetched"),
    ({"openapi": "3.0.0", "paths": []}, "paths: a table"),
    (document({"x": {}}), "paths > x: a path begins with /"),
    (document({"/x": {"$ref": "other.json#/x"}}), "paths > /x: .*leads out of the document"),
    (document({"/x": {"$ref": "#/paths/~1x"}}), "leads back to itself"),
    (get(parameters={}), "paths > /echo > get > parameters: a list"),
    (get(parameters=[{"in": "query"}]), "parameters > 0: 'name' is missing"),
    (get(parameters=[parameter("a", "body")]), "parameters > 0: .*got 'body'"),
    (get(parameters=[parameter("a", "cookie", required=True)]), "the cookie a is required"),
    (get(parameters=[parameter("Host", "header")]), "the client's own"),
    (get(parameters=[parameter("a", "path", style="matrix", required=True)]), "style 'matrix' is not supported"),
    (get(parameters=[{"$ref": "#/components/nothing"}]), "there is no such place"),
    (get(parameters=[{"name": "a", "in": "query", "schema": 1}]), "parameters > 0 > schema: a schema is expected"),
    (get(parameters=[{"name": "a", "in": "query", "schema": {"type": "foo"}}]), "tool 'ask': .*type"),
    (get("/x/{a}"), "no parameter says"),
    (get(requestBody={"content": {"multipart/form-data": {}}}), "multipart/form-data.* none can be sent"),
    (document({"/a": {"get": {"operationId": "x"}}, "/b": {"get": {"operationId": "x"}}}), "used twice"),
    (document({"/a": {"get": {"operationId": "x.y"}}, "/b": {"get": {"operationId": "x/y"}}}), "'x.y' and 'x/y'"),
]


@pytest.mark.parametrize(("given", "told"), BAD, ids=[told for _, told in BAD])
def test_what_is_wrong_with_a_document_is_named(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        openapi_tools(given, base_url="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"include": ["aks"]}, "there is no 'aks'; did you mean 'ask'"),
        ({"exclude": ["x"]}, "there is no 'x'"),
        ({"effects": {"x": "read"}}, "there is no 'x'"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"base_url": "http://me:pw@x"}, "a password belongs in a header"),
        ({"base_url": None}, "it names no server; give base_url"),
        ({"headers": {"Authorization": "Bearer abc"}}, "Authorization holds a secret"),
        ({"headers": {"X Y": "abc"}}, "'X Y' is no header"),
        ({"query": {"api_key": "abc"}}, "api_key holds a secret"),
    ],
)
def test_what_is_wrong_with_a_choice_is_named(choices: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"base_url": "http://127.0.0.1:9", **choices}
    with pytest.raises(ConfigError, match=told) as refused:
        openapi_tools(get(), **given)
    assert "abc" not in str(refused.value)
    assert "pw" not in str(refused.value)


def test_choices(service: Service) -> None:
    paths = {"/a": {"get": {"operationId": "a"}, "post": {"operationId": "b"}}, "/c": {"get": {"summary": "C."}}}
    made = openapi_tools(
        document(paths),
        base_url=service.url,
        exclude=["a"],
        prefix="api",
        approval={"b": True},
        timeout={"b": 5},
        retries=2,
    )
    assert [(each.name, each.approval, each.timeout, each.retries) for each in made] == [
        ("api_b", True, 5, 0),
        ("api_GET_c", False, 60, 2),
    ]
    assert made[1].description == "C."


def test_a_document_that_is_nested_without_end_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(ConfigError, match="nested too deeply"):
        openapi_tools(get(parameters=[{"name": "a", "in": "query", "schema": deep}]), base_url="http://127.0.0.1:9")


def test_a_large_document_is_read_once_for_each_tool() -> None:
    """The schemas that an operation does not use are not carried along."""
    schemas = {f"S{number}": {"type": "object", "description": "x" * 1000} for number in range(1000)}
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/S1"}}}}
    made = document({"/x": {"post": {"requestBody": body}}}, components={"schemas": schemas})
    (tool,) = openapi_tools(made, base_url="http://127.0.0.1:9")
    assert list(tool.parameters.json["$defs"]) == ["S1"]
    assert Document.read(made).root is not made
