"""An agent that uses a computer: it fills in a form in a browser, and keeps a picture of what it has done."""

import anyio

from ridethrough import Agent, Runtime, ToolContext, tool
from ridethrough.sandboxes.desktop import Desktop
from ridethrough.tools.computer import computer

FORM = """<!doctype html><meta charset="utf-8"><title>Harbour office</title>
<style>
  body { font: 20px sans-serif; margin: 0; background: #eef3f7; color: #123 }
  h1 { margin: 40px 0 0 60px } form > * { position: absolute; left: 60px; font: inherit }
  input { width: 500px; height: 40px } button { width: 200px; height: 50px }
</style>
<h1>Harbour office: announce a ship</h1>
<form onsubmit="event.preventDefault(); done.textContent =
  `${ship.value} is expected from ${from.value}. Berth 7, high water 18:37.`; document.title = 'Announced'">
  <label style="top: 120px">Name of the ship</label> <input id="ship" style="top: 150px">
  <label style="top: 220px">Coming from</label> <input id="from" style="top: 250px">
  <button style="top: 330px">Announce</button>
  <p id="done" style="top: 400px; font-size: 28px; font-weight: bold"></p>
</form>
"""


@tool(effect="idempotent", confined=True)
async def find_form(ctx: ToolContext) -> str:
    """Get the address of the harbour office's form."""
    await ctx.sandbox.write("form.html", FORM)
    return "file:///workspace/form.html"


@tool(effect="idempotent")
async def keep_picture(ctx: ToolContext) -> str:
    """Keep a picture of the screen for the files."""
    screen = await Desktop.start(ctx.sandbox)
    await anyio.Path("screen.jpg").write_bytes(await screen.screenshot(quality=85))
    return "kept as screen.jpg"


clerk = Agent(
    "clerk",
    model="smart",  # a route of ridethrough.toml
    instructions="Use the computer to announce the ship in the harbour office's form. At the end keep a picture.",
    tools=[computer, find_form, keep_picture],
    sandbox="desktop",  # a profile that needs no configuration: a display and a browser, and no network
)


async def main() -> None:
    """Do what `ridethrough run app.py:clerk` does."""
    async with Runtime.open(config="ridethrough.toml") as runtime:
        run = await runtime.start(clerk, "Announce the Étoile, coming from Saint-Malo.", id="etoile")
        result = await run.result()
        print(result.output)


if __name__ == "__main__":
    anyio.run(main)
