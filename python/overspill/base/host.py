"""The machine itself: cores, caches, free RAM, and the control groups that limit them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

__all__ = ["available_ram_bytes", "control_groups", "last_level_cache_bytes", "physical_cores"]


def available_ram_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes of RAM that a new process can have without swapping; None where the system does not tell.

    ``root`` is the folder that has ``proc`` and ``sys``.
    """
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    limits = [int(available[1]) * 1024] if available else []
    limits.extend(_group_rooms(root))
    return max(0, min(limits)) if limits else None


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of each control group of this process, and whether the group is of version 2."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        unified = controllers == ""
        if not unified and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("" if unified else controller)
        folder = mount / path.lstrip("/")
        # In a container the path may be the host's, and only the container's own part is mounted.
        for group in [folder, *folder.parents]:
            if group != mount and mount not in group.parents:
                break
            yield group, unified


def _group_rooms(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group of this process leaves; file caches do not count as used."""
    for group, unified in control_groups(root, "memory"):
        if unified:
            limit, usage, caches = "memory.max", "memory.current", ("inactive_file", "active_file")
        else:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            caches = ("total_inactive_file", "total_active_file")
        try:
            most = int((group / limit).read_text())  # "max" where there is no limit
            used = int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield most - used + sum(int(stat.get(cache, 0)) for cache in caches)
        except (OSError, ValueError):
            continue


def last_level_cache_bytes() -> int:
    """Return the bytes of all last-level caches of the CPU together; 32 MiB where the system does not tell."""
    sizes = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]"):
        try:
            level = int((folder / "level").read_text())
            kib = int((folder / "size").read_text().strip().removesuffix("K"))
            sizes[level, (folder / "shared_cpu_list").read_text()] = kib * 1024
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) if last >= 2 else 32 << 20


def logical_cpus() -> int:
    """Return the number of logical CPUs that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def physical_cores(root: Path = Path("/"), usable: Collection[int] | None = None) -> int:
    """Return the number of physical cores that this process may use, at least 1.

    Parameters
    ----------
    root
        The folder that has ``sys``.
    usable
        Numbers of logical CPUs. Default: those that this thread may run on.
    """
    if sys.platform != "linux":
        # Half of the logical ones, where simultaneous multithreading is usual.
        logical = logical_cpus()
        return max(1, logical if sys.platform == "darwin" else logical // 2)
    usable = os.sched_getaffinity(0) if usable is None else usable
    siblings = set()
    for cpu in usable:
        try:
            siblings.add((root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").read_text())
        except OSError:
            return len(usable)
    return len(siblings)
