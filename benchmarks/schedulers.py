"""diffusers' schedulers in the loop of its pipelines, each the same map or distribution as the sampler of its name.

A pipeline sets the timesteps at every call, which a scheduler with a state needs: so does the loop.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import external
from .loops import FLOW, TEN, Network, Run


def runs() -> dict[str, Run]:
    """By the name of the sampler; none where diffusers cannot run here (external.missing says why).

    They draw their noise themselves.
    """
    if "diffusers" in external.missing():
        return {}
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        HeunDiscreteScheduler,
    )

    T = len(TEN)
    betas: dict[str, Any] = {"num_train_timesteps": T, "trained_betas": TEN.betas.tolist()}
    # "leading" starts from x/alpha, the others from noise of size sigma/alpha.
    scaled: dict[str, Any] = {**betas, "timestep_spacing": "leading"}
    every = {"num_inference_steps": T}
    levels = {"timesteps": list(range(T - 1, -1, -1))}  # its own would leave the last one out
    solver = DPMSolverMultistepScheduler(**betas)
    sde = DPMSolverMultistepScheduler(**betas, algorithm_type="sde-dpmsolver++")
    flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=len(FLOW))
    return {
        "ddpm": _pipeline(DDPMScheduler(**betas, clip_sample=False), every),
        "ddpm-learned": _pipeline(DDPMScheduler(**betas, clip_sample=False, variance_type="learned_range"), every),
        "ddim": _pipeline(DDIMScheduler(**betas, clip_sample=False), every),
        "euler": _pipeline(EulerDiscreteScheduler(**scaled), every),
        "euler_ancestral": _pipeline(EulerAncestralDiscreteScheduler(**scaled), every),
        "heun": _pipeline(HeunDiscreteScheduler(**scaled), every),
        "dpm_solver_pp_2m": _pipeline(solver, levels),
        "dpm_solver_pp_2m_sde": _pipeline(sde, levels),
        "flow_euler": _pipeline(flow, {"sigmas": FLOW.sigma.flip(0).tolist()}),
    }


def _pipeline(scheduler: Any, timesteps: dict[str, Any]) -> Run:
    scales = hasattr(scheduler, "scale_model_input")

    def run(net: Network, x: Tensor, normal: object) -> Tensor:
        scheduler.set_timesteps(**timesteps)
        if scales and scheduler.init_noise_sigma != 1:
            x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if scales else x
            x = scheduler.step(net(seen, t.expand(x.shape[:1])), t, x, return_dict=False)[0]
        return x

    return run
