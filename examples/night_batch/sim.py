"""What the simulated model says."""

from ridethrough.runtime.router.providers.simulated import Script

script = Script(latency=0.2, per_token=0.01)
script.rule({"kind": "complaint", "urgent": True}, user="complaint")
script.rule({"kind": "order", "urgent": False}, user="order")
script.rule({"kind": "question", "urgent": False}, user="question")
