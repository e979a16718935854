"""Tri-level pruning with knowledge distillation (Sec. 4.2, Fig. 3, Table 4): the phone's DiT out of the server's.

    python prune.py                          # toy: search, surgery, fine-tuning; after dit.py, a laptop, minutes
    python prune.py --sensitivity            # Fig. 3, each level alone -> out/sensitivity.json
    python prune.py --ablation --seeds 3     # Table 4, seven ways to a small DiT -> out/ablation.json

out/dit.pt (or --init, any generator), vae.pt and latents/ beside it -> out/pruned.pt, out/pruned.png (samples)
"""
import copy
import itertools
import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
from dit import (COMPILED, LaterStage, add_noise, average, build, contact_sheet, encode_clips, fingerprint,
                 flow_matching_loss, load_dit, load_vae, rms_norm, save_dit, score_samples, step_inputs, test_captions,
                 training_batch)
from vae import (PAPER, VAE, Abort, Meter, Training, VAEConfig, barrier, dry_run, flag, launch, load, make_optimizers,
                 median_ms, once, prepare, print0, progress, resume, seeded, setup, share, summary, update)

# ------------------------------------------------------------------------------------------------ candidates
SIZES = "depth", "num_heads", "ffn_dim"             # of a DiT, one for each level of granularity
LEVELS = {"blocks": 0, "self_attn": 1, "cross_attn": 1, "ffn": 2}  # of masks: their place in SIZES, groups and kept
PAPER_CUT = 8 / 28, 12 / 32, 1 / 4                  # shares of them that the paper prunes, of heads "more aggressively"
LORA_RANK = 4                                       # Ours: of the light update in the search
LINEARS = {"self_attn": ("to_q", "to_k", "to_v"), "cross_attn": ("to_q", "to_k", "to_v"), "ffn": ("up",)}  # masked
SEARCHED = {"self_attn": ("to_v",), "cross_attn": ("to_v",), "ffn": ("up",)}  # Ours: see Search
# Ours, after [7]: hard Gumbel-softmax, LoRA and the logits' average, as the paper does not say how it learns masks; of
# blocks otherwise, see Search.
TEMPERATURES = 4., .1                               # of the Gumbel-softmax, first and last
PHONE = 7, 12, 16                                   # latents of the 49 x 384 x 512 video that the paper's phone makes


def count_parameters(about):
    with torch.device("meta"):
        return sum(p.numel() for p in build(about).parameters())


