"""Adversarial step distillation (Sec. 4.3, Table 5): 4 network evaluations without guidance instead of 80.

    python distill.py                                # toy: after dit.py or prune.py, a laptop, minutes
    python distill.py --targets 0 --warm_steps 0     # as printed: L_recon towards x0, and no warm start
    python distill.py --ablation                     # Table 5's heads, each part of the method alone, three seeds
    torchrun --nproc_per_node=8 distill.py --preset paper --accumulate 8

out/pruned.pt or out/dit.pt -> out/distilled.pt, out/distilled.png (samples before above those after)
"""
import copy
import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import dit
from dit import (Attention, Block, DiT, LaterStage, add_noise, average, draw_batch, encode_clips, euler_times,
                 evaluations, fingerprint, load_dit, load_vae, make_videos, recipe, rms_norm, sample, save_dit,
                 score_samples, step_inputs, test_captions, text_encoder)
from vae import (PAPER, TOY, VAE, WORLD, Abort, Training, VAEConfig, draw_noise, dry_run, flag, launch, load,
                 make_optimizers, median_ms, once, prepare, print0, progress, resume, seeded, setup, share, summary,
                 update, write_png)


@dataclass
class Config(LaterStage, Training):
    init: str = flag("", "generator to distil; not given: out/pruned.pt, or out/dit.pt if there is none")
    teacher: str = flag("", "generator that samples targets; not given: dit.pt beside init, or else init itself")
    targets: int = flag(25, "Ours: batches (all in memory) of which the teacher samples x_t at each t of T and "
                            "from each a target of L_recon; 0: noised clips and x0, as printed")
    target_steps: int = flag(8, "guided steps, spaced like T, in which the teacher makes a target", least=1)
    guidance_scale: float = flag(1.5, "guidance of the teacher's steps; the student has none")
    warm_steps: int = flag(400, "Ours: steps towards the targets alone, before the adversary joins")
    warm_lr: float = flag(1e-3, "AdamW's learning rate in these")
    warm_muon_lr: float = flag(.01, "Muon's")
    steps: int = 200
    lr: float = flag(1e-4, "the generator's learning rate, AdamW")
    head_lr: float = flag(2e-3, "the discriminator's heads'")
    muon_lr: float = 0.
    ema: float = flag(.95, "rate of the generator's moving average")
    num_steps: int = flag(4, "denoising steps that the generator is distilled to: k, the size of T", least=1)
    shift: float = flag(3., "Ours: above 1, T, which the paper does not give, is nearer to noise; 1: 1, .75, .5, .25",
                        least=1e-3)
    stochastic: bool = flag(True, "Ours: its steps draw fresh noise, as x_t does in training; --no-stochastic: Euler's")
    trunk: int = flag(3, "Ours: K, the generator's first blocks, which the discriminator inherits frozen")
    head: str = flag("dit", "discriminator's heads: dit, resblock2d (SnapGen-V's) or resblock3d (PCM's)")
    adversarial_weight: float = flag(1., "Ours: length of L_adv's gradient at a fake clip; L_recon's is at most 1")
    reconstruction_weight: float = flag(1., "Ours: weight of L_recon")
    huber: float = flag(.04, "Ours: c of the pseudo-Huber loss", least=1e-9)
    ablation: bool = flag(False, "train each part of the method and each head alone, and print the table")
    seeds: int = flag(3, "runs a row of the ablation", least=1)
    score_clips: int = flag(48, "captions of each test set whose samples are scored; 0 for none")


PRESETS = {"toy": TOY, "paper": PAPER | dict(  # Sec. 5. Ours: the batch, which the paper leaves open, and K
    targets=0, warm_steps=0, warm_lr=1e-6, warm_muon_lr=0., steps=20_000, batch_size=64, shift=1., stochastic=False,
    lr=1e-6, head_lr=1e-4, trunk=10, gpus=64)}


# ------------------------------------------------------------------------------------------------ the discriminator
class DiTHead(nn.Module):
    """The paper's: a learnable DiT block (full 3D self-attention, cross-attention, FFN), then an MLP with SiLU.

    Ours: one block, and a score for each token.
    """

    def __init__(self, cfg):
        super().__init__()
        self.block = Block(cfg)
        self.mlp = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.SiLU(), nn.Linear(cfg.width, 1))

    def forward(self, x, latent_shape, conditions):
        """Tokens after a frozen block (B, N, D), (f, h, w), a block's conditions -> one score a token (B, N)."""
        return self.mlp(rms_norm(self.block(x, *conditions))).squeeze(2)


