"""An agent in the place of a tool: it gets a text and gives its output back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ridethrough.runtime.errors import ConfigError
from ridethrough.tools.schema import ParameterSchema

if TYPE_CHECKING:
    from ridethrough.agents.agent import Agent

ABOUT_LENGTH = 300


def _signature(input: str) -> str:
    """The shape of every agent's tool.

    Args:
        input: The task, with all that the agent has to know; it does not see this conversation.
    """
    return input


class AgentTool:
    """What ``Agent.as_tool`` makes. Its calls are agent runs inside the caller's run, each step on record."""

    def __init__(self, agent: Agent[Any], name: str, description: str | None) -> None:
        """``description`` is the beginning of the agent's instructions when left out.

        Raises:
            ConfigError: the instructions are a function, so a description is needed.
        """
        if description is None:
            if not isinstance(agent.instructions, str):
                raise ConfigError(
                    f"agent {agent.name}: as_tool needs a description, as its instructions are a function."
                )
            description = agent.instructions[:ABOUT_LENGTH]
        self.agent = agent
        self.name = name
        self.description = description
        self.parameters = ParameterSchema.of(_signature)

    def __repr__(self) -> str:
        """The name and the agent."""
        return f"AgentTool({self.name!r}, {self.agent!r})"
