"""An agent's tools, composed by code that the model wrote, in one run of a sandbox."""

from __future__ import annotations

import trio

from trio_sandbox import Sandbox, open_sandbox

ORDERS = {"ada": [("tea", 2), ("cake", 1)], "bob": [("tea", 1)]}
PRICES = {"tea": 2.5, "cake": 4.0}

#: What a model writes when it is told the tools' names, arguments and results. It asks for three things, and prints one.
CODE = """
import asyncio

names = await customers.aio()
orders = await asyncio.gather(*(orders_of.aio(name) for name in names))
items = sorted({item for order in orders for item, _ in order})
prices = dict(zip(items, await asyncio.gather(*(price.aio(item) for item in items))))
for name, order in zip(names, orders):
    print(name, sum(prices[item] * count for item, count in order))
"""


async def customers() -> list[str]:
    """Tool: the names of all customers."""
    await trio.lowlevel.checkpoint()
    return sorted(ORDERS)


async def orders_of(name: str) -> list[tuple[str, int]]:
    """Tool: what a customer has ordered, and how many of it."""
    await trio.lowlevel.checkpoint()
    if name not in ORDERS:
        raise ValueError(f"no customer {name!r}")  # the code, and so the model, is told
    return ORDERS[name]


def price(item: str) -> float:
    """Tool: what one of an item costs."""
    return PRICES[item]


TOOLS = {"customers": customers, "orders_of": orders_of, "price": price}


async def answer(sandbox: Sandbox, code: str) -> str:
    """Run what the model wrote; return what it is to be told."""
    with trio.move_on_after(60):
        result = await sandbox.run(code, functions=TOOLS)
        return result.stdout + result.stderr
    return sandbox.last_output.stdout + "\n(stopped after 60 s)"


async def main() -> None:
    """Answer once."""
    async with open_sandbox("python") as sandbox:
        print(await answer(sandbox, CODE), end="")


if __name__ == "__main__":
    trio.run(main)
