"""A client that speaks each wire by hand, as its documentation has it; the router's own wires have no part in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated import SimulatedProvider

WIRES: tuple[WireName, ...] = ("openai", "openai-responses", "anthropic", "gemini")


@dataclass(frozen=True)
class Said:
    """One thing that was said: by ``role`` (system, user, assistant), a ``call``, or a ``result`` of one."""

    role: str
    text: str = ""
    id: str = ""
    name: str = ""
    arguments: str = "{}"


@dataclass(frozen=True)
class Got:
    """What an answer says, whatever the wire."""

    text: str = ""
    reasoning: str = ""
    signature: str = ""
    refusal: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    finish: str = ""
    tokens: tuple[int, int, int] = (0, 0, 0)
    """Input, output, cached: all of the input, whatever the wire leaves out of it."""


class Asker:
    """Speaks any wire to a server."""

    def __init__(self, sim: SimulatedProvider, client: httpx2.AsyncClient) -> None:
        self.root = f"http://127.0.0.1:{sim.port}"
        self._client = client

    async def post(self, wire: WireName, *said: Said, stream: bool = False, **more: Any) -> httpx2.Response:
        """The answer as it comes."""
        path = path_of(wire, stream=stream, model=more.get("model", "m"))
        return await self._client.post(self.root + path, json=body_of(wire, said, stream=stream, **more))

    async def answer(self, wire: WireName, *said: Said, stream: bool = False, **more: Any) -> Got:
        """What the answer says."""
        response = await self.post(wire, *said, stream=stream, **more)
        assert response.status_code == 200, response.text
        return read_stream(wire, response.text) if stream else read_whole(wire, response.json())


def path_of(wire: WireName, *, stream: bool = False, model: str = "m") -> str:
    """Where a request is posted."""
    method = "streamGenerateContent?alt=sse" if stream else "generateContent"
    paths: dict[WireName, str] = {
        "openai": "/v1/chat/completions",
        "openai-responses": "/v1/responses",
        "anthropic": "/v1/messages",
        "gemini": f"/v1beta/models/{model}:{method}",
    }
    return paths[wire]


def body_of(
    wire: WireName,
    said: Sequence[Said],
    *,
    stream: bool = False,
    tools: Sequence[str] = (),
    schema: dict[str, Any] | None = None,
    model: str = "m",
) -> dict[str, Any]:
    """A request as the wire's documentation has it."""
    write = {"openai": _chat, "openai-responses": _responses, "anthropic": _messages, "gemini": _gemini}[wire]
    body = write(said, tools, schema)
    return body if wire == "gemini" else {"model": model, **body, **({"stream": True} if stream else {})}


_PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}


def _chat(said: Sequence[Said], tools: Sequence[str], schema: dict[str, Any] | None) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for each in said:
        if each.role == "call":
            call = {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
            if messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif each.role == "result":
            messages.append({"role": "tool", "tool_call_id": each.id, "content": each.text})
        else:
            messages.append({"role": each.role, "content": each.text})
    body: dict[str, Any] = {"messages": messages}
    if tools:
        functions = [{"name": name, "parameters": _PARAMETERS} for name in tools]
        body["tools"] = [{"type": "function", "function": function} for function in functions]
    if schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "out", "schema": schema}}
    return body


def _responses(said: Sequence[Said], tools: Sequence[str], schema: dict[str, Any] | None) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for each in said:
        if each.role == "call":
            items.append({"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"})
            call = {"type": "function_call", "call_id": each.id, "name": each.name, "arguments": each.arguments}
            items.append(call)
        elif each.role == "result":
            items.append({"type": "function_call_output", "call_id": each.id, "output": each.text})
        elif each.role == "assistant":
            part = {"type": "output_text", "text": each.text, "annotations": []}
            items.append({"type": "message", "role": "assistant", "content": [part]})
        elif each.role == "user":
            items.append({"role": "user", "content": [{"type": "input_text", "text": each.text}]})
    body: dict[str, Any] = {"input": items}
    if system := [each.text for each in said if each.role == "system"]:
        body["instructions"] = "\n\n".join(system)
    if tools:
        body["tools"] = [{"type": "function", "name": name, "parameters": _PARAMETERS} for name in tools]
    if schema:
        body["text"] = {"format": {"type": "json_schema", "name": "out", "schema": schema}}
    return body


