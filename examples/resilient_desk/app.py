"""A desk whose letters are answered through brownouts: two vendors, a floor, a budget."""

from pydantic import BaseModel

from ridethrough import Agent, fan_out, tool, workflow

TIMES = {"Brest": "06:12 and 18:37", "Dover": "00:48 and 13:05", "Fundy": "03:30 and 15:52"}
LETTERS = [
    "When is high water in Brest?",
    "Is the ferry from Dover affected by the tide?",
    "We love the tide clock. Thank you!",
    "When can we watch the tide come in at Fundy?",
    "Please stop sending me the catalogue.",
    "When is high water in Dover on Sunday?",
    "The tide clock stands still.",
    "How high is the tide in Brest?",
]


class Kind(BaseModel):
    """What a letter is about."""

    kind: str


class Reply(BaseModel):
    """An answered letter."""

    letter: str
    kind: str
    text: str


@tool(effect="read", timeout=10)
async def high_water(place: str) -> str:
    """Look up the times of high water.

    Args:
        place: A harbour.
    """
    return TIMES.get(place, "not in the tables")


sorter = Agent(
    "sorter",
    model="smart",
    instructions="You are the sorter. Say what the letter is: a question, a complaint, or thanks.",
    output=Kind,  # no floor: in need the small model may sort
)
clerk = Agent(
    "clerk",
    model="smart",
    instructions="You are the clerk. Answer the letter in one sentence. Look up what you do not know.",
    tools=[high_water],
    floor="standard",  # a customer reads it: rather wait than be answered by less
)


async def answer(letter: str) -> Reply:
    """Sort a letter, then answer it."""
    sorted_ = await sorter.run(letter)
    answered = await clerk.run(letter)
    return Reply(letter=letter, kind=sorted_.output.kind, text=answered.output)


@workflow(version="1")
async def desk(letters: list[str] = LETTERS) -> list[Reply]:
    """Answer the letters, four at a time."""
    return await fan_out(answer, letters, limit=4)
