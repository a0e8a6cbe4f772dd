"""``trio-sandbox fleet``: how the nodes of fleets on a Ray cluster are, and draining one."""

from __future__ import annotations

import argparse

import attrs

from .._errors import SandboxError
from ..fleet import NodeReport, drain_node, read_reports
from ._json import print_facts, print_json
from ._report import complain, complain_about


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
        if report.host is None:
            lines.append(f"{report.name:<32} ended")
            continue
        used = report.host.admission
        state = "draining" if report.draining else "open"
        memory = f"{used.memory_mib_reserved} of {used.memory_mib_budget}"
        vcpus = f"{used.vcpus_reserved} of {used.vcpu_budget}"
        sandboxes, waiting = report.host.sandboxes_open, used.tasks_waiting
        lines.append(f"{report.name:<32} {state:<10} {sandboxes:>9} {waiting:>8} {memory:>16} {vcpus:>9}")
    stored = {report.name: _stored(report) for report in reports}  # programs on one node share its cache
    lines += [line for name, things in stored.items() if things for line in ("", f"{name} has", *things)]
    return "\n".join(lines)


def _stored(report: NodeReport) -> list[str]:
    """Give a line for each template and saved sandbox of a node."""
    return [
        f"  template {each.key:<24} {each.image:<16} {each.memory_mib:>6} MiB {each.vcpus:>3} vCPU"
        for each in report.templates
    ] + [
        f"  saved    {each.name:<24} {each.problem or f'{each.image:<16} {each.memory_mib:>6} MiB {each.vcpus:>3} vCPU'}"
        for each in report.saved
    ]
