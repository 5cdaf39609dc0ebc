"""The command line of bubblewrap: a file system of read-only libraries, no network, no other processes, an empty environment."""

from __future__ import annotations

from collections.abc import Mapping

from dylo_moe.sandbox.libraries import mounted

HOME = "/tmp"


def wrap(bwrap: str, command: list[str], environment: Mapping[str, str]) -> list[str]:
    """`command` inside. Nothing of the machine's /dev comes in but null, zero, full, random, urandom and tty."""
    binds = [word for path in mounted() for word in ("--ro-bind", path, path)]
    variables = [word for name, value in environment.items() for word in ("--setenv", name, value)]
    return [
        bwrap,
        *("--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"),
        *("--tmpfs", HOME, *binds, "--proc", "/proc", "--dev", "/dev", "--chdir", HOME),  # a library may lie in /tmp
        "--clearenv",
        *variables,
        "--",
        *command,
    ]
