"""The tests: a section for each file, and each test compares with something independent of what it tests.

    python test_all.py           # all of them, a minute or two on two cores
    python test_all.py shapes    # those whose name contains "shapes"

A test that takes a `folder` gets a new, empty one. The last line counts; the exit status is 1 if a test failed.
"""
import contextlib
import importlib
import io
import itertools
import json
import math
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import dit
import vae
from vae import Abort, COMBINATIONS, HELD_OUT

# ------------------------------------------------------------------------------------------------ helpers
TINY_VAE = vae.Config(frames=9, size=(32, 32), latent_channels=8, widths=(8, 8, 16, 16), encoder_blocks=(1, 0, 1, 1),
                      decoder_blocks=(0, 1, 1, 1), steps=4, save_every=2, log_every=2)
TINY_DIT = dit.Config(frames=9, size=(32, 32), in_channels=8, depth=2, width=32, num_heads=2, head_dim=16, ffn_dim=64,
                      text_dim=12, num_clips=12, batch_size=4, steps=4, save_every=2, log_every=2, score_clips=0)
LTX_VAE = replace(TINY_VAE, patch=0, light=False, encoder_blocks=(1, 1, 1, 2), decoder_blocks=(1, 1, 1, 2))


class Skip(Exception):
    """Why a test cannot run here."""