def group_norm(x):
    """Of about 16 channels a group; flat, as torch 2.13's crashes backwards where channels come last in memory."""
    return F.group_norm(x.flatten(2), math.gcd(x.shape[1] // 16, x.shape[1])).view(x.shape)


class ResBlock2DHead(nn.Module):
    """SnapGen-V's [49]: a residual block of 2D convolutions in each latent frame, then attention along time."""

    def __init__(self, cfg):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(cfg.width, cfg.width, 3, padding=1) for _ in range(2))
        self.attention = Attention(cfg.width, cfg.num_heads, cfg.head_dim)
        self.out = nn.Linear(cfg.width, 1)

    def forward(self, x, latent_shape, conditions):
        f, h, w = latent_shape
        x = rearrange(x, "b (f h w) d -> (b f) d h w", f=f, h=h)
        x = x + self.conv2(F.silu(group_norm(self.conv1(F.silu(group_norm(x))))))
        x = rearrange(x, "(b f) d h w -> (b h w) f d", f=f)
        x = self.out(F.silu(x + self.attention(rms_norm(x))))
        return rearrange(x, "(b h w) f 1 -> b (f h w)", h=h, w=w)


class ResBlock3DHead(nn.Module):
    """PCM's [45], extended to 3D convolutions as in Sec. 5.3: conv, norm, LeakyReLU; the same as a residual; 1x1x1."""

    def __init__(self, cfg):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv3d(cfg.width, cfg.width, 3, padding=1) for _ in range(2))
        self.out = nn.Linear(cfg.width, 1)

    def forward(self, x, latent_shape, conditions):
        x = x.transpose(1, 2).unflatten(2, latent_shape)                                         # (B, D, f, h, w)
        x = F.leaky_relu(group_norm(self.conv1(x)))
        x = x + F.leaky_relu(group_norm(self.conv2(x)))
        return self.out(x.flatten(2).transpose(1, 2)).squeeze(2)


HEADS = {"dit": DiTHead, "resblock2d": ResBlock2DHead, "resblock3d": ResBlock3DHead}


class Discriminator(nn.Module):
    """The generator's embeddings and first K blocks, frozen, and learnable heads: the paper's after the K-th block;
    Ours: its rivals' after each of them, as their sources have it. Only the trunk tells the rivals time and caption."""

    def __init__(self, generator, trunk, head):
        super().__init__()
        if head not in HEADS:
            raise Abort(f"--head {head}: choose from {', '.join(HEADS)}")
        if not 0 < trunk <= generator.cfg.depth:
            raise Abort(f"--trunk {trunk}: the generator has {generator.cfg.depth} blocks, take 1 to all of them")
        self.generator, self.trunk = generator, trunk
        self.heads = nn.ModuleList(HEADS[head](generator.cfg) for _ in range(1 if head == "dit" else trunk))
        if head == "dit":  # Ours: its attention heads take the slices of RoPE that the K-th block's have
            self.heads[0].block.self_attn.head_ids = generator.blocks[trunk - 1].self_attn.head_ids

    def forward(self, latents, t, text_emb, text_mask):
        """latents (B, C, f, h, w) of noise level t (B,), captions -> scores (B, heads * N): -1 is real, +1 is fake."""
        x, _, conditions = self.generator.embed(latents, t, text_emb, text_mask)
        after = [x := block(x, *conditions) for block in self.generator.blocks[:self.trunk]]
        scores = [head(x, latents.shape[2:], conditions) for head, x in zip(self.heads, after[-len(self.heads):])]
        return torch.cat(scores, 1)


# ------------------------------------------------------------------------------------------------ the losses
def draw_pairs(count, k, device=None):
    """Indices (count,) of t among T_1 .. T_k, and of t' among the later ones and 0, both uniform.

    Ours: the 0, without which T_k, where the last step starts, has no t'; t uniform first, as of all pairs few start at
    T_k; no logit-normal: the paper gives its m and s, but not what it draws.
    """
    i = torch.randint(k, (count,), device=device)
    return i, i + 1 + (torch.rand(count, device=device) * (k - i)).long()


