"""The durable engine, the router, and the doors of the system."""
