"""Sandboxes on many machines: the same `Sandbox`, with a longer wire.

    async with open_ray_host() as host, host.open_sandbox("python") as sandbox:
        print(sandbox.node, (await sandbox.run("print(6 * 7)")).stdout)

Ray (extra ``ray``) starts one host on each node of its cluster, and supervises them; what a sandbox and its user say to each other goes
straight from one to the other.
"""

from __future__ import annotations

from .._metadata import fix_module_metadata
from ._actor import NodeReport as NodeReport, TemplateReport as TemplateReport
from ._admin import drain_node as drain_node, read_reports as read_reports
from ._config import FleetConfig as FleetConfig
from ._host import FleetHost as FleetHost
from ._members import FleetStatistics as FleetStatistics, NodeStatistics as NodeStatistics
from ._ray import open_ray_host as open_ray_host

fix_module_metadata(__name__, globals())
del fix_module_metadata
