"""Short memory and small stacks: a call that cannot be done raises, and the process goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dae_fast as df

from .conftest import BACKENDS

pytestmark = pytest.mark.skipif("native" not in BACKENDS or sys.platform != "linux", reason="of the native kernels")

SHORT = """
import os, resource, sys, torch, dae_fast as df
rows = torch.zeros(20_000_000, 1)  # sums of each row: more than is left
noise = df.Noise(0)
calls = {
    "noise_mse": lambda: df.noise_mse(rows, noise),
    "none": lambda: df.noise_mse(rows, noise, reduction="none"),
    "gradient": lambda: df.noise_mse(rows.requires_grad_(), noise),
    "l1_penalty": lambda: df.l1_penalty(rows),
    "reparameterise": lambda: df.reparameterise(rows, rows, noise),
    "mask": lambda: df.noise_mse(rows, noise, mask=torch.ones(1, 1, dtype=torch.bool)),
}
for name, call in calls.items():  # each in a process of its own, one after the other; torch is imported once
    sys.stdout.flush()
    if not os.fork():
        break
    print(name, os.waitstatus_to_exitcode(os.wait()[1]))
else:
    sys.exit()
small = float(df.noise_mse(torch.zeros(3, 4), noise))
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((size + 200 * 1024) * 1024, resource.RLIM_INFINITY))
try:
    call()
except (MemoryError, RuntimeError) as error:  # torch's own allocator has the latter
    assert isinstance(error, MemoryError) or "memory" in str(error), error
    print(type(error).__name__)
rows = rows.detach()[:3]
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert float(df.noise_mse(torch.zeros(3, 4), noise)) == small
"""


def test_short_memory():
    """It ended the process."""
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, names = "MemoryError", ("noise_mse", "none", "gradient", "l1_penalty", "reparameterise")
    wanted = [line for name in names for line in (error, f"{name} 0")]
    said = done.stdout.splitlines()
    assert said[:-2] == wanted, done.stderr
    assert said[-2] in (error, "RuntimeError") and said[-1] == "mask 0", done.stderr


SMALL_STACK = """
import threading, torch, dae_fast as df
torch.set_num_threads(1)
x = [torch.randn(3, 5000, 2, dtype=torch.float64)[..., 0] for _ in range(3)]  # strided: every buffer is used
level = df.Schedule.linear(10)[torch.arange(3)]
calls = [
    lambda: df.add_noise(x[0], df.Noise(0), level),
    lambda: df.to_eps(x[0], x[1], level, clamp=1.0),
    lambda: df.add_noise(x[0], df.Noise(0), level, target="v"),
]
for call in calls:
    call()  # what is made once, on this thread
threading.stack_size(96 * 1024)
done = []
for call in calls:
    thread = threading.Thread(target=lambda: done.append(call()))
    thread.start(), thread.join()
assert len(done) == len(calls)
"""


def test_a_small_stack():
    """Of 96 KiB, of which Python and torch take a part: the fp64 map alone took 64."""
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def huge_pages_asked_for(x: Tensor) -> bool:
    """Linux's flag of the mapping that holds the middle of x."""
    at, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= at < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_huge_pages_for_large_outputs():
    """A new page of 4 KiB costs more than the arithmetic on it; a small output has pages already."""
    x, noise = torch.zeros(9, 1_000_000, requires_grad=True), df.Noise(0)
    mu, log_var = (torch.zeros_like(x, requires_grad=True) for _ in range(2))
    z, kl = df.reparameterise(mu, log_var, noise)
    df.noise_mse(x, noise).backward()
    torch.autograd.backward((z, kl), (torch.zeros_like(z), torch.zeros_like(kl)))
    made = (
        df.add_noise(x.detach(), noise, df.Level(0.6, 0.8)),
        df.corrupt(x.detach(), df.Masking(0.5, noise)),
        z,
        x.grad,
        mu.grad,
        log_var.grad,
    )
    assert [huge_pages_asked_for(out) for out in made] == [True] * len(made)
    assert not huge_pages_asked_for(torch.zeros_like(x))
