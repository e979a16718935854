"""The 8x32x32 video VAE (Sec. 4.1, Table 3), below the plumbing and the data that every stage shares.

    python vae.py                                    # toy: synthetic clips, a laptop, minutes
    python vae.py --ratio 4x16x16 --out out_4x16x16  # another compression ratio of Table 3
    python vae.py --data FOLDER                      # NAME.mp4 (or .png, .jpg), captions in NAME.txt
    torchrun --nproc_per_node=8 vae.py --preset paper --data FOLDER --accumulate 2

video (B, 3, F, H, W) in [-1, 1] of F = 1 + 8k frames -> out/vae.pt, out/vae.png (inputs above reconstructions)
"""
import argparse
import math
import os
import pickle
import re
import struct
import sys
import time
import weakref
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ plumbing
# Command line, processes, optimiser, checkpoints and pictures: what every stage needs and the paper is silent on.


class Abort(Exception):
    """What the user can mend: the message is one line that says what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(message.strip().rpartition("Abort: ")[2].splitlines()[0])  # no loading process' traceback


def flag(default, help, least=None):
    """A field of a Config, and so a flag; where a later class only changes the default, help and least value stay."""
    return field(default=default, metadata={"help": help, "least": least})


def told(Config, name, what):
    """Metadata of the field of that name, by the nearest class that tells it."""
    own = (getattr(c, "__dataclass_fields__", {}).get(name) for c in Config.__mro__)
    return next((f.metadata[what] for f in own if f and f.metadata.get(what) is not None), None)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # which Windows' editors may write
    except UnicodeDecodeError as error:
        raise Abort(f"{path} is no text in UTF-8 ({error}): save it as such") from None


@dataclass
class Stage:
    """Flags that every script has; a script's Config adds its own."""
    preset: str = flag("toy", "toy: minutes on a laptop; paper: the paper's sizes and hyper-parameters")
    data: str = flag("synthetic", "synthetic, or a folder of NAME.mp4, .mov, .mkv, .webm, .png, .jpg with NAME.txt")
    out: str = flag("out", "folder of results, and of the checkpoints of earlier stages")
    seed: int = flag(0, "seeds weights, data and noise")

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), told(type(self), f.name, "least") or 0
            for number in value if isinstance(value, tuple) else [value]:
                if isinstance(number, (int, float)) and not least <= number < 2 ** 63:
                    raise Abort(f"--{f.name} {number}: give a number, {least:g} or more and below 2 ** 63")


@dataclass
class Training(Stage):
    """Flags of every stage that trains. What a step computes does not depend on processes or micro-batches."""
    steps: int = flag(0, "training steps")
    batch_size: int = flag(24, "clips per step, shared among all processes", least=1)
    lr: float = flag(0., "AdamW's learning rate")
    muon_lr: float = flag(.02, "Muon's, for the blocks' matrices and kernels; 0: AdamW trains them too")
    accumulate: int = flag(1, "micro-batches that a process makes of its share of a batch: less memory", least=1)
    clip: float = flag(0., "gradients are at most this long; 0: as long as they come")
    bf16: bool = flag(False, "compute in bfloat16, the weights stay float32; the toy: on CPUs made for it")
    checkpointing: bool = flag(False, "keep only the blocks' inputs for the backward pass, compute the rest again")
    compile: bool = flag(False, "compile the blocks with torch.compile")
    save_every: int = flag(200, "steps between checkpoints", least=1)
    log_every: int = flag(50, "steps between printed lines", least=1)
    resume: bool = flag(False, "continue from the last checkpoint of an interrupted run, if there is one")
    dry_run: bool = flag(False, "print parameters, FLOPs, memory and hours, counted and, on a GPU, measured; and stop")
    gpus: int = flag(1, "GPUs that --dry_run counts with", least=1)
    gpu_tflops: float = flag(312., "TFLOPs that each computes in a second at best; an A100's in bfloat16", least=1e-9)
    utilisation: float = flag(.4, "share of these that training reaches", least=1e-9)

    def __post_init__(self):
        super().__post_init__()
        processes = self.gpus if self.dry_run else WORLD
        if self.batch_size % (processes * self.accumulate):
            raise Abort(f"--batch_size {self.batch_size} does not divide among {processes} processes of "
                        f"{self.accumulate} micro-batches: change it or --accumulate")


# Ours: bfloat16 where a CPU has instructions for it; on a GPU the toy waits for launches, not for products.
TOY = dict(bf16=not torch.cuda.is_available() and any(
    torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")))
PAPER = dict(muon_lr=0., clip=1., bf16=True, checkpointing=True, compile=True, save_every=1000, gpus=128)  # Ours: clip


def numbers(text):
    return tuple(map(int, text.split(",")))


KINDS = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": numbers, "metavar": "N,N,..."}}


def launch(main, Config, presets):
    """Run a stage from the command line; what the user can mend ends in one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hint = f"(python {parser.prog} --help lists the flags)"
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} {hint}\n")
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", default=f.default, help=f"{told(Config, f.name, 'help')} (%(default)s)",
                            **KINDS.get(f.type, {"type": f.type}))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # so that --help knows the preset, too
    first.error = parser.error
    first.add_argument("--preset", default="toy", choices=presets)
    parser.set_defaults(**presets[first.parse_known_args()[0].preset])
    try:
        main(Config(**vars(parser.parse_args())))
    except (Abort, OSError) as error:  # the first process that knows says why the job ends
        says = dist.distributed_c10d._get_default_store().add("speaks", 1) == 1 if dist.is_initialized() else RANK == 0
        parser.exit(2, f"{parser.prog}: {error}\n" if says else None)
    if dist.is_initialized():  # not after an error: NCCL would wait for the others, which wait for this process
        dist.destroy_process_group()


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun's processes


def setup(cfg):
    """Join torchrun's processes, if there are any, which all draw the same random numbers. Returns the device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        # torchrun's store still holds the addresses of processes that died, which torch 2.13 takes for the new ones'.
        # With several nodes these counts may differ: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in place of it.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""
        with together():
            store = dist.PrefixStore(restart, next(dist.rendezvous("env://"))[0])
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD,
                                    device_id=device if cuda else None,
                                    timeout=timedelta(days=1))  # they end their shares of encode_clips hours apart
    torch.manual_seed(cfg.seed)
    return device


def once(function):
    """Only the first of torchrun's processes does it."""
    return (lambda *args, **kwargs: None) if RANK else function


print0 = once(partial(print, flush=True))


@contextmanager
def together():
    """Where processes wait for each other: a missing one ends them all."""
    try:
        yield
    except RuntimeError as error:
        raise Abort(f"another process of this job has ended: start it again with --resume ({error})") from None


def barrier():
    if WORLD > 1:
        with together():
            dist.barrier()


def share(batch):
    """This process's part of what belongs to the clips of a batch."""
    count = len(batch) // WORLD
    return batch[count * RANK:count * (RANK + 1)]


def draw_noise(count, shape, device):
    """This process's share of the noise for `count` clips, drawn one by one, so that no process holds that of all."""
    clips = (torch.randn(shape, device=device) for _ in range(count))
    return torch.stack([clip for i, clip in enumerate(clips) if i in share(range(count))])


@contextmanager
def seeded(seed, device):
    """Random numbers of their own; those drawn later are as if none had been drawn here."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def progress(start, total):
    """Steps start .. total - 1: a bar on a terminal, elsewhere silent; the caller prints its lines with print0."""
    return tqdm(range(start, total), initial=start, total=total, file=sys.stdout, disable=RANK > 0 or None, leave=False)


def learning_rate(step, steps):
    """Factor of the rate. Ours: 20 steps of linear warm-up, then constant, then linear to zero over the last half."""
    return min((step + 1) / 20, 2 * (1 - step / steps), 1)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices and convolution kernels [Jordan et al. 2024].

    Ours: on the toy it learns several times faster than AdamW. torch.optim.Muon takes no convolutions, and steps one
    matrix after another; here Newton-Schulz runs on the small Gram matrices, with the Polar Express coefficients.
    """
    COEFFICIENTS = (8.2872, -23.5959, 17.3004), (4.1071, -2.9478, .5448), (3.9487, -2.9089, .5518)

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, momentum=.95))

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        alike = {}  # those of one shape are stepped together
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault(p.shape, []).append(p)
        for (m, *n), params in alike.items():
            grads = [p.grad for p in params]
            averages = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            updates = torch.stack(torch._foreach_lerp(grads, averages, group["momentum"]))
            updates = self.orthogonal(updates.flatten(2)).reshape(updates.shape)
            torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * max(1, m / math.prod(n)) ** .5)

    def orthogonal(self, x):
        """About U V^T of the singular value decompositions U S V^T of x (k, m, n)."""
        if x.shape[1] > x.shape[2]:
            return self.orthogonal(x.mT).mT
        x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        gram = x @ x.mT
        for i, (a, b, c) in enumerate(self.COEFFICIENTS):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            gram = factor @ gram @ factor if i < len(self.COEFFICIENTS) - 1 else None
            product = factor @ product if i else factor
        return product @ x


