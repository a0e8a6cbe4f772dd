"""The failure table: what can happen to a run, in each language, and what comes of it.

`docs/reference/failures.md` shows it, and `tests/qemu/test_failure_table.py` makes each of it happen.
``python -m tests.failures`` writes it into the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from tests.documented import ROOT

PAGE = ROOT / "docs" / "reference" / "failures.md"


@attrs.frozen
class Language:
    """A language, and how its interpreter's memory is looked at."""

    name: str
    title: str
    image: str
    remember: str
    """Code that sets a variable."""
    recall: str
    """Code that prints "kept" if that variable is set, and "lost" if not."""
    tidy: str
    """Code that frees the disk."""
    endless: str
    """Code that prints "go" and goes on for ever, unless it is interrupted."""


LANGUAGES = {
    language.name: language
    for language in [
        Language(
            "python",
            "Python",
            "python",
            "kept = b'kept'",
            "import os\nos.write(1, globals().get('kept', b'lost'))\n",
            "import glob\nfor name in glob.glob('/tmp/full*'): os.remove(name)",
            "print('go', flush=True)\nwhile True: pass",
        ),
        Language(
            "javascript",
            "JavaScript",
            "node",
            "var kept = 'kept'",
            "require('fs').writeSync(1, globalThis.kept ?? 'lost'); 0",
            "for (const name of ['/tmp/full', '/tmp/full2']) require('fs').rmSync(name, {force: true})",
            "console.log('go')\nfor (;;) {}",
        ),
        Language(
            "shell",
            "shell",
            "python",
            "kept=kept",
            'builtin printf %s "${kept-lost}"',
            "rm -f /tmp/full*",
            "echo go\nwhile :; do :; done",
        ),
    ]
}


@attrs.frozen
class Result:
    """A `RunResult` is returned."""

    exit_code: int
    kept: bool
    stderr: str = ""
    """What its stderr contains; described in the page by *says*."""
    says: str = ""

    def __str__(self) -> str:
        says = self.says and f", {self.says}"
        return f"`exit_code` {self.exit_code}{says}; {_state(self.kept)}"


@attrs.frozen
class Raised:
    """An exception is raised in the caller."""

    name: str
    kept: bool

    def __str__(self) -> str:
        return f"`{self.name}`; {_state(self.kept)}"


def _state(kept: bool) -> str:
    return "state kept" if kept else "state lost"


Outcome = Result | Raised
#: Code, and all that may come of it.
Case = tuple[str, tuple[Outcome, ...]]


@attrs.frozen
class Row:
    """Something that can happen, in each language."""

    what: str
    cases: Mapping[str, Case]
    like: str = ""
    """How it is called in the page, in whose way it goes in a language where it is no case of its own."""
    by: Literal["itself", "deadline", "cancel", "panic", "kill"] = "itself"
    """What ends it: the code or a limit; a deadline; once it has printed "go", a cancellation, or what ends the machine."""


def _case(code: str, *outcomes: Outcome) -> Case:
    return code, outcomes


def _python(code: str, *outcomes: Outcome) -> dict[str, Case]:
    return {"python": (code, outcomes)}


#: Python that maps a page of machine code and calls it, with the interpreter's lock held.
_NATIVE = (
    "import ctypes, mmap\n"
    "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
    "page.write(bytes.fromhex('{code}'))\n"
    "call = ctypes.PYFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
    "print('go', flush=True)\n"
    "call()"
)
_ENDLESS = LANGUAGES["python"].endless
_SOCKETS = """
import os, stat
def sockets():
    for name in os.listdir('/proc/self/fd'):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode): yield int(name)
        except OSError: pass
"""
_IGNORE = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # for SIGINT not to come first
_PTRACE = f"""{_IGNORE}
import ctypes, os, sys, time
attached, ready = os.pipe()
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: else nobody but a parent may
if os.fork() == 0:
    status = ctypes.CDLL(None).ptrace(16, os.getppid(), None, None)  # PTRACE_ATTACH
    os.write(ready, b'y' if status == 0 else b'n')
    time.sleep(1000)
sys.exit('refused' if os.read(attached, 1) == b'n' else None)
"""
#: The same of a parent that has not said that anybody may.
_PERL_PTRACE = "syscall(101, 16, getppid(), 0, 0) == 0 or die; sleep 1000"
_REFUSED = Result(1, True, "Died", "the refusal in `stderr`")

