"""Multistep methods and few-step ones: each against its paper's own loop, its order, and the law of its samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import dae_fast as df
from dae_fast.samplers import (
    DEIS,
    LCM,
    LMS,
    PLMS,
    TCD,
    Consistency,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    DPMSolverPP3M,
    Euler,
    UniPC,
)

from .exact import log_snr_levels, order
from .test_samplers import network, same, start
from .test_samplers_exact import EVEN, GAUSSIAN, MIXTURE, SEED, downwards, edm_denoiser, pairs, pure

NOISE = df.Noise(5)
VP = df.Schedule.linear(20, 0.005, 0.4)
LEVELS = [19, 16, 12, 9, 5, 3, 0]


def places(schedule=VP, levels=LEVELS):
    """(alpha, sigma, log(alpha/sigma)) of each level, and of the data."""
    found = [(a, s, math.log(a / s)) for a, s in pairs(schedule, levels)]
    return [*found, (1.0, 0.0, math.inf)]


def x0_of(x, net, level, clamp=None):
    alpha, sigma = pairs(VP, [level])[0]
    x0 = (x - sigma * net(x, torch.full((len(x),), level))) / alpha
    return x0 if clamp is None else x0.clamp(-clamp, clamp)


# One step after the other, as the papers write them.


def plain_unipc(net, x, p, variant, clamp, corrects):
    """Zhao et al. 2023 in x0, a predictor and a corrector in turn: multistep_uni_p_bh_update and uni_c of its code."""
    at, models, last = places(), [], None

    def update(x, i, order, extra=None):
        """From level i - 1 to i; extra: x0_hat at i, for the corrector."""
        (_, s0, l0), (a, s, l1) = at[i - 1 : i + 1]
        h = l1 - l0
        hh = -h
        rks = [(at[i - 1 - k][2] - l0) / h for k in range(1, order)]
        D1 = [(models[-1 - k] - models[-1]) / r for k, r in enumerate(rks, 1)]
        rks.append(1.0)
        phi_1 = math.expm1(hh)
        B = hh if variant == "bh1" else phi_1
        phi_k, factorial, R, b = phi_1 / hh - 1, 1, [], []
        for k in range(1, order + 1):
            R.append(np.power(rks, k - 1))
            b.append(phi_k * factorial / B)
            factorial *= k + 1
            phi_k = phi_k / hh - 1 / factorial
        R, b = np.array(R), np.array(b)
        base = s / s0 * x - a * phi_1 * models[-1]
        if extra is None:
            rho = [0.5] if order == 2 else np.linalg.solve(R[:-1, :-1], b[:-1])
            return base - a * B * sum(float(r) * d for r, d in zip(rho, D1, strict=False))
        rho = [0.5] if order == 1 else np.linalg.solve(R, b)
        total = sum((float(r) * d for r, d in zip(rho[:-1], D1, strict=True)), 0 * x)
        return base - a * B * (total + float(rho[-1]) * (extra - models[-1]))

    for i, level in enumerate(LEVELS):
        m = x0_of(x, net, level, clamp)
        if i and corrects:
            x = update(last, i, min(p, i), m)
        models.append(m)
        last = x
        x = m if level == 0 else update(x, i + 1, min(p, i + 1))
    return x


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("p, corrects", [(1, True), (2, True), (3, True), (3, False)])
def test_unipc_is_its_loop(p, corrects, variant, clamp, backend):
    x = start(3, 5)
    got = UniPC(VP, levels=LEVELS, order=p, variant=variant, corrected_x=corrects, clamp=clamp).sample(
        network, x, NOISE
    )
    same(got, plain_unipc(network, x, p, variant, clamp, corrects), 1e-9)


def plain_3m(net, x, eta, exact, clamp):
    """k-diffusion's sample_dpmpp_3m_sde, in alpha = 1."""
    at, old, hs = places(), [], []
    for i, level in enumerate(LEVELS):
        m = x0_of(x, net, level, clamp)
        (a_t, _, l_t), (a, s, l_s) = at[i : i + 2]
        if s == 0:
            return m
        y, h = x / a_t, l_s - l_t
        k = h * (eta + 1)
        y = math.exp(-k) * y - math.expm1(-k) * m
        if len(old) > 1:
            r0, r1 = hs[-1] / h, hs[-2] / h
            d0, d1 = (m - old[-1]) / r0, (old[-1] - old[-2]) / r1
            D1, D2 = d0 + (d0 - d1) * r0 / (r0 + r1), (d0 - d1) / (r0 + r1)
            phi_2 = math.expm1(-k) / k + 1
            y = y + phi_2 * D1 - (2 if exact else 1) * (phi_2 / k - 0.5) * D2
        elif old:
            y = y + (math.expm1(-k) / k + 1) * (m - old[-1]) / (hs[-1] / h)
        noise = s / a * math.sqrt(-math.expm1(-2 * h * eta))
        y = y + noise * NOISE.fold_in(level).normal(x.shape, dtype=x.dtype)
        x = a * y
        old.append(m), hs.append(h)
    return x


