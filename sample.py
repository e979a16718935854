"""Text to video with the checkpoint of any stage, its scores beside baselines, and its speed (Tables 1 and 3).

    python sample.py                                        # a grid of captions that nobody trained on
    python sample.py --prompt "a red circle moves left"     # one video; --prompts FILE: one per line, into --out
    python sample.py --score 192                            # semantic, quality and total on unseen captions
    python sample.py --vbench VBench_full_info.json         # the folder of videos that VBench scores (Table 2)
    python sample.py --bench --frames 49 --size 384,512     # latency, FLOPs, memory; the four ratios of Table 3

out/dit.pt (or pruned.pt, distilled.pt) and the vae.pt beside it -> out/sample.png, .npy or .mp4
"""
import json
import math
import os
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode

from dit import (MOBILE, LaterStage, build, evaluations, find_generator, fingerprint, load_dit, load_vae, make_videos,
                 recipe, step_inputs, test_captions, untrained)
from vae import (RANK, RATIOS, VAE, WORLD, Abort, Meter, barrier, flag, launch, median_ms, open_clips, print0, progress,
                 read_text, reconstruct_clips, score, setup, summary, to_rgb, write_png)


@dataclass
class Config(LaterStage):
    checkpoint: str = flag("", "a generator; its folder has vae.pt too. Without it, the latest stage found in --out")
    prompt: str = flag("", "caption of one video, written to out/sample.FORMAT")
    prompts: str = flag("", "file of captions, one a line, whose videos are written to out/0000.FORMAT and on")
    format: str = flag("png", "png (animated), npy (uint8, (F, H, W, 3)) or mp4 (needs pip install av)")
    num_steps: int = flag(None, "denoising steps; this and the next four, not given: what the checkpoint is made for",
                          least=1)
    guidance_scale: float = flag(None, "classifier-free guidance, 1 for none")
    stochastic: bool = flag(None, "fresh noise in every step")
    frames: int = flag(None, "frames of a video")
    size: tuple = flag(None, "its height and width")
    score: int = flag(0, "score this many clips of each test set, beside true ones, reconstructions and noise")
    vbench: str = flag("", "VBench_full_info.json or DIMENSION.txt: writes the folder out/vbench that VBench reads")
    bench: bool = flag(False, "measure a step and decoding; with --preset paper and no checkpoint, of untrained models")
    bf16: bool = flag(False, "compute in bfloat16, the weights stay float32")
    compile: bool = flag(False, "compile the DiT's blocks with torch.compile")


PRESETS = {"toy": {}, "paper": dict(bf16=True, compile=True)}