def optional(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Skip(f"pip install {module.split('.')[0]}") from None


def close(a, b, tolerance=1e-5):
    """a is b up to a share of the largest value of b."""
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert a.shape == b.shape and error <= tolerance, f"{tuple(a.shape)} {tuple(b.shape)}, off by {error:.2g} of the largest"


def same(a, b):
    """Nested values are equal, tensors to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def aborts(words, call, *args, **kwargs):
    """The call ends in an Abort of one line with these words."""
    try:
        call(*args, **kwargs)
    except Abort as error:
        assert words in str(error) and "\n" not in str(error), f"Abort says: {error}"
    else:
        raise AssertionError(f"no Abort about {words!r}")


class Interrupt(Exception):
    """What breaks off a run."""


def failing(function, calls):
    """function, which raises Interrupt after that many calls."""
    count = itertools.count(1)

    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(count) == calls:
            raise Interrupt
        return result
    return wrapper


def interrupted(call, *args):
    try:
        call(*args)
    except Interrupt:
        return
    raise AssertionError("was not interrupted")


def run(pattern=""):
    """Run the tests whose name contains pattern; returns the number that failed."""
    counts = Counter()
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_") and pattern in n]:
        began, said, verdict = time.time(), io.StringIO(), "passed"
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
            try:
                test(*[Path(folder)] * test.__code__.co_argcount)
            except Skip as why:
                verdict = f"skipped: {why}"
            except Exception:
                verdict = "FAILED"
                said.write(traceback.format_exc())
        counts[verdict.split(":")[0]] += 1
        print(f"{name:44}{verdict}  {time.time() - began:.1f} s", flush=True)
        if verdict == "FAILED":
            print(said.getvalue())
    print(", ".join(f"{counts[kind]} {kind.lower()}" for kind in ("passed", "FAILED", "skipped")))
    return counts["FAILED"]


# ------------------------------------------------------------------------------------------------ vae.py: plumbing
def test_learning_rate():
    rates = [vae.learning_rate(step, 200) for step in range(200)]
    assert np.allclose(rates[:20], np.arange(1, 21) / 20) and np.allclose(rates[19:101], 1)
    assert np.allclose(rates[100:], np.arange(100, 0, -1) / 100)


def test_muon_is_the_orthogonal_factor():
    for shape in ((24, 24), (16, 40), (40, 16)):
        x = torch.randn(shape, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        inside = u.T @ vae.Muon([torch.nn.Parameter(x)], .1).orthogonal(x) @ vh.T  # diagonal: the same singular vectors
        values = inside.diagonal()
        assert (inside - values.diag()).abs().max() < 1e-9
        assert (values[s > .02 * s.norm()] - 1).abs().max() < .3, values


def test_update_refuses_what_is_not_finite():
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    optimizers = [torch.optim.AdamW(model.parameters(), .1)]
    aborts("nan at step 3", vae.update, model(torch.full((1, 2), math.nan)).sum(), optimizers, 2, TINY_VAE, "x.pt")
    assert torch.equal(model.weight, before)
    vae.update(model(torch.ones(1, 2)).sum(), optimizers, 0, replace(TINY_VAE, steps=1000), "x.pt")
    close(before - model.weight, torch.full((1, 2), .1 / 20 * 1), .02)  # AdamW's first step is lr, here its warm-up


def test_save_is_whole_or_nothing(folder):
    path = folder / "vae.pt"
    vae.save(path, stage="vae", step=1, config={"steps": 1}, model={"x": torch.arange(3)})
    whole = path.read_bytes()
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nat inline_container")):
        def half(checkpoint, part):
            Path(part).write_bytes(whole[:100])
            raise error
        with patch.object(torch, "save", half):
            aborts("cannot write", vae.save, path, stage="vae", step=2)
        assert path.read_bytes() == whole and [f.name for f in folder.iterdir()] == ["vae.pt"]
    assert torch.equal(vae.load(path, "vae")["model"]["x"], torch.arange(3))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_load_runs_no_code_and_names_what_is_wrong(folder):
    path, trap = folder / "vae.pt", folder / "trap"
    aborts("is missing: run python vae.py first", vae.load, path, "vae")
    for write in (lambda: torch.save(dict(stage="vae", step=1, config={"steps": 1}, model=Bomb(trap)), path),
                  lambda: path.write_bytes(pickle.dumps(Bomb(trap))), lambda: torch.save([1, 2], path),
                  lambda: path.write_bytes(b""), lambda: torch.save({"model": torch.zeros(9)}, path),
                  lambda: path.write_bytes(path.read_bytes()[:-200])):
        write()
        aborts("is no whole checkpoint of ours", vae.load, path, "vae")
    assert not trap.exists()
    Path.touch(trap)  # what the bomb would have done
    vae.save(path, stage="vae", step=1, config={"steps": 4})
    aborts("stopped at step 1 of 4", vae.load, path, "vae")
    vae.save(path, stage="vae", step=4, config={"steps": 4})
    aborts("was made by vae.py, not by dit.py", vae.load, path, "dit")


def read_png(path):
    """Frames (F, H, W, 3) of a PNG or APNG with filter 2, which checks the sums, the counts and the order of chunks."""
    data, at, frames, numbers, head = path.read_bytes(), 8, [], [], {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body, at = data[at + 8:at + 8 + size], at + 12 + size
        assert zlib.crc32(kind + body) == int.from_bytes(data[at - 4:at])
        head.setdefault(kind, body)
        if kind in (b"fcTL", b"fdAT"):
            numbers.append(int.from_bytes(body[:4]))
        if kind in (b"IDAT", b"fdAT"):
            width, height = struct.unpack(">II", head[b"IHDR"][:8])
            rows = np.frombuffer(zlib.decompress(body[4 * (kind == b"fdAT"):]), np.uint8).reshape(height, 3 * width + 1)
            assert (rows[:, 0] == 2).all()
            frames.append(np.cumsum(rows[:, 1:], 0, dtype=np.uint8).reshape(height, width, 3))
    assert numbers == list(range(len(numbers))) and kind == b"IEND"
    assert len(frames) == (int.from_bytes(head[b"acTL"][:4]) if b"acTL" in head else 1)
    return np.stack(frames), head


def test_png_reads_back(folder):
    for frames in (5, 1):
        video = torch.rand(3, frames, 7, 10) * 2.4 - 1.2
        vae.write_png(folder / "sub" / "x.png", video, fps=8)
        pixels, head = read_png(folder / "sub" / "x.png")
        assert np.abs(pixels / 127.5 - 1 - video.clamp(-1, 1).permute(1, 2, 3, 0).numpy()).max() < 1 / 254
        assert frames == 1 or np.divide(*struct.unpack(">HH", head[b"fcTL"][20:24])) == 1 / 8  # seconds a frame


def stderr_of(module, *flags):
    """Exit status and standard error of `python module.py flags`, run inside this process."""
    error = io.StringIO()
    with patch.object(sys, "argv", [f"{module.__name__}.py", *flags]), contextlib.redirect_stderr(error):
        try:
            vae.launch(module.main, module.Config, module.PRESETS)
        except SystemExit as end:
            return end.code, error.getvalue()
    return 0, error.getvalue()


def test_command_line_says_what_is_wrong(folder):
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "vae.pt").write_bytes(b"PK\3\4 cut off")
    for words, module, *flags in (
            ("--step", vae, "--step", "3"), ("--nonsense", dit, "--nonsense", "3"), ("many", vae, "--steps", "many"),
            ("128,wide", vae, "--size", "128,wide"), ("--size", vae, "--size", "128"), ("huge", vae, "--preset", "huge"),
            ("choose from 4x16x16", vae, "--ratio", "8x8x8"), ("16 frames", vae, "--frames", "16"),
            ("100x128", vae, "--size", "100,128"), ("18 frames", vae, "--frames", "18", "--ratio", "4x16x16"),
            ("is no folder", vae, "--data", str(folder / "none")), ("holds no", vae, "--data", str(folder / "empty")),
            ("run python vae.py first", dit), ("no whole checkpoint", dit, "--out", str(folder / "broken")),
            ("is missing", vae, "--resume")):
        status, error = stderr_of(module, *(["--out", str(folder)] if "--out" not in flags else []), *flags)
        assert status == 2 and words in error and error.count("\n") == 1 and error.endswith("\n"), (flags, status, error)
    end = subprocess.run([sys.executable, vae.__file__, "--frames", "16"], capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr.count("\n") == 1 and "Traceback" not in end.stderr, end.stderr


def test_help_lists_every_flag():
    for module in (vae, dit):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert stderr_of(module, "--help") == (0, "")
        assert all(f"--{f.name} " in said.getvalue() for f in fields(module.Config)), said.getvalue()


# ------------------------------------------------------------------------------------------------ vae.py: the toy world
def grounds(height=128):
    """Background pixels (5, 3, H) by the table of the design."""
    p = (torch.arange(height) + .5) / height
    ends = torch.tensor([[[.03] * 3] * 2, [[.5] * 3] * 2, [[0, .45, .45]] * 2, [[.4, .22, .08]] * 2,
                         [[.95, .5, .15], [.25, .08, .4]]])
    return 2 * (ends[:, 0, :, None] * (1 - p) + ends[:, 1, :, None] * p) - 1


def test_objects_move_as_said_inside_the_frame():
    area_of = (math.pi, 1.8 ** 2, 3 * 3 ** .5 * .62 ** 2, 4 * 1.05 * .72 - .72 ** 2)  # over the radius squared
    wanted = torch.tensor([(i % 6, s, m, i % 5) for i, (s, m) in enumerate(itertools.product(range(4), range(8)))])
    for (colour, shape, motion, background), clip in zip(wanted.tolist(), vae.render(wanted, seed=1)):
        away = clip - grounds()[background, :, None, :, None]
        for edge in (away[..., 0], away[..., -1], away[..., 0, :], away[..., -1, :]):
            assert edge.abs().max() < 1e-4, "the object touches the edge of the frame"
        paint = torch.tensor(vae.COLOURS[list(vae.COLOURS)[colour]]) * 2 - 1
        full = paint[:, None] - grounds()[background]                                            # (3, H)
        inside = (away * full[:, None, :, None]).sum(0) / full.square().sum(0)[:, None]          # (F, H, W), 1 inside
        area, p = inside.mean((1, 2)), (torch.arange(128) + .5) / 128
        radius = (area / area_of[shape]).sqrt()
        assert radius.min() > .158 and radius.max() < .242 and radius.max() - radius.min() < .002, radius
        path = torch.stack([inside.mean(1) @ p, inside.mean(2) @ p], 1) / 128 * 128 / area[:, None]
        words, step = vae.MOTIONS[motion], path.diff(dim=0)
        if words.startswith("moves"):
            way = torch.tensor([("right" in words) - 1. * ("left" in words), ("down" in words) - 1. * ("up" in words)])
            assert .345 < (path[-1] - path[0]).norm() < .505 and step.diff(dim=0).abs().max() < .004
            close(step.sum(0) / step.sum(0).norm(), way / way.norm(), .02)
        elif words.startswith("bounces"):
            height = path[0, 1] - path[:, 1]
            assert path[:, 0].diff().abs().max() < .004 and .275 < height.max() < .385
            close(height / height[4], torch.linspace(0, 2 * math.pi, 17).sin().abs(), .03)
        else:
            about = torch.complex(*(path - .5).T)                       # clockwise as seen, for y points down
            assert (about.abs() - .18).abs().max() < .004
            close((about[1:] / about[:-1]).angle(), torch.full((16,), math.pi / 8), .05)


def test_clips_depend_on_seed_and_index_alone():
    wanted = COMBINATIONS[[5, 300, 701]]
    clips = vae.render(wanted, 3, 10, frames=3, size=(64, 64))
    assert torch.equal(clips, vae.render(wanted, 3, 10, frames=3, size=(64, 64)))
    assert torch.equal(clips[1:2], vae.render(wanted[1:2], 3, 11, frames=3, size=(64, 64)))
    others = [vae.render(wanted[:1], *key, frames=3, size=(64, 64)) for key in ((3, 10), (3, 11), (4, 10))]
    assert all((a - b).abs().max() > .5 for a, b in itertools.combinations(others, 2))


def test_training_never_shows_what_is_held_out():
    held = {(c, s, m, b) for c, s, m, b in itertools.product(range(6), range(4), range(8), range(5))
            if (c + 3 * s + 7 * m + 2 * b) % 10 == 0}
    assert len(held) == 96 and held == set(map(tuple, COMBINATIONS[HELD_OUT].tolist())) and len(COMBINATIONS) == 960
    for split in ("train", "full", "open"):
        clips = vae.SyntheticClips(vae.DataConfig(), split)
        shown, said = map(torch.stack, zip(*(clips.attributes(i) for i in range(96 if split == "full" else 4000))))
        assert ((said == shown) | (said == -1)).all()
        seen, silent = set(map(tuple, shown.tolist())), (said == -1).float()
        assert seen == held if split == "full" else not seen & held
        if split == "train":
            assert len(seen) > 800 and ((silent.mean(0) - .2).abs() < .03).all(), silent.mean(0)
            assert abs(np.corrcoef(silent.T)[np.triu_indices(4, 1)]).max() < .07   # independently of each other
        else:
            assert (silent.sum(1) == (0 if split == "full" else 2)).all()
            assert split == "full" or ((silent.mean(0) - .5).abs() < .04).all()


def test_captions_say_their_attributes():
    assert vae.caption((0, 3, 5, 4)) == "a red cross moves diagonally down-left on a sunset background"
    assert vae.caption((-1, -1, -1, -1)) == "a thing"
    known = vae.words(vae.DataConfig())
    for said in itertools.product(*(range(-1, len(values)) for values in vae.ATTRIBUTES.values())):
        text = vae.caption(said)
        start, _, ground = text.partition(" on a ")
        _, *words = start.split()
        colour = list(vae.COLOURS).index(words.pop(0)) if words[0] in vae.COLOURS else -1
        noun, motion, background = words[0], " ".join(words[1:]), ground.removesuffix(" background")
        parsed = (colour, -1 if noun == "thing" else vae.SHAPES.index(noun), vae.MOTIONS.index(motion) if motion else -1,
                  list(vae.BACKGROUNDS).index(background) if background else -1)
        assert parsed == said and set(text.split()) <= set(known), (text, said, parsed)


def test_reader_reads_what_was_drawn():
    wanted = COMBINATIONS[::7]  # 138 of the 960, which hold every pair of two attributes' values
    for a, b in itertools.combinations(range(4), 2):
        assert len(wanted[:, [a, b]].unique(dim=0)) == len(COMBINATIONS[:, [a, b]].unique(dim=0))
    read = torch.cat([vae.read_attributes(vae.render(part, 2, 1000 * i)) for i, part in enumerate(wanted.split(23))])
    wrong = (read != wanted).any(1)
    assert not wrong.any(), list(zip(wanted[wrong].tolist(), read[wrong].tolist()))


def test_reader_recognises_nothing_in_garbage():
    noise, flat = torch.randn(3, 3, 17, 128, 128).clamp(-1, 1), torch.rand(3, 3, 1, 1, 1).expand(-1, -1, 17, 128, 128)
    assert (vae.read_attributes(noise)[:, :3] == -1).all() and (vae.read_attributes(flat)[:, :3] == -1).all()
    p, shift = (torch.arange(128) + .5) / 128, torch.linspace(-.2, .2, 17)[:, None, None]
    for stretch, sharp in itertools.product((1, 1.4), (2, 8)):  # blurred blobs and ellipses
        far = (((p - .5 - shift) * stretch) ** 2 + (p[:, None] - .5) ** 2).sqrt() / .16
        inside = torch.exp(-far ** sharp * math.log(2))                                          # (F, H, W)
        blob = torch.lerp(vae.GROUNDS[0, 0, :, None, None, None], vae.PALETTE[0, :, None, None, None], inside)
        read = vae.read_attributes(blob[None])[0]
        assert read[1] == -1, f"a blob (stretch {stretch}, exponent {sharp}) reads as {vae.SHAPES[read[1]]}"
    clips = vae.render(COMBINATIONS[[0, 123, 456, 789]])
    clips[:, :, 9:] = clips[:, :, :1, :, :1]  # the object is gone
    assert (vae.read_attributes(clips)[:, 2] == -1).all()


def test_scores_tell_true_from_false():
    wanted = COMBINATIONS[::60]
    clips = vae.render(wanted, 5)
    true = vae.score(clips, wanted)
    assert true["semantic"] == 1 and true["quality"] > .9 and true["total"] > .9, true
    noise = vae.score(torch.randn(4, 3, 17, 128, 128).clamp(-1, 1), wanted[:4])
    assert noise["semantic"] == 0 and noise["total"] < .1, noise
    assert abs(true["total"] - (4 * true["quality"] + true["semantic"]) / 5) < 1e-6  # VBench's weighting
    lied = vae.score(clips[:6], torch.cat([(wanted[:6, :1] + 1) % 6, wanted[:6, 1:]], 1))
    assert lied["colour"] == 0 == lied["semantic"] and lied["shape"] == lied["motion"] == lied["background"] == 1, lied
    free = torch.full((16, 4), -1)
    spread, collapsed = vae.score(clips, free), vae.score(clips[:1].expand(16, -1, -1, -1, -1), free)
    assert collapsed["semantic"] == 1 and abs(collapsed["entropy"]) < 1e-6 and spread["entropy"] > .7, (spread, collapsed)
    shaky = clips[:4].clone()
    shaky[:, :, ::2] = shaky[:, :, ::2].roll(6, -1)
    assert vae.score(shaky, wanted[:4])["quality"] < true["quality"] - .1


# ------------------------------------------------------------------------------------------------ vae.py: data
def write_video(path, levels, fps, size=(48, 64)):
    """An mp4 of plain gray frames."""
    av = optional("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text("Gray  on\nGRAY")


def test_video_folder(folder):
    write_video(folder / "slow.mp4", range(40, 200, 2), 16)                    # 5 s, each frame 2 levels brighter
    write_video(folder / "wide.mp4", range(40, 200, 2), 8, (32, 96))
    vae.write_png(folder / "x.png", vae.render(COMBINATIONS[:1], frames=1, size=(32, 32))[0])
    (folder / "x.txt").write_text("a picture")
    cfg = vae.DataConfig(data=str(folder), frames=9, size=(32, 32), fps=8.)
    clips = vae.open_clips(cfg)
    assert {k: len(v) for k, v in clips.kinds.items()} == {"clips": 16, "images": 1}
    image, words = clips[clips.kinds["images"][0]]
    assert words == "a picture" and (image - vae.render(COMBINATIONS[:1], frames=1, size=(32, 32))[0]).abs().max() < 1 / 120
    for i in clips.kinds["clips"]:
        (window, path), (video, words) = clips.items[i], clips[i]
        assert video.shape == (3, 9, 32, 32) and words == "gray on gray"
        rate, seconds = (16, 5) if path.stem == "slow" else (8, 10)
        at = ((video + 1) * 127.5).mean((0, 2, 3)).sub(40) / 2 / rate                     # seconds that each frame shows
        start = (seconds - 9 / 8) * window / 7
        miss = (at - start - torch.arange(9) / 8).abs().max() * rate
        assert miss < .5 + .4, f"{path.name}, window {window}: {miss:.2f} source frames from the time wanted"
    assert vae.words(cfg) == ["a", "gray", "on", "picture"]
    fast = vae.open_clips(replace(cfg, fps=24.))
    assert all(fast[i][0].shape == (3, 9, 32, 32) for i in fast.kinds["clips"])           # more than the file has
    long = vae.open_clips(replace(cfg, frames=49))
    aborts("lasts 5.00 s", long.read, folder / "slow.mp4", 0)
    (folder / "slow.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:300])
    aborts("slow.mp4", vae.open_clips(cfg).read, folder / "slow.mp4", 0)
    (folder / "x.txt").unlink()
    aborts("has no caption", vae.open_clips, cfg)


# ------------------------------------------------------------------------------------------------ vae.py: the VAE
def test_vae_shapes_of_every_ratio():
    for (ratio, (time, space)), base in itertools.product(vae.RATIOS.items(), (TINY_VAE, LTX_VAE)):
        model = vae.VAE(replace(base, ratio=ratio))
        for frames, height, width in ((1, space, space), (1 + time, space, 2 * space), (1 + 2 * time, space, space)):
            video = torch.rand(2, 3, frames, height, width)
            with torch.no_grad():
                latents = model.encode(video)
                assert latents.shape == (2, 8, (frames - 1) // time + 1, height // space, width // space), ratio
                assert latents.shape[1:] == model.latent_shape(frames, height, width)
                assert model.decode(latents).shape == video.shape
        aborts(f"use 1 + a multiple of {time}", model.encode, torch.rand(1, 3, time, space, space))
        aborts(f"use multiples of {space}", model.encode, torch.rand(1, 3, 1, space, space // 2))
    assert list(vae.RATIOS) == ["4x16x16", "4x32x32", "8x32x32", "8x64x64"]


@torch.no_grad()
def test_encoder_is_causal():
    for cfg in (TINY_VAE, LTX_VAE, replace(TINY_VAE, ratio="4x16x16")):
        model, video, time = vae.VAE(cfg), torch.rand(1, 3, 17, 32, 32), vae.RATIOS[cfg.ratio][0]
        latents = model.encode(video)
        close(model.encode(video[:, :, :1]), latents[:, :, :1], 1e-6)    # an image is the first frame of a clip
        for k in range(17):
            other = video.clone()
            other[:, :, k] += torch.rand(3, 32, 32) - .5
            change = (model.encode(other) - latents).abs().amax((0, 1, 3, 4)) / latents.abs().max()
            own = math.ceil(k / time)                                    # the latent of frame k
            assert (change[:own] < 1e-6).all() and change[own] > 1e-5, (k, change)


@torch.no_grad()
def test_latents_are_normalised():
    model, clips = vae.VAE(TINY_VAE), vae.open_clips(TINY_VAE)
    model.measure_latents(clips, 16)
    z = torch.cat([model.encode(clips[i][0][None]) for i in clips.kinds["clips"][::2 ** 31 // 16][:16]])
    close(1 + z.mean((0, 2, 3, 4)), torch.ones(8), 1e-4)
    close(z.std((0, 2, 3, 4)), torch.ones(8), 1e-4)
    close(model.decode(z), model.reconstruct(z * model.std + model.mean), 1e-6)


def test_paper_vae_size():
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in vae.VAE(vae.Config(**vae.PRESETS["paper"])).named_parameters()}
    encoder = sum(size for n, size in sizes.items() if n.startswith("encoder"))
    assert sum(sizes.values()) == 419_193_649 and f"{encoder / 1e6:.1f}" == "180.4"
    assert f"{(sum(sizes.values()) - encoder) / 1e6:.1f}" == "238.8"


def copy_weights(theirs, ours):
    """Copy theirs to ours, which registers its parameters in the same order."""
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert a.shape == b.shape, name
        b.data.copy_(a.data)


@torch.no_grad()
def test_vae_is_ltx():
    theirs = optional("diffusers.models.autoencoders.autoencoder_kl_ltx").AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 8, 16, 16),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5)
    ours, video = vae.VAE(LTX_VAE), torch.rand(2, 3, 17, 64, 32) * 2 - 1
    copy_weights(theirs, ours)
    posterior, (mean, logvar) = theirs.encode(video).latent_dist, ours.posterior(video)
    close(mean, posterior.mean)
    close(logvar.expand_as(mean), posterior.logvar)
    close(ours.reconstruct(mean), theirs.decode(posterior.mean).sample)


def trained(module, cfg, **changes):
    """Checkpoint of a run of module.main."""
    module.main(replace(cfg, **changes))
    return vae.load(Path(changes["out"]) / f"{module.__name__}.pt", module.__name__)


def broken_off(module, cfg, folder):
    """The same, broken off after its checkpoint of step 2 and resumed."""
    with patch.object(module, "save", failing(module.save, 1)):
        interrupted(module.main, replace(cfg, out=folder))
    assert vae.load(Path(folder) / f"{module.__name__}.pt")["step"] == 2
    aborts("another --lr", module.main, replace(cfg, out=folder, resume=True, lr=1.))
    return trained(module, cfg, out=folder, resume=True)


def test_vae_resumes_to_the_same_bits(folder):
    whole = trained(vae, TINY_VAE, out=str(folder / "a"))
    again = broken_off(vae, TINY_VAE, str(folder / "b"))
    for key in ("model", "optimizer", "rng", "step"):
        assert same(whole[key], again[key]), key
    other = trained(vae, TINY_VAE, out=str(folder / "c"), seed=1)
    assert not same(whole["model"], other["model"]) and (folder / "a" / "vae.png").exists()


# ------------------------------------------------------------------------------------------------ dit.py
def tiny_inputs(batch=2, dtype=torch.float32):
    """Noise, times, text embeddings and masks, of captions that are 4 and 2 words long."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=dtype)[:batch]
    return torch.randn(batch, 8, 2, 3, 2, dtype=dtype), torch.rand(batch, dtype=dtype), torch.randn(batch, 4, 12, dtype=dtype), mask


@torch.no_grad()
def test_dit_is_ltx():
    theirs = optional("diffusers.models.transformers.transformer_ltx").LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2,
        caption_channels=12)
    ours, (x, t, text, mask) = dit.DiT(replace(TINY_DIT, ffn_dim=128, final_norm="layer"), fps=25.), tiny_inputs()
    for p in theirs.parameters():
        p.data += .1 * torch.randn_like(p)  # so that no weight of a norm is one and no bias zero
    copy_weights(theirs, ours)
    tokens = theirs(x.flatten(2).transpose(1, 2), text, 1000 * t, mask, 2, 3, 2, rope_interpolation_scale=(8 / 25, 32, 32))
    close(ours(x, t, text, mask), tokens.sample.transpose(1, 2).view_as(x))