@pytest.mark.parametrize("eta, exact, clamp", [(0.0, False, None), (1.0, False, 0.5), (0.5, True, None)])
def test_3m_is_k_diffusions(eta, exact, clamp, backend):
    x = start(3, 5)
    got = DPMSolverPP3M(VP, levels=LEVELS, eta=eta, exact=exact, clamp=clamp).sample(network, x, NOISE)
    same(got, plain_3m(network, x, eta, exact, clamp), 1e-9)


def test_heun_of_2m():
    """k-diffusion's solver_type="heun": phi_2 in place of half of the first coefficient; two steps in."""
    x, at = start(3, 5), places()
    got = DPMSolverPP2MSDE(VP, levels=LEVELS, eta=0.7, solver_type="heun")
    kept, y = [], x
    for i, level in enumerate(LEVELS[:2]):
        kept.append(x0_of(y, network, level))
        stepped = got.step(i, y, network(y, torch.full((3,), level)), NOISE)
        (a_t, _, l_t), (a, s, l_s) = at[i : i + 2]
        h = l_s - l_t
        k = 1.7 * h
        wanted = math.exp(-k) * y / a_t - math.expm1(-k) * kept[-1]
        if i:
            wanted = wanted + (math.expm1(-k) / k + 1) * h / (at[1][2] - at[0][2]) * (kept[1] - kept[0])
        z = NOISE.fold_in(level).normal(x.shape, dtype=x.dtype)
        same(stepped, a * wanted + s * math.sqrt(-math.expm1(-1.4 * h)) * z)
        y = stepped
    same(DPMSolverPP2M(VP, levels=LEVELS, solver_type="heun").sample(network, x, NOISE),
         DPMSolverPP2MSDE(VP, levels=LEVELS, eta=0.0, solver_type="heun").sample(network, x, NOISE))  # fmt: skip


def plain_adams(net, x, p, of, clamp):
    """k-diffusion's sample_lms in x/alpha, its coefficients by quad; DEIS where `of` is the logarithm."""
    at, eps = places(), []
    for i, level in enumerate(LEVELS):
        x0 = x0_of(x, net, level, clamp)
        alpha, sigma, _ = at[i]
        eps.append((x - alpha * x0) / sigma)
        a, s, _ = at[i + 1]
        rho = [sigma / alpha for alpha, sigma, _ in at[: i + 1]]
        n = 1 if of is math.log and s == 0 else min(p, i + 1)
        nodes = rho[len(rho) - n :]

        def basis(u, j, nodes=nodes):
            return math.prod((of(u) - of(v)) / (of(nodes[j]) - of(v)) for v in nodes if v != nodes[j])

        y = x / alpha
        for j in range(n):
            w = s / a - rho[-1] if n == 1 else quad(basis, rho[-1], s / a, args=(j,), epsabs=1e-13, epsrel=1e-13)[0]
            y = y + w * eps[len(eps) - n + j]
        x = a * y
    return x


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("cls, of", [(LMS, float), (DEIS, math.log)])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_adams_in_rho_and_in_its_logarithm(cls, of, p, clamp, backend):
    x = start(3, 5)
    got = cls(VP, levels=LEVELS, order=p, clamp=clamp).sample(network, x, NOISE)
    same(got, plain_adams(network, x, p, of, clamp), 1e-8)


def plain_plms(net, x, levels):
    """latent diffusion's PLMSSampler, eta = 0."""
    at, old = places(levels=levels), []

    def transfer(x, e, i):
        (a_t, s_t, _), (a, s, _) = at[i : i + 2]
        return a * (x - s_t * e) / a_t + s * e

    def eps(x, i):
        return net(x, torch.full((len(x),), levels[min(i, len(levels) - 1)]))

    for i in range(len(levels)):
        e = eps(x, i)
        if not old and len(levels) > 1:
            e_prime = (e + eps(transfer(x, e, i), i + 1)) / 2
        elif len(old) == 1:
            e_prime = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            e_prime = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        elif old:
            e_prime = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        else:
            e_prime = e
        x = transfer(x, e_prime, i)
        old.append(e)
    return x


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:4], [19, 5], [19]])
def test_plms_is_its_loop(levels, backend):
    x, plms = start(3, 5), PLMS(VP, levels=levels)
    same(plms.sample(network, x, NOISE), plain_plms(network, x, levels), 1e-9)
    assert plms.levels == tuple(levels if len(levels) == 1 else [*levels[:2], *levels[1:]])


