"""The example with two vendors does what its README says; with other vendors by configuration alone."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tests.examples.test_examples import Folder, example
from tests.examples.test_examples import folder as folder  # the fixture

from ridethrough.runtime.config import load_config

pytestmark = pytest.mark.processes


@example("resilient_desk")
def test_it_answers_the_letters(folder: Folder) -> None:
    explain, run, show, *_ = folder.commands
    told = folder.type(*explain)
    assert told.returncode == 0, told.stderr
    assert "ask first, second, spare" in told.stdout
    done = folder.type(*run)
    assert done.returncode == 0, done.stderr
    kinds = Counter(reply["kind"] for reply in json.loads(done.stdout))
    assert kinds == {"question": 5, "complaint": 2, "thanks": 1}
    assert folder.type(*show).returncode == 0


@example("resilient_desk")
def test_a_drill_through_a_brownout_loses_nothing(folder: Folder) -> None:
    drill = next(command for command in folder.commands if command[0] == "drill")
    done = folder.type(*drill, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["measures"]["lost"]["value"] == 0
    assert report["runs"]["done"] == report["runs"]["started"]


@example("resilient_desk")
def test_keys_and_the_other_configuration_are_all_that_vendors_take(folder: Folder) -> None:
    """Both vendors are the simulated server, which speaks their wires at one address: nothing else changes."""
    real = folder.path / "ridethrough.vendors.toml"
    assert [provider.kind for provider in load_config(real).providers.values()] == ["openai-responses", "anthropic"]
    words = ("--config", real.name)
    missing = folder.type("models", "ping", *words, OPENAI_API_KEY="", ANTHROPIC_API_KEY="")
    assert missing.returncode == 1
    assert "OPENAI_API_KEY" in missing.stdout
    with folder.going("simulate", "--scenario", "sim.py", "--json") as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["base_url"]
        text = real.read_text()
        text = text.replace('kind = "openai-responses"\n', f'kind = "openai-responses"\nbase_url = "{url}"\n')
        text = text.replace('kind = "anthropic"\n', f'kind = "anthropic"\nbase_url = "{url.removesuffix("/v1")}"\n')
        real.write_text(text)
        keys = {"OPENAI_API_KEY": "no-real-key", "ANTHROPIC_API_KEY": "no-real-key"}
        asked = folder.type("models", "ping", *words, **keys)
        assert asked.returncode == 0, asked.stdout
        for config in (text, text.replace('models = ["gpt", "claude", "haiku"]', 'models = ["claude"]')):
            real.write_text(config.replace("[[budgets]]", "[default_price]\ninput = 1.0\noutput = 4.0\n\n[[budgets]]"))
            done = folder.type("run", "app.py:desk", *words, **keys)
            assert done.returncode == 0, done.stderr
            assert "06:12 and 18:37" in done.stdout
