"""What makes decoding slow, found in files of machines that have it, and on this one."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from commands import overspill
from overspill import Hardware, ModelInfo, Placement, _core
from overspill.base.values import Device, LoadMode
from overspill.studies.doctor.findings import Finding, examine
from overspill.studies.doctor.machine import Machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the files are Linux's")

GIB = 2**30
CPU = Device("CPU", "AMD Ryzen 7 5800X", "cpu", "CPU", 28 * GIB, 32 * GIB)
CUDA = Device("CUDA0", "NVIDIA GeForce RTX 3090", "gpu", "CUDA", 23 * GIB, 24 * GIB)
ZEN_3 = "fpu sse2 ssse3 sse4_1 sse4_2 avx f16c fma avx2 bmi2 vaes"
ZEN_4 = f"{ZEN_3} avx512f avx512dq avx512cd avx512bw avx512vl avx512vbmi avx512_vnni avx512_bf16"
HASWELL_BUILD = frozenset({"SSE3", "SSSE3", "AVX", "F16C", "FMA", "BMI2", "AVX2", "LLAMAFILE"})


def write(root: Path, files: dict[str, str]) -> None:
    """Write files below a folder."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def desktop(tmp_path: Path) -> Path:
    """Return the files of an idle desktop: 8 cores with 2 threads each, 32 GB of RAM, no GPU."""
    files = {
        "proc/cpuinfo": f"processor\t: 0\nmodel name\t: AMD Ryzen 7 5800X 8-Core Processor\nflags\t\t: {ZEN_3}\n",
        "proc/meminfo": "MemTotal:       32795556 kB\nMemFree:        21012345 kB\nMemAvailable:   29360128 kB\n"
        "SwapTotal:       8388604 kB\nSwapFree:        8388604 kB\n",
        "proc/stat": "cpu  1 2 3 4\n" + "".join(f"cpu{cpu} 1 2 3 4\n" for cpu in range(16)) + "intr 1\n",
        "proc/loadavg": "0.42 0.50 0.61 1/1203 41234\n",
        "proc/vmstat": "pgfault 123456\npgmajfault 5210\n",
        "proc/sys/vm/swappiness": "60\n",
        "proc/self/status": "Name:\tpython\nCpus_allowed:\tffff\nCpus_allowed_list:\t0-15\n",
        "proc/self/cgroup": "0::/user.slice\n",
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
    }
    for cpu in range(16):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings"] = f"{1 << cpu % 8 | 1 << cpu % 8 + 8:04x}\n"
    write(tmp_path, files)
    return tmp_path