def jump(x_t, velocity, t, t_next):
    """One Euler step of each clip from its t (B,) to its t_next (B,)."""
    return x_t + (t_next - t).view(-1, 1, 1, 1, 1) * velocity  # Eq. (7), fake


def discriminator_loss(real, fake):
    """Scores of real and fake clips -> loss. Real is driven to -1 and fake to +1, as the paper prints it."""
    return F.relu(1 + real).mean() + F.relu(1 - fake).mean()  # Eq. (8)


def reconstruction_loss(x0_hat, x0, c):
    """Pseudo-Huber distance of whole clips, in expectation; its gradient at each clip is shorter than 1 / B."""
    return ((x0_hat - x0).flatten(1).square().sum(1) + c ** 2).sqrt().mean() - c  # Eq. (9), reconstruction


def set_length(gradient, weight, batch_size):
    """Ours: L_adv's gradient at each fake clip, made as long as L_recon's at most, 1 / B, times a weight, so that one
    number weighs the two. The paper gives none, and a fixed one is too much later on, as D's slope grows."""
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1).clamp(min=1e-12)
    return weight / batch_size * gradient / length


# ------------------------------------------------------------------------------------------------ training
class Adversaries:
    """The losses of a step, in which first the discriminator's heads are trained, then the generator."""

    def __init__(self, cfg, generator, discriminator=None):
        self.cfg, self.generator, self.discriminator = cfg, generator, discriminator

    def fakes(self, x_t, t, t_next, *text):
        """Fake clips at t_next, and the clean ones that the generator guesses."""
        velocity = self.generator(x_t, t, *text)
        return jump(x_t, velocity, t, t_next), jump(x_t, velocity, t, 0 * t)

    def discriminator_loss(self, x_t, t, t_next, x0, noise, _, *text):
        """The heads' loss, the mean scores of real and fake clips, and the share on the right side of 0."""
        with torch.no_grad():
            fake, _ = self.fakes(x_t, t, t_next, *text)
        real = add_noise(x0, noise, t_next)  # Eq. (7), real; Ours: noise of its own
        self.discriminator.heads.requires_grad_(True)
        both = self.discriminator(torch.cat([real, fake]), *(torch.cat([y, y]) for y in (t_next, *text)))
        d_real, d_fake = both.float().chunk(2)
        right = torch.cat([d_real < 0, d_fake > 0]).float()
        return torch.stack([discriminator_loss(d_real, d_fake), d_real.mean(), d_fake.mean(), right.mean()])

    def generator_loss(self, x_t, t, t_next, x0, noise, target, *text):
        """The generator's loss, and its parts; L_recon alone where there is no discriminator."""
        fake, x0_hat = self.fakes(x_t, t, t_next, *text)
        reconstruction = reconstruction_loss(x0_hat, target, self.cfg.huber)
        if not self.discriminator:
            return reconstruction
        self.discriminator.heads.requires_grad_(False)
        fake.register_hook(partial(set_length, weight=self.cfg.adversarial_weight, batch_size=self.cfg.batch_size))
        adversarial = self.discriminator(fake, t_next, *text).float().mean()  # Eq. (9), adversarial
        return torch.stack([adversarial + self.cfg.reconstruction_weight * reconstruction, adversarial, reconstruction])


def load_teacher(cfg, init, about, device):
    """What makes L_recon's targets, if anything does."""
    if not cfg.targets:
        if cfg.teacher:
            raise Abort(f"--teacher {cfg.teacher} makes targets, of which there are none: give --targets, too")
        return None
    beside = Path(about.out) / "dit.pt"
    path = cfg.teacher or (beside if beside.exists() else init)
    teacher, its = load_dit(path, device=device)
    if (its.vae, its.text_encoder, its.text_dim) != (about.vae, about.text_encoder, about.text_dim):
        raise Abort(f"{path} has another VAE or text encoder than {init}: name another --teacher or make {init} again")
    print0(f"{path} makes the targets, in {cfg.target_steps} steps of guidance {cfg.guidance_scale:g}")
    return teacher


