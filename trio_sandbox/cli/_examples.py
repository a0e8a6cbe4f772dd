"""What the help of each command ends with."""

from __future__ import annotations

ALL = """\
examples:
  trio-sandbox doctor                     is everything there?
  trio-sandbox run -c "print(6 * 7)"      run code
  trio-sandbox run program.py --verbose   run a program, with an argument
  trio-sandbox shell                      look around
trio-sandbox COMMAND --help says more about each.
"""

RUN = """\
examples:
  trio-sandbox run program.py --verbose < input.txt
  trio-sandbox run -c "import sys; print(sys.argv)" one two
  trio-sandbox run --memory 1G --timeout 60 -e LANG=C -e API_KEY program.js
  trio-sandbox run --upload data.csv --download result.png plot.py
  trio-sandbox run --workspace project project/build.py
  trio-sandbox run --json -q -c "print(6 * 7)"

Options stand before FILE: all that follows it belongs to the program.

"""

SHELL = """\
examples:
  trio-sandbox shell
  trio-sandbox shell --user root --memory 1G
  trio-sandbox shell -- python3 -q

"""

MCP = """\
examples:
  trio-sandbox mcp
  trio-sandbox mcp --memory 1G --network pypi.org --network "*.pythonhosted.org"
  trio-sandbox mcp --http 8080

"""

PS = """\
examples:
  trio-sandbox ps
  trio-sandbox ps --json
"""

KILL = """\
examples:
  trio-sandbox kill 3f9a61c2b07d
  trio-sandbox kill --all
"""

BENCH = """\
examples:
  trio-sandbox bench --quick
  trio-sandbox bench --only template,run,memory -n 1,4 --json

"""

DOCTOR = """\
examples:
  trio-sandbox doctor
  trio-sandbox doctor --json
"""

IMAGE = """\
examples:
  trio-sandbox image build python node
  trio-sandbox image list --json
  trio-sandbox image export python python.tar
  trio-sandbox image prune --to 20G
"""

FLEET = """\
examples:
  trio-sandbox fleet status
  trio-sandbox fleet --address head:6379 status --json
  trio-sandbox fleet drain worker-3f9a61c2 --timeout 600
"""

TEMPLATE = """\
examples:
  trio-sandbox template list
  trio-sandbox template rm 3f9a61c2 my-session
  trio-sandbox template prune
"""

COMPLETION = """\
examples:
  source <(trio-sandbox completion bash)
  trio-sandbox completion zsh > ~/.zfunc/_trio-sandbox
"""
