"""Where a measurement was made: device, versions, commit and date. Numbers without these say nothing."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import dae_fast as df

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
# The flags that decide which kernels run; /proc/cpuinfo lists a hundred others.
_VECTOR_FLAG = re.compile(r"sse4|avx|fma|f16c|amx|asimd|sve|neon|bf16")


def environment(device: torch.device = CPU) -> dict[str, str]:
    cpu = _cpu_info()
    return {
        "device": device_name(device),
        "results": results_name(device),
        "backend": default_backend(device),
        "cache": _cache(device, cpu),
        "cpu_flags": _vector_flags(cpu),
        "threads": str(torch.get_num_threads()),
        "native": df.info()["native"],
        "torch": torch.__version__,
        "dae_fast": df.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def backends_on(device: torch.device) -> tuple[str, ...]:
    """The backends that can run on the device."""
    return tuple(name for name in df.backend_names() if df.kernels.dispatch.supports(name, device))


def default_backend(device: torch.device) -> str:
    """What a user gets who forces nothing."""
    return df.kernels.dispatch.default_name(device.type)


def device_name(device: torch.device = CPU) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = _cpu_info()
    name = cpu.get("model name", platform.processor() or platform.machine())
    # Virtual machines hide the name; the model number still tells the generation.
    return f"{name} (family {cpu['cpu family']}, model {cpu['model']})" if "cpu family" in cpu else name


def results_name(device: torch.device = CPU) -> str:
    """What this device's results are called, such as cpu-intel-r-xeon-r-processor."""
    model = device_name(device).split(" (family")[0]
    return f"{device.type}-{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}"


def _cache(device: torch.device, cpu: dict[str, str]) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_properties(device).L2_cache_size // 1024} KB"
    return cpu.get("cache size", "unknown")


def _cpu_info() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _vector_flags(cpu: dict[str, str]) -> str:
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return " ".join(f for f in flags if _VECTOR_FLAG.search(f))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
