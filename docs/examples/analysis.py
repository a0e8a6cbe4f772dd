"""Data analysis: a table goes in, code that nobody trusts reads it, and a picture comes out as PNG."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from trio_sandbox import Image, Sandbox, open_sandbox

#: Matplotlib is added to the built-in image, once.
IMAGE = Image("python").packages("matplotlib").env({"MPLBACKEND": "agg"})

#: What a model writes when it is told the columns and the question.
CODE = """
import csv
import matplotlib.pyplot as plt

with open("sales.csv") as file:
    rows = list(csv.DictReader(file))
plt.bar([row["month"] for row in rows], [int(row["sales"]) for row in rows])
plt.title("Sales")
plt.savefig("plot.png")
max(rows, key=lambda row: int(row["sales"]))["month"]
"""


async def analyse(sandbox: Sandbox, table: Path, code: str, picture: Path) -> str | None:
    """Copy the table in, run the code, copy the picture out; return the code's last value as text."""
    await sandbox.upload(table, "sales.csv")
    with trio.fail_after(120):
        result = await sandbox.run(code, check=True)
    await sandbox.download("plot.png", picture, max_bytes=10_000_000)
    return result.value


async def main(table: Path, picture: Path) -> None:
    """Analyse *table*, and write *picture*."""
    async with open_sandbox(IMAGE, memory_mib=512) as sandbox:
        print("best month:", await analyse(sandbox, table, CODE, picture))
    # The picture is the guest's: open it with a decoder that you trust.
    print(picture.name, "is a PNG:", (await trio.Path(picture).read_bytes()).startswith(b"\x89PNG"))


if __name__ == "__main__":
    trio.run(main, *(Path(argument) for argument in sys.argv[1:3]))
