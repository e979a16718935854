"""Text to video with the checkpoint of any stage, its scores beside baselines, and its speed (Tables 1 and 3).

    python sample.py                                        # a grid of captions that nobody trained on
    python sample.py --prompt "a red circle moves left"     # one video; --prompts FILE: one per line, into --out
    python sample.py --score 192                            # semantic, quality and total on unseen captions
    python sample.py --vbench VBench_full_info.json         # the folder of videos that VBench scores (Table 2)
    python sample.py --bench --frames 49 --size 384,512     # latency, FLOPs, memory; the four ratios of Table 3

out/dit.pt (or pruned.pt, distilled.pt) and the vae.pt beside it -> out/sample.png, .npy or .mp4
"""
import hashlib
import json
import math
import os
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from dit import (DiT, LaterStage, euler_times, find_generator, generate, load_dit, load_vae, test_captions,
                 text_encoder)
from vae import (RANK, RATIOS, VAE, WORLD, Abort, Meter, barrier, flag, launch, open_clips, print0, progress,
                 reconstruct_clips, score, setup, summary, write_png)


@dataclass
class Config(LaterStage):
    checkpoint: str = flag("", "a generator; its folder has vae.pt too. Without it, the latest stage found in --out")
    prompt: str = flag("", "caption of one video, written to out/sample.FORMAT")
    prompts: str = flag("", "file of captions, one a line, whose videos are written to out/0000.FORMAT and on")
    format: str = flag("png", "png (animated), npy (uint8, (F, H, W, 3)) or mp4 (needs pip install av)")
    num_steps: int = flag(0, "denoising steps; 0: what the checkpoint is made for")
    guidance_scale: float = flag(0., "classifier-free guidance, 1 for none; 0: what the checkpoint is made for")
    stochastic: bool = flag(None, "fresh noise in every step; not given: as the checkpoint is made for")
    score: int = flag(0, "score this many clips of each test set, beside true ones, reconstructions and noise")
    vbench: str = flag("", "VBench_full_info.json or DIMENSION.txt: writes the folder out/vbench that VBench reads")
    bench: bool = flag(False, "measure one denoising step, decoding and a whole generation")
    frames: int = flag(0, "frames of a video; 0: as in training")
    size: tuple = flag((), "its height and width; as in training if not given")


PRESETS = {"toy": {}}


def write_video(path, video, fps):
    """Write video (3, F, H, W) in [-1, 1] in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = ((rearrange(video, "c f h w -> f h w c").clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    if path.suffix == ".png":
        write_png(path, video, fps)
    elif path.suffix == ".npy":
        np.save(path, frames)
    else:
        try:
            import av
        except ImportError:
            raise Abort("writing mp4 needs PyAV: pip install av, or --format png") from None
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=round(fps), options={"crf": "16"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


def score_table(cfg, model, vae, text, shape, recipe, trained):
    """Score the generator on both test sets, beside true clips, their reconstructions and noise."""
    if trained.data != "synthetic":
        raise Abort("--score reads the synthetic clips' attributes; this checkpoint was trained on a folder")
    figures, first = {}, True
    for split in "full", "open":
        captions, said = test_captions(trained, split, cfg.score)
        true, again = reconstruct_clips(vae, open_clips(trained, split), range(cfg.score))
        generated = generate(model, vae, text(captions), shape, *recipe, seed=cfg.seed)
        rows = dict(generated=generated, reconstructed=again, true=true, noise=torch.rand_like(true[:16]) * 2 - 1)
        for name, video in rows.items():
            row = score(video, said[:len(video)])
            if first:
                print0(f"{'set':5} {'clips':14}", *(f"{k[:10]:>10}" for k in row))
                first = False
            print0(f"{split:5} {name:14}", *(f"{v:10.3f}" for v in row.values()))
            figures |= {f"{split}_{k}_{name}": row[k] for k in ("semantic", "quality", "total")}
    return figures


def vbench_prompts(path):
    """Prompts of VBench_full_info.json, or of a text file named by their dimension, and how many videos of each."""
    try:
        text, counts = path.read_text(), {}
        listed = json.loads(text) if path.suffix == ".json" else [
            dict(prompt_en=line.strip(), dimension=[path.stem]) for line in text.splitlines() if line.strip()]
        for entry in listed:
            count = 25 if "temporal_flickering" in entry["dimension"] else 5
            counts[entry["prompt_en"]] = max(count, counts.get(entry["prompt_en"], 0))
    except (ValueError, KeyError, TypeError):
        raise Abort(f"{path} is no VBench_full_info.json: a list of {{prompt_en, dimension}}") from None
    return counts


def write_vbench(cfg, model, vae, text, shape, recipe, fps, prompts):
    """Write out/vbench/{prompt}-{i}.mp4 for the numbers of videos in prompts, but those that an earlier run wrote.

    VBench takes every file of the folder for a video, so each enters it whole, and the seeds stand beside it.
    """
    folder, note = Path(cfg.out) / "vbench", Path(cfg.out) / "vbench.json"
    names = [f"{prompt}-{i}.mp4" for prompt, count in prompts.items() for i in range(count)]
    about = dict(weights=hashlib.sha256(model.proj_out.weight.cpu().numpy().tobytes()).hexdigest(), shape=list(shape),
                 recipe=list(recipe), seeds={name: cfg.seed + i for i, name in enumerate(names)})
    if RANK == 0 and not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(about, indent=1))
    barrier()
    if json.loads(note.read_text()) != about:
        raise Abort(f"{folder} was begun with another checkpoint, list, seed or recipe: remove it and {note}")
    todo = [name for name in names if not (folder / name).exists()][RANK::WORLD]
    for name, _ in zip(todo, progress(0, len(todo))):
        prompt, seed = name[:name.rindex("-")], about["seeds"][name]
        video, = generate(model, vae, text([prompt]), shape, *recipe, seed=seed)
        write_video(part := folder.with_name(f"vbench_part{RANK}.mp4"), video, fps)
        os.replace(part, folder / name)
    return dict(videos=len(names), written=len(todo))


def median_ms(step, count=50):
    """Median time of step() in ms, after two to warm up."""
    times = []
    for _ in range(count + 2):
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[2:]))


def peak_gb():
    """Most memory ever in use: of the GPU since it was last reset, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def bench(model, vae, text, frames, size):
    """One denoising step and decoding at the size of video: a row of figures."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    device = model.proj_in.weight.device
    latents = torch.randn(1, *vae.latent_shape(frames, *size), device=device)
    emb, mask = (y[:1].to(device) for y in text)
    t = torch.full((1,), .5, device=device)
    with Meter() as meter:
        model(latents, t, emb, mask)
    step = median_ms(lambda: model(latents, t, emb, mask))
    return dict(tokens=latents[0, 0].numel(), gflops=meter.flops / 1e9, step_ms=step,
                decode_ms=median_ms(lambda: vae.decode(latents), 5), peak_gb=peak_gb())


def bench_table(cfg, model, vae, text, frames, size, recipe):
    """Print the checkpoint's figures, then Table 3: the same DiT, untrained, under the VAE of every ratio."""
    device, null = model.proj_in.weight.device, text([""])
    shape = vae.latent_shape(frames, *size)
    began = time.perf_counter()
    generate(model, vae, null, shape, *recipe)
    figures = dict(parameters=sum(p.numel() for p in model.parameters()), **bench(model, vae, null, frames, size),
                   generation_fps=frames / (time.perf_counter() - began))
    for ratio in sorted(RATIOS, key=lambda r: -math.prod(RATIOS[r])):  # so that each has a higher peak of memory
        variant = VAE(replace(vae.cfg, ratio=ratio)).eval().to(device)
        dit = DiT(model.cfg, model.fps, variant.compression).eval().to(device)
        try:
            row = bench(dit, variant, null, frames, size)
        except Abort as error:
            print0(f"{ratio}: {error}")
            continue
        print0(f"{ratio:10}", *(f"{k} {v:<10.4g}" for k, v in row.items()))
    return figures