def make_optimizers(model, lr, muon_lr):
    """AdamW, Ours: without weight decay; with muon_lr, Muon for matrices and kernels named like model.inner."""
    inner, others = [], []
    for name, p in model.named_parameters():
        (inner if muon_lr and p.ndim > 1 and name.startswith(model.inner) else others).append(p)
    adamw = torch.optim.AdamW(others, lr, weight_decay=0, fused=True)
    return [adamw, Muon(inner, muon_lr)] if inner else [adamw]


def prepare(blocks, cfg):
    """Compile the blocks' forward pass, and have the backward pass compute it again, where cfg says so."""
    for block in blocks:
        forward = type(block).forward
        if cfg.compile:
            torch._dynamo.config.recompile_limit = 64                                # once for each size of a block
            forward = torch.compile(forward, dynamic=False)
        block.forward = partial(forward, block)  # which deepcopy understands
        if cfg.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def update(loss, batch, optimizers, step, cfg):
    """Take step number `step` of the optimisers down the gradient of the loss for a batch, unless it is not finite.

    batch: tensors of this process's share, which loss(*tensors) takes in cfg.accumulate micro-batches. It returns a
    scalar, or a vector whose first entry is the loss. Returns the vector's mean over micro-batches and processes.
    """
    means, bf16 = 0, torch.autocast(batch[0].device.type, torch.bfloat16, enabled=cfg.bf16)
    # torch 2.13's own attention takes ten times as long as a plain one on a CPU in bfloat16, backwards.
    with sdpa_kernel(SDPBackend.MATH) if cfg.bf16 and batch[0].is_cpu else nullcontext():
        for part in zip(*(x.chunk(cfg.accumulate) for x in batch)):
            with bf16:
                values = loss(*part).reshape(-1) / (cfg.accumulate * WORLD)
            values[0].backward()
            means = means + values.detach()
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for x in [means, *(p.grad for p in params if p.grad is not None)] if WORLD > 1 else []:
        with together():
            dist.all_reduce(whole := x.contiguous())
        x.copy_(whole)
    length = nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
    for name, value in ("loss", means[0]), ("its gradient's length", length):
        if not value.isfinite():
            raise Abort(f"{name} is {value.item()} at step {step + 1}, which is not taken; {cfg.out} is as last saved: "
                        "start again, or go on from there with --resume, with lower learning rates")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * learning_rate(step, cfg.steps)
        with bf16:  # for Muon's products
            optimizer.step()
        optimizer.zero_grad()
    return means


for way in "", "_backward":  # torch counts a CPU's attention as nothing
    gpu, cpu = (getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{x}{way}") for x in ("", "_for_cpu"))
    flop_registry[cpu] = flop_registry[gpu]


class Meter(TorchDispatchMode):
    """Counts the FLOPs of what is computed under it, and the bytes of what is made: now and at most."""
    flops = now = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        storages = lambda tree: {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(tree)
                                 if isinstance(x, torch.Tensor)}
        result, old = function(*args, **(kwargs := kwargs or {})), storages((args, kwargs))
        self.flops += flop_registry.get(function.overloadpacket, lambda *_, **__: 0)(*args, **kwargs, out_val=result)
        for key, storage in storages(result).items():
            if key not in old:                                                       # no view
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, count):
        self.now += count
        self.most = max(self.most, self.now)


def median_ms(calls, count=50):
    """Median time in ms of each of the calls, in turns, after two rounds to warm up.

    Rounds: count, or, where they take over 20 seconds, fewer, but at least four.
    """
    times = []
    while len(times) < 6 or len(times) < count + 2 and np.sum(times[2:]) < 20e3:
        times.append([])
        for call in calls:
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[-1].append(1e3 * (time.perf_counter() - began))
    return np.median(times[2:], 0).tolist()


def measure_training(cfg, describe, device="cuda"):
    """Seconds that all steps take on this GPU, by the best of three of each phase, and the GB that it holds at most.

    describe() as dry_run's, for the clips of a micro-batch. That GPUs talk to each other is not counted.
    """
    seconds = 0
    with torch.device(device):
        trained, others, phases, _ = describe()                          # others are only held: their memory counts
    optimizers = [torch.optim.AdamW([p for module in trained for p in module.parameters()], 1e-6, fused=True)]
    for steps, loss, batch in phases:
        times = []
        for step in range(4):
            began = time.perf_counter()
            update(loss, batch, optimizers, step, replace(cfg, accumulate=1, steps=4))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        seconds += steps * cfg.accumulate * min(times[1:])               # the first one compiles
    return seconds, torch.cuda.max_memory_allocated() / 1e9


