"""Progress out of apt's output."""

from __future__ import annotations

import pytest

from trio_sandbox.image._apt_progress import AptProgress

OUTPUT = b"""\
I: running apt-get update...
Get:1 http://mirror.example/debian trixie/main amd64 Packages [9678 kB]
I: downloading packages with apt...
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://mirror.example/debian trixie/main amd64 libc6 amd64 2.41-12 [2846 kB]
Get:2 http://mirror.example/debian trixie/main amd64 bash amd64 5.2.37-2 [1499 kB]
I: installing essential packages...
Unpacking libc6:amd64 (2.41-12) ...
Unpacking bash (5.2.37-2) ...
Setting up libc6:amd64 (2.41-12) ...
Setting up bash (5.2.37-2) ...
I: installing remaining packages inside the chroot...
0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://mirror.example/debian trixie/main amd64 git amd64 1:2.47 [8862 kB]
Unpacking git (1:2.47) ...
Setting up git (1:2.47) ...
I: running --customize-hook in shell: sh -c 'set -e; secret things' exec /tmp/x
"""


def reports(pieces: list[bytes]) -> list[tuple[str, float]]:
    told: list[tuple[str, float]] = []
    progress = AptProgress(
        lambda message, fraction: told.append((message, round(fraction, 3))), rounds=(0.1, 0.4, 1.0), steps=3
    )
    for piece in pieces:
        progress.feed(piece)
    return told


def test_every_step_is_told_with_its_share() -> None:
    assert reports([OUTPUT]) == [
        ("fetching the lists of packages", 0.0),
        ("downloading libc6", 0.15),
        ("downloading bash", 0.2),
        ("installing essential packages", 0.2),
        ("unpacking libc6", 0.25),
        ("unpacking bash", 0.3),
        ("setting up libc6", 0.35),
        ("setting up bash", 0.4),
        ("installing packages", 0.4),
        ("downloading git", 0.6),
        ("unpacking git", 0.8),
        ("setting up git", 1.0),
        ("putting the files together", 1.0),
    ]


def test_where_the_output_is_cut_does_not_matter() -> None:
    assert reports([bytes([byte]) for byte in OUTPUT]) == reports([OUTPUT])


@pytest.mark.parametrize(
    "surprise",
    [
        OUTPUT[OUTPUT.index(b"Unpacking libc6") :],
        b"\xff" * 20000 + b"\n",
        b"0 upgraded, 0 newly installed\nGet:1 a b c d e f [",
    ],
)
def test_the_fraction_never_falls_and_never_passes_one(surprise: bytes) -> None:
    told = reports([OUTPUT, surprise, b"\n", OUTPUT])
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert told[-1] == ("putting the files together", 1.0)
