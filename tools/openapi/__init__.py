"""Operations of an OpenAPI document (3.0 and 3.1) as tools.

document.py   reading it, following its references, its schemas as JSON Schema
operation.py  one operation: its parameters as one schema, and a request made of arguments
wording.py    how values are written in paths, queries, headers and forms
sending.py    the request itself: secrets, redirects, bounds, what an answer means
tools.py      the whole
"""

from ridethrough.tools.openapi.tools import openapi_tools as openapi_tools

__all__ = ["openapi_tools"]
