"""``trio-sandbox template``: list and remove the saved states that sandboxes are restored from."""

from __future__ import annotations

import argparse
import datetime as dt
import json

from .._errors import SandboxError, TemplateError
from ..constants import DEFAULT_TEMPLATE_BUDGET_MIB
from ..image import default_cache_directory
from ..machines import NamedTemplateStore, TemplateStore
from ._image import mebibytes
from ._json import open_rows, print_facts
from ._report import complain_about


def template(options: argparse.Namespace) -> int:
    """Do what the command line says; 0, or 1 if it failed."""
    cache = options.cache_dir or default_cache_directory()
    store = TemplateStore(cache, budget_mib=DEFAULT_TEMPLATE_BUDGET_MIB)
    named = NamedTemplateStore(cache)
    try:
        if options.action == "list":
            print(listing(store, named, as_json=options.json))
        elif options.action == "rm":
            with open_rows(options.json) as add:
                for key in options.keys:
                    freed = remove(store, named, key)
                    add(f"{key}: {mebibytes(freed)} freed", name=key, freed_bytes=freed)
        else:
            freed = store.prune() + named.prune()
            print_facts(options.json, f"{mebibytes(freed)} freed", freed_bytes=freed)
    except BrokenPipeError:
        raise
    except (SandboxError, OSError) as exc:
        complain_about(exc)
        return 1
    return 0


def remove(store: TemplateStore, named: NamedTemplateStore, key: str) -> int:
    """Remove the saved sandbox of that name, or else the templates of that key; return the bytes that came free."""
    return named.remove(key) if key in named.names() else store.remove(key)


def listing(store: TemplateStore, named: NamedTemplateStore, *, as_json: bool) -> str:
    """Give the saved sandboxes and the intact templates, the one used last first, as a table or as JSON."""
    found = store.list()
    if as_json:
        rows = [_row(name=name, **_details_of_saved(named, name)) for name in named.names()] + [
            _row(
                key=each.key,
                image=each.image,
                memory_mib=each.memory_mib,
                vcpus=each.vcpus,
                warmup=each.warmup,
                created=each.created,
                used=each.used,
                size_bytes=each.size_bytes,
            )
            for each in found
        ]
        return json.dumps(rows, indent=2)
    lines = [_line_of_saved(named, name) for name in named.names()]
    if not found and not lines:
        return "no templates; the first sandbox of a configuration makes one"
    for each in found:
        first, _, rest = each.warmup.strip().partition("\n")
        warmup = f"  {first[:40]}{'...' if rest or len(first) > 40 else ''}" if first else ""
        lines.append(
            f"{each.key}  {each.image}  {each.memory_mib:>6} MiB  {each.vcpus:>2} vCPU"
            f"  {mebibytes(each.size_bytes):>8}  used {_minute(each.used)}{warmup}"
        )
    return "\n".join(lines)


def _row(**known: object) -> dict[str, object]:
    """Give what is said of each as JSON; null is what does not apply to it."""
    members = ("name", "key", "image", "memory_mib", "vcpus", "warmup", "created", "used", "size_bytes", "error")
    return {**dict.fromkeys(members), **known}


def _details_of_saved(named: NamedTemplateStore, name: str) -> dict[str, object]:
    try:
        saved = named.find(name)
    except TemplateError as exc:
        return {"error": str(exc)}
    return {
        "image": saved.image,
        "memory_mib": saved.memory_mib,
        "vcpus": saved.vcpus,
        "created": saved.created,
        "size_bytes": saved.size_bytes,
    }


def _line_of_saved(named: NamedTemplateStore, name: str) -> str:
    try:
        saved = named.find(name)
    except TemplateError as exc:
        return f"{name}  {exc}"
    return (
        f"{name:<24}  {saved.image}  {saved.memory_mib:>6} MiB  {saved.vcpus:>2} vCPU"
        f"  {mebibytes(saved.size_bytes):>8}  saved {_minute(saved.created)}"
    )


def _minute(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
