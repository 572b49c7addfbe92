"""
Where the time of an optimizer step goes: the fraction of each kind of operation, by torch's profiler.

    python benchmarks/profile_step.py                                   # ViT-B/16 at 224, batch 4, on a CPU
    python benchmarks/profile_step.py --size large --batch_size 64 --num_steps 10 --compiled      # a GPU

On a CPU, times are those of the operators themselves, without what they call. On a GPU they are those of the kernels,
sorted by name, because compiled code has no operators around its kernels; `idle_share` is the fraction of the step (as
timed without the profiler) in which no kernel runs. Writes profile_step-SIZE-DEVICE.json.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from records import add_out, facts, save
from torch.profiler import ProfilerActivity, profile
from train_step import SIZES, preset, stepper, timed

from modeling_can import CANForPreTraining
from modeling_can.pretraining.compiling import compile_model


KINDS = {  # the first that fits; operators' names as torch's, without aten::
    "matrix products": "mm|addmm|bmm|baddbmm|linear.*",
    "attention": r"_(scaled_dot_product|flash_attention|efficient_attention|cudnn_attention).*",
    "LayerNorm": "native_layer_norm.*",
    "GELU": "gelu.*",
    "AdamW": "_fused_adamw_|_foreach_.*",
    "additions and sums": "add_?|sum|zero_",
    "copies, gathers, joins": "copy_|fill_|clone|cat|gather|scatter.*|_?index.*",
    "everything else": ".*",
}
KERNELS = {  # the first that is found in a kernel's name
    "attention": "flash|fmha|sdpa|attention",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitk|triton_(tem|mm)",
    "AdamW": "adam|multi_tensor_apply",
    "compiled, with a sum or LayerNorm": "triton_(red|per|mix)",
    "compiled, element-wise": "triton_",
    "LayerNorm": "layer_?norm|gammabeta",
    "GELU": "gelu",
    "random numbers": "distribution|philox",
    "copies, gathers, joins": "copy|memcpy|memset|catarray|gather|scatter|index|fill",
    "additions and sums": "reduce|add",
    "everything else": "",
}


def kind_of(operation: str) -> str:
    return next(kind for kind, names in KINDS.items() if re.fullmatch(names, operation.removeprefix("aten::")))


def kind_of_kernel(name: str) -> str:
    return next(kind for kind, names in KERNELS.items() if re.search(names, name, re.IGNORECASE))


def operators(profiler) -> dict[str, float]:
    """Name -> seconds, on a CPU."""
    return {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}


def kernels(trace: dict) -> tuple[dict[str, float], float, int]:
    """Of a Chrome trace: name -> seconds; seconds in which at least one kernel ran; number of kernels."""
    events = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    seconds, busy, until = defaultdict(float), 0.0, 0.0
    for event in sorted(events, key=lambda event: event["ts"]):  # microseconds
        begin, end = event["ts"], event["ts"] + event["dur"]
        seconds[event["name"]] += event["dur"] / 1e6
        busy += max(0.0, end - max(begin, until)) / 1e6
        until = max(until, end)
    return seconds, busy, len(events)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--batch_size", type=int, default=4, help="images, each in two views")
    parser.add_argument("--num_steps", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    arguments = parser.parse_args()
    device, num_steps = torch.device(arguments.device), arguments.num_steps
    provenance = facts(seed=0, device=device)
    config = preset(arguments.size)
    torch.manual_seed(0)
    model = CANForPreTraining(config)
    if arguments.compiled:
        compile_model(model, "blocks")
    step = stepper(model, torch.randn(arguments.batch_size, 2, 3, *config.image_shape, device=device), device)
    for _ in range(2):
        step()
    report = {
        **provenance, "size": arguments.size, "batch_size": arguments.batch_size, "num_steps": num_steps,
        "compiled": arguments.compiled,
    }  # fmt: skip
    if device.type == "cuda":
        step_seconds = timed(step, device, num_steps)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            timed(step, device, num_steps)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            seconds, busy, number = kernels(json.loads(path.read_text()))
        report |= {
            "step_seconds": step_seconds,
            "kernel_seconds": sum(seconds.values()) / num_steps,
            "kernels_per_step": number / num_steps,
            "idle_share": 1 - busy / num_steps / step_seconds,
        }
        kinds, kind = KERNELS, kind_of_kernel
    else:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            timed(step, device, num_steps)
        seconds = operators(profiler)
        report["step_seconds"] = sum(seconds.values()) / num_steps
        kinds, kind = KINDS, kind_of
    total = sum(seconds.values())
    shares = dict.fromkeys(kinds, 0.0)
    for name, own in seconds.items():
        shares[kind(name)] += own / total
    largest = sorted(seconds, key=seconds.get, reverse=True)[:25]
    report["shares"] = shares
    report["largest"] = {name[:200]: {"kind": kind(name), "share": seconds[name] / total} for name in largest}
    save(f"profile_step-{arguments.size}-{device.type}", report, arguments.out)
    print(" ".join(f"{key} {report[key]:.4g}" for key in ("step_seconds", "idle_share") if key in report))
    for name, share in shares.items():
        print(f"{name:36}{share:8.1%}")
    for name, entry in report["largest"].items():
        print(f"  {name[:80]:80}{entry['share']:8.2%}  {entry['kind']}")


if __name__ == "__main__":
    main()
