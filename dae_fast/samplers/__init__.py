"""Samplers: each one flat loop around the fused step. One Noise makes the whole run reproducible.

They run without gradients and leave a start given as a tensor as it is. The network is handed x in the
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

from .ancestral import ddim, ddpm, euler_ancestral
from .double_well import DoubleWell
from .dpm_solver import dpm_solver_pp_2m, dpm_solver_pp_2m_sde
from .flow import flow_euler, flow_midpoint
from .langevin import annealed_langevin, langevin
from .mixture import GaussianMixture
from .ode import euler, heun
from .predictor_corrector import predictor_corrector
from .probability_flow import probability_flow

__all__ = [
    "DoubleWell",
    "GaussianMixture",
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
    "predictor_corrector",
    "probability_flow",
]
