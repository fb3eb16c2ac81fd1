"""What the simulated model says at each desk."""

from ridethrough.runtime.router.providers.simulated import Answer, Call, Script

ORDER = r"(?P<order>A-\d+)"

script = Script(latency=0.2, per_token=0.01)
script.rule(Answer(calls=(Call("transfer_to_billing", {"reason": "money"}),)), system="front desk", user="refund|paid")
script.rule(Answer(calls=(Call("transfer_to_technical", {"reason": "use"}),)), system="front desk")
script.rule("Set the hand to high water once, at full moon. It then keeps time by itself.", system="technical desk")
script.rule(
    Answer(calls=(Call("look_up", {"order": "{{order}}"}),)), system="billing desk", user=ORDER, not_called="look_up"
)
script.rule("I cannot find that order.", system="billing desk", result="no such order")
script.rule(
    Answer(calls=(Call("refund", '{"order": "{{order}}", "usd": {{usd}}}'),)),
    system="billing desk",
    user=ORDER,
    result=r'"usd": (?P<usd>[\d.]+)',
    not_called="refund",
)
script.rule("{{result}}. We are sorry for the trouble.", system="billing desk", result="paid back")
script.rule("We cannot pay that back: {{result}}", system="billing desk", called="refund")
