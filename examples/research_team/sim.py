"""What the simulated model says to each of the team."""

import re

from ridethrough.runtime.router.providers.simulated import Answer, Call, Script, SimRequest

script = Script(latency=0.2, per_token=0.01)
script.rule({"angles": ["what the moon does", "where the coast helps", "what power it gives"]}, system="You lead")
script.rule(
    Answer(calls=(Call("search", {"query": "{{angle}}"}),)),
    system="researcher",
    user=": (?P<angle>.*)",
    not_called="search",
)
script.rule(
    {"claim": "{{claim}}", "source": "{{source}}"},
    system="researcher",
    result=r'(?P<source>\w+, \w+ \d+): (?P<claim>[^"]*)',
)


@script.on(system="editor")
def write_up(request: SimRequest) -> dict[str, object]:
    """Join the findings."""
    topic, *notes = request.user.splitlines()
    claims, sources = zip(*(re.findall(r"(.*) \((.*)\)", note)[0] for note in notes), strict=True)
    return {"title": topic.removeprefix("Topic: "), "text": " ".join(claims), "sources": sorted(set(sources))}
