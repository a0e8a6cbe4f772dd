"""``trio-sandbox fleet``: how the nodes of fleets on a Ray cluster are, and draining one."""

from __future__ import annotations

import argparse

import attrs

from .._errors import SandboxError
from ..fleet import NodeReport, drain_node, read_reports
from ._json import print_facts, print_json
from ._report import complain, complain_about, one_line


def fleet(options: argparse.Namespace) -> int:
    """Do what the command line says; 0, or 1 if it failed."""
    try:
        if options.action == "status":
            reports = read_reports(options.address)
            if options.json:
                print_json([attrs.asdict(report) for report in reports])
            else:
                print(table(reports))
        else:
            left = drain_node(options.node, timeout=options.timeout, address=options.address)
            line = f"{options.node} is drained; {left} sandboxes were left, and ended"
            print_facts(options.json, line, node=options.node, sandboxes_ended=left)
    except BrokenPipeError:
        raise
    except (SandboxError, OSError) as exc:
        complain_about(exc)
        return 1
    except ModuleNotFoundError as exc:
        complain(str(exc))
        return 1
    return 0


def table(reports: list[NodeReport]) -> str:
    """Give a line for each node and program that uses it, and then what each node has on its disk."""
    if not reports:
        return "no fleet has a node on this cluster"
    lines = [f"{'NODE':<32} {'STATE':<10} {'SANDBOXES':>9} {'WAITING':>8} {'MEMORY (MiB)':>16} {'VCPUS':>9}"]
    for report in reports:
        name = one_line(report.name)
        if report.host is None:
            lines.append(f"{name:<32} {one_line(report.problem) or 'ended'}")
            continue
        used = report.host.admission
        state = "draining" if report.draining else "open"
        memory = f"{used.memory_mib_reserved} of {used.memory_mib_budget}"
        vcpus = f"{used.vcpus_reserved} of {used.vcpu_budget}"
        sandboxes, waiting = report.host.sandboxes_open, used.tasks_waiting
        lines.append(f"{name:<32} {state:<10} {sandboxes:>9} {waiting:>8} {memory:>16} {vcpus:>9}")
    stored = {one_line(report.name): _stored(report) for report in reports}  # programs on one node share its cache
    lines += [line for name, things in stored.items() if things for line in ("", f"{name} has", *things)]
    return "\n".join(lines)


def _stored(report: NodeReport) -> list[str]:
    """Give a line for each template and saved sandbox of a node."""
    if report.host is not None and report.problem:
        return [f"  {one_line(report.problem)}"]
    return [
        f"  template {one_line(each.key):<24} {_describe(each.image, each.memory_mib, each.vcpus)}"
        for each in report.templates
    ] + [
        f"  saved    {one_line(each.name):<24} {one_line(each.problem) or _describe(each.image, each.memory_mib, each.vcpus)}"
        for each in report.saved
    ]


def _describe(image: str, memory_mib: int, vcpus: int) -> str:
    return f"{one_line(image):<16} {memory_mib:>6} MiB {vcpus:>3} vCPU"
