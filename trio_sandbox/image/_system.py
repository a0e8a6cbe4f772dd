"""The system disk: kernel, initial RAM disk, and the read-only disk of the guest's agent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import attrs
import trio

from ..qemu import InheritedFds
from ._agent_tree import agent_archive
from ._ext4 import mke2fs_script
from ._mmdebstrap import lend_input, lend_output, run_as_root
from ._recipe import BuildContext, digest_of
from ._rights import find_rights
from ._system_base import INITRD_NAME as INITRD_NAME, KERNEL_NAME as KERNEL_NAME, USERLAND_NAME, SystemBase

DISK_NAME = "system.img"
#: Twice what is used; the rest is holes.
_DISK_SIZE = 128 * 2**20

KERNEL_ARGS = (
    "console=ttyS0",
    "quiet",
    # Process 1 has ended, so the VM does: a panic resets the machine, and QEMU leaves instead.
    "panic=-1",
    # The kernel tries whether the timer interrupts it, and hangs if that is late. On a busy host it can be.
    "no_timer_check",
    # All that follows is time: what it defends against, the VM's own walls do not rely on.
    "nokaslr",
    "mitigations=off",
    "noreplace-smp",
    "8250.nr_uarts=1",
    "cryptomgr.notests",
    # What programs can use. The others that the kernel has find no policy here, and would look at each path all the same.
    "lsm=landlock,yama",
)

# The tree is put together in memory, in a mount namespace that ends with the script, if we get one.
_MOUNT = "mount -t tmpfs -o mode=755 tmpfs /mnt; "
_MAKE_DISK = (
    "cd {tree}; tar -xf {userland}; tar -xf {agent} -C agent; "
    "chroot . /usr/bin/python3.13 -I -S -m compileall -q --invalidation-mode unchecked-hash /agent; "
    # What can't be imported is better missed here than by process 1 of every guest.
    'chroot . /usr/bin/python3.13 -I -S -c \'import sys; sys.path.insert(0, "/agent"); '
    "import trio_sandbox.guest.agent.agent, trio_sandbox.guest.agent.init'; {mke2fs}"
)


@attrs.frozen
class SystemRecipe:
    """How to build the system disk; there is one. Only the agent's part of it is made anew when we change."""

    name: str = "system"
    base: SystemBase = attrs.field(factory=SystemBase)

    @property
    def files(self) -> tuple[str, ...]:
        """What a VM is booted with."""
        return (KERNEL_NAME, INITRD_NAME, DISK_NAME)

    @property
    def languages(self) -> tuple[str, ...]:
        """None: no user sees it."""
        return ()

    def digest(self) -> str:
        """Return a digest that covers the agent's sources and all that it imports."""
        agent = hashlib.sha256(agent_archive()).hexdigest()
        return digest_of(self.base.digest(), _MAKE_DISK, mke2fs_script("", ""), _DISK_SIZE, agent)

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the three files."""
        assert context.base is not None
        context.report("adding the agent", None)
        for name in (KERNEL_NAME, INITRD_NAME):
            os.link(context.base / name, context.output / name)
        archive = context.staging / "agent.tar"
        archive.write_bytes(await trio.to_thread.run_sync(agent_archive))
        mounted = (await find_rights(context.environment)).namespaces
        tree = "/mnt"
        if not mounted:
            tree = os.fspath(context.staging / "tree")
            os.mkdir(tree)
            os.chmod(tree, 0o755)
        with InheritedFds() as inherited:
            script = _MAKE_DISK.format(
                tree=tree,
                userland=lend_input(context.base / USERLAND_NAME, inherited),
                agent=lend_input(archive, inherited),
                mke2fs=mke2fs_script(tree, lend_output(context.output / DISK_NAME, inherited, _DISK_SIZE)),
            )
            await run_as_root(
                _MOUNT + script if mounted else script, inherited=inherited, environment=context.environment
            )
        return {}
