"""
How fast is one optimiser step, and how much of the machine's own matrix-product rate does it reach?

    python benchmarks/train_step.py                        # ViT-B/16 at 224, batch 4 on CPU
    python benchmarks/train_step.py --size small --batch_size 8 --rounds 5

In one process, in interleaved rounds, times (1) a step of CAN: forward of both views, backward, AdamW; (2) the
matrix products of that step alone, recorded from it with their shapes and strides; (3) a step of transformers'
ViT-MAE on both views, with the same encoder, decoder and mask ratio and with correct positions copied in; (4) the
products of that; (5) a step of CAN as one writes it down (straightforward.py; fp16 on a GPU) and (6) its products. The
share of the matrix-product rate is (2) / (1): 100 % would be a step that does nothing but multiply. Attention's own
products are timed as plain ones, which write what flash attention on a GPU never does; so there, read the rate of the
arithmetic in TFLOP/s, over that of one large product, beside it. The patch projection of (3) and (5), a convolution,
is not among the products (0.5 %). Medians, in train_step-SIZE-DEVICE.json beside this file.

Two things that have nothing to do with the models are kept out: the order alternates from round to round, and half of
the rounds run in a process that built CAN last, because the model built second was up to 3 % faster; glibc is
told to keep the memory that it has, because page faults made single steps scatter (--default_allocator leaves it
alone; run_pretraining.py does too).
"""

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from evidence import facts, save
from straightforward import StraightforwardCAN
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_can import CANForPreTraining
from modeling_can.diagnostics import training_flops
from modeling_can.modeling_can import sincos_positions
from modeling_can.recipe import parse_arguments
from modeling_can.training import parameter_groups


ROOT = Path(__file__).parent.parent
PATCH = {"huge": 14}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


class RecordProducts(TorchDispatchMode):
    """Remembers the operands' shapes and strides of every matrix product."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            left, right = args[-2:]
            self.products.append(tuple((tuple(x.shape), x.stride()) for x in (left, right)))
        return function(*args, **(kwargs or {}))


def product_runner(products, device):
    """A function that runs the recorded products and nothing else; in half precision on a GPU, as the step does."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    operands = {}

    def operand(description):
        if description not in operands:
            shape, stride = description
            operands[description] = torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
        return operands[description]

    pairs = [(operand(left), operand(right)) for left, right in products]

    def run():
        for left, right in pairs:
            torch.matmul(left, right)

    return run


