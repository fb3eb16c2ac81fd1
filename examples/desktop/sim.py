"""What the simulated model does: it knows where things are on the screen. A real one finds them in the pictures."""

from ridethrough.runtime.router.providers.simulated import Answer, Call, Script


def use(action: str, **more: object) -> Answer:
    """One action at the computer."""
    return Answer(calls=(Call("computer", {"action": action, **more}),))


script = Script(latency=0.2, per_token=0.002)
script.rule(Answer(calls=(Call("find_form", {}),)), not_called="find_form")
script.rule(use("open", text="{{url}}"), result="^(?P<url>file:.*)$")
script.rule(use("left_click", coordinate=[300, 256]), result="^open")
script.rule(use("type", text="Étoile"), result=r"^left_click at \(300, 256\)")
script.rule(use("key", text="Tab"), result="^type 6 ")
script.rule(use("type", text="Saint-Malo"), result="^key Tab")
script.rule(use("left_click", coordinate=[160, 441]), result="^type 10 ")
script.rule(Answer(calls=(Call("keep_picture", {}),)), result=r"^left_click at \(160, 441\)")
script.rule(
    "The Étoile is announced: berth 7, high water 18:37. The picture is {{path}}.", result="^kept as (?P<path>.*)$"
)