@torch.no_grad()
def teach(cfg, teacher, cache, device, i):
    """Lesson i: x_t at each t of T (k, B, C, f, h, w), the clean clips they lead to, and real ones with captions.

    Ours: x_t is where guided steps of the teacher lead from noise along T, not a noised clip: so the student will meet
    it when it samples [54]. From each a target is sampled in finer steps. The random numbers are the lesson's own, so
    that a resumed run, which makes it later, makes the same.
    """
    times, finer = euler_times(cfg.num_steps, cfg.shift), euler_times(cfg.target_steps, cfg.shift)
    run = lambda *x: torch.cat([teacher(*part) for part in zip(*(y.chunk(cfg.accumulate) for y in x))])
    bf16 = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cfg.bf16)
    with seeded((cfg.targets * cfg.seed + i) % 2 ** 63, device), bf16:
        x0, *text = draw_batch(cache, cfg.batch_size, (cfg.seed, i), device)
        noise = partial(draw_noise, cfg.batch_size, x0.shape[1:], device)
        how = cfg.guidance_scale, noise if cfg.stochastic else None
        path = [noise()]
        for step in zip(times, times[1:-1]):
            path.append(sample(run, path[-1], *text, step, *how))
        targets = [sample(run, x_t, *text, [t * s for s in finer], *how) for x_t, t in zip(path, times)]
    return [y.cpu() for y in (torch.stack(path), torch.stack(targets), x0, *text)]


def training_batch(cfg, lesson, cache, device, step):
    """This process's share of a step's x_t, t, t', x0, noise, target of L_recon, and captions."""
    times = torch.tensor(euler_times(cfg.num_steps, cfg.shift), device=device)
    i, j = map(share, draw_pairs(cfg.batch_size, cfg.num_steps, device))
    noise = lambda: draw_noise(cfg.batch_size, x0.shape[1:], device)
    if cfg.targets:
        path, targets, x0, *text = (y.to(device) for y in lesson(step % cfg.targets))
        x_t, target = (y[i, torch.arange(len(i), device=device)] for y in (path, targets))
    else:
        x0, *text = draw_batch(cache, cfg.batch_size, (cfg.seed, step), device)
        x_t, target = add_noise(x0, noise(), times[i]), x0
    return x_t, times[i], times[j], x0, noise(), target, *text


def warm_start(cfg, generator, draw):
    """Ours: the generator after it learned L_recon alone, at higher rates: on the toy the adversary alone does not get
    there."""
    cfg, log, began = replace(cfg, steps=cfg.warm_steps), [], time.time()
    model, ema = copy.deepcopy(generator).requires_grad_(), copy.deepcopy(generator)
    optimizers, loss = make_optimizers(model, cfg.warm_lr, cfg.warm_muon_lr), Adversaries(cfg, model).generator_loss
    prepare(model.blocks, cfg)
    for step in progress(0, cfg.steps):
        log.append(update(loss, draw(cfg, step), optimizers, step, cfg).item())
        average(ema, model, cfg.ema, step)
        if (step + 1) % cfg.log_every == 0:
            print0(f"warm start {step + 1}/{cfg.steps}  reconstruction {np.mean(log[-cfg.log_every:]):.3f}  "
                   f"{(time.time() - began) / 60:.1f} min")
    return ema


def train(cfg, path, generator, warm, draw, about):
    """Distil the generator from where its warm start ended. Writes checkpoints to path.

    Returns the averaged generator and what it is and makes.
    """
    torch.manual_seed(cfg.seed)
    how = dict(num_steps=cfg.num_steps, guidance_scale=1., shift=cfg.shift, terminal=0., stochastic=cfg.stochastic)
    student = SimpleNamespace(**vars(about) | how)
    model, ema = copy.deepcopy(warm).requires_grad_(), copy.deepcopy(warm)
    heads = (discriminator := Discriminator(generator, cfg.trunk, cfg.head).to(generator.table.device)).heads
    optimizers, head_optimizers = make_optimizers(model, cfg.lr, cfg.muon_lr), make_optimizers(heads, cfg.head_lr, 0)
    losses, both = Adversaries(cfg, model, discriminator), optimizers + head_optimizers
    start = resume(path, cfg, dict(model=model, ema=ema, heads=heads), both)
    if not start:
        save_dit(path, 0, cfg, student, model, ema, both, heads=heads)  # --resume need not start warm again
    prepare([*model.blocks, *heads], cfg), prepare(generator.blocks, replace(cfg, compile=False))  # timed later
    began, log = time.time(), []
    for step in progress(start, cfg.steps):
        batch = draw(cfg, step)
        _, *scores = update(losses.discriminator_loss, batch, head_optimizers, step, cfg)
        _, *parts = update(losses.generator_loss, batch, optimizers, step, cfg)
        average(ema, model, cfg.ema, step)
        log.append([value.item() for value in scores + parts])
        if (step + 1) % cfg.log_every == 0:
            names = "D(real)", "D(fake)", "right", "adversarial", "reconstruction"
            said = map("{} {:.3f}".format, names, np.mean(log[-cfg.log_every:], 0))
            print0(f"step {step + 1}/{cfg.steps} ", *said, f" {(time.time() - began) / 60:.1f} min")
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_dit(path, step + 1, cfg, student, model, ema, both, heads=heads)
    return ema, student


