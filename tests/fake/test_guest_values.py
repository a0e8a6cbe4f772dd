"""The service "code": what runs come to, what they show, and code that awaits at its top level."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio

from trio_sandbox.wire import DISPLAY, STDERR, STDOUT

from ._agent import DISPLAY_LIMIT, Host, open_agent


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_agent() as host:
        yield host


#: Code, and the text of what its last expression comes to.
VALUES = {
    "6 * 7": "42",
    "x = 5": None,
    "x": "5",
    "None": None,
    "'text'": "'text'",
    "print('printed')": None,
    "x  # a comment": "5",
    "# nothing but a comment": None,
    "": None,
    "\n\n": None,
    "x\n\n": "5",
    "x += 1\nx": "6",
    "x += 1; x": "7",
    "(x,\n x)": "(7, 7)",
    "x;": None,
    "(x);  # muted": None,
    "x = 1\nx;": None,
    "'a;b'": "'a;b'",
    "for n in range(3): n": None,
    "if True:\n    x": None,
    "def f():\n    return 1\n": None,
    "f() if x else 2": "1",
    "'docstring'\nx": "1",
    "'é'; 'ü';": None,
    "'é\\r'\r\nx ; ": None,
    "class R:\n    def __repr__(self): return 'surrogate \\ud800'\nR()": "surrogate \\ud800",
    "from __future__ import annotations\nx": "1",
    "counter = iter(range(9))\nnext(counter)": "0",
    "next(counter)": "1",
    "x = 3\r\nx": "3",
    "import asyncio": None,
    "await asyncio.sleep(0, 'slept')": "'slept'",
    "y = await asyncio.sleep(0, 2)\ny * 2": "4",
    "await asyncio.sleep(0);": None,
    "async def numbers():\n    yield 1\n    yield 2\n[n async for n in numbers()]": "[1, 2]",
    "async with asyncio.Lock():\n    z = 1": None,
}


async def test_the_value_of_a_run_is_its_last_expression(host: Host) -> None:
    seen: dict[str, str | None] = {}
    for code in VALUES:
        result = await host.run(code)
        assert (result.exit_code, result.stderr, result.shown) == (0, "", []), code
        seen[code] = result.value
    assert seen == VALUES


async def test_a_run_that_fails_has_no_value(host: Host) -> None:
    for code, exit_code, last_line in [
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("x = (", 1, "SyntaxError: '(' was never closed"),
        ("  1", 1, "IndentationError: unexpected indent"),
        ("return 5", 1, "SyntaxError: 'return' outside function"),
        ("yield 5", 1, "SyntaxError: 'yield' outside function"),
        ("def f(): await g()", 1, "SyntaxError: 'await' outside async function"),
        ("class R:\n    def __repr__(self): raise OSError('no text')\nR()", 1, "OSError: no text"),
        ("class N:\n    def __repr__(self): return 5\nN()", 1, "TypeError: __repr__ returned non-string (type int)"),
        ("5\nexit(3)", 3, ""),
        ("import asyncio\nasync def f():\n    1 / 0\nawait f()", 1, "ZeroDivisionError: division by zero"),
        ("await asyncio.sleep(0)\nexit(4)", 4, ""),
    ]:
        result = await host.run(code)
        assert (result.value, result.exit_code) == (None, exit_code), code
        assert result.stderr.rstrip().rpartition("\n")[2] == last_line
        assert result.state_kept
        for ours in ("trio-sandbox", "asyncio/"):
            assert ours not in result.stderr, "users see their own frames"
    assert (await host.run("class P:\n    def __repr__(self): print('printed'); return 'P'\nP()")).stdout == "printed\n"


async def test_a_warning_of_the_compiler_comes_once(host: Host) -> None:
    await host.run("import warnings; warnings.simplefilter('always')")
    for code in (r"x = '\d'", r"'\d'", r"'\d'; x", "x is 1", "x = 1\nx is 1"):
        result = await host.run(code)
        assert result.stderr.count("Warning") == 1, code


async def test_the_text_of_a_value_is_cut(host: Host) -> None:
    limit = 64 * 1024
    assert (await host.run(f"print(type('x' * {limit}))\n'x' * {limit - 2}")).value == repr("x" * (limit - 2))
    for code in (f"'x' * {limit}", "'é' * 50_000", "'x' * 10_000_000"):
        result = await host.run(code)
        assert result.value is not None
        assert limit - 4 <= len(result.value.encode()) <= limit
        assert result.value.endswith(f" ... (cut: it has {eval(f'len(repr({code}))')} characters)")


async def test_code_too_large_to_be_taken_apart_runs_without_a_value(host: Host) -> None:
    assert (await host.run(f"text = '{'x' * (1 << 18)}'\nprint(len(text))\n5")).stdout == "262144\n"


PICTURE = """
class Picture:
    def __init__(self, **forms): self.forms = forms
    def __repr__(self): return '<a picture>'
    def _repr_png_(self): return self.forms.get('png')
    def _repr_html_(self): return self.forms.get('html')
    def _repr_json_(self): return self.forms.get('json')