def noises(levels, x):
    return [NOISE.fold_in(t).normal(x.shape, dtype=x.dtype) for t in levels]


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_lcm_is_its_loop(clamp, backend):
    """LCMScheduler.step."""
    levels, x = [19, 13, 4], start(3, 5)
    wanted, ends = x, [*levels[1:], None]
    for t, s, z in zip(levels, ends, noises(levels, x), strict=True):
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        f = c_skip * wanted + c_out * x0_of(wanted, network, t, clamp)
        wanted = f if s is None else VP.alpha[s] * f + VP.sigma[s] * z
    same(LCM(VP, levels=levels, clamp=clamp).sample(network, x, NOISE), wanted)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_its_loop(gamma, backend):
    """TCDScheduler.step, its eta."""
    levels, x = [19, 13, 4], start(3, 5)
    wanted, ends = x, [*levels[1:], None]
    for t, s, z in zip(levels, ends, noises(levels, x), strict=True):
        eps = network(wanted, torch.full((3,), t))
        x0 = (wanted - VP.sigma[t] * eps) / VP.alpha[t]
        if s is None:
            wanted = x0
            continue
        m = int((1 - gamma) * s)
        wanted = VP.alpha[m] * x0 + VP.sigma[m] * eps
        ratio = VP.alpha_bar[s] / VP.alpha_bar[m]
        wanted = ratio.sqrt() * wanted + (1 - ratio).sqrt() * z
    same(TCD(VP, levels=levels, gamma=gamma).sample(network, x, NOISE), wanted)
    if gamma == 0:
        same(wanted, df.samplers.DDIM(VP, levels=levels).sample(network, x, NOISE))


@pytest.mark.parametrize("sigma_data", [None, 0.5])
def test_consistency_is_algorithm_1(sigma_data, backend):
    karras, levels, x, e = df.Schedule.karras(18, 0.002, 80.0), [17, 9, 3], 80 * start(3, 5), 0.002
    wanted, ends = x, [*levels[1:], None]
    for t, s, z in zip(levels, ends, noises(levels, x), strict=True):
        r, F = float(karras.sigma[t]), network(wanted, torch.full((3,), t))
        f = (
            F
            if sigma_data is None
            else (0.25 * wanted / ((r - e) ** 2 + 0.25) + 0.5 * (r - e) / math.sqrt(r**2 + 0.25) * F)
        )
        wanted = f if s is None else f + math.sqrt(float(karras.sigma[s]) ** 2 - e**2) * z
    sampler = Consistency(karras, levels=levels, sigma_data=sigma_data, epsilon=e, predict="x0")
    same(sampler.sample(network, x, NOISE), wanted)


def test_euler_with_churn():
    """k-diffusion's sample_euler, s_churn."""
    karras = df.Schedule.karras(8, 0.05, 5.0)
    levels, x = [7, 5, 4, 2, 0], 5 * start(3, 5)
    sigmas, wanted = [*karras.sigma[levels].tolist(), 0.0], x
    for i, t in enumerate(levels):
        gamma = min(2.0 / 5, math.sqrt(2) - 1) if 0.1 <= sigmas[i] <= 4.0 else 0.0
        raised = sigmas[i] * (1 + gamma)
        z = NOISE.fold_in(t).normal(x.shape, dtype=x.dtype)
        wanted = wanted + 1.1 * math.sqrt(raised**2 - sigmas[i] ** 2) * z
        d = (wanted - network(wanted, torch.full((3,), raised, dtype=torch.float64))) / raised
        wanted = wanted + (sigmas[i + 1] - raised) * d
    euler = Euler(
        karras, levels=levels, S_churn=2.0, S_tmin=0.1, S_tmax=4.0, S_noise=1.1, conditioning="sigma", predict="x0"
    )
    same(euler.sample(network, x, NOISE), wanted)
    with pytest.raises(ValueError, match="euler: S_churn needs conditioning='sigma'"):
        Euler(karras, S_churn=1.0)


# Orders, to the last level, along the exact path of a Gaussian.

