"""``trio-sandbox template``: list and remove the saved states that sandboxes go on from."""

from __future__ import annotations

import argparse
import datetime as dt
import json
from collections.abc import Callable

from .._errors import SandboxError
from ..constants import DEFAULT_TEMPLATE_BUDGET_MIB
from ..host import TemplateStore
from ..image import default_cache_directory
from ._image import mebibytes
from ._report import complain_about


def template(options: argparse.Namespace) -> int:
    """Do what the command line says; 0, or 1 if it failed."""
    store = TemplateStore(options.cache_dir or default_cache_directory(), budget_mib=DEFAULT_TEMPLATE_BUDGET_MIB)
    actions: dict[str, Callable[[], str]] = {
        "list": lambda: listing(store, as_json=options.json),
        "rm": lambda: "\n".join(f"{key}: {mebibytes(store.remove(key))} freed" for key in options.keys),
        "prune": lambda: f"{mebibytes(store.prune())} freed",
    }
    try:
        print(actions[options.action]())
    except (SandboxError, OSError) as exc:
        complain_about(exc)
        return 1
    return 0


def listing(store: TemplateStore, *, as_json: bool) -> str:
    """Give the intact templates as a table, or as JSON, the one used last first."""
    found = store.list()
    if as_json:
        rows = [
            {
                "key": each.key,
                "image": each.image,
                "memory_mib": each.memory_mib,
                "vcpus": each.vcpus,
                "warmup": each.warmup,
                "created": each.created,
                "used": each.used,
                "size_bytes": each.size_bytes,
            }
            for each in found
        ]
        return json.dumps(rows, indent=2)
    if not found:
        return "no templates; the first sandbox of a configuration makes one"
    lines: list[str] = []
    for each in found:
        used = dt.datetime.fromtimestamp(each.used).astimezone().strftime("%Y-%m-%d %H:%M")
        first, _, rest = each.warmup.strip().partition("\n")
        warmup = f"  {first[:40]}{'...' if rest or len(first) > 40 else ''}" if first else ""
        lines.append(
            f"{each.key}  {each.image}  {each.memory_mib:>6} MiB  {each.vcpus:>2} vCPU"
            f"  {mebibytes(each.size_bytes):>8}  used {used}{warmup}"
        )
    return "\n".join(lines)
