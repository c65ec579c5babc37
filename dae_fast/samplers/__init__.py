"""Samplers: each an object with levels and a step, whose loop is `sample`. One Noise makes the whole run reproducible.

    ddim = df.samplers.DDIM(schedule, steps=50, predict="v", clamp=1.0)
    x = ddim.start((8, 3, 32, 32), noise)
    for i, t in enumerate(ddim.model_times(x)):     # callbacks, inpainting, guidance of one's own go here
        x = ddim.step(i, x, net(x, t), noise)       # one launch; return_x0=True gives (x, x0)
    x = ddim.sample(net, (8, 3, 32, 32), noise)     # the same loop, closed

A file of a method has its paper's coefficients, in float64, and no more; base.py has the rest once. The functions
(df.samplers.ddim and so on) are the short form, an object made, sampled from and thrown away.

`sample` runs without gradients and leaves a start given as a tensor as it is. The network is handed x in the
start's dtype, and so is the caller; between the steps x and the estimates are kept in the dtype of the
arithmetic, fp32 for fp16 and bf16, in which many small steps would be lost. Each x that a network is handed
is a tensor of its own. Row b of the result depends on the noise's id of sample b alone, so a batch sampled
in parts (Noise(seed, first_sample=...)) is the batch sampled at once.

graph=True runs the whole loop as one CUDA graph, with the same result and no work of the host between
the steps. The first call of a kind (network, shape, dtype, schedule, options) runs the network once more
and captures; later calls, with whatever x and noise, replay. The capture lives as long as the network
object: keep one, as a lambda written in the call is a new network each time. The network must not wait
for the device (.item(), copies from or to the host); parameters updated in place, or replaced, are seen,
but what it does in Python besides is done at capture alone.
"""

from .ancestral import DDIM, DDPM, EulerAncestral
from .base import Sampler
from .callbacks import Inpainting, Trajectory
from .consistency import LCM, TCD, Consistency
from .double_well import DoubleWell
from .dpm_solver import DPMSolverPP2M, DPMSolverPP2MSDE, DPMSolverPP3M
from .flow import FlowEuler, FlowMidpoint, FlowSDE
from .functions import (
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    euler,
    euler_ancestral,
    flow_euler,
    flow_midpoint,
    heun,
    predictor_corrector,
    probability_flow,
)
from .langevin import AnnealedLangevin, langevin
from .mcmc import mala, sgld, underdamped
from .mixture import GaussianMixture
from .multistep import DEIS, LMS, PLMS
from .ode import Euler, Heun
from .predictor_corrector import PredictorCorrector
from .probability_flow import ProbabilityFlow
from .repaint import RePaint
from .unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "LCM",
    "LMS",
    "PLMS",
    "TCD",
    "AnnealedLangevin",
    "Consistency",
    "DPMSolverPP2M",
    "DPMSolverPP2MSDE",
    "DPMSolverPP3M",
    "DoubleWell",
    "Euler",
    "EulerAncestral",
    "FlowEuler",
    "FlowMidpoint",
    "FlowSDE",
    "GaussianMixture",
    "Heun",
    "Inpainting",
    "PredictorCorrector",
    "ProbabilityFlow",
    "RePaint",
    "Sampler",
    "Trajectory",
    "UniPC",
    "annealed_langevin",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_midpoint",
    "heun",
    "langevin",
    "mala",
    "predictor_corrector",
    "probability_flow",
    "sgld",
    "underdamped",
]
