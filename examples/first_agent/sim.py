"""What the simulated model says."""

from ridethrough.runtime.router.providers.simulated import Answer, Call, Script

script = Script(latency=0.3, per_token=0.02)
script.rule(
    Answer(calls=(Call("high_water", {"port": "{{port}}"}),)),
    user="enter (?P<port>[A-Z][a-z]+( [A-Z][a-z]+)*)",
    not_called="high_water",
)
script.rule("High water is at {{result}} today: enter in the hour before.", called="high_water")