def test_paper_dit_sizes():
    paper = dit.Config(**dit.PRESETS["paper"])
    for count, changes in ((1_917_094_016, {}), (960_221_312, dict(depth=20, num_heads=20, ffn_dim=6144)),
                           ("9.77e+08", dict(depth=14)), ("9.91e+08", dict(width=1472, num_heads=23, ffn_dim=5888)),
                           (1_923_385_472, dict(text_dim=4096)),
                           (966_512_768, dict(depth=20, num_heads=20, ffn_dim=6144, text_dim=4096))):
        with torch.device("meta"):
            size = sum(p.numel() for p in dit.DiT(replace(paper, **changes)).parameters())
        assert (f"{size:.2e}" if isinstance(count, str) else size) == count, (changes, size)


def test_rope_sees_differences_of_position_only():
    shape, width = (3, 4, 5), 26  # 26 % 6 = 2 channels are left alone
    torch.set_default_dtype(torch.float64)  # for angles reach 10^4
    try:
        cos, sin = dit.rope_tables(shape, width, fps=24.)
        later = dit.rope_tables((5, 1, 1), width, fps=48.), dit.rope_tables((1, 7, 1), width, 24., (4, 16))
    finally:
        torch.set_default_dtype(torch.float32)
    q, k = (dit.rotate(torch.randn(1, 1, width).double().expand(1, 60, -1), cos, sin)[0] for _ in "qk")
    dots = (q @ k.T).view(*shape, *shape)
    for axis in range(3):
        n = shape[axis] - 1
        close(dots.narrow(axis, 1, n).narrow(axis + 3, 1, n), dots.narrow(axis, 0, n).narrow(axis + 3, 0, n), 1e-9)
        assert dots.select(axis, 0).select(axis + 2, 0).sub(dots.select(axis, 0).select(axis + 2, 1)).abs().min() > 1e-6
    cos = cos.view(*shape, -1)
    close(later[0][0][4], cos[2, 0, 0], 1e-9)  # at twice the frames per second, twice the latents are as many seconds
    close(later[1][0][6], cos[0, 3, 0], 1e-9)  # and half the compression, half the pixels


