"""Tools: definition, schema, and the life of a call."""
