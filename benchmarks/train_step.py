"""
How fast is one optimizer step, and how much of the machine's peak matmul throughput does it reach?

    python benchmarks/train_step.py                                            # ViT-B/16 at 224, batch 4 on a CPU
    python benchmarks/train_step.py --size large --batch_size 64 --orders 1    # a GPU
    python benchmarks/train_step.py --size cifar --batch_size 1024 --rows straightforward,compiled

A step is the forward pass of both views, the backward pass and AdamW; in bf16 autocast on a GPU. Ours is the trainer's
`TrainStep`, with its guard against gradients that are not finite. The rows (--rows):

straightforward, straightforward-compiled   CAN as one writes it down (straightforward.py), AdamW as torch has it by
                                            default; and with its blocks compiled
mae                                         transformers' ViT-MAE on both views: same encoder, decoder and mask ratio
eager, compiled, whole, cudagraph           ours with fused AdamW; with its blocks compiled; compiled as one graph;
                                            recorded as a CUDA graph

All rows live in one process and step in turn, in an order that alternates from round to round. With --orders 2, half
of the rounds run in a second process that built the rows in the opposite order, because the row built second was up to
3 % faster. Figures are medians over the rounds; ratios are medians of the ratios within a round. On a GPU a round has
five steps of each row and waits for the device once, after them. A row that fails (memory, compiler) is reported with
its error; the first row must not fail.

TFLOP/s counts the model's FLOPs (training_flops) and is compared with the rate of one large matrix product. With
--products, the matrix products of each step are recorded with shapes and strides and timed alone; their share of the
step would be 100 % for a step that does nothing but multiply. The patch projection of straightforward and mae, a
convolution, is not among them (0.5 %).

"probe" says whether anything compiles anew after an uncompiled forward pass in eval mode, as the trainer's probes make
it: step time before and after, time of the first step after it, and the number of new graphs.

Writes train_step-SIZE-DEVICE.json (cifar: with the batch size). On a CPU glibc is told to keep the memory that it has,
because page faults made single steps scatter; run_pretraining.py does so too (--default_allocator leaves it alone).
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from accelerate import Accelerator
from records import ROOT, add_out, facts, save
from straightforward import Block, StraightforwardCAN
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_can import CANForPreTraining
from modeling_can.modeling_can import sincos_positions
from modeling_can.optimization import parameter_groups
from modeling_can.pretraining.compiling import compile_model
from modeling_can.pretraining.cost import training_flops
from modeling_can.pretraining.recipe import parse_arguments
from modeling_can.pretraining.step import TrainStep
from modeling_can.random_state import interlude


SIZES = ("quickstart", "cifar", "tiny", "small", "base", "large", "huge")
CIFAR = {  # ViT-tiny for images of 32 x 32, the scale `tiny` of experiments/cifar10
    "patch_size": 4, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768,
    "decoder_hidden_size": 192, "decoder_num_hidden_layers": 4, "decoder_num_attention_heads": 6,
    "decoder_intermediate_size": 768,
}  # fmt: skip
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


def large_product_tflops(device) -> float:
    """The rate of one product of random matrices: 8192^3 in bf16 on a GPU, 2048^3 in fp32 on a CPU."""
    side = 8192 if device.type == "cuda" else 2048
    run = product_runner([(((side, side), (side, 1)),) * 2], device)
    return 2 * side**3 / statistics.median([timed(run, device) for _ in range(10)][2:]) / 1e12


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


def compile_straightforward(model):
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


ROWS = {  # name in the report, how to build the model, how to compile it
    "straightforward": ("straightforward CAN", StraightforwardCAN, None),
    "straightforward-compiled": ("straightforward CAN, compiled", StraightforwardCAN, compile_straightforward),
    "mae": ("ViT-MAE, both views", mae_model, None),
    "eager": ("CAN", CANForPreTraining, None),
    "compiled": ("CAN, compiled", CANForPreTraining, lambda model: compile_model(model, "blocks")),
    "whole": ("CAN, compiled whole", CANForPreTraining, lambda model: compile_model(model, "model")),
    "cudagraph": ("CAN, CUDA graph", CANForPreTraining, lambda model: compile_model(model, "cudagraph")),
}


def recipe_arguments(size: str) -> list[str]:
    """What run_pretraining.py takes for a model of this size: a recipe and flags."""
    if size == "cifar":
        recipe = ROOT / "experiments" / "cifar10" / "recipe.yaml"
        return [str(recipe), *(f"--{name}={value}" for name, value in CIFAR.items())]
    patch_size = 14 if size == "huge" else 16
    card = "can-quickstart" if size == "quickstart" else f"can-vit-{size}-patch{patch_size}-224"
    return [str(ROOT / "model_cards" / card / "recipe.yaml")]


def preset(size: str):
    """The configuration of a preset recipe."""
    return parse_arguments(recipe_arguments(size), "").config


def stepper(model, batch, device, **optimizer_options):
    """A function that makes one optimizer step; of a CAN, unless the optimizer is another, the trainer's own."""
    model.to(device).train()
    if isinstance(model, CANForPreTraining) and not optimizer_options:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if device.type == "cuda" else "no")
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
        step = TrainStep(
            model=model,
            optimizer=accelerator.prepare(optimizer),
            accelerator=accelerator,
            config=model.config,
            learning_rate=lambda step, first_step: 1e-4,
        )
        return lambda: step(0, [lambda: {"pixel_values": batch}], [])
    options = optimizer_options or ({} if isinstance(model, StraightforwardCAN) else {"fused": True})
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), **options)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(batch).loss
        loss.backward()
        optimizer.step()
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


