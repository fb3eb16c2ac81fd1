"""The simulated provider: scripted answers and scheduled faults, over real HTTP, in four wires."""

from ridethrough.runtime.config import WireName
from ridethrough.runtime.router.providers.simulated.conversation import Conversation
from ridethrough.runtime.router.providers.simulated.faults import Fault
from ridethrough.runtime.router.providers.simulated.instance import example_of
from ridethrough.runtime.router.providers.simulated.scenario import (
    MEASURES,
    Expectation,
    Kill,
    Scenario,
    ToolFault,
    load_scenario,
    load_script,
    parse_scenario,
    read_scenario,
    shipped_scenarios,
)
from ridethrough.runtime.router.providers.simulated.script import Answer, Call, Rule, Script, SimRequest
from ridethrough.runtime.router.providers.simulated.server import Handled, SimulatedProvider, run_simulator, serve

__all__ = [
    "Answer",
    "Call",
    "Conversation",
    "Expectation",
    "Fault",
    "Handled",
    "Kill",
    "MEASURES",
    "Rule",
    "Scenario",
    "Script",
    "SimRequest",
    "SimulatedProvider",
    "ToolFault",
    "WireName",
    "example_of",
    "load_scenario",
    "load_script",
    "parse_scenario",
    "read_scenario",
    "run_simulator",
    "serve",
    "shipped_scenarios",
]