class Bundle:
    def _repr_mimebundle_(self, include=None, exclude=None): return forms
    def _repr_html_(self): return 'the other'
    def __repr__(self): return '<a bundle>'
"""


async def test_what_has_rich_forms_is_shown_in_all_of_them(host: Host) -> None:
    await host.run(PICTURE)
    result = await host.run("Picture(png=b'PNG', html='<ü>', json={'a': [1]})")
    assert result.value == "<a picture>"
    html, png, json = ("text/html", "<ü>".encode(), 0), ("image/png", b"PNG", 0), ("application/json", b'{"a": [1]}', 0)
    assert result.shown == [html, png, json]
    assert (await host.run("Picture()")).shown == []
    assert (await host.run("Picture(png=b'PNG');")).shown == []
    assert (await host.run("Picture")).shown == [], "a class has no forms"
    # Forms with metadata, and Base64 as bundles have it.
    result = await host.run("forms = {'image/png': 'UE5H', 'text/x-own+xml': 'own'}, {'image/png': {}}\nBundle()")
    assert result.shown == [("image/png", b"PNG", 0), ("text/x-own+xml", b"own", 0), ("text/html", b"the other", 0)]
    assert (await host.run("Picture(png=(b'PNG', {'width': 3}))")).shown == [("image/png", b"PNG", 0)]
    assert (await host.run("forms = None\nBundle()")).shown == [("text/html", b"the other", 0)]
    assert (await host.run("Picture(html='\\ud800')")).shown == [("text/html", b"\\ud800", 0)]


@pytest.mark.parametrize(
    ("forms", "error"),
    [
        ("{'text': 'x'}", "ValueError: not a MIME type: 'text'"),
        ("{'text/html; charset=x': 'x'}", "ValueError: not a MIME type: 'text/html; charset=x'"),
        ("{5: 'x'}", "ValueError: not a MIME type: 5"),
        ("{'image/png': 'UE5'}", "ValueError: image/png as text must be Base64"),
        ("{'application/json': object()}", "TypeError: Object of type object is not JSON serializable"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
async def test_what_can_not_be_shown_is_the_exception_of_the_run(host: Host, forms: str, error: str) -> None:
    await host.run(PICTURE)
    await host.run(f"Bundle._repr_mimebundle_ = lambda self, include, exclude: {forms}")
    result = await host.run("Bundle()")
    assert (result.exit_code, result.value, result.shown, result.state_kept) == (1, None, [], True)
    assert error in result.stderr.splitlines()[-1]


async def test_display_keeps_its_place_among_what_is_printed(host: Host) -> None:
    await host.run(PICTURE)
    code = """
