"""What code does to its shell: it never keeps later runs from being run, and what is lost is said. With this machine's own bash."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator

import pytest

from ._agent import Host, open_agent

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


#: Works whatever was done to builtins and PATH.
PROBE = '/bin/echo "$kept fine"\n/bin/sh -c "exit 4"'
_OURS = "builtin enable source . printf echo unset export cd eval exec trap set declare command type return exit kill test [ read"

#: After these the shell goes on, with what it had.
HARMLESS = [
    *(f"enable -n {name}" for name in _OURS.split() if name not in ("builtin", "enable")),
    *(f"function {name} {{ :; }}" for name in _OURS.split() if name != "builtin"),
    *(f"function {name} {{ command {name} \"$@\"; }}" for name in ("builtin", "enable", "source", "printf", "unset")),
    *(f"alias {name}=false" for name in _OURS.split() if name not in ("[", ".")),
    "enable -n builtin",
    "enable -n enable",
    "enable -n builtin source printf unset",
    *(f"set {option}" for option in ("-a", "-b", "-f", "-h", "-k", "-m", "+m", "-n", "-p", "-u", "-v", "-x", "-B", "+B", "-C", "-E", "-H", "-P", "-T")),
    *(f"set -o {option}" for option in ("pipefail", "posix", "vi", "emacs", "ignoreeof", "noclobber", "nolog", "history")),
    *(f"shopt -s {option}" for option in ("failglob", "nullglob", "extglob", "lastpipe", "expand_aliases", "xpg_echo", "nocasematch", "autocd", "cdspell", "checkjobs", "execfail", "extdebug", "gnu_errfmt", "huponexit", "inherit_errexit", "sourcepath", "localvar_inherit", "compat31", "compat50", "histverify")),
    "shopt -u expand_aliases interactive_comments sourcepath promptvars",
    "trap 'echo E' ERR; trap 'echo D' DEBUG; trap 'echo R' RETURN; trap 'echo X' EXIT",
    "trap '' INT TERM HUP PIPE; trap 'echo c' CHLD",
    "PROMPT_COMMAND='echo p; false'; PS0='$(echo a)'; PS1='$(echo 1)> '; PS2='> '; PS4='$(echo +)'",
    "PROMPT_COMMAND=(false 'echo \"')",
    "IFS=:; readonly IFS PATH HOME PS1 PWD OLDPWD SHELL REPLY _",
    "PATH=; unset HOME; LANG=C; LC_ALL=nowhere; POSIXLY_CORRECT=1; BASH_COMPAT=31",
    "unset PATH IFS PS1 PS2 PS4 PWD OLDPWD BASH BASH_SOURCE FUNCNAME LINENO RANDOM",
    "umask 777; ulimit -c 0; ulimit -f 0; ulimit -n 64",
    "ulimit -n 20",
    "exec 3>/dev/null 9</dev/null 63</dev/null {fd}>&1",
    "exec 0</dev/null 1>/dev/null 2>&1", "exec 0<&- 1>&- 2>&-",
    "command_not_found_handle() { echo 'not here'; }",
    "cd /; mkdir -p /tmp/$$; cd /tmp/$$; rmdir /tmp/$$",
    "(exit 3); (kill -9 $BASHPID); (exec false) | cat", "true & wait; sleep 1000 & disown",
    "set -- a b c; shift; hash -r; history -c", "history -s 'rm !x'; set -H; set -o history",
    "coproc cat", "exec {BASH_XTRACEFD}>/dev/null; set -x", "f() { return 3; }; f; eval 'return 0'",
    "echo \"${x:?no}\"", "set -u; echo $no", "readonly r=1; r=2", "((1/0))", "[[ a =~ ( ]]", "case", "echo 'a", "cat <<E", "$(", "f() {",
    "for ((;;)); do break 99; done; continue", "local x=1", "declare -n n=n; echo $n",
]  # fmt: skip
#: After these it can't.
FATAL = [
    "exit 4", "kill -9 $$", "exec sh -c 'exit 4'", "set -e; (exit 4)", "set -r", "enable -n $(compgen -b)",
    "shopt -s extdebug; trap false DEBUG", "set -t", "ulimit -n 3", "builtin() { :; }", "builtin() { :; }; unset() { :; }",
]  # fmt: skip


@pytest.mark.parametrize("part", range(6))
async def test_the_shell_goes_on_as_it_was(host: Host, part: int) -> None:
    wrong: list[object] = []
    for code in HARMLESS[part::6]:
        await host.run("kept=1", language="shell")
        done = await host.run(code, language="shell")
        result = await host.run(PROBE, language="shell")
        if not (done.state_kept and result.state_kept) or "1 fine\n" not in result.stdout or result.exit_code != 4:
            wrong.append((code, done, result))
        await host.run("kill -9 $$", language="shell")
    assert wrong == []


async def test_a_shell_that_can_not_go_on_is_replaced(host: Host) -> None:
    wrong: list[object] = []
    for code in FATAL:
        await host.run("kept=1", language="shell")
        done = await host.run(code, language="shell")
        result = await host.run(PROBE, language="shell")
        if (done.state_kept and not result.restarted) or (result.stdout, result.exit_code) != (" fine\n", 4):
            wrong.append((code, done, result))
        await host.run("kill -9 $$", language="shell")
    assert wrong == []
