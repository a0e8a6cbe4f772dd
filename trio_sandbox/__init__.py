"""Run untrusted code in throw-away QEMU virtual machines, the Trio way."""

from __future__ import annotations
