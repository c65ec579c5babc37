"""Fused schedulers beside upstream's, whose own code is run in float64; skipped where diffusers is not installed."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from contextlib import contextmanager

import pytest
import torch

import dae_fast as df

diffusers = pytest.importorskip("diffusers")
from diffusers.utils import torch_utils  # noqa: E402

from dae_fast.integrations.diffusers import COVERED, fuse, sums, unfuse  # noqa: E402
from dae_fast.integrations.diffusers.kinds import OfBar  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # upstream's
RANDN = torch_utils.randn_tensor
# Imported now, before a test puts another randn_tensor into torch_utils; some need scipy or torchsde.
PRESENT = [name for name in COVERED if getattr(diffusers, name).__module__.startswith("diffusers.schedulers")]
STEPPED = [name for name in PRESENT if name != "ScoreSdeVeScheduler"]  # which has two other methods
SHAPE = (2, 3, 8, 8)
STEPS = 8
DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
SINGLE, SA, SDE = "DPMSolverSinglestepScheduler", "SASolverScheduler", "DPMSolverSDEScheduler"
EULER, EDM, FLOW = "EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"
PREDICTS = ("epsilon", "sample", "v_prediction")


def each(name: str, predicts: tuple[str, ...] = PREDICTS, **config: object) -> list[tuple[str, dict, dict]]:
    """Of a scheduler with every prediction type: name, config, arguments of step (those that begin with "step_")."""
    step = {key[5:]: config.pop(key) for key in list(config) if key.startswith("step_")}
    return [(name, {**config, "prediction_type": p}, step) for p in predicts]


CASES = [
    *(
        case
        for v in ("fixed_small", "fixed_small_log", "fixed_large")
        for case in each("DDPMScheduler", variance_type=v)
    ),
    *each("DDPMScheduler", clip_sample=False, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"),
    *each("DDPMScheduler", thresholding=True, sample_max_value=2.0),
    *each("DDIMScheduler"),
    *each("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"),
    *each("DDIMScheduler", step_eta=0.7, clip_sample_range=0.5),
    *each("DDIMScheduler", step_eta=1.0, step_use_clipped_model_output=True),
    *each("DDIMScheduler", thresholding=True, sample_max_value=2.0),
    *each("DDIMScheduler", ("v_prediction",), rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    *each(EULER),
    *each(EULER, use_karras_sigmas=True, step_s_churn=4.0, step_s_noise=1.01),
    *each(
        EULER, ("epsilon",), timestep_spacing="leading", final_sigmas_type="sigma_min", interpolation_type="log_linear"
    ),
    *each("EulerAncestralDiscreteScheduler", ("epsilon", "v_prediction")),
    *each("HeunDiscreteScheduler"),
    *each("HeunDiscreteScheduler", clip_sample=True, use_karras_sigmas=True),
    *each(DPM),
    *each(DPM, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    *(
        case
        for algorithm, final, orders in (
            ("dpmsolver++", "zero", (1, 2, 3)),
            ("sde-dpmsolver++", "zero", (1, 2, 3)),
            ("dpmsolver", "sigma_min", (1, 2, 3)),
            ("sde-dpmsolver", "sigma_min", (1, 2)),
        )
        for order in orders
        for solver in ("midpoint", "heun")
        for case in each(
            DPM,
            ("epsilon",),
            algorithm_type=algorithm,
            solver_order=order,
            solver_type=solver,
            final_sigmas_type=final,
        )
    ),
    *each(SINGLE),
    *each(SINGLE, ("v_prediction",), algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    *(
        case
        for algorithm, final in (("dpmsolver++", "zero"), ("sde-dpmsolver++", "zero"), ("dpmsolver", "sigma_min"))
        for order in (2, 3)
        for solver in ("midpoint", "heun")
        for case in each(
            SINGLE,
            ("epsilon",),
            algorithm_type=algorithm,
            solver_order=order,
            solver_type=solver,
            final_sigmas_type=final,
            lower_order_final=True,
        )
    ),
    *each(SINGLE, ("epsilon",), thresholding=True, sample_max_value=2.0, solver_order=3),
    *each(SINGLE, ("flow_prediction",), use_flow_sigmas=True),
    *each(SA),
    *each(SA, ("epsilon", "v_prediction"), algorithm_type="noise_prediction", tau_func=lambda t: 0.6),
    *(
        case
        for orders in ((1, 1), (1, 2), (2, 1), (3, 3), (4, 4))
        for case in each(
            SA,
            ("epsilon",),
            predictor_order=orders[0],
            corrector_order=orders[1],
            tau_func=lambda t: 1 - float(t) / 2e3,
        )
    ),
    *each(SA, ("epsilon",), thresholding=True, sample_max_value=2.0, lower_order_final=False, use_karras_sigmas=True),
    *each(SA, ("flow_prediction",), use_flow_sigmas=True),
    *each(DPM, thresholding=True, sample_max_value=2.0),
    *each(DPM, algorithm_type="dpmsolver", thresholding=True, sample_max_value=2.0, final_sigmas_type="sigma_min"),
    *each(DPM, use_karras_sigmas=True, euler_at_final=True),
    *each(DPM, lower_order_final=False, solver_order=3, final_sigmas_type="sigma_min"),
    *each(DPM, ("flow_prediction",), use_flow_sigmas=True, flow_shift=3.0),
    *(case for order in (1, 2, 3) for case in each(DEIS, solver_order=order)),
    *each(DEIS, thresholding=True, sample_max_value=2.0, solver_order=3),
    *each(DEIS, ("flow_prediction",), use_flow_sigmas=True),
    *(case for order in (1, 2, 3) for case in each(UNIPC, solver_order=order)),
    *each(UNIPC, solver_type="bh1", solver_order=3, final_sigmas_type="sigma_min"),
    *each(UNIPC, predict_x0=False, final_sigmas_type="sigma_min", solver_order=3),
    *each(UNIPC, thresholding=True, sample_max_value=2.0, disable_corrector=[0, 2]),
    *each(UNIPC, ("flow_prediction",), use_flow_sigmas=True, flow_shift=3.0),
    *(
        case
        for skip in (False, True)
        for case in each("PNDMScheduler", ("epsilon", "v_prediction"), skip_prk_steps=skip)
    ),
    *each("LMSDiscreteScheduler"),
    *each("LMSDiscreteScheduler", ("epsilon",), step_order=3, use_karras_sigmas=True),
    *each("LCMScheduler"),
    *each("LCMScheduler", clip_sample=True, set_alpha_to_one=False),
    *each("LCMScheduler", thresholding=True, sample_max_value=2.0),
    *each("TCDScheduler"),
    *each("TCDScheduler", ("epsilon",), step_eta=0.0),
    *each(EDM, ("epsilon", "v_prediction")),
    *each(EDM, ("epsilon",), sigma_schedule="exponential", step_s_churn=4.0),
    *each("EDMDPMSolverMultistepScheduler", ("epsilon", "v_prediction")),
    *each("EDMDPMSolverMultistepScheduler", ("epsilon",), solver_order=3, final_sigmas_type="sigma_min"),
    *each("EDMDPMSolverMultistepScheduler", ("epsilon",), algorithm_type="sde-dpmsolver++", solver_type="heun"),
    *each("EDMDPMSolverMultistepScheduler", ("epsilon",), thresholding=True, sample_max_value=2.0),
    *each("KDPM2DiscreteScheduler", ("epsilon", "v_prediction")),
    *each("KDPM2DiscreteScheduler", ("epsilon",), use_karras_sigmas=True, timestep_spacing="trailing"),
    *each("KDPM2AncestralDiscreteScheduler", ("epsilon", "v_prediction")),
    *each(SDE, ("epsilon", "v_prediction")),
    *each(SDE, ("epsilon",), use_karras_sigmas=True, step_s_noise=1.1),
    ("IPNDMScheduler", {}, {}),
    ("CMStochasticIterativeScheduler", {}, {}),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False, "s_noise": 1.1}, {}),
    (FLOW, {}, {}),
    (FLOW, {"shift": 3.0, "stochastic_sampling": True}, {}),
    (FLOW, {"invert_sigmas": True}, {}),
]
CASES = [case for case in CASES if case[0] in PRESENT]
IN_BF16 = [case for case in CASES if case[1].get("prediction_type", "epsilon") in ("epsilon", "flow_prediction")]


def named(cases: list[tuple[str, dict, dict]]) -> list[str]:
    return [f"{name.removesuffix('Scheduler')}-{config}-{step}" for name, config, step in cases]


class Wide:
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def drawn(shape, generator=None, device=None, dtype=None, layout=None):
    """The same noise whatever the type it is asked for in."""
    return RANDN(shape, generator, device, torch.float32, layout).bfloat16().to(dtype or torch.float32)


class Tree:
    """The same increments, in the place of a Brownian tree, whose values depend on the last bits of levels."""

    def __init__(self, x, *_):
        self.generator, self.like = torch.Generator().manual_seed(0), x

    def __call__(self, *_):
        return drawn(self.like.shape, self.generator, dtype=self.like.dtype)


@pytest.fixture
def one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_utils, "randn_tensor", drawn)
    if SDE in PRESENT:
        monkeypatch.setattr(sys.modules[getattr(diffusers, SDE).__module__], "BrownianTreeNoiseSampler", Tree)


@contextmanager
def in_float64(scheduler):
    """Upstream's own code, its tables widened and none of its casts to float32."""
    module = sys.modules[type(scheduler).__module__]
    tables = "sigmas_interpol", "sigmas_up", "sigmas_down", "discrete_sigmas", "alphas", "betas"
    for name in ("alphas_cumprod", "sigmas", "final_alpha_cumprod", "one", *tables):
        if isinstance(scheduler.__dict__.get(name), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    kept = {name: module.__dict__[name] for name in ("torch", "randn_tensor") if name in module.__dict__}
    module.torch = Wide()
    if "randn_tensor" in kept:
        module.randn_tensor = drawn
    try:
        yield
    finally:
        module.__dict__.update(kept)


def made(name: str, config: dict) -> object:
    return getattr(diffusers, name)(**({"noise_sampler_seed": 0} if name == SDE else {}), **config)


def options(scheduler, step: dict, seed: int) -> dict:
    draws = "generator" in inspect.signature(scheduler.step).parameters
    return {**step, "return_dict": False, **({"generator": torch.Generator().manual_seed(seed)} if draws else {})}


def scaled(scheduler, x, t):
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def network(x):
    return torch.sin(3 * x.double()).to(x.dtype)


def start(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def states(scheduler) -> list[str]:
    """Attributes that hold tensors of earlier steps."""
    names = ("model_outputs", "last_sample", "ets", "derivatives", "cur_sample", "cur_model_output")
    return [name for name in names if name in scheduler.__dict__]


def widened(value):
    if isinstance(value, list):
        return [widened(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def errors(name: str, config: dict, step: dict, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, float64) of every step, from the same samples."""
    reference, ours = made(name, config), fuse(made(name, config))
    reference.set_timesteps(STEPS)
    ours.set_timesteps(STEPS)
    x, pairs = start(dtype), []
    if hasattr(ours, "init_noise_sigma"):
        x = x * float(ours.init_noise_sigma)
    for k, t in enumerate(reference.timesteps):
        with in_float64(reference):
            seen = scaled(reference, x.double(), t)
        mine = scaled(ours, x, t)
        output = network(mine)
        with in_float64(reference):
            at = t.item() if name == "LCMScheduler" else t  # whose scalings of a tensor are float32
            wanted = reference.step(output.double(), at, x.double(), **options(reference, step, k))
        got = ours.step(output, t, x, **options(ours, step, k))
        assert len(got) == len(wanted)
        pairs += [(mine, seen), *zip(got, wanted, strict=True)]
        for state in states(reference):
            setattr(reference, state, widened(getattr(ours, state)))
        if name.startswith("Heun") and ours.sample is not None:
            sigma = reference.sigmas[ours.step_index - 1].double()
            reference.prev_derivative = (ours.sample.double() - ours.prev_derivative.double()) / sigma
        x = got[0]
    return pairs


@pytest.mark.usefixtures("one_noise")
@pytest.mark.parametrize(("name", "config", "step"), CASES, ids=named(CASES))
def test_every_step_in_float64(name: str, config: dict, step: dict) -> None:
    for got, wanted in errors(name, config, step, torch.float64):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("one_noise")
@pytest.mark.parametrize(("name", "config", "step"), IN_BF16, ids=named(IN_BF16))
def test_every_step_in_bf16(name: str, config: dict, step: dict) -> None:
    """Rounded once, but for what is read from an output that was itself rounded: quantiles, kept outputs."""
    for got, wanted in errors(name, config, step, torch.bfloat16):
        assert got.dtype == torch.bfloat16
        right = (got == wanted.to(torch.bfloat16)).double().mean().item()
        sixth = name == SINGLE and config.get("solver_order") == 3  # a stream more than one launch reads
        rounded_between = config.get("thresholding") or name in (UNIPC, SA, "LMSDiscreteScheduler") or sixth
        assert right > 0.99 or rounded_between
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


def loop(scheduler, x, *, steps: int = STEPS, **arguments):
    """As a pipeline has it."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scaled(scheduler, x, t)), t, x, return_dict=False, **arguments)[0]
    return x


def draws(name: str) -> bool:
    return "generator" in inspect.signature(getattr(diffusers, name).step).parameters


@pytest.mark.parametrize("name", STEPPED)
def test_a_loop_is_upstreams(name: str) -> None:
    """In float32, torch drawing through the caller's generator, which ends in the same state."""
    results, generators = [], []
    for scheduler in (made(name, {}), fuse(made(name, {}))):
        generators.append(torch.Generator().manual_seed(5))
        results.append(loop(scheduler, start(torch.float32), **({"generator": generators[-1]} if draws(name) else {})))
    scale = results[0].abs().max().item() if name == SA else 1  # whose float32 errors grow, upstream's more than ours
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3 * scale)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("name", STEPPED)
def test_it_stays_what_it_was(name: str, tmp_path) -> None:
    upstream = getattr(diffusers, name)
    scheduler = made(name, {})
    assert fuse(scheduler) is scheduler
    assert isinstance(scheduler, upstream) and type(scheduler).__name__ == name
    for method in ("step", "add_noise", "get_velocity", "scale_model_input", "scale_noise", "set_timesteps"):
        if hasattr(upstream, method):
            assert inspect.signature(getattr(scheduler, method)) == inspect.signature(getattr(made(name, {}), method))
    scheduler.save_pretrained(tmp_path)
    assert type(upstream.from_pretrained(tmp_path)) is upstream
    plain = made(name, {})
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "scheduler_config.json").read_text() == (tmp_path / "plain/scheduler_config.json").read_text()
    generator = {"generator": None} if draws(name) else {}
    copies = [copy.deepcopy(scheduler)]
    if name != SA:  # whose tau_func is a lambda
        copies.append(pickle.loads(pickle.dumps(scheduler)))
    for copied in copies:
        assert type(copied) is type(scheduler)
        torch.manual_seed(0)
        wanted = loop(scheduler, start(), **generator)
        torch.manual_seed(0)
        assert torch.equal(loop(copied, start(), **generator), wanted)
    assert type(unfuse(scheduler)) is upstream
    assert "_facts" not in scheduler.__dict__
    loop(scheduler, start(), **generator)


@pytest.mark.parametrize("name", STEPPED)
def test_unfused_in_the_middle(name: str) -> None:
    """What earlier steps left is where upstream looks for it."""
    results = []
    for undone in (False, True):
        scheduler, x = fuse(made(name, {})), start(torch.float32)
        scheduler.set_timesteps(10)
        for k, t in enumerate(scheduler.timesteps):
            if undone and k == 5:  # between the halves of a step of those that have two
                unfuse(scheduler)
            x = scheduler.step(network(scaled(scheduler, x, t)), t, x, **options(scheduler, {}, k))[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", ["torch", "fused"])
@pytest.mark.parametrize("name", STEPPED)
def test_no_step_reads_a_tensor_or_launches_more(name: str, noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a device; one launch, two of the schedulers that keep what they convert or read more."""
    if name == SDE and noise == "torch":
        pytest.skip("torchsde's tree is made of numbers on the host")
    scheduler = fuse(made(name, {}), noise=noise)
    scheduler.set_timesteps(STEPS)
    x, calls = start(torch.float32), []
    counted = sums.weighted_sum
    monkeypatch.setattr(sums, "weighted_sum", lambda *a, **k: calls.append(1) or counted(*a, **k))
    for k, t in enumerate(scheduler.timesteps):
        output = network(scaled(scheduler, x, t))
        arguments = options(scheduler, {}, k)
        copy.deepcopy(scheduler).step(output, t, x, **arguments)  # rows of numbers in host memory are checked once
        with monkeypatch.context() as patched:
            for reading in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
                patched.setattr(torch.Tensor, reading, lambda *_: pytest.fail("a tensor was read"))
            calls.clear()
            x = scheduler.step(output, t, x, **arguments)[0]
        most = 2 if name in ("LMSDiscreteScheduler", UNIPC, SA) or (name == SDE and noise == "fused") else 1
        assert 1 <= len(calls) <= most


STOCHASTIC = {
    "DDPMScheduler": {},
    "DDIMScheduler": {"eta": 1.0},
    "EulerAncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    EULER: {"s_churn": 4.0},
    EDM: {"s_churn": 4.0},
    SA: {},
    "KDPM2AncestralDiscreteScheduler": {},
    "CMStochasticIterativeScheduler": {},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_keyed_noise_is_the_same_in_every_batch(name: str) -> None:
    """By seeds from a list of ints or generators; of one seed the next sample has the next."""

    def run(x, generator):
        return loop(fuse(made(name, {}), noise="fused"), x, generator=generator, **STOCHASTIC[name])

    x = torch.randn(4, 3, 8, 8)
    seeds = [7, 8, 2**63 + 5, 11]
    whole = run(x, seeds)
    assert torch.equal(run(x, [torch.Generator().manual_seed(s) for s in seeds]), whole)
    for b, seed in enumerate(seeds):
        assert torch.equal(run(x[b : b + 1], [seed]), whole[b : b + 1])
        assert torch.equal(run(x[b : b + 1], torch.Generator().manual_seed(seed)), whole[b : b + 1])
    assert torch.equal(run(x[:2], 7), whole[:2])
    assert not torch.equal(run(x[:1], [8]), whole[:1])
    torch.manual_seed(3)
    first = run(x, None)
    torch.manual_seed(3)
    assert torch.equal(run(x, None), first)


def test_keyed_noise_of_a_solver_and_of_a_flow() -> None:
    for name, config in (
        (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        (FLOW, {"stochastic_sampling": True}),
        (SINGLE, {"algorithm_type": "sde-dpmsolver++"}),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ):
        x = torch.randn(2, 3, 8, 8)
        both = loop(fuse(made(name, config), "fused"), x, generator=[1, 2])
        assert torch.equal(loop(fuse(made(name, config), "fused"), x[1:], generator=[2]), both[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in STEPPED if name != "IPNDMScheduler"])
def test_noising(name: str, dtype: torch.dtype) -> None:
    """add_noise or scale_noise and get_velocity, at random timesteps and where a loop began."""
    reference, ours = made(name, {}), fuse(made(name, {}))
    for scheduler in (reference, ours):
        scheduler.set_timesteps(10)
    x0, eps = torch.randn(5, 3, 8, 8, dtype=dtype), torch.randn(5, 3, 8, 8, dtype=dtype)
    t = ours.timesteps[torch.tensor([3, 0, 7, 1, 7])]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-7, torch.bfloat16: 4e-3}[dtype]

    def compare(method: str, *arguments) -> None:
        with in_float64(reference):
            wanted = getattr(reference, method)(
                *(a.double() if a.dtype == dtype and a.dim() > 1 else a for a in arguments)
            )
        got = getattr(ours, method)(*arguments)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)

    if name == FLOW:
        compare("scale_noise", x0, t, eps)
    else:
        compare("add_noise", x0, eps, t)
        compare("add_noise", x0, eps, t[:1].expand(5))
        if dtype != torch.bfloat16:  # of which a keyed noise is not rounded before the sum
            keyed = df.Noise(3)
            stored = keyed.normal(x0.shape, dtype=dtype)
            assert torch.equal(ours.add_noise(x0, keyed, t), ours.add_noise(x0, stored, t))
    if hasattr(ours, "get_velocity"):
        compare("get_velocity", x0, eps, t)
    if hasattr(ours, "set_begin_index") and not isinstance(ours.kind, OfBar):
        for scheduler in (reference, ours):
            scheduler.set_begin_index(4)
        compare("scale_noise", x0, t, eps) if name == FLOW else compare("add_noise", x0, eps, t)


def test_noising_of_a_timestep_that_is_none() -> None:
    x0 = torch.randn(2, 3)
    with pytest.raises(IndexError, match="is none of scheduler"):
        fuse(made(EULER, {})).add_noise(x0, x0, torch.tensor([0.5, 1.0]))
    for solver in (DPM, UNIPC, DEIS):  # the last step's level, as upstream
        reference, ours = made(solver, {}), fuse(made(solver, {}))
        for scheduler in (reference, ours):
            scheduler.set_timesteps(5)
        t = torch.tensor([1, 3])
        torch.testing.assert_close(ours.add_noise(x0, x0, t), reference.add_noise(x0, x0, t))


def test_keyed_noise_is_undone_in_the_middle() -> None:
    """Kept noise becomes a tensor, and a Brownian tree is grown, where upstream's code goes on."""
    whole = loop(fuse(made(SA, {}), "fused"), start(), generator=[1, 2])
    scheduler, x = fuse(made(SA, {}), "fused"), start()
    scheduler.set_timesteps(STEPS)
    for k, t in enumerate(scheduler.timesteps):
        if k == 4:
            kept = scheduler.last_noise.normal(SHAPE, dtype=torch.float64)
            unfuse(scheduler)
            assert torch.equal(scheduler.last_noise, kept)
            torch.testing.assert_close(scheduler.step(network(x), t, x, generator=None)[0].shape, whole.shape)
            break
        x = scheduler.step(network(x), t, x, generator=[1, 2])[0]
    if SDE in PRESENT:
        scheduler, x = fuse(made(SDE, {}), "fused"), start()
        scheduler.set_timesteps(STEPS)
        for k, t in enumerate(scheduler.timesteps[:4]):
            x = (scheduler if k < 2 else unfuse(scheduler)).step(network(x), t, x)[0]
        assert x.isfinite().all()


@pytest.mark.skipif(SDE not in PRESENT, reason="torchsde is missing")
def test_keyed_noise_of_two_halves() -> None:
    """The noise of a whole step is what its halves have, each of the size of its part; by seeds of the samples."""
    scheduler = fuse(made(SDE, {}), "fused")
    scheduler.set_timesteps(4)
    zero = torch.zeros(1, 40000, dtype=torch.float64)
    first, second = (scheduler.step(zero, t, zero)[0] for t in scheduler.timesteps[:2])
    sigma, sigma_to = scheduler.sigmas[0].double(), scheduler.sigmas[1].double()
    middle = (sigma * sigma_to).sqrt()
    of_first = (middle**2 * (sigma**2 - middle**2)).sqrt() / sigma
    of_whole = (sigma_to**2 * (sigma**2 - sigma_to**2)).sqrt() / sigma
    z, whole = first / of_first, second / of_whole
    assert abs(whole.var().item() - 1) < 0.03
    assert abs((z * whole).mean().item() - ((sigma - middle) / (sigma - sigma_to)).sqrt().item()) < 0.02
    x = torch.randn(2, 3, 8, 8)
    both = loop(fuse(diffusers.DPMSolverSDEScheduler(noise_sampler_seed=[3, 9]), "fused"), x)
    assert torch.equal(loop(fuse(diffusers.DPMSolverSDEScheduler(noise_sampler_seed=9), "fused"), x[1:]), both[1:])


@pytest.mark.usefixtures("one_noise")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_score_sde(dtype: torch.dtype) -> None:
    """Predictor, corrector and noising, upstream's code in float64."""
    reference, ours = (made("ScoreSdeVeScheduler", {"num_train_timesteps": 20, "sigma_max": 50.0}) for _ in range(2))
    fuse(ours)
    for scheduler in (reference, ours):
        scheduler.set_timesteps(20)
        scheduler.set_sigmas(20)
    x, tolerance = 50 * start(dtype), {torch.float64: 1e-6, torch.bfloat16: 1e-2}[dtype]  # upstream's sizes are float32
    for k, t in enumerate(ours.timesteps[::3]):
        wanted = []
        score = (network(x) - x) / 50
        with in_float64(reference):
            for step, at in (("step_correct", ()), ("step_pred", (t,))):
                generator = torch.Generator().manual_seed(k)
                wanted += getattr(reference, step)(
                    score.double(), *at, x.double(), generator=generator, return_dict=False
                )
        got = ours.step_correct(score, x, torch.Generator().manual_seed(k), return_dict=False)
        made_by = ours.step_pred(score, t, x, torch.Generator().manual_seed(k))
        assert type(made_by).__name__ == "SdeVeOutput"
        for mine, theirs in zip((*got, made_by.prev_sample, made_by.prev_sample_mean), wanted, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
        assert made_by.prev_sample.dtype == dtype
        x = made_by.prev_sample
    places = torch.tensor([3, 19])
    with in_float64(reference):
        wanted = reference.add_noise(start().double(), x.double(), places)
    torch.testing.assert_close(ours.add_noise(start(dtype), x, places).double(), wanted, rtol=tolerance, atol=tolerance)
    assert ours.add_noise(start(dtype), None, places).shape == SHAPE
    ours.set_timesteps(20)
    ours.timesteps = None
    with pytest.raises(ValueError, match="call set_timesteps before a step"):
        ours.step_pred(x, 0.5, x)


def test_score_sde_keyed() -> None:
    """A sample is what it is alone, the corrector's size included; |z| is that of the noise that is added."""

    def run(x: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        scheduler = fuse(made("ScoreSdeVeScheduler", {"num_train_timesteps": 20, "sigma_max": 5.0}), "fused")
        scheduler.set_timesteps(6)
        scheduler.set_sigmas(20)
        for t in scheduler.timesteps:
            for _ in range(2):
                x = scheduler.step_correct(network(x) - x, x, generator=seeds).prev_sample
            x = scheduler.step_pred(network(x) - x, t, x, generator=seeds).prev_sample
        return x

    x = torch.randn(3, 3, 8, 8)
    whole = run(x, [5, 6, 7])
    for b, seed in enumerate((5, 6, 7)):
        assert torch.equal(run(x[b : b + 1], [seed]), whole[b : b + 1])
    scheduler, zero = fuse(made("ScoreSdeVeScheduler", {"snr": 0.5}), "fused"), torch.zeros(1, 4096)
    scheduler.set_timesteps(6)
    steps = [scheduler.step_correct(zero + 1, zero, generator=[4]).prev_sample.double() for _ in range(2)]
    assert not torch.equal(*steps)
    for made_by in steps:  # h + sqrt(2h) z with h = 2 (0.5 |z|)^2 / 64^2: the mean is h, the variance 2h
        h = 2 * 0.25 * 1.0
        assert abs(made_by.mean().item() - h) < 0.06 and abs(made_by.var().item() - 2 * h) < 0.1


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_matching_per_token(stochastic: bool) -> None:
    reference, ours = (made(FLOW, {"stochastic_sampling": stochastic}) for _ in range(2))
    fuse(ours)
    for scheduler in (reference, ours):
        scheduler.set_timesteps(10)
    x, v = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    tokens = ours.timesteps[torch.randint(10, (2, 6))] - torch.rand(2, 6)
    results = [
        s.step(v, s.timesteps[0], x, generator=torch.Generator().manual_seed(1), per_token_timesteps=tokens).prev_sample
        for s in (reference, ours)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert (
        ours.step(v.bfloat16(), ours.timesteps[1], x.bfloat16(), per_token_timesteps=tokens)[0].dtype == torch.float32
    )


def test_arguments_of_single_schedulers() -> None:
    x, output = torch.randn(2, 3), torch.randn(2, 3)
    noise = torch.randn(2, 3)
    for name, config, arguments in (
        ("DDIMScheduler", {}, {"eta": 0.5, "variance_noise": noise}),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, {"variance_noise": noise}),
        (EDM, {}, {"pred_original_sample": noise}),
    ):
        results = []
        for scheduler in (made(name, config), fuse(made(name, config))):
            scheduler.set_timesteps(10)
            t = scheduler.timesteps[3]
            scaled(scheduler, x, t)
            results.append(scheduler.step(output, t, x, **arguments).prev_sample)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    ddim = fuse(made("DDIMScheduler", {}))
    ddim.set_timesteps(10)
    with pytest.raises(ValueError, match="generator or variance_noise"):
        ddim.step(output, 100, x, 0.5, generator=torch.Generator(), variance_noise=noise)


def test_a_table_that_changes_is_read_again() -> None:
    scheduler = fuse(made(EULER, {}))
    scheduler.set_timesteps(5)
    x, output, t = torch.randn(2, 3), torch.randn(2, 3), scheduler.timesteps[0]
    scaled(scheduler, x, t)
    before = scheduler.step(output, t, x)[0]
    scheduler._step_index = None
    scheduler.sigmas[1] *= 0.5
    assert not torch.equal(scheduler.step(output, t, x)[0], before)
    with torch.inference_mode():
        loop(scheduler, x)


def test_plans_outlive_set_timesteps_where_the_tables_do() -> None:
    """A pipeline sets the timesteps at every call."""
    scheduler, x = fuse(made(DPM, {})), start()
    loop(scheduler, x)
    plans = scheduler._facts.plans
    assert len(plans) == STEPS
    loop(scheduler, x)
    assert scheduler._facts.plans is plans
    loop(scheduler, x, steps=STEPS + 1)
    assert scheduler._facts.plans is not plans
    plans = scheduler._facts.plans
    scheduler.register_to_config(solver_type="heun")
    loop(scheduler, x, steps=STEPS + 1)
    assert scheduler._facts.plans is not plans


def test_gradients_reach_the_output_and_the_sample() -> None:
    scheduler = fuse(made("DDIMScheduler", {"clip_sample": False}))
    scheduler.set_timesteps(5)
    x, output = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, output: scheduler.step(output, 600, x)[0], (x, output))


@pytest.mark.parametrize("noise", ["torch", "fused"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", DPM])
def test_a_pipeline(name: str, noise: str, tmp_path) -> None:
    """From latents to pictures, saved and loaded; a picture is that of its seed, whatever the batch, where keyed."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    kind = diffusers.DDIMPipeline if name == "DDIMScheduler" else diffusers.DDPMPipeline
    plain = kind(unet, made(name, {}))
    if kind is diffusers.DDIMPipeline:
        assert type(plain.scheduler) is diffusers.DDIMScheduler
    fused = fuse(kind(unet, made(name, {})), noise=noise)
    extra = {"eta": 1.0} if kind is diffusers.DDIMPipeline else {}

    def pictures(pipe, seeds):
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        made = pipe(len(seeds), generator=generators, num_inference_steps=6, output_type="numpy", **extra)
        return torch.from_numpy(made.images)

    theirs, ours = pictures(plain, [1, 2]), pictures(fused, [1, 2])
    if noise == "torch" or name == DPM:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pictures(fused, [2]), ours[1:], rtol=1e-4, atol=1e-4)
    fused.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(unfuse(fused).scheduler)
    torch.testing.assert_close(pictures(loaded, [1, 2]), theirs)


def test_what_is_not_covered_says_so() -> None:
    with pytest.raises(TypeError, match="RePaintScheduler is not covered; these are: DDPMScheduler"):
        fuse(diffusers.RePaintScheduler())
    with pytest.raises(TypeError, match="must be a pipeline or a scheduler of diffusers, got int"):
        fuse(3)
    with pytest.raises(ValueError, match="noise must be 'torch' or 'fused', got 'none'"):
        fuse(made(EULER, {}), noise="none")
    for name, config, what in (
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type='learned_range'"),
        (DPM, {"variance_type": "learned"}, "variance_type='learned'"),
        (UNIPC, {"solver_order": 4}, "solver_order=4"),
        (SINGLE, {"variance_type": "learned"}, "variance_type='learned'"),
        (
            SINGLE,
            {"algorithm_type": "dpmsolver", "thresholding": True, "final_sigmas_type": "sigma_min"},
            "thresholding of algorithm_type='dpmsolver'",
        ),
        (SA, {"variance_type": "learned"}, "variance_type='learned'"),
        (
            SA,
            {"algorithm_type": "noise_prediction", "thresholding": True},
            "thresholding of algorithm_type='noise_prediction'",
        ),
        ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("EDMDPMSolverMultistepScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        (
            "EDMDPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "algorithm_type='sde-dpmsolver.*' of order 3",
        ),
        (UNIPC, {"solver_p": diffusers.DDIMScheduler()}, "solver_p"),
    ):
        with pytest.raises(NotImplementedError, match=f"{name} with {what} is not covered"):
            fuse(made(name, config))

    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    with pytest.raises(TypeError, match="Mine is not covered"):
        fuse(Mine())


def test_arguments_that_are_wrong() -> None:
    x = torch.randn(2, 3)
    scheduler = fuse(made(EULER, {}), noise="fused")
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    with pytest.raises(TypeError, match="missing a required argument: 'sample'"):
        scheduler.step(x, t)
    with pytest.raises(TypeError, match="unexpected keyword argument 'order'"):
        scheduler.step(x, t, x, order=3)
    with pytest.raises(ValueError, match="integer indices are not supported"):
        scheduler.step(x, 1, x)
    with pytest.raises(IndexError, match="is none of"):
        scheduler.step(x, 0.5, x)
    with pytest.raises(ValueError, match="2 of them, one for each sample, got 3"):
        scheduler.step(x, t, x, s_churn=4.0, generator=[1, 2, 3])
    with pytest.raises(TypeError, match="or an int, or a list, got str"):
        scheduler.step(x, t, x, s_churn=4.0, generator="seed")
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        fuse(made(DPM, {})).step(x, 1, x)


def test_every_scheduler_measured_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from benchmarks import fused_schedulers

    monkeypatch.setattr(fused_schedulers, "SHAPE", (2, 3))
    assert {kind for kind, *_ in fused_schedulers.CONFIGS.values()} == {*COVERED} - {SDE, "ScoreSdeVeScheduler"}
    for _, _, values, peers in fused_schedulers.studies():
        assert values == 6
        for loop_of in peers.values():
            assert loop_of().isfinite().all()


@pytest.mark.parametrize("name", [EULER, UNIPC, "SASolverScheduler", "DDIMScheduler", "LMSDiscreteScheduler"])
def test_types_that_differ(name: str) -> None:
    """The sample's and the model's output's: the step has upstream's."""
    x = torch.randn(2, 3, 8, 8)
    for output, sample in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        types = []
        for scheduler in (made(name, {}), fuse(made(name, {}))):
            scheduler.set_timesteps(5)
            t = scheduler.timesteps[0]
            scaled(scheduler, x, t)
            types.append(scheduler.step(x.to(output), t, x.to(sample), return_dict=False)[0].dtype)
        assert types[0] == types[1]


def test_what_would_be_taken_for_something_else() -> None:
    x, scheduler = torch.randn(2, 3), fuse(made("DDIMScheduler", {}))
    scheduler.set_timesteps(5)
    with pytest.raises(TypeError, match="multiple values for argument 'timestep'"):
        scheduler.step(x, scheduler.timesteps[0], x, timestep=1)
    with pytest.raises(ValueError, match="timestep must be one number"):
        scheduler.step(x, scheduler.timesteps, x)
    before = scheduler.step(x, scheduler.timesteps[-1], x)[0]
    scheduler.final_alpha_cumprod = torch.tensor(0.9999)
    assert not torch.equal(scheduler.step(x, scheduler.timesteps[-1], x)[0], before)
    heun = made("HeunDiscreteScheduler", {})
    heun.set_timesteps(5)
    heun.step(x, heun.timesteps[0], x)
    with pytest.raises(ValueError, match="between the two halves of a step"):
        fuse(heun)
    changed = fuse(made("DPMSolverSDEScheduler", {}))
    changed.set_timesteps(8)
    for k, t in enumerate(changed.timesteps):
        x = changed.step(network(scaled(changed, x, t)), t, x).prev_sample
        if k == 1:
            fuse(changed, noise="fused")
    assert torch.isfinite(x).all()
