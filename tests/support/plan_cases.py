"""Models and hardware on which plans are compared with llama.cpp's fit, and the table of docs/offload.md.

``python -m plan_cases FOLDER`` prints the table; headers of the models come into ``FOLDER``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from header_files import write_header
from overspill import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import Plan, plan
from upstream_tools import DryRunSettings, Fit, build_upstream_tools, upstream_fit

GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """A model, its context, and what it is to run on; GB/s as of data sheets and docs/offload.md."""

    model: str
    vram_gib: tuple[int, ...]
    gpu: float
    ram: float
    link: float
    n_ctx: int = 8192

    def __str__(self) -> str:
        return f"{self.model}-{'+'.join(map(str, self.vram_gib))}GiB-{self.ram:.0f}-{self.n_ctx}"

    def hardware(self, *, roofline: bool = False) -> Hardware:
        """Return it, with the fixed costs of a GPU or without."""
        return Hardware.given(
            ram="512GiB",
            vram=[f"{size}GiB" for size in self.vram_gib],
            gpu_bandwidth=f"{self.gpu}GB/s",
            ram_bandwidth=f"{self.ram}GB/s",
            link=f"{self.link}GB/s",
            roofline=roofline,
        )

    def fit(self, tools: Path, path: Path) -> Fit:
        """Ask llama.cpp's fit."""
        memory = {f"GPU{number}": size * GIB for number, size in enumerate(self.vram_gib)}
        return upstream_fit(tools, path, memory, DryRunSettings(n_ctx=self.n_ctx, flash_attention="on"))

    def compare(self, info: ModelInfo, fit: Fit, *, roofline: bool = False) -> tuple[Plan, Forecast, Forecast]:
        """Return our plan, what is forecast of it, and what is forecast of the fit's choice."""
        devices = self.hardware(roofline=roofline)
        ours = plan(info, experts="static", hardware=devices, n_ctx=self.n_ctx)
        theirs = forecast(info, placement_of_fit(info, devices, fit), devices, n_ctx=self.n_ctx)
        return ours, ours.forecast(), theirs


DDR4, DDR5 = 46.9, 89.6  # two channels, of 2933 and 5600 MT/s
PCIE3, PCIE4, PCIE5 = 12, 25, 50
RTX_3060, RTX_4060_TI, RTX_3090, RTX_4090, RTX_5090, RTX_PRO_6000 = 360, 288, 936, 1008, 1792, 1792

CASES = [
    Case("gpt-oss-20b", (8,), RTX_4060_TI, DDR4, PCIE4),
    Case("gpt-oss-20b", (12,), RTX_3060, DDR4, PCIE4),
    Case("gpt-oss-20b", (12,), RTX_3060, DDR4, PCIE3, 131072),
    Case("gpt-oss-20b", (16,), RTX_4060_TI, DDR5, PCIE4),
    Case("gpt-oss-20b", (8, 8), RTX_4060_TI, DDR4, PCIE3),
    Case("gpt-oss-120b", (8,), RTX_4060_TI, DDR4, PCIE4),
    Case("gpt-oss-120b", (12,), RTX_3060, DDR4, PCIE3),
    Case("gpt-oss-120b", (16,), RTX_4060_TI, DDR5, PCIE4),
    Case("gpt-oss-120b", (24,), RTX_3090, DDR4, PCIE3),
    Case("gpt-oss-120b", (24,), RTX_4090, DDR5, PCIE4),
    Case("gpt-oss-120b", (24,), RTX_3090, DDR4, PCIE3, 131072),
    Case("gpt-oss-120b", (32,), RTX_5090, DDR5, PCIE5),
    Case("gpt-oss-120b", (24, 24), RTX_3090, DDR4, PCIE3),
    Case("gpt-oss-120b", (96,), RTX_PRO_6000, DDR5, PCIE5),
    Case("gemma-3-27b", (12,), RTX_3060, DDR4, PCIE4),
    Case("gemma-3-27b", (16,), RTX_4060_TI, DDR5, PCIE4),
    Case("gemma-3-27b", (24,), RTX_3090, DDR4, PCIE3, 32768),
    Case("llama-3-8b", (8,), RTX_4060_TI, DDR4, PCIE4),
    Case("llama-3-8b", (8,), RTX_4060_TI, DDR4, PCIE4, 65536),
    Case("llama-3-8b", (12,), RTX_3060, DDR5, PCIE4, 131072),
    Case("qwen-3-32b", (12,), RTX_3060, DDR4, PCIE3),
    Case("qwen-3-32b", (16,), RTX_4060_TI, DDR5, PCIE4),
    Case("qwen-3-32b", (24,), RTX_4090, DDR5, PCIE4, 32768),
    Case("llama-3-70b", (24,), RTX_3090, DDR4, PCIE3),
    Case("llama-3-70b", (32,), RTX_5090, DDR5, PCIE5),
    Case("llama-3-70b", (24, 16), RTX_3090, DDR4, PCIE3),
    Case("llama-3-70b", (48,), RTX_3090, DDR5, PCIE4),
    Case("deepseek-v3", (16,), RTX_4060_TI, DDR5, PCIE4),
    Case("deepseek-v3", (24,), RTX_3090, DDR4, PCIE3),
    Case("deepseek-v3", (96,), RTX_PRO_6000, DDR5, PCIE5),
    Case("deepseek-v3", (48, 24), RTX_3090, DDR5, PCIE4),
]


def placement_of_fit(info: ModelInfo, devices: Hardware, fit: Fit) -> Placement:
    """Return what llama.cpp's fit chose, as a placement."""
    placement = Placement(info, devices)
    for layer, device in enumerate(fit.dry_run.layers[:-1]):
        placement.apply({f"layers {layer}": device})
    placement.output = fit.dry_run.layers[-1]
    for pattern, device in reversed(fit.placement.overrides):  # llama.cpp takes the first that matches
        if any(re.search(pattern, tensor) for tensor, *_ in info.tensors):
            placement.override(pattern, device)
    return placement


def print_table(folder: Path) -> None:
    """Print the table of docs/offload.md."""
    tools = build_upstream_tools(Path(__file__).parents[2] / "build" / "upstream-tools")
    heads = ["model, context", "VRAM (GiB), GB/s", "RAM, GB/s", "whole layers", "llama.cpp's fit", "plan"]
    heads += ["prompts, fit", "prompts, plan", "`n_ubatch`"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for case in CASES:
        path = folder / f"{case.model}.gguf"
        if not path.is_file():
            write_header(path, case.model)
        ours, outlook, theirs = case.compare(ModelInfo.from_file(path), case.fit(tools, path))
        whole = ours.whole_layers_tokens_per_s
        name = f"{case.model}, {case.n_ctx // 1024}k"
        vram = f"{' + '.join(map(str, case.vram_gib))}, {case.gpu:.0f}"
        speeds = ["" if whole is None else f"{whole:.1f}", f"{theirs.tokens_per_s:.1f}", f"{outlook.tokens_per_s:.1f}"]
        speeds[0] = speeds[0] if len(case.vram_gib) == 1 else ""
        speeds += [f"{one.prompt_tokens_per_s:.0f}" for one in (theirs, outlook)] + [str(outlook.settings.n_ubatch)]
        lines.append(f"| {name} | {vram} | {case.ram:.0f} | {' | '.join(speeds)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    print_table(Path(sys.argv[1]))
