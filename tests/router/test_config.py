"""The configuration is taken whole or refused with the place where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ridethrough.runtime.config import Config, load_config, parse_config, parse_duration, resolve_secret
from ridethrough.runtime.errors import ConfigError

WHOLE = """
database = "sqlite:///runs.db"
durability = "process"
lease_seconds = 2

[providers.openai]
kind = "openai"
api_key = "env:OPENAI_API_KEY"

[providers.local]
kind = "simulated"

[models.gpt]
provider = "openai"
model = "gpt-5.2"
tier = "frontier"
context_window = 400000
quota = "openai-main"
timeouts = { connect = 5, first_token = 20, idle = 20, total = 300 }
price = { input = 1.25, output = 10.0 }

[routes.smart]
models = ["gpt", "local/anything"]
strategy = "ordered"
patience = "1500ms"
"""


def test_the_whole_contract_is_read() -> None:
    config = parse_config(WHOLE, Path("ridethrough.toml"))
    assert config.routes["smart"].models == ("gpt", "local/anything")
    assert config.routes["smart"].patience == 1.5
    assert config.models["gpt"].timeouts.first_token == 20
    assert config.lease_seconds == 2
    price = config.models["gpt"].price
    assert price is not None
    assert price.cost(1_000_000, 100_000) == pytest.approx(2.25)


def test_config_is_frozen() -> None:
    config = parse_config(WHOLE)
    with pytest.raises(ValueError, match="frozen"):
        config.durability = "power"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lease_second = 4", "f.toml:1: unknown key 'lease_second'; did you mean 'lease_seconds'?"),
        ('[providers.a]\nkind = "openai"\nbase_ur = "x"', "f.toml:3: unknown key 'providers.a.base_ur'"),
        ('\n[providers.a]\nkind = "opnai"', "f.toml:3: providers.a.kind"),
        ("[providers.a]\n", "f.toml:1: providers.a: the key 'kind' is missing"),
        ('[models.m]\nprovider = "a"\nmodel = "x"\n[models.m.timeouts]\nconect = 3', "f.toml:5: unknown key"),
        ('[models.m]\nmodel = "x"\nprovider = "opena"\n[providers.openai]\nkind = "openai"', "did you mean 'openai'?"),
        (
            '[routes.r]\nmodels = ["smat"]\n[providers.a]\nkind = "openai"',
            "f.toml:2: routes.r.models: there is no model",
        ),
        ('[routes.r]\nmodels = ["a/x"]\npatience = "5 parsecs"', "f.toml:3: routes.r.patience: not a duration"),
        ("a = [", "f.toml is not valid TOML"),
        ('path = "x"', "f.toml:1: unknown key 'path'"),
    ],
)
def test_wrong_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, Path("f.toml"))
    assert said in str(caught.value)


ROUTE = '[providers.a]\nkind = "openai"\n[routes.r]\nmodels = ["a/x"]\n'
TIERED = (
    '[providers.a]\nkind = "openai"\n[models.big]\nprovider = "a"\nmodel = "x"\ntier = "frontier"\n'
    '[models.little]\nprovider = "a"\nmodel = "y"\ntier = "small"\n[routes.r]\n'
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('embeddings = "smart"', 1),
    ],
)
def test_what_is_not_there_yet_is_not_ignored(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"f\.toml:{line}: .*this version does not support"):
        parse_config(text, Path("f.toml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ROUTE + "hedge = true", "f.toml:5: routes.r.hedge: the key has no effect with one model"),
        (ROUTE + 'floor = "standard"', "f.toml:5: routes.r.floor: a floor needs to know how capable 'a/x' is"),
        (ROUTE + 'otherwise = ["static", "pause"]', "'static' needs the answer's text"),
        (ROUTE + 'static = "sorry"', "f.toml:5: routes.r.static: the key has no effect"),
        (ROUTE + 'cache_ttl = "1h"', "f.toml:5: routes.r.cache_ttl: the key has no effect"),
        (ROUTE + 'otherwise = ["pause", "cache"]', "'pause' has to be the last"),
        (ROUTE + '[models.m]\nprovider = "a"\nmodel = "x"\nweight = 2', "f.toml:8: models.m.weight: the key has no"),
        (TIERED + 'models = ["little"]\nfloor = "standard"', "no model of the route is that capable"),
        ('[providers.c]\nkind = "anthropic"\ndialect = "vllm"', "f.toml:3: providers.c.dialect: the key has no effect"),
        ('[providers.c]\nkind = "openai"\nwire = "gemini"', "f.toml:3: providers.c.wire: the key has no effect"),
        ('[[errors]]\nerror = "Overloaded"', "a rule without a condition would be about every error"),
        ('[[errors]]\nerror = "Overloaded"\nwords = "("', "f.toml:3: errors.0.words: not a regular expression"),
        ('[providers.c]\nkind = "openai"\ndialect = "vlm"', "did you mean 'vllm'?"),
    ],
)
def test_what_would_have_no_effect_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, Path("f.toml"))
    assert said in str(caught.value)


def test_everything_of_the_contract_is_taken() -> None:
    config = parse_config(
        TIERED
        + 'models = ["big", "little"]\nstrategy = "weighted"\nfloor = "small"\nhedge = true\ncache = "exact"\n'
        + 'cache_ttl = "1h"\notherwise = ["cache", "static", "pause"]\nstatic = "later"\nfailover = ["auth"]\n'
        + '[[budgets]]\nscope = "label:team"\nusd = 1.0\nper = "day"\non_exceeded = "degrade"\n'
        + '[providers.d]\nkind = "gemini"\n[providers.e]\nkind = "simulated"\nwire = "anthropic"\n'
    )
    assert config.routes["r"].cache_ttl == 3600
    assert config.providers["e"].speaks == "anthropic"
    assert config.budgets[0].on_exceeded == "degrade"


def test_defaults_of_what_is_not_there_yet_are_accepted() -> None:
    parse_config(ROUTE + 'hedge = false\ncache = "off"\nstrategy = "ordered"\notherwise = ["pause"]')


@pytest.mark.parametrize(
    "text",
    [
        '[providers.a]\nkind = "openai"\napi_key = "sk-planted"',
        '[providers.a]\nkind = "openai"\nheaders = { "api-key" = "sk-planted" }',
        '[providers.a]\nkind = "openai"\nbase_url = 5\napi_key = "sk-planted"',
    ],
)
def test_a_written_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, Path("f.toml"))
    assert "sk-planted" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://[::1", "ftp://u:planted@h", "http://u:planted@h:99999", "localhost:8000/v1", ""]
)
def test_a_base_url_that_is_none_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"f\.toml:3: providers\.a\.base_url: .* of the form http") as caught:
        parse_config(f'[providers.a]\nkind = "openai"\nbase_url = "{url}"', Path("f.toml"))
    assert "planted" not in str(caught.value)


def test_secrets_are_resolved_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-1")
    (tmp_path / "key").write_text("sk-2\n")
    assert resolve_secret("env:SOME_KEY") == "sk-1"
    assert resolve_secret("file:key", tmp_path) == "sk-2"
    with pytest.raises(ConfigError, match="environment variable NOT_THERE is not set"):
        resolve_secret("env:NOT_THERE")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_secret("file:nowhere", tmp_path)


def test_where_the_file_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RIDETHROUGH_CONFIG", raising=False)
    assert load_config() == Config()  # pyright: ignore[reportCallIssue]
    (tmp_path / "ridethrough.toml").write_text("lease_seconds = 1")
    (tmp_path / "other.toml").write_text("lease_seconds = 2")
    (tmp_path / "third.toml").write_text("lease_seconds = 3")
    assert load_config().lease_seconds == 1
    monkeypatch.setenv("RIDETHROUGH_CONFIG", str(tmp_path / "other.toml"))
    assert load_config().lease_seconds == 2
    assert load_config(tmp_path / "third.toml").lease_seconds == 3
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.toml")


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("20s", 20), ("5m", 300), ("1h", 3600), (7, 7)])
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds
