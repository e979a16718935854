"""The rectified-flow Diffusion Transformer (Sec. 3): the model that every later stage prunes, distils and exports.

    python dit.py                                    # toy: after vae.py, a laptop, minutes
    python dit.py --data FOLDER --out OUT            # real videos, with the VAE that vae.py trained on them
    torchrun --nproc_per_node=8 dit.py --preset paper --data FOLDER

out/vae.pt, clips -> out/latents/ (each clip encoded once), out/dit.pt, out/dit.png (samples)
"""
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from vae import (VAE, Abort, DataConfig, VAEConfig, flag, launch, learning_rate, load, make_optimizers, open_clips,
                 print0, progress, resume, save, score, setup, write_png)

# ------------------------------------------------------------------------------------------------ the model
# LTX-Video's transformer [9], module for module. It is exported to Core ML, so shapes inside are static ints.


@dataclass
class DiTConfig:
    depth: int = flag(6, "transformer blocks")
    width: int = flag(192, "channels of a token")
    num_heads: int = flag(3, "attention heads that each block has")
    head_dim: int = flag(64, "channels of a head; width / head_dim heads have slices of the rotary embedding")
    ffn_dim: int = flag(768, "channels inside the feed-forward network")
    text_dim: int = flag(64, "channels of a text embedding")
    in_channels: int = flag(128, "channels of the latents")
    final_norm: str = flag("rms", "last norm: rms, as the paper has throughout, or layer, as LTX's weights need")


