"""Tools of MCP servers, through the official SDK (the optional extra ``ridethrough[mcp]``).

server.py   what a user holds: a server's name and address, its tools, a list of them that is pinned in a file
owner.py    the one task that a server's connection lives in: connects, connects again, ends
requests.py one connection, and the requests that are under way on it
pipe.py     stdio: a process of this machine or of a sandbox, with bounds on what it says
web.py      streamable HTTP: headers, bounds on bodies, failures that end a request and not its owner
results.py  what a server answered, as a tool's output
"""

from ridethrough.tools.mcp.server import McpServer as McpServer

__all__ = ["McpServer"]