def timed(function, device, repeats: int = 1) -> float:
    """Seconds of one call, of `repeats` in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def build(key: str, config, pixels, with_products: bool) -> tuple[torch.nn.Module, dict, dict]:
    """The model, the functions to time, `{"step": ..., "products": ...}`, and what was seen while it was built."""
    _, make, compile_ = ROWS[key]
    device, on_gpu = pixels.device, pixels.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = make(config).to(device)
    batch = pixels.flatten(0, 1) if key == "mae" else pixels
    runs, seen = {}, {}
    if with_products:
        products = record_products(model, batch)
        seen["num_products"] = len(products)
    if compile_:
        compile_(model)
    runs["step"] = stepper(model, batch, device)
    seen["first_step_seconds"] = timed(runs["step"], device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        timed(runs["step"], device)
        seen["memory_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    if with_products:
        runs["products"] = product_runner(products, device)
    return model, runs, seen


def after_a_probe(model, step, pixels) -> dict:
    """Whether an uncompiled forward pass in eval mode makes the next steps slower; times in seconds."""

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    before, graphs_before = statistics.median(timed(step, pixels.device) for _ in range(5)), graphs()
    model.eval()
    with torch.no_grad(), interlude():
        model(pixels)
    model.train()
    first = timed(step, pixels.device)
    after = statistics.median(timed(step, pixels.device) for _ in range(5))
    return {"step_seconds_before": before, "first_step_seconds_after": first, "step_seconds_after": after,
            "new_graphs": graphs() - graphs_before}  # fmt: skip


def measure(order: list[str], arguments) -> dict:
    """
    Rows are built in this order. Returns the seconds of every round, `{row: {"step": [...], "products": [...]}}`; what
    was seen of each row; the errors of those that failed; and the TFLOP/s of one large product.
    """
    device = torch.device(arguments.device)
    on_gpu, config = device.type == "cuda", preset(arguments.size)
    torch.manual_seed(0)
    pixels = torch.randn(arguments.batch_size, 2, 3, *config.image_shape, device=device)
    large_rate = large_product_tflops(device)
    runs, seen, errors, models = {}, {}, {}, {}

    @contextlib.contextmanager
    def row(key):
        """Whatever fails (memory, compiler), the other rows are measured."""
        try:
            yield
        except Exception as error:
            errors[key] = f"{type(error).__name__}: {error}"[:1000]
            runs.pop(key, None)
        if key in errors and on_gpu:
            torch.cuda.empty_cache()

    for key in order:
        with row(key):
            models[key], runs[key], seen[key] = build(key, config, pixels, arguments.products)
    seconds = {key: {part: [] for part in parts} for key, parts in runs.items()}
    for round_ in tqdm(range(arguments.rounds + 1), desc=f"{order[0]} built first, round 1 warms up"):
        for key in list(runs)[:: 1 if round_ % 2 else -1]:
            with row(key):
                for part, function in runs[key].items():
                    elapsed = timed(function, device, repeats=5 if on_gpu else 1)
                    if round_ > 0:
                        seconds[key][part].append(elapsed)
    probe = after_a_probe(models["compiled"], runs["compiled"]["step"], pixels) if "compiled" in runs else None
    return {"seconds": seconds, "seen": seen, "errors": errors, "large_rate": large_rate, "probe": probe}


def ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def summary(parts: list[dict], keys: list[str], arguments) -> dict:
    """The figures of all processes together."""
    errors = {key: error for part in parts for key, error in part["errors"].items()}
    seconds = {
        key: {name: [s for part in parts for s in part["seconds"][key][name]] for name in parts[0]["seconds"][key]}
        for key in keys
        if key not in errors
    }
    large_rate = statistics.mean(part["large_rate"] for part in parts)
    gflop = training_flops(preset(arguments.size)) / 1e9
    results = {}
    for key in keys:
        name = ROWS[key][0]
        if key in errors:
            results[name] = {"error": errors[key]}
            continue
        steps = seconds[key]["step"]
        step = statistics.median(steps)
        results[name] = parts[0]["seen"][key] | {  # later processes find the compiler's cache filled
            "step_seconds": step,
            "images_per_second": arguments.batch_size / step,
            "speed_over_straightforward": ratio(seconds["straightforward"]["step"], steps),
        }
        if key != "mae":  # it computes other losses
            tflops = gflop * arguments.batch_size / step / 1e3
            results[name] |= {"gflop_per_image": gflop, "tflops": tflops}
            results[name]["share_of_large_product"] = tflops / large_rate
        if "products" in seconds[key]:
            products = seconds[key]["products"]
            results[name] |= {
                "products_seconds": statistics.median(products),
                "share_of_product_rate": ratio(products, steps),
            }
    report = {"large_product_tflops": large_rate, "results": results, "probe": parts[0]["probe"]}
    if "eager" in seconds:
        report["speed_of_can_over_straightforward"] = results["CAN"]["speed_over_straightforward"]
        if "mae" in seconds:
            report["speed_of_can_over_vit_mae"] = ratio(seconds["mae"]["step"], seconds["eager"]["step"])
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--batch_size", type=int, default=4, help="images, each in two views")
    parser.add_argument("--rows", help=f"of {','.join(ROWS)}; the first is straightforward")
    parser.add_argument("--rounds", type=int, default=6, help="for each of the orders of building")
    parser.add_argument("--orders", type=int, default=2, choices=[1, 2], help="of building the rows")
    parser.add_argument("--products", action=argparse.BooleanOptionalAction, help="default: on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--default_allocator", action="store_true", help="leave glibc's allocator as it is")
    add_out(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if arguments.products is None:
        arguments.products = not on_gpu
    usual = [key for key in ROWS if key != "mae"] if on_gpu else ["straightforward", "mae", "eager"]
    keys = arguments.rows.split(",") if arguments.rows else usual
    if keys[0] != "straightforward" or not set(keys) <= set(ROWS):
        parser.error(f"--rows={arguments.rows} must begin with straightforward and be of {','.join(ROWS)}")
    provenance = facts(seed=0, device=device)
    if not arguments.default_allocator:  # read when a process starts, hence by those started below
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

    parts = []
    for order in (keys, keys[::-1])[: arguments.orders]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            parts.append(process.submit(measure, order, arguments).result())
        if "straightforward" in parts[-1]["errors"]:
            raise SystemExit(f"the row to which all are compared failed: {parts[-1]['errors']['straightforward']}")
    report = {
        **provenance,
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds * arguments.orders,
        **summary(parts, keys, arguments),
    }
    size = f"cifar{arguments.batch_size}" if arguments.size == "cifar" else arguments.size
    suffix = "-default_allocator" if arguments.default_allocator else ""
    save(f"train_step-{size}-{device.type}{suffix}", report, arguments.out)
    columns = {"images_per_second": "images/s", "step_seconds": "step, s", "tflops": "TFLOP/s",
               "share_of_large_product": "of peak", "share_of_product_rate": "products", "memory_gib": "GiB",
               "first_step_seconds": "first, s", "speed_over_straightforward": "speed"}  # fmt: skip
    print(f"\n{'':30}{''.join(f'{title:>10}' for title in columns.values())}")
    for name, result in report["results"].items():
        cells = [f"{result[column]:10.4g}" if column in result else f"{'-':>10}" for column in columns]
        print(f"{name:30}{result.get('error') or ''.join(cells)}")
    print(f"one large product: {report['large_product_tflops']:.4g} TFLOP/s; around a probe: {report['probe']}")


if __name__ == "__main__":
    main()