import sys
print('a', end='')
display(Picture(png=b'1'), 2)
sys.stderr.write('b')
display()
display('c')
print('d', end='')
"""
    async with host.open_run(code) as run:
        await run.finish()
    assert run.arrivals == [
        *((STDOUT, b"a"), (DISPLAY, b"1"), (DISPLAY, b"<a picture>"), (DISPLAY, b"2")),
        *((STDERR, b"b"), (DISPLAY, b"'c'"), (STDOUT, b"d")),
    ]
    assert [(mime, item) for mime, _, item in run.shown] == [
        *(("image/png", 0), ("text/plain", 0), ("text/plain", 1), ("text/plain", 2))
    ]


async def test_displays_of_any_size(host: Host) -> None:
    await host.run(PICTURE)
    sizes = [0, 1, 65535, 65536, 65537, DISPLAY_LIMIT]
    async with host.open_run(f"for size in {sizes}: display(Picture(png=b'x' * size))") as run:
        await run.finish()
    assert [data for mime, data, _ in run.shown if mime == "image/png"] == [b"x" * size for size in sizes]
    # What is larger than the host takes is not sent, and the run need not end for that.
    async with host.open_run(f"display(Picture(png=b'x' * {DISPLAY_LIMIT + 1}))\nprint('on')") as run:
        result = await run.finish()
    assert run.refused == [("image/png", DISPLAY_LIMIT + 1)]
    assert (result.stdout, [mime for mime, *_ in run.shown]) == ("on\n", ["text/plain"])


async def test_threads_and_children_that_display(host: Host) -> None:
    code = "import threading\nthreads = [threading.Thread(target=display, args=(n,)) for n in range(9)]"
    await host.run(code)
    result = await host.run("for thread in threads: thread.start()\nfor thread in threads: thread.join()")
    assert sorted(data for _, data, _ in result.shown) == [b"%d" % n for n in range(9)]
    # One that does it when its run is over shows nothing, and disturbs nobody.
    await host.run("import os\nr, w = os.pipe()\nlate = threading.Thread(target=lambda: (os.read(r, 1), display(1)))")
    await host.run("late.start()\nwhile late.ident is None: pass")
    assert (await host.run("os.write(w, b'x')")).state_kept
    result = await host.run("late.join()\n'fine'")
    assert (result.value, result.restarted) == ("'fine'", False)
    result = await host.run("if os.fork() == 0: display(1)\nelse: print(os.waitstatus_to_exitcode(os.wait()[1]))")
    assert (result.stdout, result.shown) == ("1\n", [])
    assert "OSError: this process can't display anything" in result.stderr


async def test_a_display_can_be_interrupted(host: Host) -> None:
    await host.run(PICTURE)
    await host.run(f"picture = Picture(png=b'x' * {DISPLAY_LIMIT})")
    async with host.open_run("print('go')\nwhile True: display(picture)") as run:
        await run.until(b"go\n")
        await run.interrupt()
        result = await run.finish()
    assert (result.exit_code, result.state_kept) == (130, True)
    assert (await host.run("len(picture.forms)")).value == "1"


# --- Code that goes for our socket ---

_FORGE = """
import array, fcntl, os, socket, stat
for name in os.listdir('/proc/self/fd'):
    try:
        if stat.S_ISSOCK(os.fstat(int(name)).st_mode): control = socket.socket(fileno=os.dup(int(name)))
    except OSError: pass
