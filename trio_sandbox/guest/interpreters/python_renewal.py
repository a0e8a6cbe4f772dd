"""What a Python interpreter forgets when its machine goes on as another one.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.
"""

from __future__ import annotations

import sys
from os import urandom

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def renew(entropy: bytes) -> None:
    """Forget what must not be the same in two machines that were made from one state.

    That is what the standard library has drawn at random for this process, and NumPy's old global
    generator. Generators of the code's own are its own affair; so is the seed of `hash`, which can't change.
    """
    renewals: tuple[tuple[str, Callable[[Any], object]], ...] = (
        ("random", lambda module: module.seed()),
        ("tempfile", lambda module: setattr(module, "_name_sequence", None)),
        ("uuid", _renew_uuid),
        # OpenSSL notices a fork, and not this.
        ("_ssl", lambda module: module.RAND_add(entropy, float(len(entropy)))),
        ("multiprocessing.process", _renew_authkey),
        ("numpy.random.mtrand", lambda module: module.seed()),
    )
    for name, renew in renewals:
        try:
            if name in sys.modules:
                renew(sys.modules[name])
        except BaseException:  # noqa: BLE001  the code has put something else in its place
            pass


def _renew_uuid(uuid: Any) -> None:
    # The node, where it is no network card's address, and what keeps the next one from being the last one. The C
    # library that makes version 1 has a node and a sequence of its own, which can't be reset: Python does it instead.
    for name in ("_node", "_generate_time_safe", "_last_timestamp", "_last_timestamp_v6", "_last_timestamp_v7"):
        if hasattr(uuid, name):
            setattr(uuid, name, None)


def _renew_authkey(process: Any) -> None:
    process._current_process._config["authkey"] = process.AuthenticationString(urandom(32))
