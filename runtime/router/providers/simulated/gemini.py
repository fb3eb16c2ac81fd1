"""Gemini's generateContent: https://ai.google.dev/api/generate-content."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import parse_qs, unquote

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated.conversation import (
    Conversation,
    Malformed,
    called,
    failed,
    illustrated,
    instructed,
    joined,
    mappings,
    offered,
    shown,
    spoken,
)
from ridethrough.runtime.router.providers.simulated.draft import (
    Draft,
    Failure,
    Refused,
    Stream,
    What,
    dump,
    words,
)

_Part = dict[str, Any]

TARGET = re.compile(r"/v1(?:beta|alpha)?/models/([^:?]+):(generateContent|streamGenerateContent)(?:\?(.*))?")
"""The path of a request: its model, its method, and its query."""

_FINISH = {"stop": "STOP", "tool_calls": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}


class Gemini:
    """The wire ``gemini``."""

    name: WireName = "gemini"
    prefix = ""

    def read(self, body: Mapping[str, Any], target: str) -> Conversation:
        """Read a body; the model, and whether it is streamed, are in the path."""
        found = TARGET.fullmatch(target)
        if found is None:
            raise Malformed(f"{target} is no path of this API")
        system = body.get("systemInstruction") or body.get("system_instruction")
        settings = body.get("generationConfig") or body.get("generation_config") or {}
        turns = [each for turn in mappings(body.get("contents"), "contents") for each in _messages(turn)]
        return Conversation(
            model=unquote(found[1]),
            messages=[*_system(system), *illustrated(joined(turns))],
            tools=list(_tools(body.get("tools") or [])),
            schema=_schema(settings),
            choice=_choice(body.get("toolConfig") or body.get("tool_config") or {}),
            stream=found[2] == "streamGenerateContent",
            framing="sse" if "sse" in parse_qs(found[3] or "").get("alt", ()) else "array",
        )

    def whole(self, draft: Draft) -> bytes:
        """Write a ``GenerateContentResponse``."""
        return dump(_response(draft, list(_parts(draft)), _reason(draft)))

    def stream(self, draft: Draft) -> Stream:
        """Write the chunks; the last has the reason, and nothing comes after it."""
        if draft.finish in ("content_filter", "malformed_function_call"):
            return Stream(_framed([dump(_response(draft, [], _reason(draft)))], draft), ending=1)
        chunks = [dump(_response(draft, [part])) for part in _streamed(draft)]
        last = dump(_response(draft, [{"text": ""}], _reason(draft)))
        return Stream(_framed([*chunks, last], draft), ending=1)

    def refused(self, failure: Failure, *, model: str = "") -> Refused:
        """Write Google's error; a prompt that is filtered gets a 200 without candidates."""
        if failure.what == "content_filter" and failure.status is None:
            return Refused(200, {"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": model})
        status, name, message = _ERRORS[failure.what]
        status = failure.status or status
        if failure.what == "auth" and status == 400:
            name = "INVALID_ARGUMENT"
        error: dict[str, Any] = {"code": status, "message": failure.message or message, "status": name}
        if details := list(_details(failure, status)):
            error["details"] = details
        return Refused(status, {"error": error})

    def error_event(self, body: Any, draft: Draft, number: int) -> bytes:
        """Write an error in the place of a chunk."""
        return _framed([b"", dump(body)], draft)[-1] if number else _framed([dump(body)], draft)[0]

    def models(self, names: Sequence[str]) -> Any:
        """Write Google's list."""
        methods = ["generateContent"]
        return {"models": [{"name": f"models/{name}", "supportedGenerationMethods": methods} for name in names]}


# --- requests -------------------------------------------------------------------------------------------------------


def _system(raw: Any) -> list[dict[str, Any]]:
    parts = mappings(raw.get("parts"), "systemInstruction.parts") if isinstance(raw, Mapping) else []
    return [instructed(str(part.get("text") or "")) for part in parts]