ORDERS = {
    "2m-heun": (DPMSolverPP2M, {"solver_type": "heun"}, (40, 80, 160), 2),
    "3m-published": (DPMSolverPP3M, {}, (80, 160, 320), 2),
    "3m-exact": (DPMSolverPP3M, {"exact": True}, (80, 160), 3),
    "lms-1": (LMS, {"order": 1}, (40, 80, 160), 1),
    "lms-2": (LMS, {"order": 2}, (40, 80, 160), 2),
    "deis-2": (DEIS, {"order": 2}, (40, 80, 160), 2),
    "deis-3": (DEIS, {}, (80, 160), 3),
    "plms": (PLMS, {}, (40, 80, 160), 2),
    "unipc-1": (UniPC, {"order": 1}, (40, 80, 160), 2),
    "unipc-2": (UniPC, {}, (40, 80, 160), 3),
    "unipc-2-bh1": (UniPC, {"variant": "bh1"}, (80, 160, 320), 3),
    "unipc-3": (UniPC, {"order": 3}, (160, 320), 4),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    cls, options, steps, wanted = ORDERS[name]

    def error(T):
        schedule = log_snr_levels(T, "vp")
        ends = pairs(schedule, (T - 1, 0))
        x = start(3, 16, 2)
        sampler = cls(schedule, levels=downwards(schedule)[:-1], to_level=0, **options)
        got = sampler.sample(GAUSSIAN.network(schedule), x, NOISE)
        return float((got - GAUSSIAN.flow_map(x, *ends)).abs().max())

    assert order([error(T) for T in steps]) == pytest.approx([wanted] * (len(steps) - 1), abs=0.25)


# The law of the samples.


def of_mixture(cls, kind="vp", **options):
    schedule = EVEN[kind]
    sampler = cls(schedule, levels=downwards(schedule), **options)
    return sampler.sample(MIXTURE.network(schedule), pure(schedule), SEED)


FINE = df.ContinuousSchedule.edm(0.02, 50.0).discretise(160, rho=7)
LAWS = {
    "unipc": lambda: of_mixture(UniPC),
    "unipc-3": lambda: of_mixture(UniPC, "ve", order=3),
    "3m": lambda: of_mixture(DPMSolverPP3M),
    "3m-sde": lambda: of_mixture(DPMSolverPP3M, "ve", eta=1.0),
    "2m-sde-heun": lambda: of_mixture(DPMSolverPP2MSDE, solver_type="heun"),
    "deis": lambda: of_mixture(DEIS),
    "lms": lambda: of_mixture(LMS, "ve"),
    "plms": lambda: of_mixture(PLMS),
    "euler-churn": lambda: Euler(FINE, steps=160, predict="x0", conditioning="sigma", S_churn=4.0).sample(
        edm_denoiser, pure(FINE), SEED
    ),
}


@pytest.mark.parametrize("run", LAWS.values(), ids=LAWS)
def test_samples_have_the_law_of_the_data(run):
    """At most twice the distance of exact samples."""
    assert MIXTURE.distance(run()) < 2 * MIXTURE.yardstick(16 * 128)


@pytest.mark.parametrize("cls", [Consistency, LCM])
def test_a_consistency_function_gives_the_data(cls):
    """The exact map of a Gaussian's ODE to the data: one look is enough, and more keep the law."""
    schedule = log_snr_levels(40, "vp", low=-6.0, high=6.0)

    def net(x, t):
        a, s = float(schedule.alpha[t[0]]), float(schedule.sigma[t[0]])
        return GAUSSIAN.flow_map(x, (a, s), (1.0, 0.0)).to(x.dtype)

    x = cls(schedule, levels=[39, 25, 10], predict="x0").sample(net, pure(schedule), SEED)
    assert GAUSSIAN.distance(x) < 2 * GAUSSIAN.yardstick(16 * 128)


def test_from_pure_noise():
    """Where there is no signal the first step is of first order, by v."""
    schedule, x = VP.zero_terminal_snr(), start(3, 5)

    def v(x, t):
        return 0.3 * torch.sin(x)

    for cls in (DPMSolverPP3M, UniPC):
        got = cls(schedule, steps=8, predict="v").sample(v, x, NOISE)
        assert got.isfinite().all()
        first = cls(schedule, steps=8, predict="v").step(0, x, v(x, None))
        same(first, df.samplers.DDIM(schedule, steps=8, predict="v").step(0, x, v(x, None)))
    with pytest.raises(ValueError, match="lms: has no finite value at level 19"):
        LMS(schedule, steps=8, predict="v")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UniPC(VP, steps=5, order=4), r"unipc: order must be in \[1, 3\], got 4"),
        (lambda: UniPC(VP, steps=5, variant="bh3"), "unipc: variant must be 'bh1' or 'bh2', got 'bh3'"),
        (lambda: LMS(VP, steps=5, order=0), r"lms: order must be in \[1, 4\], got 0"),
        (lambda: DPMSolverPP3M(VP, steps=5, eta=-1.0), "dpm_solver_pp_3m: eta must be finite and not negative"),
        (lambda: DPMSolverPP2M(VP, steps=5, solver_type="rk"), "solver_type must be 'midpoint' or 'heun', got 'rk'"),
        (lambda: TCD(VP, gamma=1.5), r"tcd: gamma must be in \[0, 1\], got 1.5"),
        (lambda: LCM(VP, sigma_data=0.0), "lcm: sigma_data must be positive and finite, got 0.0"),
        (lambda: Consistency(VP, sigma_data=-1.0), "consistency: sigma_data must be positive and finite, got -1.0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
