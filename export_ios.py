"""Core ML packages of the denoiser and the VAE decoder (Sec. 5), executed and compared before they are kept.

    python export_ios.py                             # the latest generator in out/, half precision
    python export_ios.py --bits 8                    # compressed weights, 8 or 4 bits; 32: single precision
    python export_ios.py --preset paper [--dry_run]  # 49 x 384 x 512; the 0.9B model untrained if out/ has none

out/distilled.pt (or pruned.pt, dit.pt) and the vae.pt beside it -> out/denoiser.mlpackage, out/decoder.mlpackage
"""
import asyncio
import gc
import io
import logging
import platform
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import dit
import vae as vae_stage
from dit import (MOBILE, LaterStage, add_noise, advance, build, find_generator, load_dit, load_vae, recipe, sample,
                 text_encoder, untrained)
from vae import VAE, Abort, Meter, flag, launch, open_clips, print0, setup, summary

logging.getLogger("coremltools").setLevel(logging.ERROR)  # away from a Mac it warns at length that it cannot predict


@dataclass
class Config(LaterStage):
    checkpoint: str = flag("", "a generator; its folder has vae.pt too. Without it, the latest stage found in --out")
    frames: int = flag(0, "frames of a video; 0: as in training")
    size: tuple = flag((), "its height and width; as in training if not given")
    bits: int = flag(16, "of a weight: 16, 32 (all in single precision), or 8 or 4 in linears and convolutions")
    team: str = flag("", "on a Mac: the Apple development team that signs what measures on a connected iPhone")
    dry_run: bool = flag(False, "print parameters, FLOPs, memory and estimated latency, and stop")


PRESETS = {"toy": {}, "paper": dict(frames=49, size=(384, 512))}  # Sec. 5
BOUNDS = {32: (1e-5, 1e-5), 16: (3e-3, 5e-3), 8: (3e-2, 6e-2), 4: (.3, .6)}  # relative errors: of a step, of a run
CORE_ML = sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) >= 15  # older ones: no iOS 18 package
# Ours: a roofline for the iPhone 16 Pro Max: the rate at which the 2B model's 4.94 TFLOPs of a step at 49 x 384 x 512
# take the paper's 880 ms (Table 3), and the 60 GB/s of its memory.
FLOPS, BANDWIDTH = 4.94e12 / .88, 60e9


# ------------------------------------------------------------------------------------------------ what is packaged
class Denoiser(torch.nn.Module):
    """One step of dit.sample: latents (1, C, f, h, w) at time t (1,) -> those at t_next (1,)."""
    output, says = "next_latents", "the latents at t_next"
    inputs = dict(latents="normalised latents (1, C, f, h, w); to start with, noise of N(0, 1)",
                  t="their time, from the list `times`: 1 is noise, 0 is video", t_next="the next time of the list",
                  text_emb="text embeddings (1, L, E), then zeros; of no caption zeros alone",
                  text_mask="(1, L): 1 where there is text, then zeros")

    def __init__(self, model, shape, about, null=None):
        """null: the text encoder's, if it has one, which the package takes from the embeddings."""
        super().__init__()
        self.register_buffer("null", null)
        self.model, sizes = model, (shape, (), (), (about.text_length, about.text_dim), (about.text_length,))
        if about.stochastic:
            self.inputs, sizes = self.inputs | dict(noise="like latents, N(0, 1), new for each step"), (*sizes, shape)
        self.examples = tuple(model.table.new_zeros(1, *size) for size in sizes)
        # Made here, not in forward: coremltools, left to compute them, errs by 1e-5.
        self.tables = dit.rope_tables(shape[1:], model.cfg.width, model.fps, model.compression, model.table.device)

    def forward(self, latents, t, t_next, text_emb, text_mask, noise=None):
        # A pruned model's blocks each gather slices of their own, which the converter would compute and store, 69 MB at
        # paper size, unless the tables seem to depend on an input.
        pruned = self.model.cfg.num_heads * self.model.cfg.head_dim < self.model.cfg.width
        tables = [table + 0 * t for table in self.tables] if pruned else self.tables
        text_emb = text_emb if self.null is None else text_emb - self.null * text_mask[..., None]
        with patch.object(dit, "rope_tables", lambda *_: tables):
            return advance(latents, self.model(latents, t, text_emb, text_mask), t, t_next, noise)


