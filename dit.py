"""The rectified-flow Diffusion Transformer (Sec. 3): the model that every later stage prunes, distils and exports.

    python dit.py                                    # toy: after vae.py, a laptop, minutes
    python dit.py --data FOLDER --out OUT            # real videos, with the VAE that vae.py trained on them
    torchrun --nproc_per_node=8 dit.py --preset paper --data FOLDER --accumulate 16

out/vae.pt, clips -> out/latents/ (each clip encoded once), out/dit.pt, out/dit.png (samples)
"""
import copy
import hashlib
import json
import math
import shutil
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vae as vae_stage
from vae import (PAPER, RANK, TOY, VAE, WORLD, Abort, DataConfig, Stage, Training, VAEConfig, barrier, draw, draw_noise,
                 dry_run, flag, launch, load, make_optimizers, once, open_clips, prepare, print0, progress, read_ltx,
                 reconstruct_clips, resume, save, score, script_of, setup, share, summary, update, words, write_png)

# ------------------------------------------------------------------------------------------------ the model
# Ours: LTX-Video's transformer [9], module for module. It is exported to Core ML, so shapes inside are static ints.


@dataclass
class DiTConfig:
    depth: int = flag(6, "transformer blocks")
    width: int = flag(192, "channels of a token")
    num_heads: int = flag(6, "attention heads that each block has")
    head_dim: int = flag(32, "channels of a head; width / head_dim heads have slices of the rotary embedding")
    ffn_dim: int = flag(768, "channels inside the feed-forward network")
    text_dim: int = flag(64, "channels of a text embedding")
    in_channels: int = flag(128, "channels of the latents")
    final_norm: str = flag("rms", "last norm: rms, as the paper has throughout, or layer, as LTX's weights need")
    absolute: bool = flag(True, "Ours: tokens know their place in the clip, of which RoPE tells only differences")
    clean: bool = flag(True, "Ours: the network outputs clean latents, to which the velocity leads [Li & He 2025]")


