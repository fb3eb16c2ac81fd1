"""The simulated provider: scripted answers and scheduled faults, over real HTTP."""

from ridethrough.runtime.router.providers.simulated.faults import Fault
from ridethrough.runtime.router.providers.simulated.instance import example_of
from ridethrough.runtime.router.providers.simulated.scenario import load_script, parse_scenario
from ridethrough.runtime.router.providers.simulated.script import Answer, Call, Rule, Script, SimRequest
from ridethrough.runtime.router.providers.simulated.server import Handled, SimulatedProvider, run_simulator, serve

__all__ = [
    "Answer",
    "Call",
    "Fault",
    "Handled",
    "Rule",
    "Script",
    "SimRequest",
    "SimulatedProvider",
    "example_of",
    "load_script",
    "parse_scenario",
    "run_simulator",
    "serve",
]