class Decoder(torch.nn.Module):
    """Latents (1, C, f, h, w) -> RGB frames (F, 3, H, W) in [0, 1]."""
    output, says = "frames", "RGB (F, 3, H, W) in [0, 1]"
    inputs = dict(latents="normalised latents (1, C, f, h, w) at time 0")

    def __init__(self, vae, shape):
        super().__init__()
        self.vae, self.examples = vae, (vae.mean.new_zeros(1, *shape),)

    def forward(self, latents):
        repeat = lambda x, _, g: x.transpose(0, 1).expand(-1, g, -1, -1, -1).flatten(0, 1).unsqueeze(0)
        with patch.object(vae_stage, "repeat", repeat):  # einops' goes through rank 6, and Core ML ends at 5
            return ((self.vae.decode(latents).squeeze(0).transpose(0, 1) + 1) / 2).clamp(0, 1)


def in_fp32(op):
    """Whether an operation stays in fp32: where fp16 overflows (norms square values above 256) or loses digits
    (sinusoids of 1000 t, Euler's sum).

    Ours: norms that divide by the largest value can stay in fp16, but err a quarter more over four steps of the toy.
    """
    made_by = [getattr(getattr(value, "op", None), "op_type", "") for value in op.inputs.values()]
    users = [user for result in op.outputs for user in result.child_ops]
    return op.op_type in ("reduce_mean", "rsqrt", "layer_norm", "sin", "cos") or "rsqrt" in made_by or (
        op.op_type in ("mul", "add", "sub", "real_div", "expand_dims") and all(map(in_fp32, users)))


