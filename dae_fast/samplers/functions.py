"""The samplers' short forms, one call each. Written by `python -m tests.short_forms` from the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..continuous import ContinuousSchedule
from ..ops.conversions import Bounds
from ..ops.parameterisation import Parameterisation
from ..schedule import Schedule
from .ancestral import DDIM, DDPM, EulerAncestral
from .arguments import Network, Noises, Start
from .base import Callback
from .dpm_solver import DPMSolverPP2M, DPMSolverPP2MSDE
from .flow import FlowEuler, FlowMidpoint
from .langevin import AnnealedLangevin
from .levels import Conditioning, Schedules
from .network import Guidance
from .ode import Euler, Heun
from .predictor_corrector import PredictorCorrector
from .probability_flow import ProbabilityFlow


def ddpm(
    net: Network,
    x: Start,
    schedule: Schedule,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str = "small",
    steps: int | None = None,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling, one step per level unless `steps` or `levels` says otherwise.

    The short form of DDPM(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = DDPM(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def ddim(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 50,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Denoising diffusion implicit sampling.

    The short form of DDIM(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = DDIM(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def euler_ancestral(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 50,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler ancestral sampling: an Euler step in (x/alpha, sigma/alpha) to sigma_down, then noise of sigma_up.

    The short form of EulerAncestral(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = EulerAncestral(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        eta=eta,
        noise_scale=noise_scale,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def dpm_solver_pp_2m(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 20,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    solver_type: str = "midpoint",
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ 2M: the probability-flow ODE to second order at one look by the network a step.

    The short form of DPMSolverPP2M(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = DPMSolverPP2M(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        solver_type=solver_type,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def dpm_solver_pp_2m_sde(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 20,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    eta: float = 1.0,
    solver_type: str = "midpoint",
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++ 2M: the reverse SDE, its linear part and its noise exactly, the x0 estimate to second order.

    The short form of DPMSolverPP2MSDE(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = DPMSolverPP2MSDE(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        eta=eta,
        solver_type=solver_type,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def flow_euler(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "flow",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 50,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps x' + (tau_s - tau_t) * u, u = eps - x0 the velocity; net predicts u unless `predict` says otherwise.

    The short form of FlowEuler(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = FlowEuler(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def flow_midpoint(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "flow",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 25,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Midpoint steps: x' + (tau_s - tau_t) * u, u the velocity at the level in the middle, where an Euler step leads.

    The short form of FlowMidpoint(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = FlowMidpoint(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def annealed_langevin(
    score: Network,
    x: Start,
    schedule: Schedule,
    noise: Noises,
    *,
    predict: Parameterisation = "score",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = None,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    step_size: float = 2e-05,
    steps_per_level: int = 100,
    denoise: bool = True,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """NCSN sampling: Langevin at each level from the noisiest down, h_t = step_size/2 * (sigma_t/sigma_0)^2.

    The short form of AnnealedLangevin(schedule, ...).sample(score, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = AnnealedLangevin(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        step_size=step_size,
        steps_per_level=steps_per_level,
        denoise=denoise,
    )
    return sampler.sample(
        score,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def euler(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 50,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps x' + (sigma'_s - sigma'_t) * eps in x' = x/alpha and sigma' = sigma/alpha: DDIM with eta = 0.

    The short form of Euler(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = Euler(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        S_churn=S_churn,
        S_tmin=S_tmin,
        S_tmax=S_tmax,
        S_noise=S_noise,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def heun(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = 18,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's sampler: Euler steps as in Euler, each corrected by the slope where it leads (the last one is not).

    The short form of Heun(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = Heun(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        S_churn=S_churn,
        S_tmin=S_tmin,
        S_tmax=S_tmax,
        S_noise=S_noise,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def predictor_corrector(
    net: Network,
    x: Start,
    schedule: Schedules,
    noise: Noises,
    *,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int | None = None,
    levels: Sequence[int] | None = None,
    spacing: str = "linspace",
    from_level: int | None = None,
    to_level: int | None = None,
    conditioning: Conditioning = None,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norm: str = "sample",
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Song et al. 2021: from each level a predictor's step, and at the next `corrector_steps` of Langevin.

    The short form of PredictorCorrector(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = PredictorCorrector(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        levels=levels,
        spacing=spacing,
        from_level=from_level,
        to_level=to_level,
        conditioning=conditioning,
        predictor=predictor,
        corrector_steps=corrector_steps,
        snr=snr,
        norm=norm,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )


def probability_flow(
    net: Network,
    x: Start,
    schedule: ContinuousSchedule,
    noise: Noises,
    *,
    predict: Parameterisation = "score",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: Guidance = None,
    guidance_rescale: float = 0.0,
    self_condition: bool = False,
    variance: str | None = None,
    steps: int = 50,
    times: Tensor | Sequence[float] | None = None,
    method: str = "heun",
    denoise: bool = True,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
    gradients: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """dx/dt = f(t)*x - g(t)^2/2 * score(x, t) from t_max down, f the schedule's drift and g its diffusion.

    The short form of ProbabilityFlow(schedule, ...).sample(net, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = ProbabilityFlow(
        schedule,
        predict=predict,
        clamp=clamp,
        threshold=threshold,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        self_condition=self_condition,
        variance=variance,
        steps=steps,
        times=times,
        method=method,
        denoise=denoise,
    )
    return sampler.sample(
        net,
        x,
        noise,
        net_arguments=net_arguments,
        progress=progress,
        graph=graph,
        gradients=gradients,
        callback=callback,
    )
