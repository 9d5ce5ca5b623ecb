"""What the system says of the machine."""

from __future__ import annotations

from pathlib import Path

from overspill.base.host import available_ram_bytes

GIB = 2**30


def write_files(root: Path, files: dict[str, str]) -> None:
    """Write files below ``root``."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_available_ram(tmp_path: Path) -> None:
    """The least of what the kernel and the control groups leave; caches can be given up."""
    assert available_ram_bytes(tmp_path) is None
    write_files(tmp_path, {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   8388608 kB\n"})
    assert available_ram_bytes(tmp_path) == 8 * GIB
    # Version 2: the inner group has no limit, the outer one has.
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "1000\n",
            "sys/fs/cgroup/outer/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/outer/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
        },
    )
    assert available_ram_bytes(tmp_path) == 5 * GIB // 2
    # Version 1, in a container that sees its own part of the tree only.
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "9:cpu,memory:/of/the/host\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 4}\n",
        },
    )
    assert available_ram_bytes(tmp_path) == 5 * GIB // 4