def convert(path, module, bits, metadata):
    """Write a module as a Core ML package for iOS 18 with static shapes, fp16 but for in_fp32, unless bits is 32."""
    import coremltools as ct  # takes seconds
    from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig, linear_quantize_weights
    if bits < 32 and (beyond := [k for k, x in module.state_dict().items() if not x.abs().max() <= 65504]):
        raise Abort(f"{beyond[0]} has values that fp16 cannot hold, no package is kept: try --bits 32")
    half = ct.transform.FP16ComputePrecision(lambda op: not in_fp32(op))
    # The converter's own search for weights beyond fp16, done above, takes 2.7 GB at paper size.
    no_search = patch.object(ct.transform.FP16ComputePrecision, "fp16_overflow", return_value=False)
    with no_search, patch.object(sys, "stderr", io.StringIO()):  # progress bars and tracer's warnings
        # Exporting makes shapes plain numbers; those that are only traced fail to convert on numpy 2.4. Tracing keeps
        # GELU's tanh, which the converter silently drops from exported programs.
        exported = torch.export.export(module, module.examples)
        package = ct.convert(
            torch.jit.trace(exported.module(), module.examples, check_trace=False), convert_to="mlprogram",
            inputs=[ct.TensorType(name, x.shape, np.float32) for name, x in zip(module.inputs, module.examples)],
            outputs=[ct.TensorType(module.output, dtype=None if module.output == "frames" else np.float32)],
            compute_precision=half if bits < 32 else ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
        if bits < 16:
            kind = OpLinearQuantizerConfig(dtype=f"int{bits}", granularity="per_block" if bits == 4 else "per_channel")
            package = linear_quantize_weights(package, OptimizationConfig(  # by type, to leave out the tables
                op_type_configs={"linear": kind, "conv": kind}))
    package.output_description[module.output] = module.says
    for name, text in module.inputs.items():
        package.input_description[name] = text
    package.user_defined_metadata.update({key: str(value) for key, value in metadata.items()})
    package.save(str(path))


# ------------------------------------------------------------------------------------------------ execution
# The operations that our packages use, with Core ML's names of arguments. Tensors are fp32, all else plain numbers.
OPS = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "real_div": lambda x, y: x / y,
    "sin": lambda x: x.sin(), "cos": lambda x: x.cos(), "rsqrt": lambda x, epsilon: (x + epsilon).rsqrt(),
    "silu": lambda x: F.silu(x), "clip": lambda x, alpha, beta: x.clamp(alpha, beta), "cast": lambda x, dtype: x,
    "gelu": lambda x, mode: F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode]),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    "layer_norm": lambda x, axes, epsilon, gamma=None, beta=None: F.layer_norm(
        x, [x.shape[axis] for axis in axes], gamma, beta, epsilon.item()),
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "conv": lambda x, weight, bias, strides, pad_type, pad, dilations, groups: F.conv3d(
        x, weight, bias, strides, pad[::2] if pad_type == "custom" else 0, dilations, groups),
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "reshape": lambda x, shape: x.reshape(shape), "transpose": lambda x, perm: x.permute(perm),
    "expand_dims": lambda x, axes: x.unsqueeze(*axes), "squeeze": lambda x, axes: x.squeeze(axes),
    "tile": lambda x, reps: x.repeat(reps), "split": lambda x, split_sizes, axis: x.split(split_sizes, axis),
    "stack": lambda values, axis: torch.stack(values, axis),
    "concat": lambda values, axis, interleave: torch.cat(values, axis),
    "slice_by_index": lambda x, begin, end, begin_mask=[0] * 5, end_mask=[0] * 5: x[tuple(slice(
        None if first else b, None if last else e) for b, e, first, last in zip(begin, end, begin_mask, end_mask))],
    "gather": lambda x, indices, axis, batch_dims, validate_indices: x.index_select(axis, torch.tensor(indices)),
    "constexpr_blockwise_shift_scale": lambda data, scale: data.float() * scale.repeat_interleave(
        data.shape[1] // scale.shape[1], 1)}
TYPES = {"FLOAT16": torch.float16, "FLOAT32": torch.float32, "INT32": torch.int32, "INT16": torch.int16,
         "UINT16": torch.uint16, "INT8": torch.int8, "INT4": torch.int8, "BOOL": torch.bool}


class Program:
    """A saved package, read by this class alone and executed; results are rounded to the types that it declares."""

    def __init__(self, path):
        from coremltools.proto import MIL_pb2, Model_pb2
        self.path, self.folder = Path(path), Path(path) / "Data" / "com.apple.CoreML"
        self.model = Model_pb2.Model.FromString((self.folder / "model.mlmodel").read_bytes())
        function, self.constants, self.ops = self.model.mlProgram.functions["main"], {}, []
        block = function.block_specializations[function.opset]
        declared = lambda v: (MIL_pb2.DataType.Name(v.type.tensorType.dataType),
                              [size.constant.size for size in v.type.tensorType.dimensions])
        self.inputs, (self.output,) = [(v.name, *declared(v)) for v in function.inputs], block.outputs
        for op in block.operations:
            own, names = op.outputs[0].name, {}
            given = {own: op.attributes["val"]} if op.type == "const" else {}
            for key, argument in op.inputs.items():
                names[key] = [a.name or f"{own}.{key}" for a in argument.arguments]
                given |= {f"{own}.{key}": a.value for a in argument.arguments if not a.name}
            self.constants |= {name: self.constant(value, *declared(value)) for name, value in given.items()}
            if op.type != "const":
                self.ops.append((op.type, names, [(v.name, *declared(v)) for v in op.outputs]))

    def constant(self, value, kind, shape):
        """A tensor, if of floats or of weights of 4 or 8 bits; else a plain number or string, or a list of them."""
        if value.HasField("blobFileValue"):  # its header says how many bytes there are, and where
            offset, weights = value.blobFileValue.offset, np.memmap(self.folder / "weights" / "weight.bin", mode="c")
            size, start = weights[offset + 8:offset + 24].view(np.uint64).tolist()
            numbers = torch.from_numpy(weights[start:start + size])
        else:
            held = value.immediateValue.tensor
            numbers = getattr(held, held.WhichOneof("value")).values
            if kind == "STRING":
                return numbers[0]
            numbers = torch.tensor(list(numbers), dtype=torch.uint8 if isinstance(numbers, bytes) else TYPES[kind])
        if kind == "INT4":  # two in a byte, the lower half first
            numbers = torch.stack([numbers << 4, numbers & 0xF0], 1).flatten().view(torch.int8) >> 4
        numbers = numbers.view(TYPES[kind]).reshape(shape)
        return numbers if kind in ("FLOAT16", "FLOAT32", "INT8", "INT4") else numbers.tolist()

    def __call__(self, *inputs):
        """Inputs in the package's order -> its output, all tensors."""
        last = {name: i for i, (_, args, _) in enumerate(self.ops) for names in args.values() for name in names}
        values = self.constants | {name: x.to(TYPES[kind]) for (name, kind, _), x in zip(self.inputs, inputs)}
        wide = lambda v: v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.float16 else v
        for i, (kind, args, outputs) in enumerate(self.ops):
            given = {key: [wide(values[name]) for name in names] for key, names in args.items()}
            results = OPS[kind](**{key: v if key == "values" else v[0] for key, v in given.items()})
            for (name, declared, shape), result in zip(outputs, results if len(outputs) > 1 else [results]):
                if list(result.shape) != shape:
                    raise Abort(f"{self.path.name}: {kind} gives {list(result.shape)}, but {shape} is declared")
                values[name] = result.to(TYPES[declared])
            for name in {name for names in args.values() for name in names if last[name] == i}:
                del values[name]  # nothing needs it any more
        return values[self.output].float()


def core_ml(program):
    """Core ML's own execution of a package, called like the Program; on a Mac."""
    import coremltools as ct
    model, names = ct.models.MLModel(str(program.path)), [name for name, *_ in program.inputs]
    return lambda *inputs: torch.from_numpy(np.float32(
        model.predict({name: x.numpy() for name, x in zip(names, inputs)})[program.output]))


# ------------------------------------------------------------------------------------------------ check and report
def check(modules, programs, about, bits, whole):
    """Compare packages with PyTorch on a clip's noised latents and over a whole run, unguided; returns the errors.

    Raises Abort where one is above BOUNDS.
    """
    unknown = {kind for program in programs for kind, *_ in program.ops} - set(OPS)
    (denoiser, decoder), model, rgb = programs, modules["denoiser"].model, modules["decoder"]
    if CORE_ML:
        denoiser, decoder, whole = core_ml(denoiser), core_ml(decoder), True
    elif unknown:
        print0(f"check SKIPPED: OPS lacks {', '.join(unknown)}")
        return {}
    clips, times, at, errors = open_clips(about, "full"), recipe(about)[0], lambda t: torch.tensor([t]), {}
    text = text_encoder(about)([clips.caption(0)])
    raw = lambda emb, mask: (emb if (null := modules["denoiser"].null) is None else emb + null * mask[..., None], mask)
    x0 = rgb.vae.encode(clips.clip(0)[0][None].expand(-1, -1, about.frames, -1, -1))  # an image stands still
    x = noise = torch.randn_like(x0)
    fresh = [torch.randn_like(x0)] * about.stochastic  # the same at every step
    renew = (lambda: fresh[0]) if fresh else None

    def compare(kind, what, ours, true):
        error, bound = ((ours - true).norm() / true.norm()).item(), BOUNDS[bits][kind == "run_error"]
        print0(f"{what:48} relative error {error:.1e}, at most {bound:g}")
        if not error <= bound:  # nor is NaN
            raise Abort(f"{what}: relative error {error:.1e} is above {bound:g}, no package is kept"
                        f"{': try more --bits' * (bits < 32)}")
        errors[kind] = max(error, errors.get(kind, 0))

    for t, t_next in zip(times, times[1:]):
        noised = add_noise(x0, noise, at(t))
        for name, (emb, mask) in {"a caption": text, "no caption": [0 * part for part in text]}.items():
            compare("step_error", f"next_latents, t {t:.3f} -> {t_next:.3f}, {name}",
                    denoiser(noised, at(t), at(t_next), *raw(emb, mask), *fresh),
                    sample(model, noised, emb, mask, [t, t_next], renew=renew))
            if not whole:
                print0("SKIPPED: other steps and the decoder, which take many minutes away from a Mac")
                return errors
        x = denoiser(x, at(t), at(t_next), *raw(*text), *fresh)
    true = sample(model, noise, *text, times, renew=renew)
    compare("frames_error", "frames", decoder(x0), rgb(x0))
    compare("run_error", f"next_latents after {len(times) - 1} steps", x, true)
    x, true = decoder(x), rgb(true)
    compare("run_error", "frames of these", x, true)  # 5e-3 of what is in [0, 1] is 46 dB or more
    return errors | {"run_psnr": -10 * F.mse_loss(x, true).log10().item()}


def report(modules, bits):
    """Print what each package holds and does, counted on the meta device, and its estimated latency; the figures."""
    figures = {}
    for name, module in modules.items():
        with Meter() as meter:
            module(*module.examples)
        results = [node.meta["val"] for node in torch.export.export(module, module.examples).graph.nodes
                   if not getattr(node.target, "is_view", True) and isinstance(node.meta["val"], torch.Tensor)]
        count = sum(p.numel() for part, p in module.named_parameters() if ".encoder" not in part)
        written = sum(result.numel() for result in results) * max(bits, 16) / 8
        flops, size = meter.flops, count * bits / 8
        ms = 1e3 * max(flops / FLOPS, (size + 2 * written) / BANDWIDTH)
        print0(f"{name}: {count:,} parameters, {size / 1e6:.4g} MB; a call: {flops / 1e9:.4g} GFLOPs, writes "
               f"{written / 1e6:.4g} MB of activations, takes an iPhone 16 Pro Max {ms:.3g} ms (an estimate)")
        figures |= {f"{name}_parameters": count, f"{name}_gflops": flops / 1e9, f"{name}_ms_estimate": ms}
    return figures


async def measure(path, team):
    """Print the median of 50 latencies on this Mac and on connected iPhones. Untested: no Mac was at hand."""
    import coremltools as ct
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials, Device, DeviceType
    for phone in [None] + (Device.get_connected_devices(DeviceType.IPHONE) if team else []):
        device = phone and await phone.prepare_for_model_debugging(AppSigningCredentials(development_team=team))
        benchmark = MLModelBenchmarker(ct.models.MLModel(str(path)), device)
        took = (await benchmark.benchmark_predict(iterations=50, warmup=True)).statistics.median
        uses = [op.compute_device_usage for op in await benchmark.benchmark_operation_execution()]
        units = Counter(type(use.preferred_compute_device).__name__ for use in uses if use)
        print0(f"{path.name}, {phone.name if phone else 'this Mac'}: {took:.1f} ms, operations on {dict(units)}")


@torch.no_grad()
def main(cfg):
    """Convert, check and keep both packages; returns the figures of the summary line."""
    began, _, out, path = time.time(), setup(cfg), Path(cfg.out), find_generator(cfg.out, cfg.checkpoint)
    if cfg.bits not in BOUNDS:
        raise Abort(f"--bits {cfg.bits}: choose from {', '.join(map(str, BOUNDS))}")
    if cfg.preset == "paper" and not (cfg.checkpoint or path.exists()):
        path = "random weights"
        model, vae, about = untrained("meta" if cfg.dry_run else "cpu", **MOBILE)
    else:
        model, about = load_dit(path, data=cfg.data)
        vae = load_vae(path.parent, expected=about.vae)
    about.frames, about.size = cfg.frames or about.frames, cfg.size or about.size
    shape, times = vae.latent_shape(about.frames, *about.size), recipe(about)[0]
    print0(f"export_ios: {path}, {cfg.bits} bits, video {about.frames, *about.size}, latents {shape}, {len(times) - 1} "
           f"steps, guidance {about.guidance_scale:g}{' (for the app to do)' * (about.guidance_scale != 1)}")
    packaged = lambda model, vae, null=None: dict(denoiser=Denoiser(model, shape, about, null),
                                                  decoder=Decoder(vae, shape))
    with torch.device("meta"):
        counted = report(packaged(build(about), VAE(vae.cfg)), cfg.bits)
    if cfg.dry_run:
        return summary("EXPORT_IOS", counted)
    open_clips(about, "full").clip(0)  # which check needs: better missing now
    figures, programs, modules = {}, [], packaged(model, vae, text_encoder(about).null)
    metadata = {key: getattr(about, key) for key in ("guidance_scale", "text_length", "text_dim", "frames", "fps")}
    metadata |= dict(times=times, size=list(about.size), bits=cfg.bits, checkpoint=path,
                     text_encoder=about.text_encoder or "dit.WordEncoder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:  # on the packages' disk, so that to move is to rename
        for name, module in modules.items():
            convert(Path(folder) / f"{name}.mlpackage", module, cfg.bits, metadata)
            gc.collect()  # the converter's copies of the weights
            programs.append(program := Program(Path(folder) / f"{name}.mlpackage"))
            figures[f"{name}_mb"] = size = sum(f.stat().st_size for f in program.path.rglob("*") if f.is_file()) / 1e6
            kinds = Counter(kind + " in fp32" * (y[0][1] == "FLOAT32") for kind, _, y in program.ops).most_common()
            print0(f"{name}: {size:.4g} MB,", ", ".join(f"{n} {kind}" for kind, n in kinds))
        figures |= check(modules, programs, about, cfg.bits, counted["denoiser_gflops"] < 1e3)
        for program in programs:
            if (kept := out / program.path.name).exists():
                kept.replace(Path(folder) / f"old.{kept.name}")
            program.path.replace(kept)
    for program in programs if CORE_ML else ():
        try:
            asyncio.run(measure(out / program.path.name, cfg.team))
        except Exception as error:  # of coremltools' many kinds: without Xcode, signature or compute plan
            print0(f"{program.path.name} is kept, but could not be measured: {error}")
    return summary("EXPORT_IOS", figures, began, f"add {out}/*.mlpackage to an Xcode project")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