def _messages(said: Sequence[Said], tools: Sequence[str], schema: dict[str, Any] | None) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for each in said:
        if each.role == "system":
            continue
        role = "assistant" if each.role in ("assistant", "call") else "user"
        if not turns or turns[-1]["role"] != role:
            turns.append({"role": role, "content": []})
        turns[-1]["content"].append(_block(each))
    system = [{"type": "text", "text": each.text} for each in said if each.role == "system"]
    body: dict[str, Any] = {"max_tokens": 1000, "messages": turns, **({"system": system} if system else {})}
    if tools:
        body["tools"] = [{"name": name, "description": "", "input_schema": _PARAMETERS} for name in tools]
    if schema:
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return body


def _block(each: Said) -> dict[str, Any]:
    if each.role == "call":
        return {"type": "tool_use", "id": each.id, "name": each.name, "input": json.loads(each.arguments)}
    if each.role == "result":
        return {"type": "tool_result", "tool_use_id": each.id, "content": [{"type": "text", "text": each.text}]}
    return {"type": "text", "text": each.text}


def _gemini(said: Sequence[Said], tools: Sequence[str], schema: dict[str, Any] | None) -> dict[str, Any]:
    contents: list[dict[str, Any]] = []
    for each in said:
        if each.role == "system":
            continue
        role = "model" if each.role in ("assistant", "call") else "user"
        if not contents or contents[-1]["role"] != role:
            contents.append({"role": role, "parts": []})
        contents[-1]["parts"].append(_part(each))
    body: dict[str, Any] = {"contents": contents}
    if system := [{"text": each.text} for each in said if each.role == "system"]:
        body["systemInstruction"] = {"parts": system}
    if tools:
        declared = [{"name": name, "parametersJsonSchema": _PARAMETERS} for name in tools]
        body["tools"] = [{"functionDeclarations": declared}]
    if schema:
        body["generationConfig"] = {"responseMimeType": "application/json", "responseJsonSchema": schema}
    return body


def _part(each: Said) -> dict[str, Any]:
    if each.role == "call":
        return {"functionCall": {"name": each.name, "args": json.loads(each.arguments)}}
    if each.role == "result":
        return {"functionResponse": {"name": each.name, "response": {"output": each.text}}}
    return {"text": each.text}


# --- answers --------------------------------------------------------------------------------------------------------


def events_of(text: str) -> list[tuple[str, Any]]:
    """The events of a stream: their names (empty where there are none) and their data."""
    found: list[tuple[str, Any]] = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in lines:
            data = lines["data"]
            found.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def read_whole(wire: WireName, body: Any) -> Got:
    """An answer without streaming."""
    if wire == "openai":
        choice = body["choices"][0]
        message = choice["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        return Got(
            text=message["content"] or "",
            reasoning=message.get("reasoning_content", ""),
            refusal=message["refusal"] or "",
            calls=tuple(calls),
            finish=choice["finish_reason"],
            tokens=_chat_tokens(body["usage"]),
        )
    if wire == "openai-responses":
        return _responses_answer(body)
    if wire == "anthropic":
        return _messages_answer(body["content"], body["stop_reason"], body["usage"])
    candidate = body["candidates"][0]
    return _gemini_answer([candidate], body["usageMetadata"])


def read_stream(wire: WireName, text: str) -> Got:
    """A streamed answer, put together from its deltas alone."""
    events = events_of(text)
    if wire == "openai":
        assert events.pop() == ("", "[DONE]")
        return _chat_stream([data for _, data in events])
    if wire == "openai-responses":
        return _responses_stream(events)
    if wire == "anthropic":
        return _messages_stream(events)
    return _gemini_answer([data["candidates"][0] for _, data in events], events[-1][1]["usageMetadata"])


def _chat_tokens(usage: Any) -> tuple[int, int, int]:
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return usage["prompt_tokens"], usage["completion_tokens"], cached


