"""Short memory and small stacks: a call that cannot be done raises, and the process goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .conftest import BACKENDS

pytestmark = pytest.mark.skipif("native" not in BACKENDS or sys.platform != "linux", reason="of the native kernels")

SHORT = """
import resource, sys, torch, dae_fast as df
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
call = calls[sys.argv[1]]
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


@pytest.mark.parametrize("name", ["noise_mse", "none", "gradient", "l1_penalty", "reparameterise", "mask"])
def test_short_memory(name):
    """It ended the process."""
    done = subprocess.run([sys.executable, "-c", SHORT, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "MemoryError" or (name == "mask" and done.stdout.strip() == "RuntimeError")


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
