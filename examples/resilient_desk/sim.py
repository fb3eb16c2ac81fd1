"""What the simulated models say, whichever vendor they stand in for."""

from ridethrough.runtime.router.providers.simulated import Answer, Call, Script

PLACE = r"(?P<place>Brest|Dover|Fundy)"

script = Script(latency=0.2, per_token=0.01)
script.rule(Answer(data={"kind": "thanks"}), system="the sorter", user="Thank")
script.rule(Answer(data={"kind": "complaint"}), system="the sorter", user="stop|still")
script.rule(Answer(data={"kind": "question"}), system="the sorter")
script.rule(
    Answer(calls=(Call("high_water", {"place": "{{place}}"}),)),
    system="the clerk",
    user=PLACE,
    not_called="high_water",
)
script.rule("High water at {{place}} is at {{result}}.", system="the clerk", user=PLACE, called="high_water")
script.rule("We are glad that it serves you.", system="the clerk", user="Thank")
script.rule("We are sorry, and look into it at once.", system="the clerk")
