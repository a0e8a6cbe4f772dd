"""What a porter writes for its interpreter to read, in a language of each: see `porter` for what it is told."""

from __future__ import annotations

from _json import encode_basestring_ascii  # pyright: ignore[reportMissingModuleSource]

#: Descriptors of ours that the interpreter opens by name: where it answers, what it is to begin with, and when it can take SIGINT.
ANSWERS, SOURCE, GATE = 8, 9, 10
#: Where it finds more of what it is to begin with, if it has more.
LIBRARIES = (11, 12, 13)
_EPERM = 1


class Order:
    """One run that the agent wants."""

    __slots__ = ("code", "cwd", "descriptors", "env", "functions", "last_status", "number")

    def __init__(self, number: int, code: str, env: dict[str, str], cwd: str | None, last_status: int = 0) -> None:
        self.number: int = number
        self.code: str = code
        self.env: dict[str, str] = env
        self.cwd: str | None = cwd
        self.last_status: int = last_status
        """The exit status of the run before."""
        self.descriptors: list[int] = []
        """Ours, in turn: standard input or -1, standard output, standard error, and a file with the code."""
        self.functions: tuple[list[str], list[int]] | None = None
        """Names of the host's functions, and descriptors of ours: what answers come from, and what calls go to."""

    def paths(self, files: str) -> list[str]:
        """Return names of the descriptors, which the directory *files* has."""
        return [f"{files}/{descriptor}" if descriptor >= 0 else "/dev/null" for descriptor in self.descriptors]


class Dialect:
    """How an interpreter is spoken to: the text that is written for it to read. This one is lines of JSON."""

    #: The descriptor that it reads it from.
    descriptor: int = 3
    #: Where it finds the texts that it begins with, in the order in which they come.
    texts: tuple[int, ...] = (*LIBRARIES, SOURCE)
    #: Seconds after which what a SIGINT may have destroyed, or its aim may have missed, is sent again, and again. Node.js that breaks
    #: a script off has no handler for some milliseconds, where it is emulated, and can't close the gate before.
    retries: tuple[float, ...] = (0.5, 0.5)
    #: Seconds that it has at most to take a SIGINT before that comes to the children that it may wait for. Node.js has a thread for it: if
    #: the child's end were there first, the code after it would run; and if the script's end were, the SIGINT would be lost.
    lead: float = 0.2
    #: Seconds after which a question that is not answered is followed by a SIGINT, and by itself again, in turn. (): never by a SIGINT.
    resets: tuple[float, ...] = ()
    #: Whether the most memory that it had is found out after each run, which takes a fiftieth of one of a shell's, in whose own little is.
    tells_memory: bool = True
    #: What it reads after a run, and what means nothing: once it is read and nothing was answered, the run is over all the same.
    #: "" if nothing that code does can keep the interpreter from answering.
    probe: str = ""

    def begin(self, files: str) -> str:
        """Make it run what is in SOURCE of the directory *files*; "" if its command line says so."""
        return ""

    def can_set(self, name: str, value: str) -> bool:
        """Whether it can have an environment variable *name* with that value."""
        return name != "" and "=" not in name and "\0" not in name + value

    def run(self, files: str, token: str, order: Order) -> str:
        """Make it run the code of *order*, whose descriptors are in the directory *files*."""
        names = ",".join(f'"{path}"' for path in order.paths(files))
        variables = ",".join(
            f"[{encode_basestring_ascii(n)},{encode_basestring_ascii(v)}]" for n, v in order.env.items()
        )
        directory = "null" if order.cwd is None else encode_basestring_ascii(order.cwd)
        return (
            f'{{"run":"{token}","number":{order.number},"code":{encode_basestring_ascii(order.code)},'
            f'"env":[{variables}],"cwd":{directory},"files":[{names}]{self._functions(files, order)}}}\n'
        )

    def _functions(self, files: str, order: Order) -> str:
        if order.functions is None:
            return ""
        names, (answers, calls) = order.functions
        known = ",".join(encode_basestring_ascii(name) for name in names)
        return f',"functions":{{"names":[{known}],"answers":"{files}/{answers}","calls":"{files}/{calls}"}}'

    def remind(self, files: str, token: str) -> str:
        """Make it tell the end of a run again, which SIGINT may have kept it from; "" if SIGINT does."""
        return ""

    def ask(self, files: str, token: str) -> str:
        """Make it answer S when there is no SIGINT on its way to it any more."""
        return f'{{"ask":"{token}"}}\n'

    def renew(self, entropy: bytes) -> str:
        """Make it forget what two machines must not share."""
        return '{"renew":true}\n'