def _chat_stream(chunks: list[Any]) -> Got:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    finish = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    calls: dict[int, list[str]] = {}
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", ())):
        call = calls.setdefault(piece["index"], [piece["function"].get("name", ""), ""])
        call[1] += piece["function"]["arguments"]
    joined = {
        key: "".join(delta.get(key) or "" for delta in deltas) for key in ("content", "reasoning_content", "refusal")
    }
    return Got(
        text=joined["content"],
        reasoning=joined["reasoning_content"],
        refusal=joined["refusal"],
        calls=tuple((name, arguments) for name, arguments in calls.values()),
        finish=finish[0],
        tokens=_chat_tokens(chunks[-1]["usage"]),
    )


def _responses_answer(body: Any) -> Got:
    items = body["output"]
    thoughts = [item for item in items if item["type"] == "reasoning"]
    parts = [part for item in items if item["type"] == "message" for part in item["content"]]
    usage = body["usage"]
    return Got(
        text="".join(part.get("text", "") for part in parts),
        reasoning="".join(part["text"] for item in thoughts for part in item["summary"]),
        signature="".join(item["encrypted_content"] for item in thoughts),
        refusal="".join(part.get("refusal", "") for part in parts),
        calls=tuple((item["name"], item["arguments"]) for item in items if item["type"] == "function_call"),
        finish=(body["incomplete_details"] or {}).get("reason") or body["status"],
        tokens=(usage["input_tokens"], usage["output_tokens"], usage["input_tokens_details"]["cached_tokens"]),
    )


def _responses_stream(events: list[tuple[str, Any]]) -> Got:
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(name == data["type"] for name, data in events)
    assert [name for name, _ in events[:2]] == ["response.created", "response.in_progress"]
    done = _responses_answer(events[-1][1]["response"])
    kinds = {
        "text": "response.output_text.delta",
        "refusal": "response.refusal.delta",
        "reasoning": "response.reasoning_summary_text.delta",
    }
    for key, kind in kinds.items():
        assert "".join(data["delta"] for name, data in events if name == kind) == getattr(done, key)
    return done


def _messages_answer(blocks: list[Any], finish: str, usage: Any) -> Got:
    cached = usage["cache_read_input_tokens"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    thoughts = [block for block in blocks if block["type"] == "thinking"]
    return Got(
        text="" if finish == "refusal" else text,
        reasoning="".join(block["thinking"] for block in thoughts),
        signature="".join(block["signature"] for block in thoughts),
        refusal=text if finish == "refusal" else "",
        calls=tuple((name, given if isinstance(given, str) else json.dumps(given)) for name, given in calls),
        finish=finish,
        tokens=(usage["input_tokens"] + cached + usage["cache_creation_input_tokens"], usage["output_tokens"], cached),
    )


def _messages_stream(events: list[tuple[str, Any]]) -> Got:
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert ("ping" in names) == ("content_block_start" in names)
    blocks: dict[int, Any] = {}
    for name, data in events:
        if name == "content_block_start":
            blocks[data["index"]] = {
                **data["content_block"],
                **({"input": ""} if "input" in data["content_block"] else {}),
            }
        elif name == "content_block_delta":
            delta = dict(data["delta"])
            kind = delta.pop("type")
            key = {"input_json_delta": "input"}.get(kind, kind.removesuffix("_delta"))
            blocks[data["index"]][key] += delta.popitem()[1]
    last = events[-2][1]
    return _messages_answer(list(blocks.values()), last["delta"]["stop_reason"], last["usage"])


def _gemini_answer(candidates: list[Any], usage: Any) -> Got:
    parts = [part for candidate in candidates for part in candidate["content"].get("parts", ())]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    return Got(
        text="".join(_texts(parts, thought=False)),
        reasoning="".join(_texts(parts, thought=True)),
        signature="".join(part.get("thoughtSignature", "") for part in parts),
        refusal=candidates[-1].get("finishMessage", ""),
        calls=tuple((call["name"], json.dumps(call["args"])) for call in calls),
        finish=candidates[-1]["finishReason"],
        tokens=(
            usage["promptTokenCount"],
            usage["candidatesTokenCount"] + usage.get("thoughtsTokenCount", 0),
            usage.get("cachedContentTokenCount", 0),
        ),
    )


def _texts(parts: list[Any], *, thought: bool) -> Iterator[str]:
    return (part["text"] for part in parts if "text" in part and part.get("thought", False) == thought)