def write_video(path, video, fps):
    """Write video (3, F, H, W) in [-1, 1] in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        write_png(path, video, fps)
    elif path.suffix == ".npy":
        np.save(path, to_rgb(video))
    else:
        import av
        frames = to_rgb(video)
        with av.open(str(path), "w") as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


def score_table(cfg, model, vae, about):
    """Score the generator on both test sets, beside true clips, their reconstructions and noise."""
    if about.data != "synthetic":
        raise Abort(f"--score reads the synthetic clips' attributes, and {about.data} has none")
    figures = {}
    for split in "full", "open":
        captions, said = test_captions(about, split, cfg.score)
        true, again = reconstruct_clips(vae, open_clips(about, split), range(cfg.score))
        generated = make_videos(model, vae, about, captions, seed=cfg.seed)
        rows = dict(generated=generated, reconstructed=again, true=true, noise=torch.rand_like(true[:16]) * 2 - 1)
        for name, video in rows.items():
            row = score(video, said[:len(video)])
            if not figures:
                print0(f"{'set':5} {'clips':14}", *(f"{k[:10]:>10}" for k in row))
            print0(f"{split:5} {name:14}", *(f"{v:10.3f}" for v in row.values()))
            figures |= {f"{split}_{k}_{name}": row[k] for k in ("semantic", "quality", "total")}
        del generated, again, true, rows, video  # of 192 clips 2 GB, before as many are made
    return figures


def vbench_prompts(path):
    """Prompts of VBench_full_info.json, or of a text file named by their dimension, and how many videos of each."""
    try:
        text, counts = read_text(path), {}
        listed = json.loads(text) if path.suffix == ".json" else [
            dict(prompt_en=line.strip(), dimension=[path.stem]) for line in text.splitlines() if line.strip()]
        for entry in listed:
            count = 25 if "temporal_flickering" in entry["dimension"] else 5
            counts[entry["prompt_en"]] = max(count, counts.get(entry["prompt_en"], 0))
    except (ValueError, KeyError, TypeError):
        raise Abort(f"{path} is no VBench_full_info.json: a list of {{prompt_en, dimension}}") from None
    return counts


def write_vbench(cfg, model, vae, about, prompts):
    """Write out/vbench/{prompt}-{i}.mp4, as many of each prompt as prompts says, less what an earlier run wrote.

    VBench takes every file of the folder for a video, so each enters it whole, and the seeds stand beside it.
    """
    folder, note = Path(cfg.out) / "vbench", Path(cfg.out) / "vbench.json"
    names = [f"{prompt}-{i}.mp4" for prompt, count in prompts.items() for i in range(count)]
    if odd := [name for name in names if "/" in name or len(name.encode()) > 255]:
        raise Abort(f"{odd[0][:60]}... can be no file's name, as VBench needs it: change that caption")
    made = dict(weights=fingerprint(model, "proj_out"), frames=about.frames, size=list(about.size),
                recipe=list(recipe(about)), seeds={name: cfg.seed + i for i, name in enumerate(names)})
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and not note.exists():
        (part := note.with_suffix(".part")).write_text(json.dumps(made, indent=1))
        os.replace(part, note)
    barrier()
    if json.loads(note.read_text()) != made:
        raise Abort(f"{folder} was begun with another checkpoint, list, seed, size or recipe: remove it and {note}")
    todo = [name for name in names if not (folder / name).exists()]
    barrier()  # all have read it
    for name, _ in zip(own := todo[RANK::WORLD], progress(0, len(own))):
        video, = make_videos(model, vae, about, [name[:name.rindex("-")]], seed=made["seeds"][name])
        write_video(part := folder.with_name(f"vbench_part{RANK}.mp4"), video, about.fps)
        os.replace(part, folder / name)
    barrier()
    return dict(videos=len(names), written=len(todo))


@torch.no_grad()
def bench(name, model, vae, about, matmul_tflops):
    """Print and return figures of a denoising step, of decoding, and of a whole video by about's recipe.

    peak_gb is a step's, with the weights: measured on a GPU, elsewhere counted.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    shape = vae.latent_shape(about.frames, *about.size)
    with FakeTensorMode(), Meter() as meter:
        build(about)(*step_inputs(about, shape[1:], 1))
    inputs = step_inputs(about, shape[1:], 1, model.table.device)
    step, = median_ms([lambda: model(*inputs)])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else meter.most
    decode, = median_ms([lambda: vae.decode(inputs[0])], 5)
    row = dict(parameters=sum(p.numel() for p in model.parameters()), tokens=math.prod(shape[1:]),
               gflops=meter.flops / 1e9, step_ms=step, utilisation=meter.flops / step / 1e9 / matmul_tflops,
               decode_ms=decode, peak_gb=peak / 1e9, evaluations=evaluations(about),
               fps=1e3 * about.frames / (evaluations(about) * step + decode))
    print0(f"{name!s:16}", *(f"{k} {v:<9,}" if isinstance(v, int) else f"{k} {v:<9.4g}" for k, v in row.items()))
    return row