# ------------------------------------------------------------------------------------------------ figures
COLUMNS = "full_semantic", "full_quality", "full_total", "open_semantic", "open_quality", "open_total", "open_entropy"
HEADER = " " * 48 + "".join(f"{column:>14}" for column in COLUMNS)


def evaluate(table, name, models, vae, about, count, *how):
    """Add a row of scores on both test sets, means over the models and their spread; returns the means by column."""
    values = []
    for model in models:
        scores = {f"{split}_{key}": figure for split in ("full", "open")
                  for key, figure in score_samples(model, vae, about, split, count, *how).items()}
        values.append([scores[column] for column in COLUMNS])
    means = np.mean(values, 0).tolist()
    cell = "{:8.3f} {:.3f}" if len(models) > 1 else "{:14.3f}"  # format leaves the spread of one out
    table.append(f"{name:48}" + "".join(map(cell.format, means, np.std(values, 0))))
    print0(table[-1])
    return dict(zip(COLUMNS, means))


def ablation(cfg, path, generator, draw, vae, about):
    """Table 5's heads, and each part of the method, in equal steps; into out/ablation.txt. Returns the scores
    of the paper's head.

    The warm start and its lessons are those of one seed; the spread is of what follows.
    """
    few, table = lambda n: (euler_times(n, cfg.shift), 1., cfg.stochastic), [HEADER]
    parts = {"Eq. 7-9, x0 for target, no warm start": dict(targets=0, steps=cfg.warm_steps + cfg.steps),
             "warm start, reconstruction only": dict(adversarial_weight=0.),
             "warm start, adversarial only": dict(reconstruction_weight=0.),
             "warm start, lightweight ResBlock 3D [45]": dict(head="resblock3d"),
             "warm start, ResBlock-2D + attention [49]": dict(head="resblock2d"), "warm start, DiT block + MLP": {}}
    print0(HEADER)
    many, guidance_scale, stochastic = recipe(about)
    for name, *how in (("guided", many, guidance_scale, stochastic), ("unguided", many, 1., stochastic),
                       ("few steps", *few(cfg.num_steps))):
        evaluate(table, f"not distilled, {name}", [generator], vae, about, cfg.score_clips, *how)
    warm = warm_start(cfg, generator, draw)
    evaluate(table, "warm start", [warm], vae, about, cfg.score_clips, *few(cfg.num_steps))
    for name, changes in parts.items():
        seeds, begin = range(cfg.seed, cfg.seed + cfg.seeds), generator if "targets" in changes else warm
        models = [train(replace(cfg, seed=seed, **changes), path, generator, begin, draw, about)[0] for seed in seeds]
        figures = evaluate(table, name, models, vae, about, cfg.score_clips, *few(cfg.num_steps))
    for n in 1, 2, 8:
        evaluate(table, f"the same, {n} steps", models, vae, about, cfg.score_clips, *few(n))
    once(path.with_suffix(".txt").write_text)("\n".join(table) + "\n")
    once(path.unlink)()
    return figures


@torch.no_grad()
def speed(generator, ema, vae, about, student):
    """Network evaluations a clip; medians of the time to denoise one, in turns, and to decode it; frames a second."""
    device = generator.proj_in.weight.device
    text = [y.to(device) for y in text_encoder(about)(test_captions(about, "full", 1)[0])]
    noise = torch.randn(1, *vae.latent_shape(about.frames, *about.size), device=device)
    calls = [partial(sample, m, noise, *text, *recipe(its)[:2]) for m, its in ((generator, about), (ema, student))]
    slow, fast, decode = median_ms([*calls, partial(vae.decode, noise)], 10)
    return dict(evaluations=evaluations(student), evaluations_guided=evaluations(about), times_faster=slow / fast,
                denoise_ms=fast, decode_ms=decode, fps=1e3 * about.frames / (fast + decode),
                fps_guided=1e3 * about.frames / (slow + decode))


