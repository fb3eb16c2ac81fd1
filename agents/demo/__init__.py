"""The built-in demonstration: a team of agents, a provider that fails, a process that is killed, and what was saved."""
