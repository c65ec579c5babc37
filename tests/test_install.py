"""Installing from source, with and without a compiler, always without torch at build time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import dae_fast as df
from dae_fast.samplers.start import START_TAG

from .conftest import LONGER

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "dae_fast", "benchmarks")
NEEDS_COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
NEEDS_NATIVE = pytest.mark.skipif("native" not in df.backend_names(), reason="needs the native backend")


def run(*command, cwd, timeout=300, **environment):
    """With only what the tests mean to set of the variables that matter here."""
    ours = ("CXX", "CUDACXX", "DAE_CUDA_ARCHS", "HIPCXX", "DAE_HIP_ARCHS", "CXXFLAGS", "DAE_FAST_CPU_ISA", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**kept, "COLUMNS": "80", **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def pip(verb, source, *options, cwd, **environment):
    """pip in a process in which `import torch` fails; nothing is downloaded."""
    stub = cwd / "no_torch"
    stub.mkdir(exist_ok=True)
    (stub / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    done = run("-m", "pip", verb, *flags, *options, source, cwd=cwd, PYTHONPATH=stub, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    blocked = run("-c", "import torch", cwd=cwd, PYTHONPATH=stub)
    assert "the build must not need torch" in blocked.stderr


def alone(site):
    """Makes `site` all there is of dae_fast: an editable install's finder would lend it the missing module."""
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]\n"
    )
    return site


def copy_sources(target):
    """What a clean checkout has: nothing built comes along."""
    target.mkdir()
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=ignore)
        else:
            shutil.copy2(path, target / name)
    return target