def _messages(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    role = turn.get("role", "user")
    if role not in ("user", "model", "function"):
        raise Malformed("Please use a valid role: user, model.")
    parts = mappings(turn.get("parts"), "contents.parts")
    if role == "model":
        calls = [call for part in parts if (call := _field(part, "functionCall", "function_call"))]
        text = "".join(str(part.get("text", "")) for part in parts if not part.get("thought"))
        yield spoken(text, [called(call.get("name"), call.get("args"), call.get("id")) for call in calls])
        return
    for part in parts:
        if response := _field(part, "functionResponse", "function_response"):
            given = str(response.get("id") or response.get("name") or "")
            yield {"role": "tool", "tool_call_id": given, "content": _result(response)}
    if rest := _content(parts):
        yield {"role": "user", "content": rest}


def _field(part: Mapping[str, Any], name: str, other: str) -> Any:
    return part.get(name) or part.get(other)


def _content(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in parts:
        if data := _field(part, "inlineData", "inline_data"):
            found.append(shown(f"data:{data.get('mimeType') or data.get('mime_type')};base64,{data.get('data')}"))
        elif file := _field(part, "fileData", "file_data"):
            found.append(shown(str(file.get("fileUri") or file.get("file_uri"))))
        elif "text" in part:
            found.append({"type": "text", "text": str(part["text"])})
    return found


def _result(answered: Mapping[str, Any]) -> Any:
    text, images = _result_text(answered.get("response")), _content(answered.get("parts") or [])
    return [{"type": "text", "text": text}, *images] if images else text


def _result_text(response: Any) -> str:
    """Return a result's text: what is wrapped because the wire takes only objects there is unwrapped."""
    if not isinstance(response, Mapping) or len(response) != 1:
        return dump(response).decode()
    key, value = next(iter(response.items()))
    text = value if isinstance(value, str) else dump(value).decode()
    return failed(text) if key == "error" else text


def _tools(raw: Any) -> Iterator[dict[str, Any]]:
    raw = [raw] if isinstance(raw, Mapping) else raw
    for group in mappings(raw, "tools"):
        for tool in _field(group, "functionDeclarations", "function_declarations") or ():
            schema = tool.get("parametersJsonSchema") or tool.get("parameters_json_schema") or tool.get("parameters")
            yield offered(tool.get("name"), tool.get("description"), _lowered(schema))


def _schema(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for key in ("responseJsonSchema", "response_json_schema", "responseSchema", "response_schema"):
        if isinstance(settings.get(key), Mapping):
            found: Mapping[str, Any] = _lowered(settings[key])
            return found
    return None


def _lowered(schema: Any) -> Any:
    """Return a schema with its types in lower case: Google's own dialect of OpenAPI shouts them."""
    if isinstance(schema, list):
        return [_lowered(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value.lower() if key == "type" and isinstance(value, str) else _lowered(value)
        for key, value in schema.items()
    }


def _choice(raw: Mapping[str, Any]) -> str:
    config = _field(raw, "functionCallingConfig", "function_calling_config") or {}
    allowed = list(_field(config, "allowedFunctionNames", "allowed_function_names") or [])
    if len(allowed) == 1:
        return str(allowed[0])
    return {"ANY": "required", "NONE": "none"}.get(str(config.get("mode", "AUTO")).upper(), "auto")


# --- answers --------------------------------------------------------------------------------------------------------


def _response(draft: Draft, parts: list[_Part], finish: str | None = None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"} if parts else {}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
        if message := draft.refusal:
            candidate["finishMessage"] = message
    return {
        "candidates": [candidate],
        "usageMetadata": _usage(draft),
        "modelVersion": draft.model,
        "responseId": draft.key,
    }


def _reason(draft: Draft) -> str:
    return "PROHIBITED_CONTENT" if draft.refusal else _FINISH.get(draft.finish, draft.finish.upper())


def _usage(draft: Draft) -> dict[str, int]:
    tokens = draft.tokens
    usage = {"promptTokenCount": tokens.input, "candidatesTokenCount": tokens.output - tokens.reasoning}
    if tokens.cached:
        usage["cachedContentTokenCount"] = tokens.cached
    if tokens.reasoning:
        usage["thoughtsTokenCount"] = tokens.reasoning
    return {**usage, "totalTokenCount": tokens.input + tokens.output}


def _parts(draft: Draft) -> Iterator[_Part]:
    """Yield the parts; a signature is on the first one that is no thought."""
    if draft.finish in ("content_filter", "malformed_function_call"):
        return
    if draft.reasoning:
        yield {"text": draft.reasoning, "thought": True}
    rest: list[_Part] = [{"text": draft.text}] if draft.text else []
    rest += [{"functionCall": {"name": call.name, "args": call.parsed()}} for call in draft.calls]
    for index, part in enumerate(rest):
        yield {**part, "thoughtSignature": draft.signature} if draft.reasoning and index == 0 else part


def _streamed(draft: Draft) -> Iterator[_Part]:
    """Yield the parts, the text of one cut into several; a signature is on its first piece."""
    for part in _parts(draft):
        if "text" not in part:
            yield part
            continue
        for index, word in enumerate(words(part["text"])):
            yield {**part, "text": word} if index == 0 else {**_plain(part), "text": word}


def _plain(part: _Part) -> _Part:
    return {key: value for key, value in part.items() if key != "thoughtSignature"}


def _framed(chunks: list[bytes], draft: Draft) -> list[bytes]:
    """Write chunks as events, or as the elements of an array that the last of them closes."""
    if draft.framing == "sse":
        return [b"data: " + chunk + b"\r\n\r\n" for chunk in chunks]
    opened = [(b"[" if index == 0 else b",\r\n") + chunk for index, chunk in enumerate(chunks)]
    return [*opened[:-1], opened[-1] + b"]"]


# --- errors ---------------------------------------------------------------------------------------------------------
# https://ai.google.dev/gemini-api/docs/troubleshooting and google/rpc/error_details.proto

_ERRORS: dict[What, tuple[int, str, str]] = {
    "bad_request": (400, "INVALID_ARGUMENT", "Request contains an invalid argument."),
    "auth": (401, "UNAUTHENTICATED", "API key not valid. Please pass a valid API key."),
    "permission": (403, "PERMISSION_DENIED", "The caller does not have permission"),
    "not_found": (404, "NOT_FOUND", "The model is not found for API version v1beta."),
    "too_large": (413, "INVALID_ARGUMENT", "Request payload size exceeds the limit."),
    "context_length": (
        400,
        "INVALID_ARGUMENT",
        "The input token count (1100000) exceeds the maximum number of tokens allowed (1048576).",
    ),
    "content_filter": (400, "INVALID_ARGUMENT", "The prompt was blocked for reasons of safety."),
    "rate_limit": (429, "RESOURCE_EXHAUSTED", "You exceeded your current quota."),
    "quota": (
        429,
        "RESOURCE_EXHAUSTED",
        "You exceeded your current quota, please check your plan and billing details.",
    ),
    "server_error": (500, "INTERNAL", "An internal error has occurred."),
    "timeout": (504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
    "overloaded": (503, "UNAVAILABLE", "The model is overloaded. Please try again later."),
}

_METRIC = "generativelanguage.googleapis.com/generate_content_requests"
_TYPE = "type.googleapis.com/google.rpc."

_Period = Literal["Minute", "Day"]


def _details(failure: Failure, status: int) -> Iterator[dict[str, Any]]:
    """Say why, and how long to wait: this wire has no headers for it."""
    match failure.what:
        case "rate_limit":
            yield _quota("Minute")
            if failure.wait is not None:
                yield {"@type": f"{_TYPE}RetryInfo", "retryDelay": f"{failure.wait:g}s"}
        case "quota":
            yield _quota("Day")
        case "auth" if status == 400:
            yield {"@type": f"{_TYPE}ErrorInfo", "reason": "API_KEY_INVALID", "domain": "googleapis.com"}
        case _:
            return


def _quota(period: _Period) -> dict[str, Any]:
    violation = {"quotaMetric": _METRIC, "quotaId": f"GenerateRequestsPer{period}PerProjectPerModel"}
    return {"@type": f"{_TYPE}QuotaFailure", "violations": [violation]}