def dry_run(stage, cfg, describe):
    """Count what training on cfg.gpus takes, with tensors that have sizes and no values; measure it, on a GPU.

    describe(n), for n clips at a time, returns modules that are trained, other ones that are kept in memory, phases
    (steps, loss and batch as for update) and what makes a sample or a step of it.
    """
    work, parts, training, inference = 0, cfg.gpus * cfg.accumulate, Meter(), Meter()
    with FakeTensorMode(), torch.compiler.set_stance("force_eager"):
        trained, others, phases, infer = describe(cfg.batch_size // parts)
        weights, rest = ({p: p.numel() for m in modules for p in m.parameters()} for modules in (trained, others))
        for p in weights:
            p.grad = torch.zeros_like(p)                                             # as in a second micro-batch
        for steps, loss, batch in phases:
            training.flops = 0
            with training:
                with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
                    value = loss(*batch).reshape(-1)[0]
                value.backward()
            work += steps * parts * training.flops
        with inference, torch.no_grad():
            infer()
    count, held = sum(weights.values()), sum((weights | rest).values())
    sizes = dict(weights_gb=4 * held, gradients_gb=4 * count, adamw_gb=8 * count, activations_gb=training.most)
    hours = lambda utilisation: work / (cfg.gpus * cfg.gpu_tflops * 1e12 * utilisation) / 3600
    figures = dict(parameters=sum(p.numel() for p in trained[0].parameters()),
                   exaflops=work / 1e18, tflops_to_infer=inference.flops / 1e12,
                   **{k: n / 1e9 for k, n in sizes.items()}, gb_a_gpu=sum(sizes.values()) / 1e9, gpus=cfg.gpus,
                   hours=hours(cfg.utilisation))
    if torch.cuda.is_available():
        seconds, gb = measure_training(cfg, partial(describe, cfg.batch_size // parts))
        figures |= dict(measured_gb=gb, measured_hours=seconds / 3600, measured_utilisation=hours(1) * 3600 / seconds)
    return summary(stage, figures)


def summary(stage, figures, began=None, then=None):
    """Print a stage's last line, `STAGE key=value ...`, and what to run next. Returns the figures."""
    if began:
        figures = figures | {"minutes": (time.time() - began) / 60}
    print0(stage, *(f"{k}={v:,}" if isinstance(v, int) else f"{k}={v:.4g}" for k, v in figures.items()))
    if then:
        print0("next:", then)
    return figures


@once
def save(path, **checkpoint):
    """Write a checkpoint of tensors and plain values so that `path` always holds a whole one, the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint | {"rng": rng}, file)
            os.fsync(file.fileno())  # else the new name may outlive a crash, and what it names not
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise Abort(f"cannot write {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def script_of(checkpoint):
    """The script that makes out/CHECKPOINT.pt."""
    scripts = dict(vae="vae.py", dit="dit.py", search="prune.py", pruned="prune.py", distilled="distill.py")
    return scripts.get(checkpoint, "SCRIPT.py that makes it")


def load(path, stage=None, finished=True):
    """Read a checkpoint, weights and plain values only; of the named stage, and of a finished run, if asked to."""
    script = script_of(stage or Path(path).stem)
    if not Path(path).is_file():
        raise Abort(f"{path} is missing: run python {script} first, or say where it is with --out")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        step, steps, made_by = checkpoint["step"], checkpoint["config"]["steps"], checkpoint["stage"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        raise Abort(f"{path} is not a whole checkpoint of ours: remove it and run python {script} again") from None
    if stage and made_by != stage:
        raise Abort(f"{path} was made by {script_of(made_by)}, not by {script}")
    if finished and step < steps:
        raise Abort(f"{path} stopped at step {step} of {steps}: finish it with python {script} --resume")
    return checkpoint


# Flags of which a resumed run may have others: those that change no weights, and what helps against an infinite loss.
FREE = ("resume", "out", "workers", "accumulate", "checkpointing", "compile", "log_every", "save_every", "score_clips",
        "gpus", "gpu_tflops", "utilisation")
RATES = "lr", "muon_lr", "head_lr", "search_lr", "warm_lr", "warm_muon_lr", "clip"


def resume(path, cfg, modules, optimizers):
    """With --resume load the state of an interrupted run of the same flags into modules (a dict) and optimizers.

    Returns the step that it had come to.
    """
    if not cfg.resume:
        return 0
    there = [Path(path).exists()] * WORLD
    if WORLD > 1:
        with together():
            dist.all_gather_object(there, there[0])
    if any(there) != all(there):
        raise Abort(f"{path} is there for some processes, not for others: --out must be a folder that all share")
    if not there[0]:
        print0(f"{path} is not there yet: starting from scratch")
        return 0
    checkpoint = load(path, finished=False)
    for k, v in asdict(cfg).items():
        if k not in FREE and (was := checkpoint["config"].get(k)) != v:
            if k not in RATES or k == "muon_lr" and 0 in (v, was):                # 0: other optimisers
                raise Abort(f"{path} was made with another --{k}: resume with the flags that it was started with")
            print0(f"--{k} was {was:g}, from here on it is {v:g}")
    for name, module in modules.items():
        module.load_state_dict(checkpoint[name])
    for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
        optimizer.load_state_dict(state)
    for set_state, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), checkpoint["rng"]):
        set_state(state)
    return checkpoint["step"]


def to_rgb(video):
    """video (3, F, H, W) in [-1, 1] -> bytes (F, H, W, 3)."""
    return ((rearrange(video, "c f h w -> f h w c").clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


@once
def write_png(path, video, fps=8):
    """Write video (3, F, H, W) in [-1, 1] as a PNG, animated (APNG) if it has more than one frame."""
    frames = to_rgb(video)
    count, height, width, _ = frames.shape

    def chunk(kind, layout="", *values, data=b""):
        body = kind + struct.pack(f">{layout}", *values) + data
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    above = np.diff(frames, axis=1, prepend=np.uint8(0)).reshape(count, height, -1)
    rows = np.pad(above, ((0, 0), (0, 0), (1, 0)), constant_values=2)  # PNG's filter 2: differences to the row above
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", "IIBBBBB", width, height, 8, 2, 0, 0, 0)
    if count > 1:
        png += chunk(b"acTL", "II", count, 0)
    for i, pixels in enumerate(zlib.compress(frame.tobytes(), 6) for frame in rows):
        if count > 1:
            png += chunk(b"fcTL", "IIIIIHHBB", max(0, 2 * i - 1), width, height, 0, 0, 100, round(100 * fps), 0, 0)
        png += chunk(b"fdAT", "I", 2 * i, data=pixels) if i else chunk(b"IDAT", data=pixels)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(png + chunk(b"IEND"))


# ------------------------------------------------------------------------------------------------ the toy world
COLOURS = {"red": (.9, .1, .1), "green": (.1, .8, .15), "blue": (.15, .25, .95), "yellow": (.95, .9, .1),
           "white": (.97, .97, .97), "magenta": (.9, .15, .9)}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "moves diagonally up-right",
           "moves diagonally down-left", "bounces up-and-down", "orbits clockwise")
BACKGROUNDS = {"black": ((.03, .03, .03),) * 2, "gray": ((.5, .5, .5),) * 2, "teal": ((0, .45, .45),) * 2,
               "brown": ((.4, .22, .08),) * 2, "sunset": ((.95, .5, .15), (.25, .08, .4))}  # (top, bottom) RGB
PALETTE = torch.tensor(list(COLOURS.values())) * 2 - 1                                           # (6, 3)
GROUNDS = rearrange(torch.tensor(list(BACKGROUNDS.values())) * 2 - 1, "k end c -> end k c 1 1 1")
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS, "background": tuple(BACKGROUNDS)}
HEADINGS = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1], [.5 ** .5, -.5 ** .5], [-.5 ** .5, .5 ** .5]])  # (x, y down)
COMBINATIONS = torch.cartesian_prod(*(torch.arange(len(names)) for names in ATTRIBUTES.values()))  # (960, 4)
HELD_OUT = (COMBINATIONS @ torch.tensor([1, 3, 7, 2])) % 10 == 0  # 96 of them, which no stage trains on


def caption(attributes):
    """Words of one clip's 4 attributes; -1 leaves one out."""
    colour, shape, motion, background = (n[i] if i >= 0 else "" for n, i in zip(ATTRIBUTES.values(), attributes))
    words = ["a", colour, shape or "thing", motion, background and f"on a {background} background"]
    return " ".join(filter(None, words))


def signed_distance(shape, x, y, r):
    """Distance in units of x and y to the outline of SHAPES[shape] of radius r at the origin, negative inside."""
    if shape == 0:
        return (x ** 2 + y ** 2).sqrt() - r
    if shape == 1:
        return torch.maximum(x.abs(), y.abs()) - .9 * r
    if shape == 2:
        return torch.maximum(y, .75 ** .5 * x.abs() - .5 * y) - .62 * r
    bar = lambda a, b: torch.maximum(a.abs() - 1.05 * r, b.abs() - .36 * r)
    return torch.minimum(bar(x, y), bar(y, x))


def track(shape, motion, rng, frames):
    """Radius and centres (frames, 2), x and y down, of one object, in units of the frame, which it never leaves."""
    r, u = rng.uniform(.16, .24), torch.linspace(0, 1, frames)
    left, top, bottom = r * torch.tensor([[1, .9, 1.074, 1.05], [1, .9, 1.24, 1.05], [1, .9, .62, 1.05]])[:, shape]
    if motion == 7:  # one clockwise turn, as seen
        angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * u
        return r, .5 + .18 * torch.stack([angle.cos(), angle.sin()], 1)
    low, high = torch.stack([left, top]), 1 - torch.stack([left, bottom])
    if motion == 6:
        path = torch.stack([0 * u, -rng.uniform(.28, .38) * (2 * np.pi * u).sin().abs()], 1)
    else:
        room = ((high - low) / HEADINGS[motion].abs().clamp(min=1e-6)).min().item()
        path = rng.uniform(.35, min(.5, room)) * u[:, None] * HEADINGS[motion]
    low, high = low - path.amin(0), high - path.amax(0)
    return r, low + (high - low) * torch.tensor(rng.uniform(size=2), dtype=torch.float32) + path


def render(attributes, seed=0, index=0, frames=17, size=(128, 128)):
    """Anti-aliased clips of one moving object on a plain background.

    attributes: (n, 4) long, positions in ATTRIBUTES. Clip i depends on (seed, index + i) and its attributes alone.
    Returns video (n, 3, frames, height, width) in [-1, 1].
    """
    p, q = ((torch.arange(n) + .5) / n for n in size)
    grounds, video = torch.lerp(*GROUNDS, p[:, None]), []                                        # (5, 3, 1, H, 1)
    for i, (colour, shape, motion, background) in enumerate(attributes.tolist()):
        r, path = track(shape, motion, np.random.default_rng((seed, index + i)), frames)
        x, y = q - path[:, 0, None, None], p[:, None] - path[:, 1, None, None]                   # (F, 1, W), (F, H, 1)
        inside = (.5 - size[0] * signed_distance(shape, x, y, r)).clamp(0, 1)                    # (F, H, W)
        video.append(torch.lerp(grounds[background], PALETTE[colour][:, None, None, None], inside))
    return torch.stack(video)


# ------------------------------------------------------------------------------------------------ the toy's reader
# The twin of render, by plain geometry; -1 = not recognised.
AREAS = torch.tensor([np.pi, 1.8 ** 2, 27 ** .5 * .62 ** 2, .72 * (4.2 - .72)]).float()      # of SHAPES at radius 1
PERIMETERS = torch.tensor([2 * np.pi, 4 * 1.8, 108 ** .5 * .62, 4 * 2.1]).float()
MIN_IOU = torch.tensor([.9, .87, .8, .8])     # with the shape's outline; a circle's is the one that blobs come close to
MIN_LEAD, MAX_EDGE = .03, .05           # IoU ahead of the second shape; width of the outline's soft edge, in frames
REACH = torch.tensor([[.25, .65], [.2, .5], [.12, .26]])     # shortest and longest straight move, bounce and orbit


def read_motion(path, seen):
    """Motion (-1 = not recognised) of an object at path (F, 2) where seen (F,) is 1, and the path's jerkiness."""
    z, u, p = torch.complex(*path.T), torch.linspace(0, 1, len(path)), seen / seen.sum()
    ways = torch.stack([u + 0j, (2 * np.pi * u).sin().abs() + 0j, torch.exp(2j * np.pi * u)])  # straight, bounce, orbit
    z, ways = z - (p * z).sum(), ways - (p * ways).sum(1, keepdim=True)
    scale = (p * ways.conj() * z).sum(1) / (p * ways.abs() ** 2).sum(1)  # complex: how far, and in which direction
    rest = z - scale[:, None] * ways
    misses = (p * rest.abs() ** 2).sum(1).sqrt()
    way = misses.argmin().item()
    # Second differences of what the closest way leaves over, so that a bounce's kinks cost nothing.
    triples = seen[2:] * seen[1:-1] * seen[:-2]
    jerk = (rest[way].diff(n=2).abs() * triples).sum() / triples.sum().clamp(min=1)
    reach, (low, high) = scale[way].abs(), REACH[way]
    cosines = HEADINGS @ torch.view_as_real(scale[way] / reach)
    motion, cosine = ((cosines.argmax().item(), cosines.max()), (6, cosines[2]), (7, 1))[way]
    fits = low < reach < high and cosine > .92 and misses[way] < .35 * (p * z.abs() ** 2).sum().sqrt()
    return motion if fits else -1, jerk


def look(clip):
    """One clip (3, F, H, W): its attributes, and its flicker, smoothness, constancy and sharpness (1 is best)."""
    coarse = clip[..., ::2, ::2]                                     # a quarter of the pixels tells the colours
    p, q = ((torch.arange(n) + .5) / n for n in clip.shape[2:])
    border = torch.maximum((q - .5).abs(), (p[:, None] - .5).abs()) > .48  # an object covers less than a quarter of it
    grounds = torch.lerp(*GROUNDS, p[:, None])                                                  # (5, 3, 1, H, 1)
    off = clip[:, ::2, border] - grounds.expand(-1, -1, -1, -1, len(q))[..., border]            # (5, 3, F/2, border)
    errors = off.abs().mean(1).flatten(1)
    best = errors.mean(1).argmin().item()
    background = best if (errors[best] < .2).float().mean() > .7 else -1
    ground = grounds[best] + off[best].flatten(1).median(1).values[:, None, None, None]
    nothing = torch.tensor([-1, -1, -1, background]), torch.zeros(4)

    away = clip - ground
    apart = away[..., ::2, ::2].abs().amax(0)
    most = apart[:, ::2, ::2].quantile(.97)                          # the smallest object covers 5% of a frame
    if not most > .4:                                                # no object, or NaN
        return nothing
    paint = coarse[:, apart > .6 * most].median(1).values            # without the soft edge
    wrong = (paint - PALETTE).abs().mean(1)
    axis = paint[:, None, None, None] - ground
    matte = ((away * axis).sum(0) / (axis ** 2).sum(0).clamp(min=.1)).clamp(max=1)              # (F, H, W)
    matte = matte * (matte > .15)                                    # a little noise everywhere is no object
    area = matte.mean((1, 2))
    path = torch.stack([matte.mean(1) @ q / len(q), matte.mean(2) @ p / len(p)], 1) / area[:, None].clamp(min=1e-6)
    x, y = q - path[:, 0, None, None], p[:, None] - path[:, 1, None, None]
    radius = (area / AREAS[:, None]).sqrt()                                                     # (4, F)
    outlines = torch.stack([signed_distance(shape, x, y, r[:, None, None]) for shape, r in enumerate(radius)])
    misses = ((outlines < 0) ^ (matte > .5)).float().mean((2, 3))                               # (4, F)
    ious = (2 * area - misses) / (2 * area + misses).clamp(min=1e-6)  # the two areas are the same
    seen = ((area > .02) & (area < .3) & (ious.amax(0) > .5)).float()
    if seen.mean() < .75:
        return nothing

    mean = lambda values: (values * seen).sum(-1) / seen.sum()
    vary = lambda values: mean((values - mean(values)[..., None]).abs()).mean()
    (iou, second), (shape, _) = [pair.tolist() for pair in mean(ious).topk(2)]
    edge = mean(((matte - .5).abs() < .3).float().mean((1, 2)) / (PERIMETERS[shape] * radius[shape]).clamp(min=1e-6))
    clear = iou > MIN_IOU[shape] and iou - second > MIN_LEAD and edge < MAX_EDGE
    motion, jerk = read_motion(path, seen)
    far = (outlines[shape][:, ::2, ::2] > .05) * seen[:, None, None]
    far = far[1:] * far[:-1]
    flicker = (coarse.diff(dim=1).abs().mean(0) * far).sum() / far.sum().clamp(min=1)
    core = (matte[:, ::2, ::2] > .8).float()
    paints = (coarse * core).mean((2, 3)) / core.mean((1, 2)).clamp(min=1e-6)                   # (3, F)
    true = (.5 - len(p) * outlines[shape]).clamp(0, 1)
    blur = (matte - true * (true > .15)).abs().mean((1, 2)) / area.clamp(min=1e-6)              # (F,)
    change = vary(area) / mean(area) + vary(paints) + vary(blur)
    quality = 1 - torch.stack([flicker / .2, jerk / .03, 2 * change, 2 * mean(blur)])
    read = [wrong.argmin() if wrong.min() < .25 else -1, shape if clear else -1, motion, background]
    return torch.tensor(read), quality.clamp(min=0) * seen.mean()


def score(video, attributes):
    """The toy's VBench of clips for captions that say attributes (n, 4), -1 = left open; entropy: nan if none is."""
    read, quality = map(torch.stack, zip(*map(look, video.float())))
    left_open, entropies = attributes < 0, []
    for values, free, names in zip(read.T, left_open.T, ATTRIBUTES.values()):
        if free.any():  # of what is chosen where the caption leaves the choice, so that a collapsed model shows
            counts = torch.bincount(values[free & (values >= 0)], minlength=len(names))
            entropies.append(torch.special.entr(counts / counts.sum().clamp(min=1)).sum() / np.log(len(names)))
    right = torch.where(left_open, read >= 0, read == attributes)
    figures = {"semantic": right.all(1).float().mean().item(), **dict(zip(ATTRIBUTES, right.float().mean(0).tolist()))}
    figures |= dict(zip(("flicker", "smoothness", "constancy", "sharpness"), quality.mean(0).tolist()))
    figures |= {"quality": quality.mean().item(), "entropy": float(np.mean(entropies)) if entropies else math.nan}
    return {"total": (4 * figures["quality"] + figures["semantic"]) / 5, **figures}


# ------------------------------------------------------------------------------------------------ data
VIDEOS, IMAGES = (".mp4", ".mov", ".mkv", ".webm"), (".png", ".jpg", ".jpeg")


@dataclass
class DataConfig(Stage):
    """What a clip is; it travels with the checkpoints, so that later stages see the same clips."""
    frames: int = flag(17, "frames of a clip, 1 + a multiple of the VAE's temporal ratio")
    size: tuple = flag((128, 128), "height and width in pixels")
    fps: float = flag(8., "frames per second that videos are resampled to", least=1e-3)
    workers: int = flag(0, "processes that load clips; 0: the one that trains or encodes")


class SyntheticClips:
    """The toy world: clip i depends on (seed, i) alone. Splits: train; full, unseen combinations; open, half told."""

    kinds = {"clips": range(2 ** 31)}

    def __init__(self, cfg, split="train"):
        self.cfg, self.split, self.seed = cfg, split, 3 * cfg.seed + ("train", "full", "open").index(split)

    def attributes(self, i):
        """What clip i shows and what its caption says of it, -1 where it is silent: two tensors of 4."""
        rng = np.random.default_rng((self.seed, i, 1))  # not track's: what is silent must not tell where objects go
        if self.split == "full":
            shown = COMBINATIONS[HELD_OUT][i * 37 % 96]  # 37 and 96 have no common factor: all come, neighbours differ
            return shown, shown
        seen = COMBINATIONS[~HELD_OUT]
        shown = seen[rng.integers(len(seen))]
        silent = rng.random(4) < .2 if self.split == "train" else rng.permutation(4) < 2
        return shown, torch.where(torch.from_numpy(silent), -1, shown)

    def clip(self, i):
        return render(self.attributes(i)[0][None], self.seed, i, self.cfg.frames, self.cfg.size)[0], self.caption(i)

    def caption(self, i):
        return caption(self.attributes(i)[1].tolist())


class VideoFolder:
    """A folder of videos and images with captions, listed once: STARTS clips of each video, one frame of an image.

    A clip that cannot be read, or that its file is too short for, is that of the next file; the file is named.
    Raises Abort where folder, caption or `av` is missing, or too many clips are bad: over BAD, or all of a kind.
    """
    STARTS = 8  # Ours: starts per video, evenly spread, so that decoded clips can be kept
    BAD = .1
    HOLD = .25  # Ours: seconds that a video's last frame may stay, where its sound is longer or its end is missing

    def __init__(self, cfg):
        self.cfg, folder = cfg, Path(cfg.data)
        if not folder.is_dir():
            raise Abort(f"--data {folder} is no folder: give one with NAME.mp4 and NAME.txt, or leave it synthetic")
        listed = sorted(folder.iterdir())
        videos, images = ([f for f in listed if f.suffix.lower() in kind] for kind in (VIDEOS, IMAGES))
        if not videos + images:
            raise Abort(f"--data {folder} holds no {', '.join(VIDEOS + IMAGES)} file")
        captions = {f.stem for f in listed if f.suffix == ".txt"}
        for f in videos + images:
            if f.stem not in captions:
                raise Abort(f"{f} has no caption: write one into {f.with_suffix('.txt').name} beside it")
        try:
            import av  # noqa: F401
        except ImportError:
            raise Abort("reading videos needs PyAV: pip install av") from None
        self.files, self.videos, self.tried, self.bad, self.named = videos + images, len(videos), 0, set(), set()
        n = self.STARTS * self.videos
        self.kinds = {k: i for k, i in dict(clips=range(n), images=range(n, n + len(images))).items() if i}
        self.kept = lru_cache(2 ** 28 // (12 * cfg.frames * math.prod(cfg.size)))(self.decode)  # 256 MB of clips

    def __reduce__(self):  # for loading processes that do not fork: each lists the folder and keeps clips of its own
        return VideoFolder, (self.cfg,)

    def item(self, i):
        """Number of the start, and file, of clip i. Each start begins at another file: even choices meet them all."""
        v, n = self.videos, self.STARTS * self.videos
        return (i // v, self.files[(i + i // v) % v]) if i < n else (0, self.files[i - n + v])

    @staticmethod
    def read_caption(file):
        return " ".join(read_text(file.with_suffix(".txt")).split())

    def caption(self, i):
        return self.read_caption(self.item(i)[1])

    def clip(self, i):
        """Clip i (3, F, H, W) in [-1, 1] and its caption; where it is bad, those of the next good one."""
        indices = next(indices for indices in self.kinds.values() if i in indices)
        for _ in indices:
            start, path = self.item(i)
            if i not in self.bad:
                try:
                    return self.kept(start, path), self.caption(i)
                except (Abort, OSError) as error:
                    if path not in self.named:
                        print(f"skipped: {error}", flush=True)
                        self.named.add(path)
                    self.bad.add(i)
                    count = min(sum(map(len, self.kinds.values())), max(1000, self.tried))
                    if len(self.bad) > self.BAD * count:
                        raise Abort(f"{len(self.bad)} of {count} clips are skipped, {self.BAD:.0%} may be: {error}"
                                    ) from None
            i = indices[(i + 1 - indices.start) % len(indices)]
        raise Abort(f"--data {self.cfg.data}: all its videos, or all its images, are skipped: mend or remove them")

    def decode(self, start, path):
        """A clip (3, F, H, W) in [-1, 1] of a file: at each moment the frame that is nearest, or else still shown."""
        import av
        self.tried += 1
        cfg = self.cfg
        still = path.suffix.lower() in IMAGES
        wanted = np.arange(1 if still else cfg.frames) / cfg.fps  # seconds
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                late, seconds = (float((n or 0) * stream.time_base) for n in (stream.start_time, stream.duration))
                seconds = seconds or (container.duration or 0) / av.time_base - late  # .mkv, .webm say it only here
                shortest = 1 / float(stream.average_rate or cfg.fps)
                room = seconds - wanted[-1] - max(shortest, 1 / cfg.fps)
                if not still and room < -1e-6:                       # of rounding
                    raise Abort(f"{path} lasts {seconds:.2f} s, a clip of {cfg.frames} frames at {cfg.fps:g} per "
                                f"second {cfg.frames / cfg.fps:.2f} s: remove it, or lower --frames or raise --fps")
                wanted = wanted + max(room, 0) * start / (self.STARTS - 1)
                container.seek(int((wanted[0] + late) / stream.time_base), stream=stream)
                decoded, frames = container.decode(stream), []
                frame, later = next(decoded, None), next(decoded, None)
                for moment in wanted + late:
                    while later and later.time < moment + shortest / 2:
                        frame, later = later, next(decoded, None)
                    stays = frame and max(shortest, self.HOLD, float((frame.duration or 0) * frame.time_base))
                    if not frame or not (still or later) and moment - frame.time > stays:
                        raise Abort(f"{path} ends after {len(frames)} of {len(wanted)} frames: remove it or encode it "
                                    "again")
                    frames.append(self.fit(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))))
        except (av.error.FFmpegError, IndexError, TypeError, ValueError) as error:
            raise Abort(f"{path} cannot be decoded ({error}): remove it or encode it again") from None
        return torch.cat(frames, 1)

    def fit(self, pixels):
        """A decoded frame, bytes (h, w, 3), scaled and cropped in the middle to (3, 1, H, W) in [-1, 1]."""
        frame = rearrange(torch.from_numpy(pixels.copy()), "h w c -> c 1 h w").float() / 127.5 - 1
        scale = max(side / n for side, n in zip(self.cfg.size, frame.shape[2:]))
        frame = F.interpolate(frame, [round(n * scale) for n in frame.shape[2:]], mode="bilinear", antialias=True)
        for dim, side in enumerate(self.cfg.size, 2):
            frame = frame.narrow(dim, (frame.shape[dim] - side) // 2, side)
        return frame


def words(cfg, length=None):
    """All words of the captions, or of the first `length` words of each."""
    captions = (["a thing", *map(caption, COMBINATIONS.tolist())] if cfg.data == "synthetic" else
                map(VideoFolder.read_caption, open_clips(cfg).files))
    return sorted({word for said in captions for word in said.lower().split()[:length]})


def open_clips(cfg, split="train"):
    """The clips of cfg.data: clip(i) is a video (3, F, H, W) and caption(i); kinds has the ranges of i."""
    return SyntheticClips(cfg, split) if cfg.data == "synthetic" else VideoFolder(cfg)


# ------------------------------------------------------------------------------------------------ the VAE (Sec. 4.1)
# Ours: LTX-Video's VAE, version 0.9.0 [9]: 3D convolutions, causal in the encoder: latent frame k sees the first 1 + 8k
# frames only, and an image is a clip of one frame. light=False is LTX's, to the last weight; light=True is the toy's.
RATIOS = {"4x16x16": (4, 16), "4x32x32": (4, 32), "8x32x32": (8, 32), "8x64x64": (8, 64)}  # Table 3: (time, space)


@dataclass
class VAEConfig(DataConfig):
    ratio: str = flag("8x32x32", f"compression in time and space, of Table 3: {', '.join(RATIOS)}")
    latent_channels: int = flag(128, "channels of the latents, the same for every ratio")
    patch: int = flag(8, "side of a patch in pixels, where the encoder starts; 0: every stage halves t, h and w")
    widths: tuple = flag((64, 64, 128, 256), "channels from the first stage to the latents'")
    encoder_blocks: tuple = flag((1, 1, 1, 1), "residual blocks per stage of the encoder")
    decoder_blocks: tuple = flag((1, 1, 1, 2), "residual blocks per stage of the decoder")
    light: bool = flag(True, "Ours: (1,3,3) + (3,1,1) kernels, and shortcuts round the samplers as in LTX 0.9.5")


def pixel_norm(x):
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class CausalConv3d(nn.Conv3d):
    """Repeats the first frame before the clip; with causal=False, as in LTX's decoder, both ends alike."""

    def __init__(self, c_in, c_out, kernel, stride=1, causal=True):
        super().__init__(c_in, c_out, kernel, stride)
        self.causal, self.padding = causal, (0, *(k // 2 for k in self.kernel_size[1:]))

    def forward(self, x):
        extra = self.kernel_size[0] - 1
        before, after = (extra, 0) if self.causal else (extra // 2, extra // 2)
        return super().forward(torch.cat([x[:, :, :1]] * before + [x] + [x[:, :, -1:]] * after, 2) if extra else x)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, light, causal):
        super().__init__()
        first, second = ((1, 3, 3), (3, 1, 1)) if light else (3, 3)
        self.conv1 = CausalConv3d(c_in, c_out, first, causal=causal)
        self.conv2 = CausalConv3d(c_out, c_out, second, causal=causal)
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else None
        self.norm = nn.LayerNorm(c_in, eps=1e-6) if c_in != c_out else None

    def forward(self, x):                                                                        # (B, C, F, H, W)
        h = self.conv1(F.silu(pixel_norm(x)))
        h = self.conv2(F.silu(pixel_norm(h)))
        return h + (self.shortcut(self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)) if self.shortcut else x)


class Down(nn.Module):
    """Halve some of t, h and w: a strided convolution; light: plus a shortcut, space to depth and averages of it."""

    def __init__(self, c_in, c_out, stride, light):
        super().__init__()
        self.stride, self.light = stride, light
        kernel = tuple(2 * s - 1 for s in stride) if light else 3
        self.conv = CausalConv3d(c_in, c_out if light else c_in, kernel, stride)
        self.block = ResBlock(c_in, c_out, light, True) if not light and c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.block(self.conv(x))
        if not self.light:
            return h
        t, p, q = self.stride
        x = torch.cat([x[:, :, :t - 1], x], 2)
        folded = rearrange(x, "b c (f t) (h p) (w q) -> b (c t p q) f h w", t=t, p=p, q=q)
        return h + reduce(folded, "b (c g) f h w -> b c f h w", "mean", c=h.shape[1])


class Up(nn.Module):
    """Double some of t, h and w: a convolution, depth to space, less the first frame's extra copies."""

    def __init__(self, c_in, c_out, stride, light):
        super().__init__()
        self.stride, self.light = stride, light
        self.block = ResBlock(c_in, c_out, light, False) if not light and c_in != c_out else nn.Identity()
        self.conv = CausalConv3d(c_in if light else c_out, c_out * math.prod(stride), 1 if light else 3, causal=False)

    def forward(self, x):
        h = self.conv(self.block(x))
        if self.light:
            h = h + repeat(x, "b c f h w -> b (c g) f h w", g=h.shape[1] // x.shape[1])
        t, p, q = self.stride
        return rearrange(h, "b (c t p q) f h w -> b c (f t) (h p) (w q)", t=t, p=p, q=q)[:, :, t - 1:]


class VAE(nn.Module):
    """Video autoencoder of Sec. 4.1. encode and decode speak normalised latents, (z - mean) / std per channel."""
    inner = ""  # Muon trains all of it

    def __init__(self, cfg):
        super().__init__()
        if cfg.ratio not in RATIOS:
            raise Abort(f"--ratio {cfg.ratio}: choose from {', '.join(RATIOS)}")
        self.cfg, self.compression = cfg, RATIOS[cfg.ratio]
        kernel, c, light, (time, space) = 1 if cfg.light else 3, cfg.latent_channels, cfg.light, self.compression
        self.patch = cfg.patch or space // time
        if self.patch == 1 or space % self.patch:
            raise Abort(f"--patch {self.patch} does not fit --ratio {cfg.ratio}: use a power of 2, from 2 to {space}")
        halve_t, halve_s = int(math.log2(time)), int(math.log2(space // self.patch))
        stages = max(halve_t, halve_s)
        strides = [tuple(2 if i >= stages - n else 1 for n in (halve_t, halve_s, halve_s)) for i in range(stages)]
        widths, down_blocks, up_blocks = (per_stage[:stages] + per_stage[-1:] for per_stage in
                                          (cfg.widths, cfg.encoder_blocks, cfg.decoder_blocks))
        if min(map(len, (widths, down_blocks, up_blocks))) <= stages or light and any(
                a * math.prod(stride) % b for a, b, stride in zip(widths, widths[1:], strides)):
            raise Abort(f"--widths, --encoder_blocks and --decoder_blocks have one for each of {stages} stages and one "
                        "for the latents; with --light a width divides the one before times what that stage halves")
        blocks = lambda width, count, causal: [ResBlock(width, width, light, causal) for _ in range(count)]
        self.encoder_in = CausalConv3d(3 * self.patch ** 2, widths[0], kernel)
        encoder, decoder = [], blocks(widths[-1], up_blocks[-1], False)
        for i in range(stages):
            encoder += blocks(widths[i], down_blocks[i], True) + [Down(widths[i], widths[i + 1], strides[i], light)]
        for i in reversed(range(stages)):
            decoder += [Up(widths[i + 1], widths[i], strides[i], light)] + blocks(widths[i], up_blocks[i], False)
        self.encoder = nn.Sequential(*encoder, *blocks(widths[-1], down_blocks[-1], True))
        self.encoder_out = CausalConv3d(widths[-1], c + 1, kernel)  # the latents' mean, and one shared log-variance
        self.decoder_in = CausalConv3d(c, widths[-1], kernel, causal=False)
        self.decoder = nn.Sequential(*decoder)
        self.decoder_out = CausalConv3d(widths[0], 3 * self.patch ** 2, kernel, causal=False)
        self.register_buffer("mean", torch.zeros(1, c, 1, 1, 1))
        self.register_buffer("std", torch.ones(1, c, 1, 1, 1))

    def latent_shape(self, frames, *size):
        """(C, f, h, w) of a clip's latents; raises Abort if the clip's size does not fit the ratio."""
        if len(size) != 2:
            raise Abort(f"--size takes a height and a width, such as {self.cfg.size[0]},{self.cfg.size[-1]}, and "
                        "--crop frames before these")
        (time, space), (height, width) = self.compression, size
        if frames % time != 1:
            raise Abort(f"{frames} frames do not fit --ratio {self.cfg.ratio}: use 1 + a multiple of {time}, "
                        f"such as {frames // time * time + 1}")
        if height % space or width % space or not height * width:
            raise Abort(f"{height}x{width} pixels do not fit --ratio {self.cfg.ratio}: use multiples of {space}")
        return self.cfg.latent_channels, frames // time + 1, height // space, width // space

    def to_patches(self, video):
        return rearrange(video, "b c f (h p) (w q) -> b (c q p) f h w", p=self.patch, q=self.patch).contiguous(
            memory_format=torch.channels_last_3d)

    def posterior(self, patches):
        """Patches of a video -> its latents' mean (B, C, f, h, w), log-variance (B, 1, f, h, w), not normalised."""
        x = self.encoder_out(F.silu(pixel_norm(self.encoder(self.encoder_in(patches)))))
        return x[:, :-1], x[:, -1:].clamp(-30, 20)

    def reconstruct(self, z):
        """Latents, not normalised -> patches of the video."""
        x = self.decoder(self.decoder_in(z.contiguous(memory_format=torch.channels_last_3d)))
        return self.decoder_out(F.silu(pixel_norm(x)))

    def encode(self, video):
        """video (B, 3, F, H, W) in [-1, 1] -> latents (B, C, f, h, w). Raises Abort if its size does not fit."""
        self.latent_shape(*video.shape[2:])
        return (self.posterior(self.to_patches(video))[0] - self.mean) / self.std

    def decode(self, latents):
        """latents (B, C, f, h, w) -> video (B, 3, F, H, W), about [-1, 1]."""
        patches = self.reconstruct(latents * self.std + self.mean)
        return rearrange(patches, "b (c q p) f h w -> b c f (h p) (w q)", p=self.patch, q=self.patch)

    def forward(self, video, noise):
        """video (B, 3, F, H, W), noise like latents -> (loss, mean squared error).

        The loss: reconstruction + KL + latent consistency.

        Ours: the paper's losses are in a supplement that is not public. Its authors' VAE paper [48] finds that GAN,
        LPIPS and wavelet losses bring nothing at scale, and that a reconstruction, encoded again, should land on its
        own latents.
        """
        mean, logvar = self.posterior(self.to_patches(video))
        z = mean + (logvar / 2).exp() * noise
        output = self.reconstruct(z)
        loss, error = self.distance(output, video)
        loss = loss + self.cfg.kl_weight * .5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        if self.cfg.consistency_weight:
            again = self.posterior(output)[0]
            loss = loss + self.cfg.consistency_weight * (again - mean.detach()).square().mean()
        return torch.stack([loss, error.detach()])

    def distance(self, output, video):
        """Patches of a reconstruction, and its video -> weighted L1 + 5 MSE, and the plain mean squared error.

        Ours: patches on or beside what differs from its row's median colour count five times. Most of a clip is
        background that is easy; on the toy this is worth 2 dB and is what makes outlines sharp.
        """
        pixels = video[..., ::self.patch // 2, ::self.patch // 2]
        far = (pixels - pixels.median(-1, keepdim=True).values.median(2, keepdim=True).values).abs().amax(1) > .2
        weight = 1 + 4 * F.max_pool2d(far.float(), 6, 2, 2)[:, None]                             # (B, 1, F, h, w)
        error = output - self.to_patches(video)
        return (weight * (error.abs() + 5 * error.square())).mean(), error.square().mean()

    @torch.no_grad()
    def measure_latents(self, clips, count):
        """Set mean and std from the posteriors' means of `count` clips, drawn from all of them evenly."""
        indices = next(iter(clips.kinds.values()))
        indices = indices[::max(1, len(indices) // count)][:count]
        videos = (clips.clip(i)[0][None].to(self.mean.device) for i in indices)
        z = torch.stack([self.posterior(self.to_patches(video))[0][0] for video in videos], 1)
        self.std, self.mean = (y.view(1, -1, 1, 1, 1) for y in torch.std_mean(z.flatten(1), 1))


# ------------------------------------------------------------------------------------------------ LTX's weights
# diffusers' names -> ours. Resnets and samplers then sort, by name, into our order: in the encoder, a block's shrink is
# after its resnets and mid_block last; in the decoder, mid_block is first and a block's grow before its resnets.
LTX_NAMES = ((r"\.conv\.(weight|bias)$", r".\1"), (r"^(en|de)coder\.conv_(in|out)", r"\1coder_\2"), ("norm3", "norm"),
             (r"downsamplers\.0", "shrink.conv"), (r"(down_blocks.*)conv_out", r"\1shrink.block"), ("^latents_", ""),
             (r"upsamplers\.0", "grow"), (r"(up_blocks.*)conv_in", r"\1grow.block"), ("conv_shortcut", "shortcut"))


def read_ltx(path, names):
    """Tensors of a .safetensors file, or of a folder of them, by our name; names: pairs of a pattern and what it is."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise Abort("reading LTX's weights needs safetensors: pip install safetensors") from None
    tensors = {}
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [path]:
        try:
            own = load_file(file)
        except SafetensorError:
            raise Abort(f"{file} is not a whole .safetensors file: fetch it again") from None
        for name, tensor in own.items():
            for theirs, ours in names:
                name = re.sub(theirs, ours, name)
            tensors[name] = tensor.float()
    return tensors


def load_ltx(path, cfg):
    """LTX-Video's VAE, version 0.9.0, in diffusers' layout -> VAE of cfg, but for the sizes, read off the tensors.

    Raises Abort where a tensor is missing, left over or of another size.
    """
    try:
        tensors, counts = read_ltx(path, LTX_NAMES), {}
        grows = sorted(name for name in tensors if name.endswith("grow.conv.weight"))
        widths = [tensors[name].shape[1] for name in grows[::-1]] + [tensors["encoder_out.weight"].shape[1]]
        for part, sampler in ("encoder", "shrink"), ("decoder", "grow"):
            found = (re.match(rf"{part}\..*?(resnets\.\d+|{sampler})", name) for name in tensors)
            place = {unit: f"{part}.{i}" for i, unit in enumerate(sorted({match[0] for match in found if match}))}
            counts[part] = [len(run) for run in "".join("r|"[unit.endswith(sampler)] for unit in place).split("|")]
            tensors = {re.sub("|".join(place), lambda m: place[m[0]], k): x for k, x in tensors.items()}
        patch, scale = math.isqrt(len(tensors["decoder_out.weight"]) // 3), 2 ** len(grows)
        model = VAE(replace(cfg, ratio=f"{scale}x{patch * scale}x{patch * scale}", patch=patch, light=False,
                            latent_channels=tensors["decoder_in.weight"].shape[1], widths=tuple(widths),
                            encoder_blocks=tuple(counts["encoder"]), decoder_blocks=tuple(counts["decoder"][::-1])))
        tensors |= {name: tensors[name].view(1, -1, 1, 1, 1) for name in ("mean", "std")}
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise Abort(f"{path} is not LTX-Video's VAE 0.9.0 in diffusers' layout: {' '.join(str(error).split())[:200]}"
                    ) from None
    return model


# ------------------------------------------------------------------------------------------------ training
@dataclass
class Config(VAEConfig, Training):
    init: str = flag("", "LTX-Video's VAE to start from, diffusers' .safetensors; with --steps 0 to take as it is")
    steps: int = 2000
    batch_size: int = 8
    crop: tuple = flag((9, 64, 64), "Ours: frames, height and width of the crops that it trains on; 0,0,0: whole clips")
    lr: float = 2e-3
    kl_weight: float = flag(1e-2, "weight of the KL divergence from N(0, I)")
    consistency_weight: float = flag(0., "weight of the latent consistency loss of H3AE [48]")
    log_every: int = 100


PRESETS = {"toy": TOY, "paper": PAPER | dict(  # LTX's own sizes: 419,193,649 parameters. Ours: all else
    frames=33, size=(512, 512), fps=24., patch=0, widths=(128, 256, 512, 512), encoder_blocks=(4, 3, 3, 7),
    decoder_blocks=(4, 3, 3, 7), light=False, steps=200_000, batch_size=128, crop=(0, 0, 0), lr=5e-5, kl_weight=1e-4,
    consistency_weight=.1, workers=8)}


def draw(kinds, count, key):
    """Pick a kind of clips, and `count` clips of it, by number; the same for the same key."""
    rng, sizes = np.random.default_rng(key), [len(clips) for clips in kinds]
    kind = rng.choice(len(kinds), p=np.divide(sizes, sum(sizes)))  # videos and images do not share a batch
    return kind, rng.integers(sizes[kind], size=count)


def crop_size(cfg):
    return [min(m or n, n) for m, n in zip(cfg.crop, (cfg.frames, *cfg.size))]


def crop(video, size, rng):
    """Of two random crops, (F, H, W) or less where the video (3, F, H, W) has less, the one that shows more.

    Ours: most of a toy clip is background; eight crops show four times the objects of two clips in half the pixels.
    """
    corners = rng.integers([max(n - m, 0) + 1 for n, m in zip(video.shape[1:], size)], size=(2, 3))
    return max((video[:, *map(slice, corner, corner + size)] for corner in corners), key=torch.std)


def training_batch(clips, cfg, step):
    """This process's share of crops (B, 3, F, H, W) of clips that depend on (seed, step) alone."""
    kinds = list(clips.kinds.values())
    kind, rows = draw(kinds, cfg.batch_size, (cfg.seed, step))
    return torch.stack([crop(clips.clip(kinds[kind][row])[0], crop_size(cfg),
                             np.random.default_rng((cfg.seed, step, row))) for row in share(rows)])


@torch.no_grad()
def reconstruct_clips(vae, clips, indices):
    """Clips (n, 3, F, H, W) and what the VAE makes of them, on the CPU."""
    video = torch.stack([clips.clip(i)[0] for i in indices])
    again = [vae.decode(vae.encode(clip[None].to(vae.mean.device))).clamp(-1, 1).cpu() for clip in video]
    return video, torch.cat(again)


def evaluate(vae, cfg):
    """Figures of reconstructed clips, unseen ones if synthetic, and a film of inputs above reconstructions."""
    clips, rows, film = open_clips(cfg, "full"), [], []
    for i in next(iter(clips.kinds.values()))[:48]:  # one by one: a clip of the paper's size has 100 MB
        video, output = reconstruct_clips(vae, clips, [i])
        c, f, h, w = vae.latent_shape(*video.shape[2:])
        scale = (c / 3) ** .5  # the baseline: averages over boxes, as many numbers as the latents have
        boxes = F.interpolate(F.adaptive_avg_pool3d(video, (f, round(h * scale), round(w * scale))), video.shape[2:],
                              mode="trilinear")
        psnr = lambda clip: 10 * (4 / (clip - video).square().mean()).log10().item()
        rows.append(dict(psnr=psnr(output), psnr_boxes=psnr(boxes)))
        if cfg.data == "synthetic":
            for name, clip in dict(readable=output, readable_boxes=boxes, readable_true=video).items():
                rows[-1][name] = score(clip, clips.attributes(i)[0][None])["semantic"]
        film += [torch.cat([video, output], 3)] if len(film) < 6 else []
    figures = {k: np.mean([row[k] for row in rows]).item() for k in rows[0]}
    return figures, rearrange(film, "n 1 c f h w -> c f h (n w)")


def describe(cfg, n):
    """What dry_run counts, for n clips at a time."""
    vae = VAE(cfg)
    prepare([*vae.encoder, *vae.decoder], cfg)
    video, noise = torch.rand(n, 3, *crop_size(cfg)), torch.rand(n, *vae.latent_shape(*crop_size(cfg)))
    infer = lambda: vae.decode(torch.rand(1, *vae.latent_shape(cfg.frames, *cfg.size)))
    return [vae], [], [(cfg.steps, vae, (video, noise))], infer


def main(cfg):
    """Train the VAE; returns the figures of its summary line."""
    if cfg.dry_run:
        return dry_run("VAE", cfg, partial(describe, cfg))
    began, device, path = time.time(), setup(cfg), Path(cfg.out) / "vae.pt"
    with device:
        vae = (load_ltx(cfg.init, cfg) if cfg.init else VAE(cfg)).to(memory_format=torch.channels_last_3d)
    cfg = vae.cfg
    shape = vae.latent_shape(cfg.frames, *cfg.size)
    print0(f"vae: {cfg.ratio}, latents {shape} of {cfg.data} clips {cfg.frames, *cfg.size}, {WORLD} x {device.type}")
    vae.latent_shape(*crop_size(cfg))  # raises where crops do not fit
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours of work that end in a file there
    if not cfg.steps:
        if not cfg.init:
            raise Abort("--steps 0 trains nothing: say with --init which weights to take as they are")
        save(path, stage="vae", step=0, config=asdict(cfg), model=vae.state_dict())
        figures = dict(parameters=sum(p.numel() for p in vae.parameters()))
        return summary("VAE", figures, began, "python dit.py --init TRANSFORMER")
    optimizers = make_optimizers(vae, cfg.lr, cfg.muon_lr)
    start = resume(path, cfg, {"model": vae}, optimizers)
    clips = open_clips(cfg)
    loader = torch.utils.data.DataLoader(range(start, cfg.steps), None, num_workers=cfg.workers,
                                         collate_fn=partial(training_batch, clips, cfg),
                                         prefetch_factor=1 if cfg.workers else None,   # the paper's are 100 MB a clip
                                         generator=torch.Generator())  # its own, so that workers change no noise
    prepare([*vae.encoder, *vae.decoder], cfg)
    for step, video in zip(progress(start, cfg.steps), loader):
        noise = draw_noise(cfg.batch_size, vae.latent_shape(*video.shape[2:]), device)
        loss, error = update(vae, (video.to(device), noise), optimizers, step, cfg)
        if (step + 1) % cfg.log_every == 0:
            print0(f"step {step + 1}/{cfg.steps}  loss {loss:.4f}  psnr {10 * (4 / error).log10():.2f} dB  "
                   f"{(time.time() - began) / 60:.1f} min")
        if step + 1 == cfg.steps:
            vae.measure_latents(clips, 256)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save(path, stage="vae", step=step + 1, config=asdict(cfg), model=vae.state_dict(),
                 optimizer=[optimizer.state_dict() for optimizer in optimizers])
    figures, film = evaluate(vae, cfg)
    write_png(path.with_suffix(".png"), film, cfg.fps)
    return summary("VAE", figures, began, f"look at {path.with_suffix('.png')}, then python dit.py")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