def describe(cfg, n):
    """What vae.dry_run counts, for n clips at a time, of distilling what dit.py's preset describes: no lessons, no
    warm start."""
    about = dit.Config(**dit.PRESETS[cfg.preset])
    shape = VAE(VAEConfig()).latent_shape(about.frames, *about.size)[1:]
    model, generator, ema = (DiT(about) for _ in "123")
    discriminator = Discriminator(generator.requires_grad_(False), cfg.trunk, cfg.head)
    prepare([*model.blocks, *discriminator.heads], cfg), prepare(generator.blocks, replace(cfg, compile=False))
    losses, (x, t, *text) = Adversaries(cfg, model, discriminator), step_inputs(about, shape, n)
    batch = x, t, t, x, x, x, *text
    phases = [(cfg.steps, loss, batch) for loss in (losses.discriminator_loss, losses.generator_loss)]
    return [model, discriminator.heads], [generator, ema], phases, lambda: model(*step_inputs(about, shape, 1))


def main(cfg):
    """Distil the generator; returns the figures of the summary line."""
    if cfg.dry_run:
        return dry_run("DISTILL", cfg, partial(describe, cfg))
    began, out, device = time.time(), Path(cfg.out), setup(cfg)
    init = cfg.init or out / ("pruned.pt" if (out / "pruned.pt").exists() else "dit.pt")
    generator, about = load_dit(init, device=device, data=cfg.data)
    vae, path = load_vae(about.out, device, about.vae), out / ("ablation.pt" if cfg.ablation else "distilled.pt")
    print0(f"distill: {init}, {sum(p.numel() for p in generator.parameters()):,} parameters, {about.num_steps} steps "
           f"of guidance {about.guidance_scale:g} -> {cfg.num_steps} without; {WORLD} x {device.type}")
    Discriminator(generator, cfg.trunk, cfg.head)  # raises where these do not fit
    for name, other in ("init", init), ("teacher", cfg.teacher):
        if Path(other).resolve() == path.resolve():
            raise Abort(f"--{name} {other} is what this run would overwrite: rename it first")
    teacher, again = load_teacher(cfg, init, about, device), cfg.resume and path.exists()
    about.distilled = " ".join(fingerprint(m, "") for m in (generator, teacher) if m)  # by which --resume knows them
    if cfg.ablation and (about.data != "synthetic" or cfg.resume or not cfg.score_clips):
        raise Abort("--ablation takes a generator of synthetic clips, --score_clips of at least 1, and no --resume")
    if again and load(path, finished=False)["generator"].get("distilled") != about.distilled:
        raise Abort(f"{path} was distilled from another generator or teacher: start again without --resume")
    cache = encode_clips(about, vae, device)
    lesson = lru_cache(None)(partial(teach, cfg, teacher, cache, device))
    draw = lambda cfg, step: training_batch(cfg, lesson, cache, device, step)
    if cfg.ablation:
        return summary("DISTILL", ablation(cfg, path, generator, draw, vae, about), began)
    warm = warm_start(cfg, generator, draw) if cfg.warm_steps and not again else generator
    ema, student = train(cfg, path, generator, warm, draw, about)
    fast = cfg.bf16 and device.type != "cpu"  # there it costs more than it saves to convert the weights at every call
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        figures = speed(generator, ema, vae, about, student)
        if cfg.score_clips and about.data == "synthetic":
            print0(HEADER)
            for name, m, its in ("", ema, student), ("_undistilled", generator, student), ("_guided", generator, about):
                scores = evaluate([], name[1:] or "distilled", [m], vae, about, cfg.score_clips, *recipe(its))
                figures |= {k + name: v for k, v in scores.items()}
        splits = ("full", "open") if about.data == "synthetic" else ("full",)
        captions = [caption for split in splits for caption in test_captions(about, split, 3)[0]]
        film = [make_videos(m, vae, its, captions) for m, its in ((generator, about), (ema, student))]
    write_png(path.with_suffix(".png"), rearrange(film, "r b c f h w -> c f (r h) (b w)"), about.fps)
    print0(f"{path.with_suffix('.png')} shows, samples in {evaluations(about)} evaluations above those in "
           f"{evaluations(student)}:", *captions, sep="\n  ")
    return summary("DISTILL", figures, began, "python export_ios.py, or python sample.py")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
