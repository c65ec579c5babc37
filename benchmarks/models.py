"""Three small networks eps_hat = net(x_t, t), of the kinds that people train: an MLP, a U-Net, a DiT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LevelEmbedding(nn.Module):
    """(B,) levels -> (B, width): sines of the level, then two linear layers."""

    frequency: Tensor

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.logspace(0, -4, features // 2))
        self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequency
        return self.layers(torch.cat((angle.sin(), angle.cos()), 1))


class MLP(nn.Module):
    """(B, D), three hidden layers, each scaled by the level."""

    def __init__(self, D: int, width: int = 512, depth: int = 3) -> None:
        super().__init__()
        self.level = LevelEmbedding(width)
        self.hidden = nn.ModuleList(nn.Linear(D if k == 0 else width, width) for k in range(depth))
        self.last = nn.Linear(width, D)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        scale = 1 + self.level(t)
        h = x_t
        for layer in self.hidden:
            h = F.silu(layer(h) * scale)
        return self.last(h)


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, level_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width_in), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.level = nn.Linear(level_width, width)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.level(level)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """(B, C, H, W): two resolutions down, two up, with skips (Ho et al. 2020, without attention)."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.level = LevelEmbedding(4 * width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down1 = ResidualBlock(width, width, 4 * width)
        self.down2 = ResidualBlock(width, 2 * width, 4 * width)
        self.middle = ResidualBlock(2 * width, 2 * width, 4 * width)
        self.up2 = ResidualBlock(4 * width, width, 4 * width)
        self.up1 = ResidualBlock(2 * width, width, 4 * width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        level = F.silu(self.level(t))
        h1 = self.down1(self.first(x_t), level)
        h2 = self.down2(F.avg_pool2d(h1, 2), level)
        h = self.middle(F.avg_pool2d(h2, 2), level)
        h = self.up2(torch.cat((F.interpolate(h, scale_factor=2.0), h2), 1), level)
        h = self.up1(torch.cat((F.interpolate(h, scale_factor=2.0), h1), 1), level)
        return self.last(F.silu(h))


class DiTBlock(nn.Module):
    """Attention and an MLP, shifted, scaled and gated by the level (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(level)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)

    def attention(self, x: Tensor) -> Tensor:
        B, N, width = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, width))


class DiT(nn.Module):
    """(B, C, S, S) latents in patches of 2 (Peebles and Xie 2023)."""

    def __init__(self, channels: int, size: int, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.level = LevelEmbedding(width)
        self.patches = nn.Conv2d(channels, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(size * size // 4, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 4 * channels)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        level = F.silu(self.level(t))
        patches = self.patches(x_t)
        x = patches.flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, level)
        x = self.last(self.norm(x)).transpose(1, 2).unflatten(2, patches.shape[2:])
        return F.pixel_shuffle(x, 2)