class ShellDialect(Dialect):
    """Lines for an interactive bash: SIGINT then brings it back to its next line, whatever it is in the middle of.

    Code can do anything to the shell that takes them. A backslash keeps aliases away, `builtin` functions; what would take
    the place of `builtin` itself is removed before each run, and what was switched off is switched on. Where builtins can't be
    used at the end, a program gives the answer. And where nothing does, the probe shows that the shell came back.
    """

    descriptor = 0
    texts: tuple[int, ...] = (SOURCE,)
    retries: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    resets: tuple[float, ...] = (0.5, 0.5, 1.0, 1.0, 2.0, 2.0)
    lead: float = 0.0
    tells_memory: bool = False
    probe = " "

    def begin(self, files: str) -> str:
        """Say it."""
        return f"\\builtin source {files}/{SOURCE}; \\builtin printf 'R\\n' >{files}/{ANSWERS}\n"

    def can_set(self, name: str, value: str) -> bool:
        """Whether its syntax has such a name."""
        return name.isidentifier() and name.isascii() and "\0" not in value

    def run(self, files: str, token: str, order: Order) -> str:
        """Say it. The code is in a file of ours, since a shell reads a pipe byte by byte. A descriptor of it would be in all that it starts."""
        stdin, stdout, stderr, code = order.paths(files)
        # For the code to see it as `$?`, the command before must have come to it; in such a list it sets off no trap and no `set -e`.
        last = f"(\\builtin exit {order.last_status}) || " if order.last_status else ""
        running = f"{last}\\builtin source {code} <{stdin} >{stdout} 2>{stderr}; {self._tell_end(files, token)}"
        if order.env or order.cwd is not None:
            running = self._surround(files, token, order, running)
        return (
            "\\unset -f builtin enable unset; "
            "{ \\enable builtin enable source printf unset || \\builtin source /dev/null; } && "
            f"{{ \\builtin printf 'B {token}\\n' >{files}/{ANSWERS} && {{ {running}; }}; }}\n"
        )

    def _surround(self, files: str, token: str, order: Order, running: str) -> str:
        """Have variables and a directory meanwhile, and tell what undoes it."""
        undoing = [f"\\\\builtin unset -v {name}; ${{{name}+${{{name}@A}}; }}" for name in order.env]
        doing = [f"\\builtin export -- {name}={_quote(value)}" for name, value in order.env.items()]
        if order.cwd is not None:
            doing.append(f"\\builtin cd -- {_quote(order.cwd)}")
            undoing.append("\\\\builtin cd -- ${PWD@Q}; ${OLDPWD+OLDPWD=${OLDPWD@Q}}")
        return (
            f"\\builtin printf 'U {token} %s\\n' \"{''.join(undoing)}\" >{files}/{ANSWERS}; "
            f"\\builtin enable cd export; {{ {' && '.join(doing)}; }} && {{ {running}; }} || "
            f"\\builtin printf 'F {token} {_EPERM}\\n' >{files}/{ANSWERS}"
        )

    def _tell_end(self, files: str, token: str) -> str:
        # Its standard input stays what it is: that shows whether it still reads us.
        program = "{ \\enable builtin enable source printf unset && /bin/cat <&9; }"
        return f'{{ \\builtin printf \'D {token} %s\\n\' "$?" || {program}; }} 9<<<"D {token} $?" >{files}/{ANSWERS}'

    def remind(self, files: str, token: str) -> str:
        """Say it."""
        return f"{self._tell_end(files, token)}\n"

    def ask(self, files: str, token: str) -> str:
        """Say it."""
        return f"\\builtin printf 'S {token}\\n' >{files}/{ANSWERS}\n"

    def renew(self, entropy: bytes) -> str:
        """Say it. SRANDOM asks the kernel each time."""
        return f"RANDOM={int.from_bytes(entropy[-4:], 'big')}\n"


DIALECTS: dict[str, Dialect] = {"json": Dialect(), "shell": ShellDialect()}


def _quote(text: str) -> str:
    # One line, whatever is in it; and no character that a shell with history would expand.
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("!", "\\x21")):
        text = text.replace(character, escape)
    return f"$'{text}'"