def rms_norm(x, weight=None, eps=1e-6):
    """By hand: Core ML's conversion of torch's own goes wrong on small inputs."""
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def timestep_embedding(t, dim=256):
    """t (B,) in [0, 1] -> sinusoids of 1000 t (B, dim), cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope_tables(latent_shape, width, fps, compression=(8, 32), device=None):
    """Cosines and sines (N, width // 2) for the tokens of latents (f, h, w), in (f h w) order.

    Positions are (seconds / 20, y / 2048, x / 2048) of the video that the latents stand for.
    """
    f, h, w = latent_shape
    time, space = compression
    scale = time / fps / 20, space / 2048, space / 2048
    grid = torch.meshgrid(*(torch.arange(n, device=device) * s for n, s in zip((f, h, w), scale)), indexing="ij")
    position = torch.stack(grid, -1).reshape(-1, 1, 3)                                           # (N, 1, 3)
    frequencies = 10000 ** torch.linspace(0, 1, width // 6, device=device) * math.pi / 2
    angles = (frequencies[:, None] * (2 * position - 1)).flatten(1)                              # (N, width // 6 * 3)
    angles = F.pad(angles, (width // 2 - angles.shape[1], 0))         # the first width % 6 channels are left alone
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs of x (B, N, D) by the angles of cos, sin (N, D // 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with QK norm over all heads together; rotary embedding in self-attention only.

    head_ids says which slices of the rotary embedding the heads own: all of them, until pruning removes some.
    """

    def __init__(self, width, num_heads, head_dim):
        super().__init__()
        self.num_heads, self.head_dim, inner = num_heads, head_dim, num_heads * head_dim
        self.norm_q, self.norm_k = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.ones(inner))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner) for _ in range(3))
        self.to_out = nn.Linear(inner, width)
        self.register_buffer("head_ids", torch.arange(num_heads))

    def forward(self, x, context=None, bias=None, rope=None):
        """x (B, N, D), context (B, L, D) or None for x itself, bias (B, 1, 1, L), rope two of (N, heads, head_dim // 2)."""
        context = x if context is None else context
        q = rms_norm(self.to_q(x), self.norm_q, 1e-5)                                            # (B, N, inner)
        k = rms_norm(self.to_k(context), self.norm_k, 1e-5)                                      # (B, L, inner)
        v = self.to_v(context)
        if rope is not None:
            cos, sin = (table[:, self.head_ids].flatten(1) for table in rope)                    # (N, inner // 2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width, ffn_dim):
        super().__init__()
        self.up, self.down = nn.Linear(width, ffn_dim), nn.Linear(ffn_dim, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, cfg.width) / cfg.width ** .5)
        self.self_attn = Attention(cfg.width, cfg.num_heads, cfg.head_dim)
        self.cross_attn = Attention(cfg.width, cfg.num_heads, cfg.head_dim)
        self.ffn = FeedForward(cfg.width, cfg.ffn_dim)

    def forward(self, x, modulation, text, bias, rope):
        """x (B, N, D), modulation (B, 6, D), text (B, L, D), bias (B, 1, 1, L) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation).unsqueeze(2).unbind(1)
        x = x + gate1 * self.self_attn(modulate(rms_norm(x), shift1, scale1), rope=rope)
        x = x + self.cross_attn(x, text, bias)
        return x + gate2 * self.ffn(modulate(rms_norm(x), shift2, scale2))


class DiT(nn.Module):
    inner = {"blocks"}

    def __init__(self, cfg, fps=24., compression=(8, 32)):
        super().__init__()
        self.cfg, self.fps, self.compression = cfg, fps, compression
        self.table = nn.Parameter(torch.randn(2, cfg.width) / cfg.width ** .5)
        self.proj_in = nn.Linear(cfg.in_channels, cfg.width)
        self.time_mlp = nn.Sequential(nn.Linear(256, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 6 * cfg.width))
        self.text_mlp = nn.Sequential(nn.Linear(cfg.text_dim, cfg.width), nn.GELU("tanh"), nn.Linear(cfg.width, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.proj_out = nn.Linear(cfg.width, cfg.in_channels)

    def forward(self, latents, t, text_emb, text_mask):
        """latents (B, C, f, h, w), t (B,) in [0, 1], text_emb (B, L, E), text_mask (B, L) -> velocity like latents."""
        shape, cfg = latents.shape, self.cfg
        x = self.proj_in(latents.flatten(2).transpose(1, 2))                                     # (B, N, D)
        embedded = self.time_mlp(timestep_embedding(t).to(x.dtype))                              # (B, D)
        modulation = self.modulation(embedded).unflatten(-1, (6, cfg.width))                     # (B, 6, D)
        text = self.text_mlp(text_emb)                                                           # (B, L, D)
        bias = (text_mask.to(x.dtype)[:, None, None] - 1) * 1e4                                  # (B, 1, 1, L)
        rope = [table.to(x.dtype).unflatten(1, (-1, cfg.head_dim // 2))
                for table in rope_tables(shape[2:], cfg.width, self.fps, self.compression, x.device)]
        for block in self.blocks:
            x = block(x, modulation, text, bias, rope)
        x = rms_norm(x) if cfg.final_norm == "rms" else F.layer_norm(x, (cfg.width,), eps=1e-6)
        shift, scale = (self.table + embedded[:, None]).unsqueeze(2).unbind(1)
        return self.proj_out(modulate(x, shift, scale)).transpose(1, 2).unflatten(2, shape[2:])


# ------------------------------------------------------------------------------------------------ text
class WordEncoder:
    """Captions -> text_emb (B, L, E) and text_mask (B, L): a frozen random vector for each word, plus its position.

    Ours: stands in for T5 at toy scale. Any word has a vector; only those seen in training mean anything.
    """

    def __init__(self, dim, length):
        self.dim, self.length = dim, length
        self.position = timestep_embedding(torch.arange(length) / 1000, dim)

    def __call__(self, captions):
        emb, mask = torch.zeros(len(captions), self.length, self.dim), torch.zeros(len(captions), self.length)
        for i, words in enumerate(caption.lower().split()[:self.length] for caption in captions):
            for j, word in enumerate(words):
                emb[i, j] = self.vector(word) + self.position[j]
            mask[i, :len(words)] = 1
        return emb, mask

    def vector(self, word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        vector = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
        return vector * (self.dim ** .5 / vector.norm())


# ------------------------------------------------------------------------------------------------ rectified flow
def add_noise(x0, noise, t):
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * noise  # Eq. (1)


def flow_matching_loss(model, x0, noise, t, text_emb, text_mask):
    velocity = model(add_noise(x0, noise, t), t, text_emb, text_mask)
    return (velocity - (noise - x0)).square().mean()  # Eq. (2)


def euler_times(num_steps, shift=1.):
    """Times from 1 down to 0, num_steps + 1 of them; shift > 1 spends more of the steps near noise [6]."""
    t = torch.linspace(1, 0, num_steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


@torch.no_grad()
def sample(model, noise, text_emb, text_mask, times, guidance_scale=1.):
    """Integrate the model's velocity from noise (B, C, f, h, w) at times[0] to times[-1] with Euler's method.

    guidance_scale other than 1 runs the model on the caption and on no caption, and goes that much beyond the latter.
    """
    x, guided = noise, guidance_scale != 1
    if guided:
        text_emb, text_mask = (torch.cat([y, torch.zeros_like(y)]) for y in (text_emb, text_mask))
    for t, t_next in zip(times, times[1:]):
        velocity = model(torch.cat([x, x]) if guided else x, torch.full((len(text_emb),), t, device=x.device),
                         text_emb, text_mask)
        if guided:
            told, untold = velocity.chunk(2)
            velocity = untold + guidance_scale * (told - untold)
        x = x + (t_next - t) * velocity
    return x


# ------------------------------------------------------------------------------------------------ the latent cache
def fingerprint(vae):
    """Names the latent space of a VAE: latents of one space mean nothing to a model of another."""
    digest = hashlib.sha256()
    for name, value in vae.state_dict().items():
        if name.startswith(("encoder", "mean", "std")):
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_vae(out, device="cpu"):
    """The VAE of out/vae.pt with its configuration."""
    checkpoint = load(Path(out) / "vae.pt", "vae")
    cfg = VAEConfig(**{k: checkpoint["config"][k] for k in VAEConfig.__dataclass_fields__})
    vae = VAE(cfg)
    vae.load_state_dict(checkpoint["model"])
    return vae.eval().requires_grad_(False).to(device)


def encode_clips(cfg, vae, encode_text, rank, world, device):
    """Encode every clip once into memory-mapped arrays under out/latents; finished ones are kept, of any earlier run.

    Returns {kind of clip: (latents (n, C, f, h, w), text_emb (n, L, E), text_mask (n, L))} and the captions' words.
    """
    folder, clips = Path(cfg.out) / "latents", open_clips(vae.cfg)
    about = dict(vae=fingerprint(vae), data=str(cfg.data), clips=cfg.num_clips, text=[cfg.text_dim, cfg.text_length])
    note = folder / "about.json"
    if rank == 0 and not (note.exists() and json.loads(note.read_text())["about"] == about):
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        for kind, indices in clips.kinds.items():
            n, length = len(indices[:cfg.num_clips or None]), cfg.text_length
            latent = vae.latent_shape(1 if kind == "images" else vae.cfg.frames, vae.cfg.height, vae.cfg.width)
            for name, shape in dict(latents=(n, *latent), text=(n, length, cfg.text_dim), mask=(n, length), done=(n,)).items():
                np.lib.format.open_memmap(folder / f"{kind}.{name}.npy", "w+", np.float16, shape).flush()
        note.write_text(json.dumps(dict(about=about)))
    if world > 1:
        dist.barrier()
    cache, words = {}, set()
    for kind, indices in clips.kinds.items():
        latents, text, mask, done = (np.load(folder / f"{kind}.{name}.npy", mmap_mode="r+")
                                     for name in ("latents", "text", "mask", "done"))
        todo = [i for i in range(rank, len(done), world) if not done[i]]
        for n in progress(0, len(todo)):
            i = todo[n]
            video, caption = clips[indices[i]]
            latents[i] = vae.encode(video[None].to(device))[0].cpu().numpy()
            text[i], mask[i] = (y[0].numpy() for y in encode_text([caption]))
            done[i] = 1
        cache[kind] = latents, text, mask
    if world > 1:
        dist.barrier()
    return cache
