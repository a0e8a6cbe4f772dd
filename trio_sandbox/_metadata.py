"""Make public objects say the module that users import them from."""

from __future__ import annotations


def fix_module_metadata(module: str, namespace: dict[str, object]) -> None:
    """Set `__module__` of what *namespace* re-exports, so that tracebacks and docs show the public path."""
    for name, value in namespace.items():
        defined_in: object = getattr(value, "__module__", None)
        if not name.startswith("_") and isinstance(defined_in, str) and defined_in.startswith("trio_sandbox."):
            try:
                value.__module__ = module
            except AttributeError:  # an alias of types, a constant: nothing to show
                continue


def version() -> str:
    """Return the installed version, or "0+unknown" when run from a tree that was never installed."""
    import importlib.metadata  # slow, and few ask

    try:
        return importlib.metadata.version("trio-sandbox")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