def one_line(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    """Where the package is installed, no compiler having been found."""
    place = tmp_path_factory.mktemp("without_compiler")
    source = copy_sources(place / "source")
    pip("install", source, "--target", place / "site", cwd=place, CXX="/nonexistent-compiler")
    return alone(place / "site")


# What a user does first. Prints what the tests below expect.
FIRST_STEPS = """
import json, torch, dae_fast as df
schedule = df.Schedule.linear(10)
x0 = torch.arange(24.).reshape(4, 6) / 10
t = torch.tensor([0, 3, 6, 9])
noise = df.Noise(5).fold_in(1)
x_t = df.add_noise(x0, noise, schedule[t])
pred = (x_t / 2).requires_grad_()
loss = df.noise_mse(pred, noise)
loss.backward()
samples = df.samplers.ddpm(lambda x, t: x / 2, (2, 3), schedule, noise)
result = dict(x_t=x_t.tolist(), loss=loss.item(), grad=pred.grad.tolist(), samples=samples.tolist())
"""


REFUSED = """
df.use_backend("reference"), df.use_backend(None)
try:
    df.use_backend("native")
except RuntimeError as error:
    result.update(refused=str(error))
"""
WHY = "no C++ compiler: '/nonexistent-compiler' is not on the PATH; install one or set CXX, then reinstall"


def test_without_a_compiler_the_reference_runs(without_compiler, tmp_path):
    code = (
        FIRST_STEPS + REFUSED + "result.update(file=df.__file__, names=df.backend_names()); print(json.dumps(result))"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=without_compiler)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert Path(got["file"]).is_relative_to(without_compiler)
    assert got["names"] == ["reference"]
    assert f"RuntimeWarning: dae_fast has no kernels here and runs as plain torch, only slower: {WHY}" in done.stderr
    assert got["refused"] == f"use_backend: 'native' is not available: {WHY}"

    # The same by hand; the normals are those of this process.
    schedule, noise = df.Schedule.linear(10), df.Noise(5).fold_in(1)
    t = torch.tensor([0, 3, 6, 9])
    eps = noise.normal((4, 6), dtype=torch.float64)
    x_t = schedule.alpha[t][:, None] * torch.arange(24.0).reshape(4, 6) / 10 + schedule.sigma[t][:, None] * eps
    start = noise.fold_in(START_TAG).normal((2, 3)).double()
    wanted = {
        "x_t": x_t,
        "loss": ((x_t / 2 - eps) ** 2).mean(),
        "grad": 2 * (x_t / 2 - eps) / 24,
        "samples": df.samplers.ddpm(lambda x, t: x / 2, start, schedule, noise),
    }
    for name, values in wanted.items():
        torch.testing.assert_close(torch.tensor(got[name], dtype=torch.float64), values, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_info_says_why(without_compiler, tmp_path):
    done = run("-m", "dae_fast", "info", cwd=tmp_path, PYTHONPATH=without_compiler)
    assert done.returncode == 0, done.stderr
    shown = one_line(done.stdout)
    assert f"native missing: {WHY}" in shown
    assert "default on CPU reference" in shown
    assert f"torch {torch.__version__}" in shown


def test_without_a_compiler_the_reference_is_not_measured_as_ours(without_compiler, tmp_path):
    done = run("-m", "dae_fast", "bench", "--quick", cwd=tmp_path, PYTHONPATH=without_compiler, COLUMNS="500")
    assert done.returncode == 2
    assert f"no kernels run on cpu here, only plain torch ({WHY})" in one_line(done.stderr)


def test_without_a_compiler_the_files(without_compiler):
    package = without_compiler / "dae_fast"
    assert json.loads((package / "_build.json").read_text()) == {
        "native": WHY,
        "cuda": "the native core is missing",
        "hip": "the native core is missing",
    }
    assert list(package.glob("_core*.so")) == []
    assert (package / "py.typed").exists() and (package / "_core.pyi").exists()


@pytest.mark.skipif(os.name != "posix", reason="the failing compiler is a shell script")
def test_a_compiler_that_fails(tmp_path):
    """Its message is shown as it is, brackets and all."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'bind.cpp:1: error: [/bold] [red]no such thing [-Wsome]' >&2\nexit 1\n")
    compiler.chmod(0o755)
    source = copy_sources(tmp_path / "source")
    pip("install", source, "--target", tmp_path / "site", cwd=tmp_path, CXX=compiler)
    done = run("-m", "dae_fast", "info", cwd=tmp_path, PYTHONPATH=alone(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    shown = one_line(done.stdout)
    assert "missing: the native build failed:" in shown
    assert "error: [/bold] [red]no such thing [-Wsome]" in shown


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made of the sdist, as for a release. nvcc, which takes a minute, fails."""
    place = tmp_path_factory.mktemp("wheel")
    nvcc = place / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in --list-gpu-code) echo sm_90;; *) echo 'error: no such thing' >&2; exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    source = copy_sources(place / "source")
    done = run(
        "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", place / "dist", cwd=source
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (place / "dist").glob("dae_fast-*.tar.gz")
    # -O1 compiles faster; the core of this tree has the flags of a release.
    pip("wheel", sdist, "--wheel-dir", place / "dist", cwd=place, CUDACXX=nvcc, CXXFLAGS="-O1")
    (path,) = (place / "dist").glob("dae_fast-*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(place / "site")
        names = archive.namelist()
    return alone(place / "site"), names


@NEEDS_COMPILER
def test_what_a_wheel_holds(wheel):
    site, names = wheel
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "dae_fast").rglob("*.py")}
    modules |= {f"dae_fast/benchmarks/{p.name}" for p in (ROOT / "benchmarks").glob("*.py")}
    assert modules <= set(names)
    (library,) = (n for n in names if n.endswith(".so"))
    assert library.startswith("dae_fast/_core.")
    rest = {n for n in names if ".dist-info/" not in n} - modules - {library}
    assert rest == {"dae_fast/py.typed", "dae_fast/_core.pyi", "dae_fast/_build.json"}
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    notes = json.loads((site / "dae_fast" / "_build.json").read_text())
    assert notes["native"] is None
    assert notes["cuda"].startswith("the cuda build failed:\nerror: no such thing")