@torch.no_grad()
def test_kept_heads_keep_their_slices_of_rope():
    width, heads, dim, kept = 48, 3, 16, [0, 2]
    full, part, x = dit.Attention(width, heads, dim), dit.Attention(width, len(kept), dim), 3 * torch.randn(2, 12, width)
    rope = [table.unflatten(1, (heads, dim // 2)) for table in dit.rope_tables((2, 3, 2), width, 24.)]
    rows = torch.arange(width).view(heads, dim)[kept].flatten()
    cut = torch.tensor([i for i in range(width) if i not in rows])
    for name in ("to_q", "to_k", "to_v"):
        linear, small = getattr(full, name), getattr(part, name)
        linear.weight[cut], linear.bias[cut] = 0, 0                     # mask a head of the full one
        small.weight.copy_(linear.weight[rows]), small.bias.copy_(linear.bias[rows])
    for name in ("norm_q", "norm_k"):
        getattr(full, name).normal_()
        getattr(part, name).copy_(getattr(full, name)[rows] * (heads / len(kept)) ** .5)
    part.to_out.weight.copy_(full.to_out.weight[:, rows]), part.to_out.bias.copy_(full.to_out.bias)
    part.head_ids.copy_(torch.tensor(kept))
    close(part(x, rope=rope), full(x, rope=rope), 1e-4)
    part.head_ids.copy_(torch.tensor([0, 1]))
    assert (part(x, rope=rope) - full(x, rope=rope)).abs().max() > 1e-3


@torch.no_grad()
def test_padding_changes_nothing():
    model, (x, t, text, mask) = dit.DiT(TINY_DIT), tiny_inputs()
    velocity = model(x, t, text, mask)
    other = torch.where(mask[..., None] > 0, text, 9 * torch.randn_like(text))
    close(model(x, t, other, mask), velocity, 1e-6)
    close(model(x, t, F.pad(other, (0, 0, 0, 3), value=7.), F.pad(mask, (0, 3))), velocity, 1e-6)
    close(model(x[1:], t[1:], text[1:, :2], mask[1:, :2]), velocity[1:], 1e-5)   # and no padding at all
    null = [model(x, t, torch.zeros(2, n, 12), torch.zeros(2, n)) for n in (4, 9)]
    close(*null, 1e-5)                                                           # no caption is as long as any
    assert (null[0] - velocity).abs().max() > 1e-3 * velocity.abs().max()


def test_word_encoder():
    emb, mask = dit.WordEncoder(64, 5)(["a RED circle", "", "circle a b c d e f", "a red zebra"])
    assert emb.shape == (4, 5, 64) and mask.tolist() == [[1, 1, 1, 0, 0], [0] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    assert (emb[mask == 0] == 0).all() and torch.equal(emb[0, :2], emb[3, :2])
    place = dit.timestep_embedding(torch.arange(5) / 1000, 64)
    words = emb - place
    close(words[0, 2], words[2, 0])                                     # the same word elsewhere
    close(words[mask > 0].norm(dim=1), torch.full((11,), 8.))
    assert (words[0, 0] @ words[0, 1]).abs() < .5 * 64                   # other words point elsewhere
    angles = 3 / 10000 ** (torch.arange(32) / 32)
    close(place[3], torch.cat([angles.cos(), angles.sin()]))


def test_flow_matching_equations():
    x0, noise, t = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2), torch.tensor([0, .25, 1])
    x_t = dit.add_noise(x0, noise, t)                                   # Eq. 1
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    close(x_t[1], .75 * x0[1] + .25 * noise[1], 1e-6)
    true = (noise - x0).requires_grad_()
    loss = dit.flow_matching_loss(lambda *_: true, x0, noise, t, None, None)  # Eq. 2
    loss.backward()
    assert loss == 0 and (true.grad == 0).all()
    close(dit.flow_matching_loss(lambda x, *_: 0 * x, x0, noise, t, None, None), sum((true.detach().flatten()) ** 2) / 24)
    (x0, t, text, mask), model = tiny_inputs(dtype=torch.float64), dit.DiT(TINY_DIT).double()
    noise, parameters = torch.randn_like(x0), list(model.parameters())
    compute = lambda: dit.flow_matching_loss(model, x0, noise, t, text, mask)
    compute().backward()
    ways = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * way).sum() for p, way in zip(parameters, ways))
    def moved(distance):
        with torch.no_grad():
            torch._foreach_add_(parameters, ways, alpha=distance)
            loss = compute()
            torch._foreach_add_(parameters, ways, alpha=-distance)
        return loss
    close(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, 1e-5)


def test_sampler_reaches_a_gaussian_at_first_order():
    mean, std, noise = 1.5, .4, torch.randn(50, 1, 1, 1, 1, dtype=torch.float64)

    def velocity(x, t, *_):
        """E[noise - x0 | x_t] of data that are N(mean, std^2)."""
        t = t.view(-1, 1, 1, 1, 1)
        excess = (x - (1 - t) * mean) / ((1 - t) ** 2 * std ** 2 + t ** 2)
        return t * excess - mean - (1 - t) * std ** 2 * excess

    truth, text = mean + std * noise, torch.zeros(50, 1)                # the flow keeps the order, so the quantiles
    for shift in (1., 3.):
        errors = [(dit.sample(velocity, noise, text, text, dit.euler_times(n, shift)) - truth).abs().max().item()
                  for n in (50, 100, 200)]
        assert errors[2] < .02 and all(1.85 < a / b < 2.15 for a, b in zip(errors, errors[1:])), errors


def test_euler_times():
    assert dit.euler_times(4) == [1, .75, .5, .25, 0]
    times = dit.euler_times(40, 3.)
    assert times[0] == 1 and times[-1] == 0 and times == sorted(times, reverse=True) and abs(times[20] - .75) < 1e-6


@torch.no_grad()
def test_guidance():
    model, (x, _, text, mask) = dit.DiT(TINY_DIT), tiny_inputs()
    null, times = (torch.zeros_like(text), torch.zeros_like(mask)), dit.euler_times(3)
    close(dit.sample(model, x, *null, times, 5.), dit.sample(model, x, *null, times), 1e-4)
    assert (dit.sample(model, x, text, mask, times, 5.) - dit.sample(model, x, text, mask, times)).abs().max() > 1e-3
    v0, v1 = torch.randn_like(x), torch.randn_like(x)
    told = lambda x, t, text, mask: torch.where(mask.sum(1).view(-1, 1, 1, 1, 1) > 0, v1.repeat(len(x) // 2, 1, 1, 1, 1),
                                                v0.repeat(len(x) // 2, 1, 1, 1, 1))
    for scale in (0., 1., 3.):
        close(dit.sample(told, x, text, mask, [1., .6], scale), x - .4 * (v0 + scale * (v1 - v0)), 1e-6)


def test_latent_cache(folder):
    model, clips = vae.VAE(TINY_VAE).eval().requires_grad_(False), vae.open_clips(TINY_DIT)
    encoder, device = dit.WordEncoder(12, TINY_DIT.text_length), torch.device("cpu")

    def encode(out, text=encoder, model=model, **changes):
        """The cache's arrays and the number of clips that were encoded."""
        calls = []
        cache = dit.encode_clips(replace(TINY_DIT, out=folder / out, **changes), model,
                                 lambda captions: calls.append(captions) or text(captions), 0, 1, device)
        return [torch.from_numpy(array[:].astype(np.float32)) for array in cache["clips"]], len(calls)

    whole, calls = encode("a")
    assert calls == 12 and whole[0].shape == (12, 8, 2, 1, 1)
    for i in range(12):
        video, caption = clips[i]
        for array, value in zip(whole, (model.encode(video[None]), *encoder([caption]))):
            close(array[i], value[0], 1e-3)                             # float16
    interrupted(encode, "b", failing(encoder, 5))
    again, calls = encode("b")
    assert same(whole, again) and 12 - 5 <= calls <= 12 - 4, f"{calls} of 12 were encoded again"
    assert encode("b")[1] == 0
    other = vae.VAE(TINY_VAE).eval().requires_grad_(False)
    changed, calls = encode("b", model=other)
    assert calls == 12 and not same(whole, changed)
    assert encode("b", model=other, num_clips=8)[1] == 8 and encode("b", model=other, num_clips=8, seed=1)[1] == 8


def test_dit_resumes_to_the_same_bits_and_averages_its_weights(folder):
    vae.main(replace(TINY_VAE, out=str(folder)))
    (folder / "b").mkdir()
    (folder / "b" / "vae.pt").write_bytes((folder / "vae.pt").read_bytes())
    whole, again = trained(dit, TINY_DIT, out=str(folder)), broken_off(dit, TINY_DIT, str(folder / "b"))
    for key in ("model", "ema", "optimizer", "rng", "step", "vae", "words"):
        assert same(whole[key], again[key]), key
    model, cfg = dit.load_dit(folder / "dit.pt", "dit")
    assert same(dict(model.state_dict()), dict(whole["ema"])) and not same(whole["ema"], whole["model"])
    kept = []
    with patch.object(dit, "save", lambda path, **c: kept.append({k: {n: v.clone() for n, v in c[k].items()} for k in ("model", "ema")})):
        dit.main(replace(TINY_DIT, out=str(folder), save_every=1, ema=.15))
    for step in (1, 2, 3):
        rate = min(.15, (1 + step) / (10 + step))                       # it forgets its start first
        for name, value in kept[step]["ema"].items():
            if value.is_floating_point():
                close(value, rate * kept[step - 1]["ema"][name] + (1 - rate) * kept[step]["model"][name], 1e-5)


def test_two_processes_share_the_work(folder):
    vae.main(replace(TINY_VAE, out=str(folder)))
    names = [f.name for f in fields(dit.Config) if f.type is not bool]
    flags = [f"--{n}={','.join(map(str, v)) if isinstance(v := getattr(TINY_DIT, n), tuple) else v}" for n in names]
    end = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", dit.__file__, *flags,
                          f"--out={folder}", "--steps=2"], capture_output=True, text=True)
    assert end.returncode == 0 and end.stdout.splitlines()[-2].startswith("DIT "), end.stdout + end.stderr
    shared = np.load(folder / "latents" / "clips.latents.npy")
    (folder / "latents" / "about.json").unlink()
    alone = dit.encode_clips(replace(TINY_DIT, out=str(folder)), dit.load_vae(folder), dit.WordEncoder(12, 16), 0, 1, "cpu")
    assert np.abs(shared - alone["clips"][0]).max() < 1e-2 and vae.load(folder / "dit.pt", "dit")["step"] == 2


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]) > 0)