def shrink(about, groups, kept):
    """What a generator is with `kept` units left in each of the groups (blocks, heads, channels)."""
    return SimpleNamespace(**vars(about) | {f: getattr(about, f) // m * n for f, m, n in zip(SIZES, groups, kept)})


def fit_budget(about, groups, budget):
    """Units (blocks, heads, channels) that a group keeps, for at most `budget` parameters (up to 1: a share of them).

    Ours: the paper's cuts of the three levels, scaled together to the first that fits; for 1e9 that is the paper's.
    """
    if len(groups) != 3 or any(m < 1 or getattr(about, name) % m for name, m in zip(SIZES, groups)):
        raise Abort(f"--groups {','.join(map(str, groups))} do not divide the generator's blocks, heads and channels: "
                    f"{about.depth}, {about.num_heads}, {about.ffn_dim}")
    settings = (tuple(max(1, round(m * (1 - scale * cut))) for m, cut in zip(groups, PAPER_CUT))
                for scale in np.arange(0, 4.001, .001))
    limit = budget * count_parameters(about) if budget <= 1 else budget
    for kept in dict.fromkeys(settings):  # each once
        count = count_parameters(shrink(about, groups, kept))
        if count <= limit:
            return kept
    raise Abort(f"--budget {budget:g} cannot be met: one unit of each group makes {count:,} parameters; raise it")


class Candidates:
    """Per level the masks (C, m) that a group of m units chooses from: all that keep n of them (Sec. 4.2.1)."""

    def __init__(self, about, groups, kept):
        self.masks, self.shapes = {}, {}
        for level, i in LEVELS.items():
            units, m, n = getattr(about, SIZES[i]), groups[i], kept[i]
            if math.comb(m, n) > 20_000:
                raise Abort(f"{n} of a group of {m} are {math.comb(m, n):,} choices: take smaller --groups")
            subsets = list(itertools.combinations(range(m), n))
            self.masks[level] = F.one_hot(torch.tensor(subsets), m).sum(1).float()
            self.shapes[level] = (about.depth,) * (i > 0) + (units // m, len(subsets))           # of a level's logits

    def masks_of(self, choice):
        """One-hot choices (B, ..., groups, C) -> masks (B, depth) of blocks, (B, depth, units) of the other levels."""
        return {level: (choice[level] @ masks.to(choice[level])).flatten(-2) for level, masks in self.masks.items()}

    def read_out(self, logits):
        """Masks, with B = 1, of the candidates with the highest logits (..., groups, C)."""
        return self.masks_of({k: F.one_hot(v.argmax(-1), v.shape[-1]).float()[None] for k, v in logits.items()})


# -------------------------------------------------------------------------------------------- masks, surgery, search
def hooked(changes):
    """A context in which a module's output y for its input x is change(x, y), if not None, for (module, change)s."""
    stack = ExitStack()
    for module, change in changes:
        stack.enter_context(module.register_forward_hook(lambda _, x, y, change=change: change(x[0], y)))
    return stack


def masking(model, masks, linears=LINEARS):
    """Changes for `hooked` under which the DiT computes as if the units of mask 0 were not there.

    masks: blocks (B, depth), self_attn and cross_attn (B, depth, heads), ffn (B, depth, channels); B = 1 for all alike.
    """
    changes = []
    for i, block in enumerate(model.blocks):
        m = masks["blocks"][:, i, None, None]                                                    # (B, 1, 1)
        changes.append((block, lambda x, y, m=m: y * m + x * (1 - m)))  # Eq. (3)
        for level, name in ((level, name) for level, names in linears.items() for name in names):
            linear, m = block.get_submodule(f"{level}.{name}"), masks[level][:, i, None]
            if name in ("to_q", "to_k"):  # Ours: zeros would sharpen attention; x / s has the kept heads' mean square
                norm, s = block.get_submodule(f"{level}.{name.replace('to', 'norm')}"), m.mean(-1, keepdim=True).sqrt()
                changes.append((norm, lambda x, _, norm=norm, s=s: rms_norm(x / s, norm.eps) * s * norm.weight))
            m = m.repeat_interleave(linear.out_features // m.shape[-1], -1)                      # (B, 1, D)
            changes.append((linear, lambda x, y, m=m: y * m))  # Eq. (4), heads before attention, channels before GELU
    return changes


@torch.no_grad()
def cut(model, about, masks):
    """Dense surgery: the ordinary DiT without the units of mask 0 (B = 1), and what it is, with the kept units."""
    blocks = masks["blocks"][0].nonzero().flatten().tolist()
    kept = {level: [masks[level][0, i].nonzero().flatten().tolist() for i in blocks] for level in LINEARS}
    small = SimpleNamespace(**vars(about) | dict(depth=len(blocks), num_heads=len(kept["self_attn"][0]),
                                                 ffn_dim=len(kept["ffn"][0]), kept={"blocks": blocks, **kept}))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.")}
    for j, i in enumerate(blocks):
        for name, value in model.blocks[i].state_dict().items():
            level, _, leaf = name.partition(".")
            if level in LINEARS and leaf not in ("to_out.bias", "down.bias"):
                mask, side = masks[level][0, i], int(leaf in ("to_out.weight", "down.weight"))      # rows, or columns
                value = value.index_select(side, mask.repeat_interleave(value.shape[side] // len(mask)).nonzero()[:, 0])
            state[f"blocks.{j}.{name}"] = value
    student = build(small).to(model.proj_in.weight.device)
    student.load_state_dict(state)
    return student, small


def gumbel(logits, count, device=None):
    """Gumbel noise for `count` clips, this process's share of it, for each level's logits."""
    return [share(-torch.empty(count, *v.shape, device=device).exponential_().log()) for v in logits.values()]


class Search(nn.Module):
    """The frozen DiT under masks drawn for each clip, and a light update (LoRA) of its linears, thrown away after.

    Ours: of a head only the values are masked. With zeros for queries and keys it would attend to all tokens alike, and
    the straight-through gradient would tell the worth of that head, not of the one that would come back.

    Ours: what whole blocks are worth is told by the score function (REINFORCE). From a block's absence to its presence
    the loss is no line, and the straight-through gradient favours those that change their input most, good or not.
    """

    def __init__(self, model, candidates):
        super().__init__()
        self.model, self.candidates, self.hooks = model, candidates, ExitStack()
        self.logits = nn.ParameterDict({level: torch.zeros(shape) for level, shape in candidates.shapes.items()})
        # The update makes the loss tell how a choice recovers, not how low it is after the cut, which misleads [7].
        self.linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
        self.down = nn.ParameterList(torch.randn(m.in_features, LORA_RANK) / m.in_features ** .5 for m in self.linears)
        self.up = nn.ParameterList(torch.zeros(LORA_RANK, m.out_features) for m in self.linears)

    def forward(self, temperature, x0, noise, t, text_emb, text_mask, *gumbels):
        """The loss of clips in pairs (2i, 2i + 1): one clip, noise and t under two draws of masks."""
        if (count := len(gumbels[0])) % 2:
            raise Abort(f"the search compares pairs of clips, a process' micro-batch has {count}: make it even, by "
                        "--batch_size or --accumulate")
        choice = {}
        for (level, logits), drawn in zip(self.logits.items(), gumbels):
            soft = ((logits + drawn) / temperature).softmax(-1)
            hard = F.one_hot(soft.argmax(-1), soft.shape[-1])
            choice[level] = hard - soft.detach() + soft                  # straight through
        choice["blocks"] = choice["blocks"].detach()                     # but not for these
        log_p = (choice["blocks"] * self.logits["blocks"].log_softmax(-1)).sum((1, 2))           # (B,)
        updates = [(linear, lambda x, y, down=down, up=up: y + x @ down @ up)
                   for linear, down, up in zip(self.linears, self.down, self.up)]
        self.hooks.close()  # the last call's, which its backward pass needs where it computes the blocks again
        self.hooks = hooked(updates + masking(self.model, self.candidates.masks_of(choice), SEARCHED))
        losses = flow_matching_loss(self.model, x0, noise, t, text_emb, text_mask, dims=(1, 2, 3, 4))    # (B,)
        worse = losses.detach() - losses.detach().view(-1, 2).flip(1).flatten()                  # than the other of two
        return losses.mean() + (worse * (log_p - log_p.detach())).mean()                         # whose value is 0


def search(cfg, teacher, candidates, draw, device, path=None, about=None):
    """Learn which units to keep; returns the masks (B = 1) of the logits' moving average.

    Writes checkpoints to path, if given; about: what the teacher is, which they record.
    """
    module, losses = Search(teacher, candidates).to(device), []
    prepare(teacher.blocks, replace(cfg, compile=False))  # its hooks change at every step
    average_logits, cfg = copy.deepcopy(module.logits).requires_grad_(False), replace(cfg, steps=cfg.search_steps)
    optimizers = [torch.optim.AdamW(module.logits.values(), cfg.search_lr, weight_decay=0),
                  torch.optim.AdamW([*module.down, *module.up], cfg.lr, weight_decay=0)]
    own = dict(model=module.logits, ema=average_logits, down=module.down, up=module.up)
    for step in progress(resume(path, cfg, own, optimizers), cfg.steps):
        temperature = np.interp(step, (0, cfg.steps - 1), TEMPERATURES).item()
        pairs = (x[::2].repeat_interleave(2, 0) for x in draw((cfg.seed, step, 0, 1)))          # half of them, twice
        batch = *pairs, *gumbel(module.logits, cfg.batch_size, device)
        loss, = update(partial(module, temperature), batch, optimizers, step, cfg)
        average(average_logits, module.logits, .9, step)
        losses.append(loss.item())
        if (step + 1) % cfg.log_every == 0:
            print0(f"search {step + 1}/{cfg.steps}  loss {np.mean(losses[-cfg.log_every:]):.4f}")
        if path and (step + 1) % cfg.save_every == 0:
            save_dit(path, step + 1, cfg, about, optimizers=optimizers, **own)
    module.hooks.close()
    if losses:  # not resumed at its end
        first, last = np.mean(losses[:10]), np.mean(losses[-10:])
        print0(f"search: {cfg.steps} steps, loss {first:.4f} at first, {last:.4f} at last")
    return candidates.read_out(dict(average_logits.items()))


# ------------------------------------------------------------------------------------------------ fine-tuning with KD
class Student(nn.Module):
    """A DiT and, for KD, an affine map of the features in which each group of blocks ends, to the teacher's width."""

    def __init__(self, cfg, model, teacher):
        super().__init__()
        self.model, self.alpha, self.output_kd = model, cfg.alpha, cfg.output_kd
        count = teacher.cfg.depth // cfg.groups[0] * (cfg.alpha > 0)  # Ours: N, those of pruning
        self.affine = nn.ModuleList(nn.Linear(model.cfg.width, teacher.cfg.width) for _ in range(count))
        for affine in self.affine:
            nn.init.eye_(affine.weight), nn.init.zeros_(affine.bias)  # Ours: a pruned DiT starts close to the teacher

    def forward(self, teacher, x0, noise, t, *text):
        """The loss, and its parts: flow matching, towards the teacher's velocity with output_kd, and the features' KD.

        All are for the same x_t, t and text; without KD the second part is 0.
        """
        count, y_s, y_t, velocity = len(self.affine), [], [], None
        ends = lambda model: [model.blocks[(i + 1) * len(model.blocks) // count - 1] for i in range(count)]
        if count:
            with hooked((block, lambda _, out: y_t.append(out)) for block in ends(teacher)), torch.no_grad():
                velocity = teacher(add_noise(x0, noise, t), t, *text)
        with hooked((block, lambda _, out: y_s.append(out)) for block in ends(self.model)):
            loss = flow_matching_loss(self.model, x0, noise, t, *text, velocity if self.output_kd else None)
        # Ours: sim is the negative cosine, as in REPA [56]; the paper leaves it open.
        sims = [-F.cosine_similarity(a, f(b), dim=-1).mean() for a, b, f in zip(y_t, y_s, self.affine)]
        distill = sum(sims, loss.new_zeros(())) / max(count, 1)  # Eq. (5)
        return torch.stack([loss + self.alpha * distill, loss, distill])  # Eq. (6)


def finetune(cfg, model, teacher, draw, device, path=None, about=None):
    """Train a DiT, with KD if cfg.alpha; returns its moving average. Writes checkpoints to path, if given."""
    began, losses, student = time.time(), [], Student(cfg, model, teacher).to(device)
    ema, optimizers = copy.deepcopy(model).requires_grad_(False), make_optimizers(model, cfg.lr, cfg.muon_lr)
    if cfg.alpha:
        optimizers.append(torch.optim.AdamW(student.affine.parameters(), cfg.lr, weight_decay=0))
    start = resume(path, cfg, {"model": student, "ema": ema}, optimizers)
    if path and not start:
        save_dit(path, 0, cfg, about, student, ema, optimizers)  # --resume need not search again
        barrier()  # all have read it
        once(path.with_name("search.pt").unlink)(missing_ok=True)
    prepare([*model.blocks, *teacher.blocks], cfg)
    for step in progress(start, cfg.steps):
        _, *parts = update(partial(student, teacher), draw((cfg.seed, step)), optimizers, step, cfg)
        average(ema, model, cfg.ema, step)
        losses.append([value.item() for value in parts])
        if (step + 1) % cfg.log_every == 0:
            print0(f"step {step + 1}/{cfg.steps}  loss {{:.4f}}  distill {{:.4f}}  {(time.time() - began) / 60:.1f} min"
                   .format(*np.mean(losses[-cfg.log_every:], 0)))
        if path and ((step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps):
            save_dit(path, step + 1, cfg, about, student, ema, optimizers)
    prepare(teacher.blocks, replace(cfg, compile=False, checkpointing=False))  # to be timed beside the average
    return ema


# ------------------------------------------------------------------------------------------------ Fig. 3 and Table 4
@torch.no_grad()
def measure(cfg, model, vae, about, draw):
    """Parameters, flow-matching loss (this process's share of eight training batches, always the same) and scores."""
    device = vae.mean.device
    with seeded(0, device), torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
        losses = [flow_matching_loss(model, *part).item() for i in range(8)
                  for part in zip(*(x.chunk(cfg.accumulate) for x in draw((i, 2))))]
    figures = dict(parameters=count_parameters(about), loss=np.mean(losses).item())
    if cfg.score_clips and about.data == "synthetic":
        scores = score_samples(model, vae, about, "full", cfg.score_clips)
        figures |= {k: scores[k] for k in ("semantic", "quality", "total")}
    return figures


@torch.no_grad()
def step_costs(cfg, models, about, latent_shape):
    """Median ms of a denoising step, GFLOPs and peak MB, weights included, of each model; timed in turns."""
    costs, device = [], models[0].table.device
    inputs = step_inputs(about, latent_shape, 1, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16 and device.type != "cpu"):
        for model, ms in zip(models, median_ms([partial(model, *inputs) for model in models], 15)):
            with Meter() as meter:
                model(*inputs)
            weights = sum(p.nbytes for p in model.parameters())
            costs.append(dict(step_ms=ms, gflops=meter.flops / 1e9, peak_mb=(weights + meter.most) / 1e6))
    return costs


def sensitivity(cfg, teacher, vae, about, draw, device):
    """Fig. 3: prune each level alone, progressively. Ours: no fine-tuning; each setting has a search of its own."""
    rows, settings = [], [("none", cfg.groups)]
    for i, m in enumerate(cfg.groups):
        settings += [(SIZES[i], (*cfg.groups[:i], n, *cfg.groups[i + 1:])) for n in range(m - 1, 0, -1)]
    for level, kept in settings:
        model, small = (teacher, about) if level == "none" else \
            cut(teacher, about, search(cfg, teacher, Candidates(about, cfg.groups, kept), draw, device))
        (whole, cost), size = step_costs(cfg, [teacher, model], about, PHONE), getattr(small, level, 0)
        row = cost | dict(speedup=whole["step_ms"] / cost["step_ms"]) | measure(cfg, model, vae, small, draw)
        rows.append(dict(level=level, kept=size, **summary(f"{level} {size or ''}", row)))
    once(Path(cfg.out, "sensitivity.json").write_text)(json.dumps(rows, indent=1))
    return {f"{row['level']}_{row['kept']}_loss": row["loss"] for row in rows}


def ablation(cfg, teacher, vae, about, kept, draw, device, trained):
    """Table 4 at equal total steps, and the same cut with random units and with those of most weight."""
    candidates, size = Candidates(about, cfg.groups, kept), count_parameters(shrink(about, cfg.groups, kept))
    weight = {level: torch.stack([sum(block.get_submodule(f"{level}.{name}").weight.square().sum(1) for name in names)
                                  for block in teacher.blocks]) for level, names in LINEARS.items()}   # (depth, D)
    weight["blocks"] = sum(w.sum(1) for w in weight.values())                                          # (depth,)
    weight = {level: weight[level].unflatten(-1, (candidates.shapes[level][-2], masks.shape[1], -1)).sum(-1)
              @ masks.T.to(weight[level]) for level, masks in candidates.masks.items()}                # as the logits
    closest = lambda changes: min((SimpleNamespace(**vars(about) | c) for c in changes),
                                  key=lambda small: abs(count_parameters(small) - size))
    scratch = {"shallow": closest(dict(depth=n) for n in range(1, about.depth)), "narrow": closest(
        dict(head_dim=n, width=n * about.num_heads, ffn_dim=about.ffn_dim * n // about.head_dim)
        for n in range(2, about.head_dim, 2))}  # Ours: narrower heads, as many
    cuts = {"tri-level": dict(output_kd=False), "output KD": dict(output_kd=True), "no KD": dict(alpha=0.),
            "random": dict(alpha=0.), "magnitude": dict(alpha=0.)}
    methods, rows, figures = cuts | dict.fromkeys(scratch, dict(alpha=0.)), [], {}
    for seed, method in itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), methods):
        torch.manual_seed(seed)
        own = replace(cfg, seed=seed, **methods[method])
        if method in scratch:
            own = replace(own, steps=trained["steps"] + cfg.search_steps + cfg.steps,  # what the teacher got, too
                          lr=trained["lr"], muon_lr=trained["muon_lr"])
            model, small = build(scratch[method]).to(device), scratch[method]
        else:
            if method == "tri-level":
                learned = search(own, teacher, candidates, draw, device)
            masks = {"random": candidates.read_out({k: torch.rand_like(w) for k, w in weight.items()}),
                     "magnitude": candidates.read_out(weight)}.get(method, learned)
            model, small = cut(teacher, about, masks)
        began = time.process_time()
        ema = finetune(own, model, teacher, draw, device)
        row = dict(steps=own.steps, cpu_minutes=(time.process_time() - began) / 60)
        row |= measure(cfg, ema, vae, small, draw)
        rows.append(dict(method=method, seed=seed, **summary(f"{method}, seed {seed}:", row)))
    once(Path(cfg.out, "ablation.json").write_text)(json.dumps(rows, indent=1))
    for method, k in itertools.product(methods, list(row)[3:]):
        values = [row[k] for row in rows if row["method"] == method]
        figures[f"{method}_{k}"] = np.mean(values).item()
        print0(f"{method:10} {k:10} {np.mean(values):.3f} +- {np.std(values):.3f} of {cfg.seeds} seeds")
    return figures


# ------------------------------------------------------------------------------------------------ the stage
@dataclass
class Config(LaterStage, Training):
    init: str = flag("", "generator to prune, of any stage; not given: dit.pt in --out")
    budget: float = flag(.52, "parameters of the pruned DiT, at most; up to 1: share of the generator's")
    groups: tuple = flag((3, 6, 6), "blocks, heads and FFN channels that make a group")
    search_steps: int = flag(60, "steps of the search for the units to keep")
    search_lr: float = flag(.3, "learning rate of the candidates' logits")
    steps: int = flag(3000, "fine-tuning steps")
    lr: float = 2e-3
    alpha: float = flag(.01, "weight of KD (Sec. 4.2.2); 0: without")
    output_kd: bool = flag(True, "Ours: KD also makes the teacher's velocity flow matching's target, not noise - x0")
    ema: float = flag(.98, "Ours: rate of the weights' moving average, which is what later stages use")
    score_clips: int = flag(48, "unseen captions whose samples are scored; 0 for none")
    save_every: int = 250
    sensitivity: bool = flag(False, "Fig. 3 instead: prune each level alone")
    ablation: bool = flag(False, "Table 4 instead: other ways to a DiT of this size")
    seeds: int = flag(1, "runs of each way in --ablation", least=1)


PRESETS = {"toy": COMPILED, "paper": PAPER | dict(  # Sec. 4.2.1. Ours: groups, batch, and how 200K steps are shared
    budget=1e9, groups=(7, 8, 4), search_steps=2000, search_lr=.01, steps=50_000, batch_size=1024, save_every=200,
    lr=5e-5, ema=.9999, output_kd=False)}


def describe(cfg, about, kept, n):
    """What vae.dry_run counts, for n clips at a time: the search, and fine-tuning, which needs more memory."""
    teacher, shape = build(about).requires_grad_(False), VAE(VAEConfig()).latent_shape(about.frames, *about.size)[1:]
    module = Search(teacher, Candidates(about, cfg.groups, kept))
    model, ema = (build(shrink(about, cfg.groups, kept)) for _ in "12")
    student = Student(cfg, model, teacher)
    prepare(teacher.blocks, replace(cfg, compile=False)), prepare(model.blocks, cfg)  # as search does
    x, *rest = step_inputs(about, shape, n)
    searching = cfg.search_steps, partial(module, 1.), (x, x, *rest, *gumbel(module.logits, n))

    def kd(*batch):
        module.hooks.close()  # as search does at its end
        return student(teacher, *batch)
    return ([model, student.affine], [teacher, ema], [searching, (cfg.steps, kd, (x, x, *rest))],
            lambda: model(*step_inputs(about, shape, 1)))


def main(cfg):
    """Prune and fine-tune, or make a table; returns the figures of the summary line."""
    began, device, init = time.time(), setup(cfg), cfg.init or f"{cfg.out}/dit.pt"
    path, searched = (Path(cfg.out) / f"{name}.pt" for name in ("pruned", "search"))
    if cfg.dry_run:
        about = SimpleNamespace(**vars(dit.Config(**dit.PRESETS[cfg.preset])), compression=(8, 32))
    else:
        teacher, about = load_dit(init, device=device, data=cfg.data)
        about.pruned = fingerprint(teacher, "")  # by which --resume knows what it went on from
    kept = fit_budget(about, cfg.groups, cfg.budget)
    small, candidates = shrink(about, cfg.groups, kept), Candidates(about, cfg.groups, kept)
    print0(f"prune: {count_parameters(small):,} parameters from {count_parameters(about):,}")
    for level, masks in candidates.masks.items():
        part, whole = (getattr(what, SIZES[LEVELS[level]]) for what in (small, about))
        count = f"{math.comb(whole, part):,}" if whole < 99 else f"10^{math.log10(math.comb(whole, part)):.0f}"
        print0(f"  {level:10} {part} of {whole}: {len(masks)} choices in each {masks.shape[1]}; {count} without groups")
    if cfg.dry_run:
        return dry_run("PRUNE", cfg, partial(describe, cfg, about, kept))
    if (cfg.ablation or cfg.sensitivity) and cfg.resume:
        raise Abort("--ablation and --sensitivity take no --resume")
    if Path(init).resolve() == path.resolve():
        raise Abort(f"--init {init} is what this run would overwrite: rename it first")
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours of work that end in a file there
    vae = load_vae(about.out, device, about.vae)
    draw = partial(training_batch, cfg, about, encode_clips(about, vae, device), device)
    if cfg.sensitivity:
        return summary("PRUNE", sensitivity(cfg, teacher, vae, about, draw, device), began)
    if cfg.ablation:
        return summary("PRUNE", ablation(cfg, teacher, vae, about, kept, draw, device, load(init)["config"]), began)
    found = next((file for file in (searched, path) if cfg.resume and file.exists()), None)
    saved = found and load(found, finished=False)["generator"]
    if found and saved.get("pruned") != about.pruned:
        raise Abort(f"{found} was not pruned from {init} as that is now: start again without --resume")
    barrier()  # all have read it
    if found == path:
        small.kept, model = saved["kept"], build(small).to(device)
    else:
        masks = search(cfg, teacher, candidates, draw, device, searched, about)
        for i, block in enumerate(masks["blocks"][0]):  # as a picture: # is kept, . is cut
            rows = [f"{level} {''.join('.#'[int(m)] for m in masks[level][0, i, :48])}" for level in LINEARS if block]
            print0(f"  block {i:2}  {'  '.join(rows) or 'cut'}")
        model, small = cut(teacher, about, masks)
    ema = finetune(replace(cfg, resume=found == path), model, teacher, draw, device, path, small)
    figures = measure(cfg, ema, vae, small, draw)
    figures |= {f"{k}_teacher": v for k, v in measure(cfg, teacher, vae, about, draw).items()}
    for shape in vae.latent_shape(about.frames, *about.size)[1:], PHONE:
        (whole, part), tokens = step_costs(cfg, [teacher, ema], about, shape), math.prod(shape)
        figures |= {f"speedup_{tokens}_tokens": whole["step_ms"] / part["step_ms"],
                    f"flops_ratio_{tokens}_tokens": whole["gflops"] / part["gflops"]}
    contact_sheet(path.with_suffix(".png"), ema, vae, small, cfg.bf16)
    print0(f"{path.with_suffix('.png')} shows:", *test_captions(about, "full", 8)[0], sep="\n  ")
    return summary("PRUNE", figures, began, "python distill.py")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