@pytest.fixture
def read(desktop: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Return a function that reads the desktop after some files changed, with a build for AVX2."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def read(**files: str) -> Machine:
        write(desktop, {name.replace("__", "/"): text for name, text in files.items()})
        machine = Machine.read(desktop, sample_s=0)
        return replace(machine, built_for=HASWELL_BUILD, devices=(CPU,), gpu_backends=())

    return read


def found(findings: list[Finding], title: str) -> Finding:
    """Return the finding whose title begins so."""
    matching = [finding for finding in findings if finding.title.startswith(title)]
    assert len(matching) == 1, [finding.title for finding in findings]
    return matching[0]


def test_an_idle_desktop_is_fine(read: Callable[..., Machine]) -> None:
    """Nothing is made up, and everything has its figure."""
    machine = read()
    assert (machine.n_cores, machine.n_logical_cpus, machine.quota_cpus) == (8, 16, None)
    findings = examine(machine=machine)
    assert {finding.severity for finding in findings} == {"fine"}
    assert found(findings, "No more threads").reading == "8 threads on 8 physical cores"
    assert "0.4 in the last minute on 16 logical CPUs" in found(findings, "The cores are free").reading
    assert found(findings, "Nothing is swapped").reading == "0 B of 8.0 GiB in use, swappiness 60"


@pytest.mark.parametrize(
    ("flags", "built_for", "severity", "missing"),
    [
        (ZEN_3, {"SSE3", "AVX"}, "bad", "F16C, FMA, AVX2"),
        (ZEN_4, HASWELL_BUILD, "warning", "AVX512, AVX512_VBMI, AVX512_VNNI, AVX512_BF16"),
        (f"{ZEN_3} avx_vnni", HASWELL_BUILD, "warning", "AVX_VNNI"),
        # Without one of its five parts there is no code of ggml's for it.
        (f"{ZEN_3} avx512f avx512cd", HASWELL_BUILD, "fine", ""),
    ],
)
def test_a_build_for_a_lesser_cpu(
    read: Callable[..., Machine], flags: str, built_for: set[str], severity: str, missing: str
) -> None:
    """The instructions that are left unused are named."""
    machine = replace(read(proc__cpuinfo=f"flags\t\t: {flags}\n"), built_for=frozenset(built_for))
    finding = found(examine(machine=machine), "llama.cpp ")
    assert finding.severity == severity
    assert finding.reading.startswith(f"the CPU also has {missing}, and" if missing else "the build uses AVX, ")
    assert ("portable" in finding.advice) == bool(missing)


def test_half_as_wide_instructions_are_not_missed(read: Callable[..., Machine]) -> None:
    """AVX_VNNI is no gain where AVX512_VNNI is used."""
    machine = read(proc__cpuinfo=f"flags\t\t: {ZEN_4} avx_vnni\n")
    machine = replace(machine, built_for=HASWELL_BUILD | {"AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"})
    assert found(examine(machine=machine), "llama.cpp ").severity == "fine"


def test_a_virtual_machine_that_hides_avx2(read: Callable[..., Machine]) -> None:
    """The default CPU of QEMU has none."""
    machine = replace(read(proc__cpuinfo="flags\t\t: fpu sse2 ssse3 hypervisor\n"), built_for=frozenset({"SSE3"}))
    finding = found(examine(machine=machine), "The CPU has no AVX2")
    assert finding.severity == "bad"
    assert "4 flags" in finding.reading
    assert "-cpu host" in finding.advice


def test_threads(read: Callable[..., Machine]) -> None:
    """More than physical cores are too many, those of the CPUs that the process may use."""
    assert found(examine(machine=read(), n_threads=8), "No more").severity == "fine"
    finding = found(examine(machine=read(), n_threads=16), "More threads")
    assert (finding.severity, finding.reading) == (
        "warning",
        "16 threads on the 8 physical cores that this process may use",
    )
    machine = read(proc__self__status="Cpus_allowed_list:\t0-2,8\n")
    assert machine.n_cores == 3
    assert "4 threads on the 3 physical cores" in found(examine(machine=machine, n_threads=4), "More").reading
    assert found(examine(machine=machine), "No more").reading == "3 threads on 3 physical cores"
    for wrong in (0, 513):
        with pytest.raises(ValueError, match="n_threads must be 1 to 512"):
            examine(machine=machine, n_threads=wrong)


def test_a_container_with_few_cpus(read: Callable[..., Machine]) -> None:
    """The smallest quota on the way to the top counts, in either version of control groups."""
    machine = read(
        proc__self__cgroup="0::/pod/app\n",
        **{"sys__fs__cgroup__pod__cpu.max": "250000 100000\n", "sys__fs__cgroup__pod__app__cpu.max": "max 100000\n"},
    )
    assert machine.quota_cpus == 2.5
    finding = found(examine(machine=machine), "The control group")
    assert (finding.severity, finding.reading) == ("bad", "the time of 2.5 CPUs for 8 threads")
    assert finding.advice.startswith("2 for n_threads")
    assert found(examine(machine=machine, n_threads=2), "No more").severity == "fine"
    older = read(
        proc__self__cgroup="4:cpu,cpuacct:/app\n3:memory:/\n",
        **{
            "sys__fs__cgroup__cpu__app__cpu.cfs_quota_us": "400000\n",
            "sys__fs__cgroup__cpu__app__cpu.cfs_period_us": "100000\n",
            "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
            "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
        },
    )
    assert older.quota_cpus == 4.0


def test_busy_cores(read: Callable[..., Machine]) -> None:
    """What others run and the model's threads have to have room together."""
    for load, severity in ((7.9, "fine"), (9.0, "warning"), (17.5, "bad")):
        title = "The cores are free" if severity == "fine" else "Other programs keep the cores busy"
        finding = found(examine(machine=read(proc__loadavg=f"{load} 1 1 9/100 1\n")), title)
        assert finding.severity == severity
        assert f"a load of {load}" in finding.reading


def test_swap(read: Callable[..., Machine]) -> None:
    """It is told how much is in use, and what the kernel was told about it."""
    memory = "MemAvailable:   2097152 kB\nSwapTotal:       8388608 kB\nSwapFree:        4194304 kB\n"
    finding = found(examine(machine=read(proc__meminfo=memory)), "Swap is in use")
    assert (finding.severity, finding.reading) == ("warning", "4.0 GiB of 8.0 GiB in use, swappiness 60")
    assert "vm.swappiness=10" in finding.advice
    calm = found(examine(machine=read(proc__sys__vm__swappiness="1\n")), "Swap is in use")
    assert "vm.swappiness" not in calm.advice
    none = "MemAvailable:   2097152 kB\nSwapTotal:       0 kB\nSwapFree:        0 kB\n"
    assert found(examine(machine=read(proc__meminfo=none)), "Nothing is swapped").reading == "there is no swap"


def test_page_faults(desktop: Path, read: Callable[..., Machine]) -> None:
    """They are counted while it looks, not since the machine was started."""
    assert read().major_faults_per_s is None
    assert Machine.read(desktop, sample_s=0.01).major_faults_per_s == 0
    end = threading.Event()

    def count() -> None:
        n = 5210
        while not end.is_set():
            n += 1000
            write(desktop, {"proc/vmstat.new": f"pgfault 1\npgmajfault {n}\n"})
            (desktop / "proc/vmstat.new").replace(desktop / "proc/vmstat")

    counting = threading.Thread(target=count)
    counting.start()
    try:
        machine = Machine.read(desktop, sample_s=0.2)
    finally:
        end.set()
        counting.join()
    assert machine.major_faults_per_s is not None
    finding = found(examine(machine=machine), "Programs wait for pages")
    assert finding.severity == "warning"
    assert finding.reading.startswith(f"{machine.major_faults_per_s:.0f} major page faults per second")


# --- GPUs


def test_a_cuda_build_that_found_no_gpu(
    desktop: Path, read: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is looked for: no driver, a driver that does not fit, or a variable."""
    machine = replace(read(), gpu_backends=("CUDA",))
    finding = found(examine(machine=machine), "Built with CUDA, but no GPU")
    assert finding.severity == "bad"
    assert finding.reading == "llama.cpp lists CPU; NVIDIA's driver lists no GPU"
    assert "install a driver" in finding.advice
    information = "Model: \t\t NVIDIA GeForce RTX 3090\nIRQ:   \t\t 132\n"
    machine = replace(
        read(**{"proc__driver__nvidia__gpus__0000:01:00.0__information": information}), gpu_backends=("CUDA",)
    )
    finding = found(examine(machine=machine), "Built with CUDA")
    assert "driver lists NVIDIA GeForce RTX 3090" in finding.reading
    assert "update NVIDIA's driver" in finding.advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    machine = replace(Machine.read(desktop, sample_s=0), devices=(CPU,), gpu_backends=("CUDA",))
    finding = found(examine(machine=machine), "Built with CUDA")
    assert 'CUDA_VISIBLE_DEVICES is "-1"' in finding.reading
    assert finding.advice.startswith("unset CUDA_VISIBLE_DEVICES")
    machine = replace(machine, devices=(CUDA, CPU))
    assert found(examine(machine=machine), "GPUs were found").reading == (
        "CUDA0, NVIDIA GeForce RTX 3090: 23.0 GiB free"
    )


def test_a_build_without_cuda_beside_a_gpu(read: Callable[..., Machine]) -> None:
    """NVIDIA's driver knows a GPU that the build cannot use."""
    information = "Model: \t\t NVIDIA GeForce RTX 3090\n"
    machine = read(**{"proc__driver__nvidia__gpus__0000:01:00.0__information": information})
    finding = found(examine(machine=machine), "This build cannot use the GPU")
    assert finding.severity == "bad"
    assert "RTX 3090" in finding.reading


# --- models


def renamed(hardware: Hardware) -> Hardware:
    """Return hardware whose GPU is called as CUDA calls it."""
    gpu, cpu = hardware.devices
    return replace(hardware, devices=(replace(gpu, name="CUDA0"), cpu))


def test_experts_larger_than_ram(read: Callable[..., Machine], gpt_oss_120b_header: Path) -> None:
    """What is missing is read from the disk, and what is said of it are the header's bytes."""
    info = ModelInfo.from_file(gpt_oss_120b_header)
    hardware = renamed(Hardware.given(ram="32GiB", vram="24GiB"))
    machine = replace(read(), devices=(CUDA, CPU), gpu_backends=("CUDA",))
    placement = Placement.gpu(info, ["CUDA0"])
    placement.assign(part="experts", device="CPU")
    findings = examine(info, machine=machine, hardware=hardware, placement=placement)
    assert findings[0].severity == "bad"
    finding = found(findings, "RAM is smaller than the experts")
    assert finding.severity == "bad"
    assert f"{info.bytes_by_part['experts'] / GIB:.1f} GiB of experts" in finding.reading
    assert "32.0 GiB of RAM are available" in finding.reading
    assert "more RAM" in finding.advice
    assert not [one for one in findings if "not pinned" in one.title]  # without room nothing is


def test_what_is_planned_with_enough_ram(read: Callable[..., Machine], gpt_oss_120b_header: Path) -> None:
    """It fits, and its weights in RAM are pinned; where a driver cannot do that to a mapped file, it is said."""
    info = ModelInfo.from_file(gpt_oss_120b_header)
    hardware = renamed(Hardware.given(ram="96GiB", vram="24GiB"))
    machine = replace(read(), devices=(CUDA, CPU), gpu_backends=("CUDA",))
    findings = examine(info, machine=machine, hardware=hardware)
    assert found(findings, "RAM holds the experts").severity == "fine"
    assert not [one for one in findings if "not pinned" in one.title]
    expected = found(findings, "What to expect").reading
    assert re.search(r"about [\d.]+ tokens/s; prompts: about \d+ tokens/s, [\d.]+ s to the first token", expected)
    assert "partial GPU offload possible" in expected
    gpu, cpu = hardware.devices
    cannot = replace(hardware, devices=(replace(gpu, registers_host_memory=False), cpu))
    finding = found(examine(info, machine=machine, hardware=cannot), "Weights in RAM are not pinned")
    assert finding.severity == "warning"
    assert re.search(r"\d\d\.\d GiB of weights in RAM stay mapped, and CUDA0 copies them at 8.3 GB/s", finding.reading)
    assert "96.0 GiB of RAM" in finding.advice
    no_gpu = replace(hardware, devices=(cpu,))
    cases: list[tuple[LoadMode, Hardware]] = [("read", cannot), ("mmap", no_gpu)]
    for load_mode, here in cases:
        other = examine(info, machine=machine, hardware=here, load_mode=load_mode)
        assert not [one for one in other if "not pinned" in one.title]


def test_a_gpu_that_is_too_small(read: Callable[..., Machine], gpt_oss_120b_header: Path) -> None:
    """A placement that does not fit is told of before it is loaded."""
    info = ModelInfo.from_file(gpt_oss_120b_header)
    hardware = renamed(Hardware.given(ram="96GiB", vram="24GiB"))
    placement = Placement.gpu(info, ["CUDA0"])
    finding = found(examine(info, machine=read(), hardware=hardware, placement=placement), "CUDA0 has too little")
    assert finding.severity == "bad"
    assert finding.reading.endswith("are needed and 1.0 GiB to be left, and 24.0 GiB are free")


def test_speed_of_ram(read: Callable[..., Machine]) -> None:
    """It is told whether it is known."""
    known = Hardware.given(ram="32GiB", ram_bandwidth="51.2GB/s", op_s=2e-6, cpu_flops=1e12, n_threads=8)
    finding = found(examine(machine=read(), hardware=known), "The speed of RAM is given")
    assert finding.reading.startswith("51.2 GB/s of weights with 8 threads")
    assumed = Hardware.given(ram="32GiB")
    assert "RAM counts with 47.0 GB/s" in found(examine(machine=read(), hardware=assumed), "The speed of").reading
    machine = replace(read(), kernels={"mxfp4": "avx512vbmi"})
    rates = {"mxfp4:experts": 31.2e9, "q8_0": 24e9, "f16:kv": 8e9}
    reads = {"mxfp4:experts": 32.5e9, "q8_0": 32e9}
    for hardware in (known, assumed):
        measured = replace(hardware, devices=(replace(hardware.cpu, rates=rates, plain_reads=reads),))
        assert found(examine(machine=machine, hardware=measured), "The speed of").reading.endswith(
            "; MXFP4 experts 31.2 GB/s, 0.96 of plain reads (products of Overspill, avx512vbmi)"
            "; Q8_0 24.0 GB/s, 0.75 of plain reads (products of llama.cpp)"
        )


@pytest.mark.usefixtures("no_gpu")
def test_ram_is_the_machines(read: Callable[..., Machine], gpt_oss_120b_header: Path) -> None:
    """Without other hardware it is what the machine has available now."""
    findings = examine(ModelInfo.from_file(gpt_oss_120b_header), machine=read())
    assert "28.0 GiB of RAM are available" in found(findings, "RAM is smaller than the experts").reading


def test_a_placement_needs_its_model(read: Callable[..., Machine], gpt_oss_120b_header: Path) -> None:
    """Without it nothing can be said about it."""
    placement = Placement.cpu(ModelInfo.from_file(gpt_oss_120b_header))
    with pytest.raises(ValueError, match="placement needs the info"):
        examine(machine=read(), placement=placement)


# --- this machine


@contextmanager
def pinned_to_one_cpu() -> Iterator[None]:
    """Let this thread, and what it starts, run on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_this_machine(tiny_gpt_oss_path: Path) -> None:
    """All of it can be read here, and llama.cpp says what its CPU code uses."""
    machine = Machine.read(sample_s=0.05)
    assert machine.cpu_flags
    assert machine.n_logical_cpus == os.cpu_count()
    assert machine.major_faults_per_s is not None
    assert machine.available_bytes is not None
    assert machine.load == pytest.approx(os.getloadavg()[0], abs=2)
    assert set(_core.cpu_features()) == machine.built_for
    findings = examine(ModelInfo.from_file(tiny_gpt_oss_path), machine=machine)
    assert all(finding.reading for finding in findings)
    severities = [finding.severity for finding in findings]
    assert severities == sorted(severities, key=["bad", "warning", "fine"].index)
    assert found(findings, "RAM holds the")


@pytest.mark.usefixtures("no_gpu")
def test_command_shows_what_was_measured(
    tiny_gpt_oss_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept figures of the model's types, and whose products they are of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("overspill.machine.measure._MOST_INTERRUPTIONS_PER_S", math.inf)
    cpu = Hardware.here(ModelInfo.from_file(tiny_gpt_oss_path), n_threads=1).cpu
    done = overspill("doctor", tiny_gpt_oss_path, "--threads", "1", "--json")
    findings = [Finding(**finding) for finding in json.loads(done.stdout)]
    reading = found(findings, "The speed of RAM is measured").reading
    for weights, name in (("mxfp4:experts", "MXFP4 experts"), ("q8_0", "Q8_0"), ("f32", "F32")):
        rate, reads = cpu.rates[weights], cpu.plain_reads[weights]
        ours = _core.cpu_kernels() if weights.partition(":")[0] in _core.cpu_kernel_types() else "llama.cpp"
        products = "llama.cpp" if ours == "llama.cpp" else f"Overspill, {ours}"
        shown = f"{name} {rate / 1e9:.1f} GB/s, {rate / reads:.2f} of plain reads (products of {products})"
        assert shown in reading.split("; ")


def test_command(tiny_gpt_oss_path: Path) -> None:
    """Findings are no errors; what a user does wrong is."""

    def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "overspill", "doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)

    with pinned_to_one_cpu():
        done = doctor(str(tiny_gpt_oss_path), "--threads", "2", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    findings = [Finding(**finding) for finding in json.loads(done.stdout)]
    assert found(findings, "More threads").reading == "2 threads on the 1 physical core that this process may use"
    table = doctor("--threads", "1")
    assert table.returncode == 0
    assert "1 thread on " in table.stdout
    assert "\x1b" not in table.stdout
    assert doctor("--threads", "0").returncode == 2
    assert "--load-mode must be one of mmap, " in doctor("--load-mode", "slow").stderr
    assert doctor("no-such-file.gguf").returncode == 1