def mae_model(config):
    """transformers' ViT-MAE of the same size. Built from a config it has no positions; they are copied in."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
             "patch_size", "layer_norm_eps", "mask_ratio", "decoder_hidden_size", "decoder_num_hidden_layers",
             "decoder_num_attention_heads", "decoder_intermediate_size")  # fmt: skip
    model = ViTMAEForPreTraining(ViTMAEConfig(**{name: getattr(config, name) for name in names}))
    tables = {model.vit.embeddings.position_embeddings: config.hidden_size,
              model.decoder.decoder_pos_embed: config.decoder_hidden_size}  # fmt: skip
    for table, width in tables.items():
        table.data.copy_(sincos_positions(config.grid_shape, width))
    return model


MODELS = {  # how to build it, and how it takes (B, 2, C, H, W)
    "CAN": (CANForPreTraining, lambda pixels: pixels),
    "ViT-MAE, both views": (mae_model, lambda pixels: pixels.flatten(0, 1)),
    "straightforward CAN": (StraightforwardCAN, lambda pixels: pixels),
}


def preset(size):
    """The configuration of a preset recipe."""
    card = ROOT / "model_cards" / f"can-vit-{size}-patch{PATCH.get(size, 16)}-224"
    return parse_arguments([], card / "recipe.yaml", "").config


def stepper(model, batch, device, **optimizer_options):
    """A function that makes one optimiser step."""
    model.to(device).train()
    is_plain, on_gpu = isinstance(model, StraightforwardCAN), device.type == "cuda"
    options = optimizer_options or ({} if is_plain else {"fused": True})
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), **options)
    autocast = torch.autocast(device.type, torch.float16 if is_plain else torch.bfloat16, enabled=on_gpu)
    scaler = torch.amp.GradScaler(device.type, enabled=is_plain and on_gpu)

    def step():
        with autocast:
            loss = model(batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def record_products(model, batch):
    """The products of forward and backward. Eager attention shows those that sdpa hides."""
    configs = [
        module.config for module in model.modules() if hasattr(module, "config")
    ]  # ViT-MAE's decoder has its own
    for config in configs:
        config._attn_implementation = "eager"
    with RecordProducts() as recorder:
        model(batch).loss.backward()
    model.zero_grad()
    for config in configs:
        config._attn_implementation = "sdpa"
    return recorder.products


def timed(function, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(build_order, arguments):
    """
    Seconds of every round, `{name: {"step": [...], "products": [...]}}`, the models' number of products, and the
    TFLOP/s of one large product.
    """
    device = torch.device(arguments.device)
    config = preset(arguments.size)
    torch.manual_seed(0)
    pixels = torch.randn(arguments.batch_size, 2, 3, *config.image_shape, device=device)
    runs, num_products = {}, {}
    for name in build_order:
        build, views = MODELS[name]
        model = build(config).to(device)
        products = record_products(model, views(pixels))
        num_products[name] = len(products)
        runs[name] = {"step": stepper(model, views(pixels), device), "products": product_runner(products, device)}

    side = 8192 if device.type == "cuda" else 2048
    large = product_runner([(((side, side), (side, 1)),) * 2], device)
    large_rate = 2 * side**3 / statistics.median([timed(large, device) for _ in range(10)][2:]) / 1e12
    seconds = {name: {part: [] for part in parts} for name, parts in runs.items()}
    for round_ in tqdm(range(arguments.rounds + 1), desc=f"{build_order[0]} built first, round 1 warms up"):
        for name, parts in runs.items() if round_ % 2 else reversed(runs.items()):
            for part, function in parts.items():
                elapsed = timed(function, device)
                if round_ > 0:
                    seconds[name][part].append(elapsed)
    return seconds, num_products, large_rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=["tiny", "small", "base", "large", "huge"])
    parser.add_argument("--batch_size", type=int, default=4, help="images, each in two views")
    parser.add_argument("--rounds", type=int, default=6, help="for each of the two orders of building")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--default_allocator", action="store_true", help="leave glibc's allocator as it is")
    arguments = parser.parse_args()
    provenance = facts(seed=0, device=arguments.device)
    if not arguments.default_allocator:  # read when a process starts, hence by those started below
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

    seconds, large_rates = {name: {"step": [], "products": []} for name in MODELS}, []
    for build_order in (list(MODELS), list(reversed(MODELS))):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            more_seconds, num_products, large_rate = process.submit(measure, build_order, arguments).result()
        large_rates.append(large_rate)
        for name, parts in more_seconds.items():
            for part, rounds in parts.items():
                seconds[name][part] += rounds

    results = {name: {"num_products": num_products[name]} for name in MODELS}
    results["CAN"]["gflop_per_image"] = training_flops(preset(arguments.size)) / 1e9
    for name, result in results.items():
        step, products = (statistics.median(seconds[name][part]) for part in ("step", "products"))
        result |= {
            "step_seconds": step,
            "images_per_second": arguments.batch_size / step,
            "products_seconds": products,
            "share_of_product_rate": statistics.median(
                p / s for s, p in zip(seconds[name]["step"], seconds[name]["products"], strict=True)
            ),
        }
    ours = results["CAN"]
    ours["tflops"] = ours["gflop_per_image"] * ours["images_per_second"] / 1e3
    can, mae, plain = (seconds[name]["step"] for name in MODELS)
    speed, plain_speed = (statistics.median(m / c for c, m in zip(can, other, strict=True)) for other in (mae, plain))
    device_type = torch.device(arguments.device).type
    report = {
        **provenance,
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "rounds": len(can),
        "large_product_tflops": statistics.mean(large_rates),
        "results": results,
        "speed_of_can_over_vit_mae": speed,
        "speed_of_can_over_straightforward": plain_speed,
    }
    suffix = "-default_allocator" if arguments.default_allocator else ""
    save(f"train_step-{arguments.size}-{device_type}{suffix}", report)
    print(f"\n{'':22}{'images/s':>10}{'step, s':>10}{'products, s':>13}{'share':>8}{'GFLOP/image':>13}")
    for name, r in results.items():
        gflop = f"{r['gflop_per_image']:.1f}" if "gflop_per_image" in r else "-"
        print(f"{name:22}{r['images_per_second']:10.3f}{r['step_seconds']:10.2f}{r['products_seconds']:13.2f}"
              f"{r['share_of_product_rate']:8.0%}{gflop:>13}")  # fmt: skip
    print(f"CAN: {ours['tflops']:.3f} TFLOP/s; one large product: {report['large_product_tflops']:.3f} TFLOP/s")
    print(f"CAN in images a second / ViT-MAE: {speed:.3f}, / straightforward: {plain_speed:.3f}")


if __name__ == "__main__":
    main()
