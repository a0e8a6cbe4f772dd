"""What programs find in the real images."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from trio_sandbox import Sandbox, open_sandbox

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "node_image", "system_disk")]

_TOOLS = "awk bzip2 curl diff file gawk git jq less make patch ps python python3 tree unzip xz zip"
#: Nobody but root writes what is the system's, reads passwords, or gets rights by a program that he starts.
_WRONG_MODES = (
    r"find / -xdev -type f \( -perm /6000 -o -path '/etc/*' -perm /022 \);"
    " stat -c '%a %U:%G %n' /etc/passwd /etc/group /etc/shadow /etc/gshadow /etc/hostname /etc/hosts /tmp /var/tmp /root;"
    # What a package manager puts there only while it installs.
    " ls /usr/sbin/policy-rc.d /usr/sbin/*.REAL 2>/dev/null; true"
)


async def _sh(sandbox: Sandbox, script: str, *, user: str | None = None) -> str:
    result = await sandbox.run_process(
        script, shell=True, capture_stdout=True, stderr_to_stdout=True, user=user, check=False
    )
    text = result.stdout.decode()
    assert result.returncode == 0, text
    return text


@pytest.mark.parametrize("image", ["python", "node"])
async def test_an_image_has_what_programs_expect(image: str, tmp_path: Path) -> None:
    async with open_sandbox(image) as sandbox:
        await _sh(sandbox, f"for tool in {_TOOLS}; do command -v $tool >/dev/null || exit 1; done")
        assert await _sh(sandbox, "TZ=Asia/Shanghai date -d @0 +%H; locale -a | grep -x C.utf8") == "08\nC.utf8\n"
        assert "443/tcp" in await _sh(
            sandbox, "getent services https; getent protocols tcp; grep -q image/webp /etc/mime.types"
        )
        modes = await _sh(sandbox, _WRONG_MODES, user="root")
        assert modes.splitlines() == [
            "644 root:root /etc/passwd",
            "644 root:root /etc/group",
            "640 root:shadow /etc/shadow",
            "640 root:shadow /etc/gshadow",
            "644 root:root /etc/hostname",
            "644 root:root /etc/hosts",
            "1777 root:root /tmp",
            "1777 root:root /var/tmp",
            "700 root:root /root",
        ]
        # Every user of one file is in the other.
        await _sh(sandbox, "bash -c 'diff <(cut -d: -f1 /etc/passwd) <(cut -d: -f1 /etc/shadow)'", user="root")
        assert await _sh(sandbox, "su user -c 'id -un'", user="root") == "user\n"
        result = await sandbox.run("import zoneinfo; print(zoneinfo.ZoneInfo('Europe/Berlin'))", language="python")
        assert (result.stdout, result.exit_code) == ("Europe/Berlin\n", 0)
        if image == "node":
            result = await sandbox.run(
                "new Date(0).toLocaleString('en-GB', {timeZone: 'Asia/Shanghai', hour: '2-digit'})"
            )
            assert result.value == "'08'"
        else:
            await _check_pip(sandbox, tmp_path)


async def _check_pip(sandbox: Sandbox, directory: Path) -> None:
    wheel = directory / "demo_pkg-1.0-py3-none-any.whl"
    about = "demo_pkg-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("demo_pkg.py", "answer = 42\n")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: demo-pkg\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", f"demo_pkg.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    await sandbox.upload(wheel, f"/tmp/{wheel.name}")
    await _sh(sandbox, f"pip install --no-index /tmp/{wheel.name}")
    # The interpreter was there before.
    assert (await sandbox.run("import demo_pkg; demo_pkg.answer")).value == "42"