def bench_tables(cfg, generators, device):
    """Print Table 1's figures of each generator, and Table 3's, of the last one with untrained VAEs."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cfg.bf16 else torch.float32)
    rate = 2 * n ** 3 / median_ms([lambda: x @ x], 10)[0] / 1e9
    print0(f"{n} x {n} matrices are multiplied at {rate:.4g} TFLOP/s")
    for name, model, vae, about in generators:
        figures = bench(name, model, vae, about, rate)
    for ratio in RATIOS:
        try:
            with device:
                variant = VAE(replace(vae.cfg, ratio=ratio)).eval().requires_grad_(False)
            model.compression = variant.compression
            bench(ratio, model, variant, about, rate)
        except Abort as error:
            print0(f"{ratio}: {error}")
    return figures


def write_samples(cfg, model, vae, about):
    """Write what is asked for; returns figures of the summary line, and what to do next."""
    began, prompts = time.time(), [cfg.prompt]
    if cfg.vbench:
        prompts = vbench_prompts(Path(cfg.vbench))
    elif cfg.prompts:
        prompts = [line for line in read_text(cfg.prompts).splitlines() if line.strip()]
    elif not cfg.prompt:  # the only case that needs the data
        prompts = test_captions(about, "full", 8)[0]
    if not prompts:
        raise Abort(f"{cfg.vbench or cfg.prompts} has no captions: write one a line")
    read = {word for prompt in prompts for word in prompt.lower().split()[:about.text_length]}
    unknown = sorted(read - set(about.words))
    if unknown and not about.text_encoder:
        raise Abort(f"the checkpoint never saw: {' '.join(unknown)}. It knows: {' '.join(about.words)}")
    if cfg.vbench:
        return write_vbench(cfg, model, vae, about, prompts), f"vbench evaluate --videos_path {cfg.out}/vbench ..."
    # Those of a file one by one: memory may not hold all of a long list, and what is written stays.
    for i, some in enumerate([[prompt] for prompt in prompts] if cfg.prompts else [prompts]):
        videos = make_videos(model, vae, about, some, seed=cfg.seed + i)
        path = Path(cfg.out, f"{i:04d}.{cfg.format}" if cfg.prompts else f"sample.{cfg.format}")
        write_video(path, rearrange(videos, "(r k) c f h w -> c f (r h) (k w)", k=min(4, len(videos))), about.fps)
    print0(*prompts, sep="\n")
    return dict(videos=len(prompts), seconds_per_video=(time.time() - began) / len(prompts)), f"look at {path}"


def open_generators(cfg, path, device):
    """Yield name, model, VAE and about, with cfg's changes, of each generator to sample from or to measure."""
    if cfg.bench and cfg.preset == "paper" and not (cfg.checkpoint or path.exists()):
        found = ((f"untrained {name}", *untrained(device, **changes))
                 for name, changes in dict(mobile=MOBILE, server={}).items())
    else:
        model, about = load_dit(path, device=device, data=cfg.data)
        found = [(path, model, load_vae(path.parent, device, about.vae), about)]
    for name, model, vae, about in found:
        given = {k: getattr(cfg, k) for k in ("num_steps", "guidance_scale", "stochastic", "frames", "size")}
        vars(about).update((k, v) for k, v in given.items() if v is not None)
        vae.latent_shape(about.frames, *about.size)  # raises where these do not fit
        print0(f"sample: {name}, {sum(p.numel() for p in model.parameters()):,} parameters, {about.num_steps} "
               f"{'stochastic' if about.stochastic else 'Euler'} steps, guidance {about.guidance_scale:g}, video "
               f"{about.frames, *about.size}, {device.type}")
        for block in model.blocks if cfg.compile else ():
            block.compile()
        yield name, model, vae, about


def main(cfg):
    """Sample, score or measure; returns the figures of the summary line."""
    began, device = time.time(), setup(cfg)
    if cfg.format not in ("png", "npy", "mp4"):
        raise Abort(f"--format {cfg.format}: choose from png, npy, mp4")
    if (cfg.vbench or cfg.format == "mp4") and not find_spec("av"):
        raise Abort("writing mp4 needs PyAV: pip install av, or --format png")
    asked = [name for name in ("bench", "score", "vbench", "prompts", "prompt") if getattr(cfg, name)]
    if len(asked) > 1:
        raise Abort(f"--{asked[0]} and --{asked[1]}: choose one")
    if WORLD > 1 and not cfg.vbench:
        raise Abort("only --vbench shares its work among processes: leave torchrun out")
    generators = open_generators(cfg, find_generator(cfg.out, cfg.checkpoint), device)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
        if cfg.bench:
            return summary("SAMPLE", bench_tables(cfg, generators, device), began)
        (_, *generator), = generators
        if cfg.score:
            return summary("SAMPLE", score_table(cfg, *generator), began)
        figures, then = write_samples(cfg, *generator)
    return summary("SAMPLE", figures, began, then)


if __name__ == "__main__":
    launch(main, Config, PRESETS)