def main(cfg):
    """Sample, score or measure; returns the figures of the summary line."""
    began, device = time.time(), setup(cfg)
    if cfg.format not in ("png", "npy", "mp4"):
        raise Abort(f"--format {cfg.format}: choose from png, npy, mp4")
    path = find_generator(cfg.out, cfg.checkpoint)
    model, trained = load_dit(path, device=device, data=cfg.data)
    vae = load_vae(path.parent, device, trained.vae)
    frames, size = cfg.frames or trained.frames, cfg.size or trained.size
    shape = vae.latent_shape(frames, *size)
    text = text_encoder(trained)
    num_steps, guidance_scale = cfg.num_steps or trained.num_steps, cfg.guidance_scale or trained.guidance_scale
    stochastic = trained.stochastic if cfg.stochastic is None else cfg.stochastic
    recipe = euler_times(num_steps, trained.shift), guidance_scale, stochastic
    print0(f"sample: {path}, {sum(p.numel() for p in model.parameters()):,} parameters, {num_steps} "
           f"{'stochastic' if stochastic else 'Euler'} steps, guidance {guidance_scale:g}, video {frames, *size}, "
           f"{device.type}")
    if cfg.score:
        return summary("SAMPLE", score_table(cfg, model, vae, text, shape, recipe, trained), began)
    if cfg.bench:
        return summary("SAMPLE", bench_table(cfg, model, vae, text, frames, size, recipe), began)
    prompts = [cfg.prompt] if cfg.prompt else test_captions(trained, "full", 8)[0]
    if cfg.prompts:
        prompts = [line for line in Path(cfg.prompts).read_text().splitlines() if line.strip()]
    if cfg.vbench:
        prompts = vbench_prompts(Path(cfg.vbench))
    if not prompts:
        raise Abort(f"{cfg.prompts or cfg.vbench} has no captions: write one a line")
    unknown = sorted({word for prompt in prompts for word in prompt.lower().split()} - set(trained.words))
    if unknown and not trained.text_encoder:
        raise Abort(f"the checkpoint never saw: {' '.join(unknown)}. It knows: {' '.join(trained.words)}")
    if cfg.vbench:
        figures = write_vbench(cfg, model, vae, text, shape, recipe, trained.fps, prompts)
        return summary("SAMPLE", figures, began, f"vbench evaluate --videos_path {cfg.out}/vbench --dimension ...")
    videos = generate(model, vae, text(prompts), shape, *recipe, seed=cfg.seed)
    if not cfg.prompts:
        columns = min(4, len(videos))
        paths, videos = [f"sample.{cfg.format}"], [rearrange(videos, "(r k) c f h w -> c f (r h) (k w)", k=columns)]
    else:
        paths = [f"{i:04d}.{cfg.format}" for i in range(len(videos))]
    for name, video in zip(paths, videos):
        write_video(Path(cfg.out) / name, video, trained.fps)
    print0(*prompts, sep="\n")
    return summary("SAMPLE", dict(videos=len(prompts), seconds_per_video=(time.time() - began) / len(prompts)), began,
                   f"look at {Path(cfg.out) / paths[0]}")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
