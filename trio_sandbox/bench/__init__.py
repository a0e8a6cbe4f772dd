"""Measuring: what ``trio-sandbox bench`` shows, and what the project's own benchmarks are made of."""

from __future__ import annotations

from ._figures import Figure as Figure, Skipped as Skipped, durations as durations, table as table
from ._lab import Lab as Lab, OpenHost as OpenHost
from ._machine import Load as Load, LoadWatch as LoadWatch, Machine as Machine
from ._measures import MEASURES as MEASURES, Measure as Measure, private_mib as private_mib
from ._plan import Plan as Plan, Report as Report, measure as measure