#: What happens to code that means no harm, and how it does in Python.
_ACCIDENTS = [
    Row(
        "an exception",
        _python("1 / 0", Result(1, True, "ZeroDivisionError: division by zero\n", "a traceback in `stderr`")),
    ),
    Row("a syntax error", _python("def f(:", Result(1, True, "SyntaxError", "the error in `stderr`"))),
    Row("`exit(n)`", _python("import sys\nsys.exit(7)", Result(7, True))),
    Row("the process ends: `os._exit(n)`", _python("import os\nos._exit(5)", Result(5, False)), like="`exit(n)`"),
    Row("a crash: SIGSEGV", _python("import ctypes\nctypes.string_at(0)", Result(139, False))),
    Row("a crash: SIGABRT", _python("import os\nos.abort()", Result(134, False)), like="SIGSEGV"),
    Row(
        "a crash: SIGBUS",
        _python(
            "import mmap\nfile = open('/tmp/short', 'w+b')\nfile.truncate(4096)\n"
            "page = mmap.mmap(file.fileno(), 4096)\nfile.truncate(0)\npage[0]",
            Result(135, False),
        ),
        like="SIGSEGV",
    ),
    Row("a crash: SIGFPE", _python(_NATIVE.format(code="31c9f7f1"), Result(136, False)), like="SIGSEGV"),
    Row("a crash: SIGILL", _python(_NATIVE.format(code="0f0b"), Result(132, False)), like="SIGSEGV"),
    Row("SIGTERM", _python("import os\nos.kill(os.getpid(), 15)", Result(143, False)), like="SIGSEGV"),
    Row("SIGKILL", _python("import os\nos.kill(os.getpid(), 9)", Result(137, False)), like="SIGSEGV"),
    Row(
        "out of memory in the guest, little by little",
        _python("data = []\nwhile True: data.append(b'x' * (1 << 20))", Result(137, False)),
    ),
    Row(
        "out of memory in the guest, at once",
        _python("b'x' * (1 << 40)", Result(1, True, "MemoryError", "`MemoryError` in `stderr`")),
    ),
    Row("more output than allowed", _python("while True: print('x' * 1000)", Raised("OutputLimitError", True))),
    Row("the deadline passes", _python(_ENDLESS, Raised("TooSlowError", True)), by="deadline"),
    Row("the caller is cancelled", _python(_ENDLESS, Raised("Cancelled", True)), by="cancel"),
    Row(
        "the same, in native code that takes no SIGINT",
        _python(_NATIVE.format(code="ebfe"), Raised("Cancelled", False)),
        by="cancel",
    ),
    Row(
        "the same, where SIGINT is ignored",
        _python(f"{_IGNORE}{_ENDLESS}", Raised("Cancelled", False)),
        by="cancel",
    ),
    Row(
        "a fork bomb",
        _python(
            f"{_IGNORE}import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
            Raised("TooSlowError", False),
            Result(137, False),
        ),
        by="deadline",
    ),
    Row(
        "the guest's disk is full",
        _python(
            "import os\nspace = os.statvfs('/tmp')\nfile = open('/tmp/full', 'wb', buffering=0)\n"
            "os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize)\n"
            "while True: open('/tmp/full2', 'ab').write(bytes(1 << 20))",
            Result(1, True, "No space left on device", "`OSError` in `stderr`"),
        ),
    ),
]

