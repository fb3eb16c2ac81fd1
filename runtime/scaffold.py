"""A first project: small enough to read in a minute, and it runs at once, because its model is simulated."""

from __future__ import annotations

import shlex
from pathlib import Path

from ridethrough.runtime.errors import UsageError

APP = '''"""Two researchers look into a topic, an editor writes it up. Kill it wherever you like, then resume it."""

from pydantic import BaseModel

from ridethrough import Agent, Limits, gather, tool, workflow

NOTES = [
    "The tides are the sea's answer to the pull of the moon and the sun.",
    "Spring tides come at new and full moon, when both pull in one line.",
    "The highest tides are those of the Bay of Fundy: about 16 metres.",
]


class Brief(BaseModel):
    title: str
    text: str


@tool(effect="read", timeout=10)
async def search(query: str) -> list[str]:
    """Search the notes.

    Args:
        query: Words to look for.
    """
    words = {word.strip(".,:?").lower() for word in query.split()}
    return [note for note in NOTES if any(len(word) > 3 and word in note.lower() for word in words)]


researcher = Agent(
    "researcher",
    model="smart",  # a route of ridethrough.toml
    instructions="You are a researcher. Search the notes, then state the one finding that matters.",
    tools=[search],
    limits=Limits(turns=5),
)
editor = Agent(
    "editor",
    model="smart",
    instructions="You are an editor. Write the findings up as a brief.",
    output=Brief,
)


@workflow(version="1")
async def brief(topic: str) -> Brief:
    angles = ["how they come about", "where they are highest"]
    findings = await gather(*(researcher.run(f"{topic}: {angle}") for angle in angles))
    result = await editor.run(f"Topic: {topic}\\n" + "\\n".join(finding.output for finding in findings))
    return result.output
'''

CONFIG = """database = "sqlite:///ridethrough.db"

# A provider that answers by the rules of simulated.toml, over real HTTP on this machine. It needs no key.
[providers.here]
kind = "simulated"
script = "simulated.toml"

[models.simulated]
provider = "here"
model = "simulated"
price = { input = 1.25, output = 10.0 }      # USD per million tokens, for show

[routes.smart]                               # what app.py asks for
models = ["simulated"]
patience = "20s"                             # try again for so long in place; then the run pauses, and nothing is lost

# With real models: remove the comment signs of what you have, name it in routes.smart, try `ridethrough models ping`.
# With two providers in the route one stands in for the other. Keys are never written here.
#
# [providers.openai]
# kind = "openai"                            # or "openai-responses"
# api_key = "env:OPENAI_API_KEY"
#
# [models.gpt]
# provider = "openai"
# model = "gpt-5.2"
#
# [providers.anthropic]
# kind = "anthropic"
# api_key = "env:ANTHROPIC_API_KEY"
#
# [models.claude]
# provider = "anthropic"
# model = "claude-sonnet-4-5"
#
# [providers.google]
# kind = "gemini"
# api_key = "env:GEMINI_API_KEY"
#
# [models.gemini]
# provider = "google"
# model = "gemini-2.5-pro"
#
# [providers.local]
# kind = "openai"                            # any server that speaks Chat Completions: vLLM, Ollama, llama.cpp ...
# base_url = "http://127.0.0.1:11434/v1"
#
# [models.qwen]
# provider = "local"
# model = "qwen3:8b"
# price = { input = 0.0, output = 0.0 }
"""

SCENARIO = """# What the simulated provider answers: the first rule whose conditions all hold.
latency = "300ms"
per_token = "15ms"

[[rules]]
system = "You are a researcher"
not_called = "search"
calls = [{ name = "search", arguments = { query = "{{user}}" } }]

[[rules]]
system = "You are a researcher"
called = "search"
text = "The notes say of {{user}}: {{result}}"

[[rules]]
system = "You are an editor"
user = "Topic: (?P<topic>[^\\\\n]*)\\\\n(?P<findings>.*)"
data = { title = "On {{topic}}", text = "{{findings}}" }

# A fault on schedule: the third request is refused once. The run rides through.
[[faults]]
kind = "status"
status = 503
requests = [3]
"""

README = """# A ridethrough project

    ridethrough run app.py:brief --input '"tides"' --id first

Kill it on the way (`kill -9`, or Ctrl-C), then go on from the last finished step, without repeating one:

    ridethrough resume first

What happened:

    ridethrough runs
    ridethrough show first --steps
    ridethrough show first --messages
    ridethrough events first

Go on from the middle with changed code, as a new run:

    ridethrough fork first --at 'editor#1/model#1' --id second
    ridethrough resume second

| file | what it is |
| --- | --- |
| `app.py` | a tool, two agents, a workflow |
| `ridethrough.toml` | where runs are kept, which models answer; `ridethrough doctor` checks it |
| `simulated.toml` | what the simulated model says, and when it fails |

For a real model, follow the comments in `ridethrough.toml`.
"""

FILES = {"app.py": APP, "ridethrough.toml": CONFIG, "simulated.toml": SCENARIO, "README.md": README}

FIRST_RUN = ("ridethrough", "run", "app.py:brief", "--input", '"tides"', "--id", "first")


def write(folder: Path) -> list[str]:
    """Write the project's files into ``folder``; their names.

    Raises:
        UsageError: one of them is there already (then nothing is written), or the folder cannot be written to.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        raise UsageError(
            f"{folder / there[0]} exists already; nothing was written. Give another folder: ridethrough init DIR"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise UsageError(f"The project cannot be written to {folder}: {error.strerror}.") from error
    return list(FILES)


def next_steps(folder: str, made: list[str]) -> str:
    """What to do with the new project."""
    enter = "" if folder == "." else f"  cd {shlex.quote(folder)}\n"
    return f"Wrote {', '.join(made)}. Next:\n\n{enter}  {shlex.join(FIRST_RUN)}"