@NEEDS_COMPILER
def test_a_wheel_runs_native(wheel, tmp_path):
    site, _ = wheel
    done = run("-c", FIRST_STEPS + "print(df.__file__); print(df.info())", cwd=tmp_path, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "'native': 'built; instruction set" in done.stdout and "'default on CPU': 'native'" in done.stdout


# Of the first 2^24 normals of seed 0, on every machine.
NOISE_HASH = "b153974fe216ebd4cdd7cdb030e189a759b955bdf6d2b0f73ef73a1ed558ee94"


@NEEDS_COMPILER
def test_a_wheel_has_the_noise_of_every_machine(wheel, tmp_path):
    done = run("-m", "dae_fast", "hash", cwd=tmp_path, PYTHONPATH=wheel[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{NOISE_HASH}\n", "")


def test_the_pages_and_the_release_name_the_same_hash():
    for name in ("pyproject.toml", "docs/release.md", "docs/matrix.md"):
        assert NOISE_HASH in (ROOT / name).read_text(), name


@NEEDS_COMPILER
def test_a_wheel_measures(wheel, tmp_path):
    """In a folder that is no clone; what it finds goes there."""
    chosen = (
        "--case",
        "add_noise-fresh",
        "--shape",
        "4x16",
        "--dtype",
        "float32",
        "--peer",
        "native",
        "--csv",
        "a.csv",
    )
    done = run("-m", "dae_fast", "bench", *chosen, cwd=tmp_path, PYTHONPATH=wheel[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "add_noise-fresh" in (tmp_path / "a.csv").read_text()


@LONGER
@NEEDS_COMPILER
def test_an_unchanged_tree_is_not_compiled_again(tmp_path):
    """Not even where pip's isolated build has the headers in a new folder, as a link stands for it here."""
    source = copy_sources(tmp_path / "source")
    builds = [run("setup.py", "build_ext", "--inplace", cwd=source, CUDACXX="none", CXXFLAGS="-O0") for _ in range(2)]
    assert all(done.returncode == 0 for done in builds), builds
    assert "compiling kernels_baseline.o" in builds[0].stdout
    assert "ninja: no work to do" in builds[1].stdout and "compiling" not in builds[1].stdout


def test_libraries_for_gpus_are_built_where_they_are_asked_for(tmp_path):
    """By a torch with CUDA or ROCm, or by the environment."""
    code = (
        "import sysconfig, libraries; sysconfig.get_path = lambda name: '.'; "
        "print(*(name for name in ('cuda', 'hip') if libraries.torch_version(name)))"
    )
    (tmp_path / "torch").mkdir()
    for cuda, hip, wanted in (("'13.0'", None, "cuda"), (None, "'6.4.43484'", "hip"), (None, None, "")):
        lines = f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = {hip}\n"
        (tmp_path / "torch" / "version.py").write_text(lines)
        assert run("-c", code, cwd=tmp_path, PYTHONPATH=ROOT / "csrc").stdout.strip() == wanted


def test_hip_architectures(tmp_path):
    """Of the default ones those that the compiler knows; one that is asked for and is not known stops the build."""
    hipcc = tmp_path / "hipcc"
    answers = "--version) echo 'HIP version: 5.2.1';; *gfx90a*) ;; *) echo \"unknown: $3\" >&2; exit 1;;"
    hipcc.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    hipcc.chmod(0o755)
    code = "import libraries; print(libraries.hip_commands()[1])"
    ask = {"cwd": tmp_path, "PYTHONPATH": ROOT / "csrc"}
    done = run("-c", code, HIPCXX=hipcc, **ask)
    assert done.stdout.strip() == f"env HIP_PLATFORM=amd {hipcc} -shared --offload-arch=gfx90a $in -o $out"
    done = run("-c", code, HIPCXX=hipcc, DAE_HIP_ARCHS="gfx90a;gfx0", **ask)
    assert done.stderr.strip().endswith("DAE_HIP_ARCHS: unknown: --offload-arch=gfx0")
    done = run("-c", f"import libraries; libraries.torch_version = lambda name: '6.4.4'; {code}", HIPCXX=hipcc, **ask)
    assert f"{hipcc} has HIP 5, torch HIP 6.4.4: one process would have two runtimes" in done.stderr
    done = run("-c", code, HIPCXX="none", **ask)
    assert "no ROCm compiler: 'none' is neither on the PATH nor in /opt/rocm/bin" in done.stderr


@NEEDS_NATIVE
def test_cpu_isa_is_selected(tmp_path):
    """Each instruction set that this processor has, in a process of its own."""
    isas = df.kernels.native.isas()
    assert "baseline" in isas
    for isa in isas:
        done = run(
            "-m", "dae_fast", "info", cwd=tmp_path, PYTHONPATH=Path(df.__file__).parents[1], DAE_FAST_CPU_ISA=isa
        )
        assert done.returncode == 0, done.stderr
        assert f"built; instruction set {isa} of {', '.join(isas)}" in one_line(done.stdout)


@NEEDS_NATIVE
def test_wrong_cpu_isa_is_refused(tmp_path):
    done = run(
        "-c", "import dae_fast", cwd=tmp_path, PYTHONPATH=Path(df.__file__).parents[1], DAE_FAST_CPU_ISA="avx1024"
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "RuntimeError: DAE_FAST_CPU_ISA=avx1024: this processor or this build has no instruction set"
    )
    assert last.endswith(f"there are {', '.join(df.kernels.native.isas())}")
