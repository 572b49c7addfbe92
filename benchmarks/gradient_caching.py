"""
What does gradient caching cost, over the usual accumulation?

    python benchmarks/gradient_caching.py                      # ViT-B/16 at 224, 2 micro-batches of 2 images on CPU
    python benchmarks/gradient_caching.py --micro_batch_size 128 --num_micro_batches 8 --rounds 20    # a GPU

Times the forwards and backwards of one step, cached and plain, in interleaved rounds in one process; counts their
FLOPs; and on a GPU notes the peak memory. Caching repeats the encoder once without a graph. Writes
gradient_caching-SIZE-DEVICE.json.
"""

import argparse
import contextlib
import statistics
from functools import partial

import torch
from records import add_out, facts, save
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from train_step import SIZES, preset, timed

from modeling_can import CANForPreTraining
from modeling_can.pretraining.gradient_caching import accumulated_backward, cached_backward


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--micro_batch_size", type=int, default=2, help="images, each in two views")
    parser.add_argument("--num_micro_batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    arguments = parser.parse_args()
    device, config = torch.device(arguments.device), preset(arguments.size)
    provenance = facts(seed=0, device=device)
    torch.manual_seed(0)
    model = CANForPreTraining(config).to(device).train()
    pixels = torch.randn(arguments.micro_batch_size, 2, 3, *config.image_shape, device=device)
    micro_batches = [lambda: {"pixel_values": pixels}] * arguments.num_micro_batches
    common = (model, micro_batches, torch.Tensor.backward, contextlib.nullcontext)
    steps = {
        "plain": partial(accumulated_backward, *common),
        "cached": partial(cached_backward, *common, config),
    }

    def run(name):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            steps[name]()
        model.zero_grad()

    results = {}
    for name in steps:
        model.set_attn_implementation("eager")  # whose products the counter sees on every device
        with FlopCounterMode(display=False) as counter:
            run(name)
        model.set_attn_implementation("sdpa")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run(name)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        results[name] = {"gflop_per_step": counter.get_total_flops() / 1e9, "peak_memory_gib": peak}
    seconds = {name: [] for name in steps}
    for round_ in tqdm(range(arguments.rounds)):
        for name in steps if round_ % 2 else reversed(steps):
            seconds[name].append(timed(partial(run, name), device))
    for name, result in results.items():
        result["step_seconds"] = statistics.median(seconds[name])
    ratio = statistics.median(c / p for c, p in zip(seconds["cached"], seconds["plain"], strict=True))
    report = {
        **provenance,
        "size": arguments.size,
        "micro_batch_size": arguments.micro_batch_size,
        "num_micro_batches": arguments.num_micro_batches,
        "rounds": arguments.rounds,
        "results": results,
        "cached_over_plain_time": ratio,
        "cached_over_plain_flop": results["cached"]["gflop_per_step"] / results["plain"]["gflop_per_step"],
    }
    save(f"gradient_caching-{arguments.size}-{device.type}", report, arguments.out)
    for name, result in results.items():
        print(f"{name:8}{result['step_seconds']:8.2f} s{result['gflop_per_step']:10.0f} GFLOP a step")
    print(f"cached / plain: {ratio:.3f} in time, {report['cached_over_plain_flop']:.3f} in FLOPs")


if __name__ == "__main__":
    main()
