"""The command ``trio-sandbox``. Made of the public interface only."""

from __future__ import annotations

from ._main import main as main
from ._parser import build_parser as build_parser
