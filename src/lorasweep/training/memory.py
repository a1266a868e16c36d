"""Measures the free memory of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil


def free_memory_bytes() -> int:
    """Returns the host's memory that can be allocated now without swapping, within the limits of control groups."""
    return min([int(psutil.virtual_memory().available), *list_cgroup_free_bytes()])


def list_cgroup_free_bytes(
    *, memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yields the bytes that are left of each memory limit of this process's control groups and of their parent groups.

    Cached files count as free, because the system drops them. Containers and Slurm set these limits, and psutil does
    not read them. See cgroups(7): `memberships` has lines `number:controllers:path`. `mount` has the groups of version
    2, and `mount/memory` has the groups of version 1.
    """
    if not memberships.exists():  # macOS
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 has one hierarchy for all controllers
            root, name, used = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, name, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                limit = int((root / folder / name).read_text())
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", (root / folder / "memory.stat").read_text(), re.M
                )
                yield limit - int((root / folder / used).read_text()) + int(cached[1] if cached else 0)
            except (OSError, ValueError):  # the group is not visible in a container, or its limit is `max`
                continue
