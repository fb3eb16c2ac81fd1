"""What sandboxes may reach: a list of names, an existing proxy that enforces it, and a record of every decision."""