def file(data=b'forged', seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE, size=None):
    descriptor = os.memfd_create('x', os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    if size is not None: os.truncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor
def forge(head, descriptors):
    control.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', descriptors))] if descriptors else [])
def end(status, value=b''):
    return b'V' + number.to_bytes(4, 'big') + bytes([status]) + bytes(12) + value
pipe = os.pipe()
number = {number}
head = b'P' + number.to_bytes(4, 'big') + bytes(3) + b'\\7'
"""


@pytest.mark.parametrize(
    "forged",
    [
        "head + b'image/png', []",
        "head + b'image/png', [file()]",
        "head + b'image', [file(), pipe[1]]",
        "head + b'image/png\\n', [file(), pipe[1]]",
        "head + b'\\xff/png', [file(), pipe[1]]",
        "head, [file(), pipe[1]]",
        "b'P', [file(), pipe[1]]",
        "head + b'image/png', [file(seals=0), pipe[1]]",
        "head + b'image/png', [file(seals=fcntl.F_SEAL_WRITE), pipe[1]]",
        "head + b'image/png', [file(size=1 << 40), pipe[1]]",
        "head + b'image/png', [pipe[0], pipe[1]]",
        "head + b'image/png', [os.open('/dev/zero', os.O_RDONLY), pipe[1]]",
        "head + b'image/png', [os.open(f'/proc/self/fd/{file(seals=0)}', os.O_PATH), pipe[1]]",
        "end(0)[:-1], []",
        "end(0, b'\\xff'), []",
        "end(0, b'x' * 65537), []",
    ],
)
async def test_a_display_that_no_worker_sends_ends_that_interpreter_only(host: Host, forged: str) -> None:
    await host.run(_FORGE.replace("{number}", "2"))
    before = len(os.listdir("/proc/self/fd"))
    result = await host.run(f"forge({forged})\nimport time\ntime.sleep(1000)")
    assert (result.exit_code, result.state_kept, result.shown) == (137, False, [])
    result = await host.run("5")
    assert (result.value, result.restarted) == ("5", True)
    assert len(os.listdir("/proc/self/fd")) <= before, "descriptors that came with it were closed"


async def test_a_forged_display_or_value_is_the_runs_own(host: Host) -> None:
    await host.run(_FORGE.replace("{number}", "3"))
    # Of another run: taken for what a thread left behind.
    result = await host.run("forge(head + b'image/png', [file(), pipe[1]])\n'fine'")
    assert (result.value, result.shown) == ("'fine'", [])
    code = "forge(head + b'image/png', [file(), pipe[1]])\nforge(end(5, b'forged'), [])"
    result = await host.run(code)
    assert (result.value, result.exit_code, result.shown) == ("forged", 5, [("image/png", b"forged", 7)])
    # Its real end was one too many.
    while not (await host.run("1")).restarted:
        pass
    assert (await host.run("6")).value == "6"


async def test_a_memory_file_that_can_not_be_read_is_none(host: Host) -> None:
    await host.run(_FORGE.replace("{number}", "2"))
    code = "f = file()\nw = os.open(f'/proc/self/fd/{f}', os.O_WRONLY)\nforge(head + b'image/png', [w, pipe[1]])"
    result = await host.run(f"{code}\nimport time\ntime.sleep(1000)")
    assert (result.exit_code, result.shown) == (137, [])


# --- Await at the top level ---


async def test_the_event_loop_persists_and_stands_still_between_runs(host: Host) -> None:
    code = """
import asyncio
ticks = []
async def tick():
    while True:
        ticks.append(len(ticks))
        await asyncio.sleep(0)
task = asyncio.create_task(tick())
"""
    result = await host.run(code)
    assert "RuntimeError: no running event loop" in result.stderr, "no loop turns where nothing is awaited"
    assert (await host.run(code + "await asyncio.sleep(0)")).exit_code == 0
    first = (await host.run("len(ticks)")).value
    assert (await host.run("len(ticks)")).value == first, "it does not turn while other code runs"
    assert (
        await host.run("await asyncio.sleep(0)\nawait asyncio.sleep(0)\nlen(ticks) > " + str(first))
    ).value == "True"
    assert (await host.run("task.cancel()\nawait asyncio.sleep(0)\ntask.cancelled()")).value == "True"
    # Loops that the code runs itself, and one that it closes.
    assert (await host.run("asyncio.run(asyncio.sleep(0, 5))")).value == "5"
    assert (await host.run("loop = asyncio.get_running_loop()\nawait asyncio.sleep(0, 6)")).value == "6"
    assert (await host.run("loop.close()")).exit_code == 0
    assert (await host.run("await asyncio.sleep(0, 7)")).value == "7"


async def test_trio_runs_beside_top_level_await(host: Host) -> None:
    site = str(Path(trio.__file__).parent.parent)
    await host.run(f"import sys; sys.path.append({site!r})\nimport asyncio, trio\nawait asyncio.sleep(0)")
    code = "async def main():\n    await trio.sleep(0)\n    return 'trio'\ntrio.run(main)"
    assert (await host.run(code)).value == "'trio'"
    assert (await host.run("await asyncio.sleep(0, 8)")).value == "8"


async def test_an_interrupt_of_an_await_lets_it_clean_up(host: Host) -> None:
    code = """
import asyncio
async def main():
    try:
        print('go')
        await asyncio.sleep(1000)
    finally:
        await asyncio.sleep(0)
        print('clean')
await main()
"""
    for _ in range(3):
        async with host.open_run(code) as run:
            await run.until(b"go\n")
            await run.interrupt()
            result = await run.finish()
        assert (result.stdout, result.exit_code, result.state_kept) == ("go\nclean\n", 130, True)
        assert result.stderr.endswith("KeyboardInterrupt\n")
    assert (await host.run("await asyncio.sleep(0, 1)")).value == "1"


async def test_code_that_awaits_nothing_does_not_import_asyncio(host: Host) -> None:
    code = "import sys\n[name in sys.modules for name in ('asyncio', 'ast', 'matplotlib', 'inspect')]"
    assert (await host.run(code)).value == "[False, False, False, False]"


# --- Matplotlib ---

FAKE_MATPLOTLIB = {
    "__init__.py": """
class RcParams(dict):
    def __getitem__(self, name): raise AssertionError('this would choose a backend')
rcParams = RcParams(backend=object())
def use(name): dict.__setitem__(rcParams, 'backend', name)
""",
    "figure.py": """
class Figure:
    canvas = None
    def __init__(self): self.axes, self.lines = [], []
    def savefig(self, file, format, bbox_inches):
        assert (format, bbox_inches) == ('png', 'tight')
        file.write(b'PNG of %r' % self.lines)
    def __repr__(self): return f'<Figure of {self.lines}>'
""",
    "backends/__init__.py": "",
    "backends/backend_agg.py": "class FigureCanvasAgg: pass\n",
    "pyplot.py": """
import importlib, sys
import matplotlib
from matplotlib.figure import Figure
_figures = {}
def figure(number=None):
    number = max(_figures, default=0) + 1 if number is None else number
    return _figures.setdefault(number, Figure())
def get_fignums(): return sorted(_figures)
def plot(*data):
    if not _figures: figure()
    _figures[max(_figures)].lines.append(data)
def close(which):
    assert which == 'all'
    _figures.clear()
def show(*args, **kwargs):
    name = dict.get(matplotlib.rcParams, 'backend')
    if name.startswith('module://'):
        backend = importlib.import_module(name.removeprefix('module://'))
        assert backend.FigureCanvas.__module__ == 'matplotlib.backends.backend_agg'
        backend.show(*args, **kwargs)
""",
}


@pytest.fixture
async def plotting(host: Host, tmp_path: Path) -> Host:
    for name, text in FAKE_MATPLOTLIB.items():
        path = tmp_path / "matplotlib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    await host.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    return host


async def test_figures_are_shown_at_the_end_of_the_run(plotting: Host) -> None:
    result = await plotting.run("import matplotlib.pyplot as plt\nplt.plot(1)\nplt.figure(); plt.plot(2)\nprint('end')")
    assert result.shown == [("image/png", b"PNG of [(1,)]", 0), ("image/png", b"PNG of [(2,)]", 1)]
    assert (await plotting.run("plt.get_fignums()")).value == "[]"
    async with plotting.open_run("for n in range(2):\n    plt.plot(n)\n    plt.show(block=False)\n    print(n)") as run:
        await run.finish()
    assert [data for _, data in run.arrivals] == [b"PNG of [(0,)]", b"0\n", b"PNG of [(1,)]", b"1\n"]
    # What was drawn before an error, too. A figure without anything in it is none.
    result = await plotting.run("plt.plot(3)\n1 / 0")
    assert (result.exit_code, result.shown) == (1, [("image/png", b"PNG of [(3,)]", 0)])
    assert (await plotting.run("plt.figure()")).shown == []


async def test_a_figure_that_is_the_value_is_shown_once(plotting: Host) -> None:
    result = await plotting.run("import matplotlib.pyplot as plt\nfigure = plt.figure()\nplt.plot(1)\nfigure")
    assert (result.value, result.shown) == ("<Figure of [(1,)]>", [("image/png", b"PNG of [(1,)]", 0)])
    assert (await plotting.run("figure")).shown == [("image/png", b"PNG of [(1,)]", 0)], "one that is closed"
    result = await plotting.run("display(figure)")
    assert [mime for mime, *_ in result.shown] == ["image/png", "text/plain"]


async def test_a_backend_that_the_code_chooses_stays(plotting: Host) -> None:
    result = await plotting.run(
        "import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as plt\nplt.plot(1)\nplt.show()\nprint('on')"
    )
    assert (result.exit_code, result.stdout) == (0, "on\n")
    assert [mime for mime, *_ in result.shown] == ["image/png"]