#: What code can do on purpose, and how it does in Python.
_ATTACKS = [
    Row(
        "it closes all of its descriptors",
        _python("import os\nos.closerange(0, 100_000)", Result(0, False)),
    ),
    Row(
        "it writes to all of its descriptors",
        _python(
            "import os, time\nfor number in range(3, 1000):\n    try: os.write(number, b'x' * 64)\n    except OSError: pass\n"
            "time.sleep(1000)",
            Result(137, False),
        ),
    ),
    Row(
        "it takes all that is sent to its interpreter",
        _python(
            f"{_SOCKETS}\nimport socket, threading\ndef take(sock):\n    while sock.recv(1): pass\n"
            "for number in sockets():\n    threading.Thread(target=take, args=[socket.socket(fileno=os.dup(number))]).start()\n"
            f"{_ENDLESS}",
            Raised("Cancelled", False),
        ),
        by="cancel",
    ),
    Row(
        "it prints look-alikes of what we send",
        _python(
            """print('J\\0\\0\\0\\x02{}{"finished":{"exit_code":9}}D\\0\\0\\0\\1\\0', flush=True)\nraise SystemExit(3)""",
            Result(3, True),
        ),
    ),
    Row("a child of it stops it by ptrace", _python(_PTRACE, Raised("TooSlowError", False)), by="deadline"),
    Row(
        "it stops itself (SIGSTOP)",
        _python(f"{_IGNORE}import os\nos.kill(os.getpid(), 19)", Raised("TooSlowError", False)),
        by="deadline",
    ),
    Row(
        "it kills all that it can",
        _python(
            "import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: pass\nos.kill(os.getpid(), 9)",
            Result(137, False),
        ),
    ),
    Row(
        "it redefines `print`, `exit`, and what it finds in its builtins and in `sys`",
        _python(
            "import builtins, sys\nprint = exit = None\nsys.stdout = sys.stderr = sys.stdin = sys.excepthook = sys.exit = 5\n"
            "vars(builtins).update(dict.fromkeys(set(vars(builtins)) - {'__import__', 'globals'}))",
            Result(0, True),
        ),
    ),
]

_ENDLESS_SHELL = LANGUAGES["shell"].endless

#: The same in shell, by line.
_SHELL = {
    "an exception": _case("cat /nowhere", Result(1, True, "No such file", "that of the last command")),
    "a syntax error": _case("if then", Result(2, True, "syntax error", "the error in `stderr`")),
    "`exit(n)`": _case("exit 7", Result(7, False)),
    "the process ends: `os._exit(n)`": _case("exec sh -c 'exit 5'", Result(5, False)),
    "a crash: SIGSEGV": _case("kill -SEGV $$", Result(139, False)),
    "a crash: SIGABRT": _case("kill -ABRT $$", Result(134, False)),
    "a crash: SIGBUS": _case("kill -BUS $$", Result(135, False)),
    "a crash: SIGFPE": _case("kill -FPE $$", Result(136, False)),
    "a crash: SIGILL": _case("kill -ILL $$", Result(132, False)),
    "SIGTERM": _case("kill -TERM $$", Result(0, True, says="since bash ignores it")),
    "SIGKILL": _case("kill -KILL $$", Result(137, False)),
    "out of memory in the guest, little by little": _case(
        "x=x; while :; do x=$x$x; done", Result(137, False), Result(2, False)
    ),
    "out of memory in the guest, at once": _case(
        "dd if=/dev/zero of=/dev/null bs=1T count=1",
        Result(1, True, "memory exhausted", "the command's error in `stderr`"),
    ),
    "more output than allowed": _case(f"while :; do echo {'x' * 1000}; done", Raised("OutputLimitError", True)),
    "the deadline passes": _case(_ENDLESS_SHELL, Raised("TooSlowError", True)),
    "the caller is cancelled": _case(_ENDLESS_SHELL, Raised("Cancelled", True)),
    "the same, in native code that takes no SIGINT": _case(
        """sh -c 'trap "" INT; echo go; while :; do :; done'""", Raised("Cancelled", False)
    ),
    "the same, where SIGINT is ignored": _case(f"trap '' INT\n{_ENDLESS_SHELL}", Raised("Cancelled", False)),
    "a fork bomb": _case(
        "trap '' INT; f() { f & f & sleep 1000; }; f 2>/dev/null; while :; do :; done",
        Raised("TooSlowError", False),
        Result(137, False),
    ),
    "the guest's disk is full": _case(
        "fallocate -l $(($(stat -f -c '%a*%S' /tmp))) /tmp/full; cat /dev/zero >/tmp/full2",
        Result(1, True, "No space left on device", "the command's error in `stderr`"),
    ),
    "it closes all of its descriptors": _case('for n in {0..300}; do eval "exec $n>&-"; done', Result(0, False)),
    "it writes to all of its descriptors": _case(
        "for file in /proc/$$/fd/*; do echo : >$file; done",
        Result(141, False),  # its own 255 is a pipe that nobody reads any more; it takes no redirection of that
    ),
    "it takes all that is sent to its interpreter": _case(
        # Descriptor 10 is where bash keeps its own input while a file's commands have another.
        "echo go; while :; do read -r line <&10; done",
        Raised("Cancelled", True),
    ),
    "it prints look-alikes of what we send": _case(
        """printf 'J\\0\\0\\0\\2{}{"finished":{"exit_code":9}}D\\0\\0\\0\\1\\0'; (exit 3)""", Result(3, True)
    ),
    "a child of it stops it by ptrace": _case(f"perl -e '{_PERL_PTRACE}'", _REFUSED),
    "it stops itself (SIGSTOP)": _case("trap '' INT; kill -STOP $$", Raised("TooSlowError", False)),
    "it kills all that it can": _case("kill -KILL -1; kill -KILL $$", Result(137, False)),
    "it redefines `print`, `exit`, and what it finds in its builtins and in `sys`": _case(
        'for name in printf echo exit exec eval read source cd trap; do eval "$name() { :; }"; done', Result(0, True)
    ),
}
_ENDLESS_JAVASCRIPT = LANGUAGES["javascript"].endless
#: Waiting for a child is native code, and SIGINT does not end this one.
_NATIVE_JAVASCRIPT = (
    """require('child_process').spawnSync('sh', ['-c', 'trap "" INT; echo go; exec sleep 1000'], {stdio: 'inherit'})"""
)

