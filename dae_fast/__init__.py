"""Fused kernels for everything a diffusion or denoising loop does outside the network."""

from . import library as library  # registers the torch.library ops
from . import nn, samplers, saved
from .coefficients import Level
from .continuous import ContinuousSchedule, LogitNormal, LogNormal, Mode, Uniform
from .info import info, noise_version, package_version
from .kernels.dispatch import backend_names, use_backend
from .nn import LevelStatistics
from .noise import Noise
from .ops import weighting
from .ops.brownian import BrownianNoise
from .ops.conversions import convert, to_eps, to_score, to_v, to_x0
from .ops.corruption import Masking, SaltAndPepper, corrupt, patch_mask
from .ops.embedding import fourier_embedding, timestep_embedding
from .ops.langevin import langevin_step
from .ops.losses import denoising_loss, noise_mse
from .ops.mcmc import mala_step, sgld_step, underdamped_step
from .ops.noising import add_noise
from .ops.parameterisation import EDM
from .ops.penalties import contraction, kl_sparsity, l1_penalty, sigmoid_contraction
from .ops.reparameterisation import reparameterise
from .ops.structured import OffsetNoise, PyramidNoise
from .ops.targets import dream, target
from .ops.variational import hybrid_loss, variational_bound
from .primitives import LevelOp, clamped, residual_loss, weighted_sum
from .samplers.stateless import step
from .schedule import Schedule, TimedSchedule

__version__ = package_version()
saved.allow()

__all__ = [
    "EDM",
    "BrownianNoise",
    "ContinuousSchedule",
    "Level",
    "LevelOp",
    "LevelStatistics",
    "LogNormal",
    "LogitNormal",
    "Masking",
    "Mode",
    "Noise",
    "OffsetNoise",
    "PyramidNoise",
    "SaltAndPepper",
    "Schedule",
    "TimedSchedule",
    "Uniform",
    "add_noise",
    "backend_names",
    "clamped",
    "contraction",
    "convert",
    "corrupt",
    "denoising_loss",
    "dream",
    "fourier_embedding",
    "hybrid_loss",
    "info",
    "kl_sparsity",
    "l1_penalty",
    "langevin_step",
    "mala_step",
    "nn",
    "noise_mse",
    "noise_version",
    "patch_mask",
    "reparameterise",
    "residual_loss",
    "samplers",
    "sgld_step",
    "sigmoid_contraction",
    "step",
    "target",
    "timestep_embedding",
    "to_eps",
    "to_score",
    "to_v",
    "to_x0",
    "underdamped_step",
    "use_backend",
    "variational_bound",
    "weighted_sum",
    "weighting",
]