def rms_norm(x, eps=1e-6):
    """By hand: Core ML's conversion of torch's own goes wrong on small inputs."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class RMSNorm(nn.Module):
    """Of queries or keys, over all heads together."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms_norm(x, self.eps) * self.weight


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
        self.norm_q, self.norm_k = RMSNorm(inner, 1e-5), RMSNorm(inner, 1e-5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner) for _ in range(3))
        self.to_out = nn.Linear(inner, width)
        self.register_buffer("head_ids", torch.arange(num_heads))

    def forward(self, x, context=None, bias=None, rope=None):
        """x (B, N, D), context (B, L, D) or None for x itself, bias (B, 1, 1, L), rope two of (N, heads, ...)."""
        context = x if context is None else context
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)  # (B, N or L, inner)
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
    inner = "blocks"  # which Muon trains

    def __init__(self, cfg, fps=24., compression=(8, 32)):
        super().__init__()
        self.cfg, self.fps, self.compression = cfg, fps, compression
        self.table = nn.Parameter(torch.randn(2, cfg.width) / cfg.width ** .5)
        self.proj_in = nn.Linear(cfg.in_channels, cfg.width)
        self.time_mlp = nn.Sequential(nn.Linear(256, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 6 * cfg.width))
        self.text_mlp = nn.Sequential(nn.Linear(cfg.text_dim, cfg.width), nn.GELU("tanh"),
                                      nn.Linear(cfg.width, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.proj_out = nn.Linear(cfg.width, cfg.in_channels)

    def embed(self, latents, t, text_emb, text_mask):
        """Inputs as in forward -> tokens (B, N, D), the embedded t (B, D), and what every block takes beside tokens."""
        x = self.proj_in(latents.flatten(2).transpose(1, 2))                                     # (B, N, D)
        embedded = self.time_mlp(timestep_embedding(t).to(x.dtype))                              # (B, D)
        modulation = self.modulation(embedded).unflatten(-1, (6, self.cfg.width))                # (B, 6, D)
        text = self.text_mlp(text_emb)                                                           # (B, L, D)
        bias = (text_mask[:, None, None] - 1) * 1e4                                              # (B, 1, 1, L)
        tables = rope_tables(latents.shape[2:], self.cfg.width, self.fps, self.compression, x.device)  # (N, D // 2)
        if self.cfg.absolute:
            x = x + torch.cat(tables, -1)
        rope = [table.unflatten(1, (-1, self.cfg.head_dim // 2)) for table in tables]            # (N, heads, ...)
        return x, embedded, (modulation, text, bias, rope)

    def unembed(self, x, embedded, latent_shape):
        """Tokens after the last block (B, N, D), the embedded t (B, D), (f, h, w) -> output (B, C, f, h, w)."""
        x = rms_norm(x) if self.cfg.final_norm == "rms" else F.layer_norm(x, (self.cfg.width,), eps=1e-6)
        shift, scale = (self.table + embedded[:, None]).unsqueeze(2).unbind(1)
        return self.proj_out(modulate(x, shift, scale)).transpose(1, 2).unflatten(2, latent_shape)

    def forward(self, latents, t, text_emb, text_mask):
        """latents (B, C, f, h, w), t (B,) in [0, 1], text_emb (B, L, E), text_mask (B, L) -> velocity like latents."""
        x, embedded, conditions = self.embed(latents, t, text_emb, text_mask)
        for block in self.blocks:
            x = block(x, *conditions)
        output = self.unembed(x, embedded, latents.shape[2:])
        if self.cfg.clean:  # latents have fewer directions than noise, which then need not pass the network. The clamp
            # bounds what an error of the output weighs; below t = .5 it aims at x_t - velocity / 2 in place of x0
            return (latents - output) / t.clamp(.5, 1).view(-1, 1, 1, 1, 1)
        return output


LTX_NAMES = (("transformer_blocks", "blocks"), ("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "to_out"),
             ("scale_shift_table", "table"), ("ff.net.0.proj", "ffn.up"),
             ("ff.net.2", "ffn.down"), ("time_embed.emb.timestep_embedder", "time_mlp"), ("linear_1", "0"),
             ("linear_2", "2"), ("time_embed.linear", "modulation.1"), ("caption_projection", "text_mlp"))


def load_ltx(path, cfg, compression=(8, 32)):
    """LTX-Video's transformer in diffusers' layout -> DiT of cfg, but for the sizes, which are read off the tensors.

    A head's size, which they do not tell, is that of config.json beside them, or else cfg's. Raises Abort where a
    tensor is missing, left over or does not fit.
    """
    try:
        tensors, folder = read_ltx(path, LTX_NAMES), Path(path) if Path(path).is_dir() else Path(path).parent
        said = json.loads(note.read_text()) if (note := folder / "config.json").exists() else {}
        cfg = replace(cfg, head_dim=said.get("attention_head_dim", cfg.head_dim))
        size = lambda name: tensors[name].shape[-1]  # of a bias, or of what a linear takes
        cfg = replace(cfg, depth=sum(name.endswith("ffn.up.weight") for name in tensors), width=size("proj_in.bias"),
                      num_heads=size("blocks.0.self_attn.to_q.bias") // cfg.head_dim, in_channels=size("proj_out.bias"),
                      ffn_dim=size("blocks.0.ffn.up.bias"), text_dim=size("text_mlp.0.weight"), final_norm="layer",
                      absolute=False, clean=False)
        model = DiT(cfg, cfg.fps, compression)
        model.load_state_dict(tensors | {k: v for k, v in model.state_dict().items() if k.endswith("head_ids")})
    except (KeyError, RuntimeError, ValueError) as error:
        raise Abort(f"{path} is not LTX-Video's transformer in diffusers' layout: {' '.join(str(error).split())[:200]}"
                    ) from None
    return model


# ------------------------------------------------------------------------------------------------ text
class WordEncoder(nn.Module):
    """Captions -> text_emb (B, L, E) and text_mask (B, L): a frozen random vector for each word, plus its position.

    Ours: stands in for T5 at toy scale. Any word has a vector; only those seen in training mean anything.
    """
    null = None  # nothing is taken off, as TextEncoder does

    def __init__(self, dim, length):
        super().__init__()
        self.dim, self.length = dim, length
        self.position = timestep_embedding(torch.arange(length) / 1000, dim)

    def forward(self, captions):
        emb, mask = torch.zeros(len(captions), self.length, self.dim), torch.zeros(len(captions), self.length)
        for i, caption in enumerate(captions):
            for j, word in enumerate(caption.lower().split()[:self.length]):
                emb[i, j], mask[i, j] = self.vector(word) + self.position[j], 1
        return emb, mask

    def vector(self, word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        vector = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
        return vector * (self.dim ** .5 / vector.norm())


@lru_cache  # each is read once
class TextEncoder(nn.Module):
    """Captions -> text_emb (B, L, E) and text_mask (B, L), by an encoder of transformers with last_hidden_state.

    Ours: less what the empty caption gets, so that zeros, which every stage takes for no caption, mean just that.
    """

    def __init__(self, name, dim, length):
        super().__init__()
        try:
            from transformers import AutoModelForTextEncoding, AutoTokenizer
        except ImportError:
            raise Abort("--text_encoder needs transformers: pip install transformers") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForTextEncoding.from_pretrained(name).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise Abort(f"--text_encoder {name} has no tokenizer and encoder: {error}") from None
        if self.model.config.hidden_size != dim:
            raise Abort(f"--text_encoder {name} makes {self.model.config.hidden_size} channels: set --text_dim to it")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.length, self.null = length, 0
        emb, mask = self([""])
        self.null = emb[mask > 0].mean(0)                                                        # (E,)

    def forward(self, captions):
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.model.device)
        emb = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.float().cpu()
        return (emb.float().cpu() - self.null) * mask[..., None], mask


def text_encoder(about):
    """The text encoder of a generator; about: a GeneratorConfig, or what load_dit says."""
    sizes = about.text_dim, about.text_length
    return TextEncoder(about.text_encoder, *sizes) if about.text_encoder else WordEncoder(*sizes)


# ------------------------------------------------------------------------------------------------ rectified flow
def add_noise(x0, noise, t):
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * noise  # Eq. (1)


def logit_normal(count, mean, std, device=None):
    """Draw times t (count,): sigmoids of a normal variable [6]. Ours: one from each of `count` equal slices of it."""
    u = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


def flow_matching_loss(model, x0, noise, t, text_emb, text_mask, target=None, dims=None):
    """Mean squared error, over dims or (None) all, of the velocity from noise - x0 or another target of that shape."""
    velocity = model(add_noise(x0, noise, t), t, text_emb, text_mask)
    return (velocity - (noise - x0 if target is None else target)).square().mean(dims)  # Eq. (2)


def euler_times(num_steps, shift=1., terminal=0.):
    """Times from 1 down to 0, num_steps + 1 of them; shift > 1 spends more of the steps near noise [6].

    terminal > 0: then stretched so that the last of several steps starts there, as LTX-Video's scheduler does.
    """
    t = torch.linspace(1, 0, num_steps + 1)
    t = shift * t / (1 + (shift - 1) * t)
    if terminal and num_steps > 1:
        t[:-1] = 1 - (1 - t[:-1]) * (1 - terminal) / (1 - t[-2])
    return t.tolist()


def advance(x, velocity, t, t_next, noise=None):
    """One step from t to t_next: Euler's or, with new noise, a stochastic one [diffusers].

    Ours: Euler's keeps the noise that x and the velocity imply, and with it the errors of earlier steps; new noise
    covers them for the model to mend.
    """
    if noise is None:
        return x + (t_next - t) * velocity
    return (1 - t_next) * (x - t * velocity) + t_next * noise  # add_noise to the clean clip that the velocity leads to


@torch.no_grad()
def sample(model, noise, text_emb, text_mask, times, guidance_scale=1., renew=None):
    """Integrate the model's velocity from noise (B, C, f, h, w) at times[0] to times[-1] in steps of advance.

    guidance_scale other than 1 runs the model on the caption and on no caption, and goes that much beyond the latter.
    renew() draws more such noise, which makes the steps stochastic.
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
        x = advance(x, velocity, t, t_next, renew and renew())
    return x


# ------------------------------------------------------------------------------------------------ the latent cache
def fingerprint(model, parts=("encoder", "mean", "std")):
    """Hash of a model's weights; not told which parts, of those that make a VAE's latents."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith(parts):
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_vae(folder, device="cpu", expected=None):
    """The VAE of folder/vae.pt; where one is expected, it must have that fingerprint."""
    if expected and not Path(folder, "vae.pt").is_file():
        raise Abort(f"{folder}/vae.pt is missing: copy there the one that the generator was trained with")
    checkpoint = load(Path(folder) / "vae.pt", "vae")
    vae = VAE(VAEConfig(**{f.name: checkpoint["config"][f.name] for f in fields(VAEConfig)}))
    vae.load_state_dict(checkpoint["model"])
    if expected not in (None, fingerprint(vae)):
        raise Abort(f"{folder}/vae.pt is not the VAE that the generator was trained with: run python dit.py again")
    return vae.eval().requires_grad_(False).to(device)


def encode_clips(cfg, vae, device):
    """Encode every clip once into memory-mapped arrays under out/latents; what an earlier run encoded is kept.

    cfg: a GeneratorConfig, or what load_dit says of a generator.
    Returns for each kind of clip the arrays latents (n, C, f, h, w), text_emb (n, L, E) and text_mask (n, L).
    """
    folder, clips, encode_text = Path(cfg.out) / "latents", open_clips(cfg), text_encoder(cfg)
    note = folder / "about.json"
    sizes = {kind: min(len(indices), cfg.num_clips) for kind, indices in clips.kinds.items()}
    names = map(clips.caption, range(1000)) if cfg.data == "synthetic" else [
        f"{f.name} {f.stat().st_size} {f.with_suffix('.txt').stat().st_size}" for f in clips.files]
    files = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    about = dict(vae=fingerprint(vae), data=cfg.data, files=files, clips=sizes, frames=cfg.frames, size=list(cfg.size),
                 fps=cfg.fps, text=[cfg.text_encoder, cfg.text_dim, cfg.text_length])
    there = json.loads(note.read_text()) if note.exists() else None
    if there and there["data"] != "synthetic" and there != about:  # days of work, perhaps
        changed = " and ".join(key for key in about if there.get(key) != about[key])
        raise Abort(f"{folder} was encoded with other {changed}: rename or remove it to encode again")
    barrier()  # all have read the note
    if RANK == 0 and there != about:
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        for kind, n in sizes.items():
            latent = vae.latent_shape(1 if kind == "images" else cfg.frames, *cfg.size)
            shapes = dict(latents=latent, text_emb=(cfg.text_length, cfg.text_dim), text_mask=(cfg.text_length,),
                          done=())
            size = 2 * n * sum(map(math.prod, shapes.values()))
            if size > shutil.disk_usage(folder).free:  # to write to a map on a full disk kills the process
                raise Abort(f"{folder} needs {size / 1e9:.1f} GB, which the disk has not: give another --out")
            for name, shape in shapes.items():
                np.lib.format.open_memmap(folder / f"{kind}.{name}.npy", "w+", np.float16, (n, *shape))
        note.write_text(json.dumps(about))
    barrier()
    cache = {}
    for kind, n in sizes.items():
        *cache[kind], done = (np.load(folder / f"{kind}.{name}.npy", mmap_mode="r+")
                              for name in ("latents", "text_emb", "text_mask", "done"))
        todo = np.flatnonzero(np.asarray(done) == 0)
        barrier()  # all have read it
        rows = np.array_split(todo, WORLD)[RANK].tolist()  # neighbours, as a page of the disk holds several rows
        loader = torch.utils.data.DataLoader([clips.kinds[kind][i] for i in rows], None, num_workers=cfg.workers,
                                             collate_fn=clips.clip, generator=torch.Generator())
        for i, (video, said), _ in zip(rows, loader, progress(0, len(rows))):
            for array, value in zip(cache[kind], (vae.encode(video[None].to(device)), *encode_text([said]))):
                array[i] = value[0].cpu().numpy()
            done[i] = 1
        for array in (*cache[kind], done):
            array.flush()
        print0(f"{folder}: {n} {kind}, {n - len(todo)} of them encoded before")
    barrier()
    encode_text.cpu()  # training needs the memory: T5-XXL has 19 GB
    return list(cache.values())


def draw_batch(cache, batch_size, key, device):
    """This process's share of x0 (B, C, f, h, w), text_emb (B, L, E), text_mask (B, L); the same for the same key."""
    kind, rows = draw([latents for latents, _, _ in cache], batch_size, key)
    return [torch.from_numpy(array[share(rows)]).float().to(device) for array in cache[kind]]


def training_batch(cfg, about, cache, device, key):
    """This process's share of a step's x0, noise, t, text_emb and text_mask. Ours: a tenth of captions is dropped."""
    count, (x0, text_emb, text_mask) = cfg.batch_size, draw_batch(cache, cfg.batch_size, key, device)
    told = share(torch.rand(count, 1, device=device) >= .1).float()                              # (B, 1)
    t = logit_normal(count, about.timestep_mean, about.timestep_std, device)
    noise = draw_noise(count, x0.shape[1:], device)
    return x0, noise, share(t), text_emb * told[..., None], text_mask * told


# ------------------------------------------------------------------------------------------------ training
@dataclass
class GeneratorConfig(DiTConfig, DataConfig):
    """What a generator is and makes; it travels with the checkpoints of every stage from here on."""
    text_encoder: str = flag("", "folder or Hugging Face name of T5 or another encoder; not given: a vector per word")
    num_clips: int = flag(4000, "clips that are encoded and trained on, at most", least=1)
    text_length: int = flag(12, "words or tokens of a caption, the rest is cut off")
    num_steps: int = flag(40, "denoising steps of a sample", least=1)
    guidance_scale: float = flag(1.25, "Ours: classifier-free guidance of the 40-step recipe")
    stochastic: bool = flag(True, "Ours: every step draws fresh noise; --no-stochastic: Euler's method alone")
    shift: float = flag(6., "Ours: above 1, more of the sampling steps go near noise [6]", least=1e-3)
    terminal: float = flag(0., "stretch the times so that the last step starts here, as LTX-Video does; 0: do not")
    timestep_mean: float = flag(1.5, "Ours: t is, in training, the sigmoid of a normal variable [6] of this mean",
                                least=-math.inf)
    timestep_std: float = flag(1.2, "standard deviation of that normal variable")


@dataclass
class Config(GeneratorConfig, Training):
    init: str = flag("", "LTX-Video's transformer to start from, folder or file; with --steps 0 to take as it is")
    steps: int = 3500
    lr: float = 3e-3
    ema: float = flag(.98, "Ours: rate of the weights' moving average, which is what later stages use")
    score_clips: int = flag(48, "unseen captions whose samples are scored at the end; 0 for none")
    save_every: int = flag(500, "steps between checkpoints, and between contact sheets out/dit.png")
    log_every: int = 100


# Ours: torch.compile takes half a minute, then a step of dit.py is 1.3 times, of prune.py 1.4 times as fast, on a CPU
# that has what it needs. Not for the VAE nor in distill.py, where it gains less than it costs.
COMPILED = TOY | dict(compile=sys.platform == "linux" and not torch.cuda.is_available() and bool(shutil.which("g++"))
                      and Path(sysconfig.get_path("include"), "Python.h").exists())
# Sec. 5: the server model, 2.0B. Ours: batch, guidance, shift, the text encoder, and this stage's part of 200K steps
PRESETS = {"toy": COMPILED, "paper": PAPER | dict(
    frames=121, size=(576, 1024), fps=24., depth=28, width=2048, num_heads=32, head_dim=64, ffn_dim=8192, text_dim=1024,
    text_encoder="google/t5-v1_1-large", text_length=128, absolute=False, clean=False, num_clips=10 ** 9, workers=4,
    steps=148_000, batch_size=1024, save_every=200, lr=5e-5, timestep_mean=0., timestep_std=1., ema=.9999, shift=8.,
    guidance_scale=3., stochastic=False)}
MOBILE = dict(depth=20, num_heads=20, ffn_dim=6144, num_steps=4, guidance_scale=1., shift=1.)  # pruned and distilled


def save_dit(path, step, cfg, about, model, ema, optimizers, **others):
    """Write a generator's checkpoint; about: a GeneratorConfig's values by name, and its VAE, compression and words.

    others: modules that train beside the generator, by name, so that resume finds them.
    """
    save(path, stage=path.stem, step=step, config=asdict(cfg), model=model.state_dict(), ema=ema.state_dict(),
         generator={k: v for k, v in vars(about).items() if k != "out"},
         optimizer=[optimizer.state_dict() for optimizer in optimizers],
         **{name: module.state_dict() for name, module in others.items()})


def build(about):
    """The generator, untrained, that `about` describes."""
    return DiT(DiTConfig(**{f.name: getattr(about, f.name) for f in fields(DiTConfig)}), about.fps, about.compression)


def untrained(device, **changes):
    """The paper's server model but for the changes, its VAE, and what it is; to measure, or to export."""
    about = Config(**PRESETS["paper"] | dict(text_encoder="") | changes)
    with torch.device(device):
        vae = VAE(vae_stage.Config(**vae_stage.PRESETS["paper"]))
        about.compression = vae.compression
        return build(about).eval().requires_grad_(False), vae.eval().requires_grad_(False), about


@dataclass
class LaterStage(Stage):
    data: str = flag("", "synthetic, or a folder as vae.py takes; not given: what the generator was trained on")


def load_dit(path, device="cpu", data=""):
    """The averaged model of dit.py's checkpoint or a later stage's, and what it is and makes, by name."""
    checkpoint = load(path)
    if "generator" not in checkpoint:
        raise Abort(f"{path} was made by vae.py and is no generator")
    about = SimpleNamespace(**checkpoint["generator"] | {"out": str(Path(path).parent)})
    about.data = data or about.data
    model = build(about)
    try:
        model.load_state_dict(checkpoint["ema"])
    except RuntimeError:
        raise Abort(f"{path}: the weights do not have the sizes that it says, such as text_dim {about.text_dim}: "
                    f"run python {script_of(checkpoint['stage'])} again") from None
    return model.eval().requires_grad_(False).to(device), about


def find_generator(folder, checkpoint=""):
    """Path of the named checkpoint, or of the latest stage's in a folder."""
    stages = [Path(folder) / f"{stage}.pt" for stage in ("distilled", "pruned", "dit")]
    return Path(checkpoint or next((path for path in stages if path.exists()), stages[-1]))


def recipe(about):
    """Times, guidance scale, and whether each step draws noise, that a generator samples with unless told otherwise."""
    return euler_times(about.num_steps, about.shift, about.terminal), about.guidance_scale, about.stochastic


def evaluations(about):
    """Evaluations of the network for a clip: its steps, twice as many with guidance."""
    return about.num_steps * (1 + (about.guidance_scale != 1))


def test_captions(cfg, split, count):
    """Captions of a split and the attributes (n, 4) that they say; of a folder, its own captions and None.

    full: of the 96 combinations that no clip was trained on; open: of other ones, with two attributes left out.
    """
    clips = open_clips(cfg, split)
    if cfg.data != "synthetic":
        return [clips.read_caption(clips.files[i % len(clips.files)]) for i in range(count)], None
    return [clips.caption(i) for i in range(count)], torch.stack([clips.attributes(i)[1] for i in range(count)])


@torch.no_grad()
def make_videos(model, vae, about, captions, *how, seed=0):
    """Captions -> videos (B, 3, F, H, W) in [-1, 1] on the CPU, of about's size. Clip i's noise has seed + i.

    how: times, guidance scale and whether steps draw noise, if not as recipe(about).
    """
    device, shape, videos = model.proj_in.weight.device, vae.latent_shape(about.frames, *about.size), []
    times, guidance_scale, stochastic = how or recipe(about)
    for i in range(0, len(captions), 32):
        text = [y.to(device) for y in text_encoder(about)(captions[i:i + 32])]
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(text[0]))]
        noise = lambda: torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        latents = sample(model, noise(), *text, times, guidance_scale, noise if stochastic else None)
        videos += [vae.decode(z[None])[0].float().clamp(-1, 1).cpu() for z in latents]
    return torch.stack(videos)


def score_samples(model, vae, about, split, count, *how):
    """vae.score of samples for `count` captions of a test set of the synthetic clips."""
    captions, said = test_captions(about, split, count)
    return score(make_videos(model, vae, about, captions, *how), said)


@once
def contact_sheet(path, model, vae, about, bf16):
    """Write a film of samples for the first eight of the full test set's captions."""
    with torch.autocast(model.table.device.type, torch.bfloat16, enabled=bf16):
        video = make_videos(model, vae, about, test_captions(about, "full", 8)[0])
    write_png(path, rearrange(video, "(r k) c f h w -> c f (r h) (k w)", r=2), about.fps)


@torch.no_grad()
def average(ema, model, rate, step):
    """Move the averaged weights towards the model's; Ours: faster while they are young."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(rate, (1 + step) / (10 + step)))


def step_inputs(about, latent_shape, n, device=None):
    """What the DiT takes, for n clips whose latents have that shape (f, h, w)."""
    x = torch.randn(n, about.in_channels, *latent_shape, device=device)
    return x, x[:, 0, 0, 0, 0], x.new_ones(n, about.text_length, about.text_dim), x.new_ones(n, about.text_length)


def describe(cfg, n):
    """What vae.dry_run counts, for n clips at a time."""
    (model, ema), shape = (DiT(cfg) for _ in "12"), VAE(VAEConfig()).latent_shape(cfg.frames, *cfg.size)[1:]
    prepare(model.blocks, cfg)
    x, *rest = step_inputs(cfg, shape, n)
    return ([model], [ema], [(cfg.steps, partial(flow_matching_loss, model), (x, x, *rest))],
            lambda: model(*step_inputs(cfg, shape, 1)))


def main(cfg):
    """Train the DiT; returns the figures of its summary line."""
    if not cfg.head_dim or cfg.head_dim % 2 or cfg.width % cfg.head_dim or cfg.num_heads * cfg.head_dim > cfg.width:
        raise Abort(f"--width {cfg.width} must be a multiple of --head_dim {cfg.head_dim}, which is even, and at least "
                    f"--num_heads {cfg.num_heads} times that")
    if cfg.text_dim % 2 and not cfg.text_encoder:
        raise Abort(f"--text_dim {cfg.text_dim} must be even, as half of it are sines of a word's place")
    if cfg.final_norm not in ("rms", "layer"):
        raise Abort(f"--final_norm {cfg.final_norm}: choose rms or layer")
    if cfg.dry_run:
        return dry_run("DIT", cfg, partial(describe, cfg))
    began, device, path = time.time(), setup(cfg), Path(cfg.out) / "dit.pt"
    if cfg.init and not cfg.text_encoder:
        raise Abort("--init: LTX's weights know no captions but T5's: give the folder of their --text_encoder")
    vae = load_vae(cfg.out, device)
    with device:
        model = load_ltx(cfg.init, cfg, vae.compression) if cfg.init else DiT(cfg, cfg.fps, vae.compression)
    cfg = model.cfg
    shape = vae.latent_shape(cfg.frames, *cfg.size)
    if shape[0] != cfg.in_channels:
        raise Abort(f"--in_channels {cfg.in_channels} must be {shape[0]}, as of the latents")
    print0(f"dit: depth {cfg.depth}, width {cfg.width}, {cfg.num_heads} heads of {cfg.head_dim}, FFN {cfg.ffn_dim}: "
           f"{sum(p.numel() for p in model.parameters()):,} parameters; latents {shape}; {WORLD} x {device.type}")
    about = SimpleNamespace(**{f.name: getattr(cfg, f.name) for f in fields(GeneratorConfig)}, vae=fingerprint(vae),
                            compression=vae.compression, words=[] if cfg.text_encoder else words(cfg, cfg.text_length))
    if cfg.init:  # our embeddings are less than LTX's by the empty caption's
        with torch.no_grad():
            model.text_mlp[0].bias += model.text_mlp[0].weight @ text_encoder(cfg).null.to(device)
    if not cfg.steps:
        if not cfg.init:
            raise Abort("--steps 0 trains nothing: say with --init which weights to take as they are")
        save_dit(path, 0, cfg, about, model, model, [])
        figures = dict(parameters=sum(p.numel() for p in model.parameters()))
        return summary("DIT", figures, began, "python sample.py, or python prune.py --data FOLDER")
    cache = encode_clips(cfg, vae, device)
    ema, optimizers = copy.deepcopy(model).requires_grad_(False), make_optimizers(model, cfg.lr, cfg.muon_lr)
    start, losses = resume(path, cfg, {"model": model, "ema": ema}, optimizers), []
    prepare(model.blocks, cfg)
    for step in progress(start, cfg.steps):
        batch = training_batch(cfg, cfg, cache, device, (cfg.seed, step))
        loss, = update(partial(flow_matching_loss, model), batch, optimizers, step, cfg)
        average(ema, model, cfg.ema, step)
        losses = [*losses, loss.item()][-cfg.log_every:]
        if (step + 1) % cfg.log_every == 0:
            print0(f"step {step + 1}/{cfg.steps}  loss {np.mean(losses):.4f}  {(time.time() - began) / 60:.1f} min")
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_dit(path, step + 1, cfg, about, model, ema, optimizers)
            contact_sheet(path.with_suffix(".png"), ema, vae, about, cfg.bf16)
    # noise and normalised latents have variance 1; a resumed run that was finished has no losses
    figures = dict(loss=float(np.mean(losses)), loss_of_zero=2.) if losses else {}
    if cfg.score_clips and cfg.data == "synthetic":
        _, said = test_captions(cfg, "full", cfg.score_clips)
        _, again = reconstruct_clips(vae, open_clips(cfg, "full"), range(cfg.score_clips))
        figures |= dict(semantic=score_samples(ema, vae, about, "full", cfg.score_clips)["semantic"],
                        semantic_reconstructed=score(again, said)["semantic"])
    print0(f"{path.with_suffix('.png')} shows:", *test_captions(cfg, "full", 8)[0], sep="\n  ")
    scored = " --score 192" * (cfg.data == "synthetic")
    return summary("DIT", figures, began, f"python sample.py{scored}, then python prune.py")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