#: The same in JavaScript. Its interpreter takes seconds to start again, and so what ends it in one way is done once.
_JAVASCRIPT = {
    "an exception": _case("throw new Error('boom')", Result(1, True, "Error: boom", "a stack in `stderr`")),
    "a syntax error": _case("let x = ;", Result(1, True, "SyntaxError", "the error in `stderr`")),
    "`exit(n)`": _case("process.exit(7)", Result(7, False)),
    "a crash: SIGSEGV": _case("process.kill(process.pid, 'SIGSEGV')\nfor (;;) {}", Result(139, False)),
    "out of memory in the guest, little by little": _case(
        "const data = []\nfor (;;) data.push(Buffer.alloc(1 << 20, 1))", Result(137, False)
    ),
    "out of memory in the guest, at once": _case(
        "new ArrayBuffer(2 ** 45)", Result(1, True, "RangeError", "`RangeError` in `stderr`")
    ),
    "more output than allowed": _case("for (;;) console.log('x'.repeat(1000))", Raised("OutputLimitError", True)),
    "the deadline passes": _case(_ENDLESS_JAVASCRIPT, Raised("TooSlowError", True)),
    "the caller is cancelled": _case(_ENDLESS_JAVASCRIPT, Raised("Cancelled", True)),
    "the same, in native code that takes no SIGINT": _case(_NATIVE_JAVASCRIPT, Raised("Cancelled", False)),
    "the same, where SIGINT is ignored": _case(
        f"process.on('SIGINT', () => {{}})\nawait null\n{_ENDLESS_JAVASCRIPT}", Raised("Cancelled", False)
    ),
    "a fork bomb": _case(
        # It ignores SIGINT before the bomb goes off: after it, nothing of the kind is sure to have begun at the deadline.
        "process.on('SIGINT', () => {})\nawait null\n"
        "require('child_process').spawn('bash', ['-c', 'f() { f & f & sleep 1000; }; f'], {stdio: 'ignore'})\n"
        + _ENDLESS_JAVASCRIPT,
        Raised("TooSlowError", False),
        Result(137, False),
    ),
    "the guest's disk is full": _case(
        "const fs = require('fs'), space = fs.statfsSync('/tmp')\n"
        "require('child_process').spawnSync('fallocate', ['-l', String(space.bavail * space.bsize), '/tmp/full'])\n"
        "for (;;) fs.appendFileSync('/tmp/full2', Buffer.alloc(1 << 20))",
        Result(1, True, "ENOSPC", "`ENOSPC` in `stderr`"),
    ),
    "it closes all of its descriptors": _case(
        "for (let n = 0; n < 1000; n++) try { require('fs').closeSync(n) } catch {}", Result(134, False)
    ),
    "it writes to all of its descriptors": _case(
        "for (let n = 3; n < 1000; n++) try { require('fs').writeSync(n, 'x'.repeat(64)) } catch {}\nawait new Promise(() => {})",
        Result(139, False),
    ),
    "it takes all that is sent to its interpreter": _case(
        "console.log('go')\nfor (;;) try { require('fs').readSync(3, Buffer.alloc(1)) } catch {}",
        Raised("Cancelled", True),
    ),
    "it prints look-alikes of what we send": _case(
        """process.stdout.write('J\\0\\0\\0\\x02{}{"finished":{"exit_code":9}}D\\0\\0\\0\\x01\\0')\nprocess.exitCode = 3""",
        Result(3, True),
    ),
    "a child of it stops it by ptrace": _case(
        f"const tracer = require('child_process').spawn('perl', ['-e', {_PERL_PTRACE!r}], {{stdio: 'inherit'}})\n"
        "process.exitCode = await new Promise((done) => tracer.on('exit', done))",
        _REFUSED,
    ),
    "it stops itself (SIGSTOP)": _case(
        f"process.kill(process.pid, 'SIGSTOP')\n{_NATIVE_JAVASCRIPT}", Raised("TooSlowError", False)
    ),
    "it kills all that it can": _case("process.kill(-1, 'SIGKILL')\nfor (;;) {}", Result(137, False)),
    "it redefines `print`, `exit`, and what it finds in its builtins and in `sys`": _case(
        "console.log = process.exit = JSON.parse = JSON.stringify = null\n"
        "for (const name of Object.getOwnPropertyNames(globalThis))\n"
        "    try { if (!['kept', 'require', 'globalThis'].includes(name)) globalThis[name] = null } catch {}\n0",
        Result(0, True),
    ),
}
_OTHERS = {"javascript": _JAVASCRIPT, "shell": _SHELL}


