"""Exit statuses of ``trio-sandbox run``, ``shell`` and ``bench``, after the ones of timeout(1) and docker-run(1)."""

from __future__ import annotations

#: Wrong use of the command line, or a file of code that can't be read.
USAGE = 2
#: The code ran longer than it may; as timeout(1) has it.
TIMEOUT = 124
#: The sandbox failed, not the code in it.
SANDBOX_FAILURE = 125
#: As env(1) has it: the interpreter was found and can't be run, or was not found.
CANNOT_RUN = 126
NOT_FOUND = 127
#: Added to a signal's number, as shells do.
SIGNAL_BASE = 128

EXIT_STATUSES = f"""\
exit status:
  that of the program, {SIGNAL_BASE} + n after signal n
  {USAGE:3}  wrong use, or FILE can't be read; nothing was started
  {TIMEOUT:3}  the program was stopped by --timeout
  {SANDBOX_FAILURE:3}  the sandbox failed; standard error says how
  {CANNOT_RUN:3}  the interpreter can't be run in the guest
  {NOT_FOUND:3}  the interpreter is not in the guest
A program that exits with one of these itself can't be told apart by the status alone.
"""

SHELL_EXIT_STATUSES = f"""\
exit status:
  that of the shell, {SIGNAL_BASE} + n after signal n; {SIGNAL_BASE + 1} after Ctrl-], as when a terminal hangs up
  {USAGE:3}  wrong use, or standard input is no terminal
  {SANDBOX_FAILURE:3}  the sandbox failed; standard error says how
"""

BENCH_EXIT_STATUSES = f"""\
exit status:
    0  it was measured; what is too large for this machine is said in the table
  {USAGE:3}  wrong use
  {SANDBOX_FAILURE:3}  something failed; the table or standard error says what
"""
