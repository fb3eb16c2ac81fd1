"""What the simulated model says: a program with a mistake, and its mending once the mistake has shown itself."""

from ridethrough.runtime.router.providers.simulated import Answer, Call, Script

PROGRAM = """\
import sys


def high_waters(lines):
    readings = [line.split() for line in lines]
    heights = [float(height) for _, height in readings]
    for index in range(len(heights)):
        if heights[index - 1] < heights[index] > heights[index + 1]:
            yield readings[index][0]


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        for time in high_waters(file):
            print(time)
"""

READINGS = "05:00 5.8\n06:00 7.0\n07:00 6.2\n12:00 1.4\n17:00 5.5\n18:00 6.9\n19:00 6.8\n00:00 1.2\n01:00 2.0\n"

WRONG = "for index in range(len(heights)):"
RIGHT = "for index in range(1, len(heights) - 1):"
RUN = Call("shell", {"command": "python3 tides.py brest.txt"})

script = Script(latency=0.2, per_token=0.002)
script.rule(
    Answer(
        "I write the program and something to try it with.",
        calls=(
            Call("write_file", {"path": "tides.py", "content": PROGRAM}),
            Call("write_file", {"path": "brest.txt", "content": READINGS}),
        ),
    ),
    not_called="write_file",
)
script.rule(Answer(calls=(RUN,)), called="write_file", not_called="shell")
script.rule(
    Answer(
        "The last reading has none after it, and the first none before it.",
        calls=(Call("edit_file", {"path": "tides.py", "old": WRONG, "new": RIGHT}),),
    ),
    result="IndexError",
    not_called="edit_file",
)
script.rule(Answer(calls=(RUN,)), result="Changed in 1 place")
script.rule(
    Answer(data={"file": "tides.py", "does": "prints the times of high water; for brest.txt: 06:00 and 18:00"}),
    result="06:00\n18:00",
)