def _in_every_language(rows: list[Row]) -> list[Row]:
    return [
        attrs.evolve(
            row,
            cases={**row.cases, **{name: cases[row.what] for name, cases in _OTHERS.items() if row.what in cases}},
        )
        for row in rows
    ]


ACCIDENTS = _in_every_language(_ACCIDENTS)
ATTACKS = _in_every_language(_ATTACKS)

_ENDS: list[tuple[str, Literal["panic", "kill"]]] = [("the guest's kernel panics", "panic"), ("QEMU is killed", "kill")]

#: What ends the machine, whatever the language is.
ENDS = [
    Row(
        what,
        {name: (language.endless, (Raised("OutcomeUnknownError", False),)) for name, language in LANGUAGES.items()},
        by,
    )
    for what, by in _ENDS
]


def _cell(row: Row, language: str) -> str:
    if language in row.cases:
        return " or ".join(map(str, row.cases[language][1]))
    return f"as {row.like}" if row.like else "-"


def table(rows: list[Row], *, lives: bool) -> str:
    """Show rows as a table of the page."""
    head = ["", *(language.title for language in LANGUAGES.values()), "sandbox"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [_cell(row, name) for name in LANGUAGES]
        lines.append("| " + " | ".join([row.what, *cells, "lives on" if lives else "has ended"]) + " |")
    return "\n".join(lines) + "\n"


def page_with_tables(page: str) -> str:
    """Put the tables where they belong in the text of the page."""
    for mark, text in [
        ("accidents", table(ACCIDENTS, lives=True)),
        ("attacks", table(ATTACKS, lives=True)),
        ("ends", table(ENDS, lives=False)),
    ]:
        before, start, rest = page.partition(f"<!-- {mark}: start -->\n")
        _, end, after = rest.partition(f"<!-- {mark}: end -->\n")
        assert start, f"the page has no mark for {mark}"
        assert end, f"the page has no end of {mark}"
        page = before + start + text + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text("utf-8")), "utf-8")
