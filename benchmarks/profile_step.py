"""
Where the time of an optimiser step goes: the share of each kind of operation, by torch's profiler.

    python benchmarks/profile_step.py                        # ViT-B/16 at 224, batch 4, on CPU
    python benchmarks/profile_step.py --size large --batch_size 64 --num_steps 10      # a GPU

Times are those of the operations themselves, without what they call; of their kernels on a GPU. Python's own time
between them is no part of it. Writes profile_step-SIZE-DEVICE.json beside this file.
"""

import argparse
import re

import torch
from evidence import facts, save
from torch.profiler import ProfilerActivity, profile
from train_step import preset, stepper

from modeling_can import CANForPreTraining


KINDS = {  # the first that fits; names as torch's, without aten::
    "matrix products": "mm|addmm|bmm|baddbmm|linear.*",
    "attention": r"_(scaled_dot_product|flash_attention|efficient_attention|cudnn_attention).*",
    "LayerNorm": "native_layer_norm.*",
    "GELU": "gelu.*",
    "AdamW": "_fused_adamw_|_foreach_.*",
    "additions and sums": "add_?|sum|zero_",
    "copies, gathers, joins": "copy_|fill_|clone|cat|gather|scatter.*|_?index.*",
    "everything else": ".*",
}


def kind_of(operation: str) -> str:
    return next(kind for kind, names in KINDS.items() if re.fullmatch(names, operation.removeprefix("aten::")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=["tiny", "small", "base", "large", "huge"])
    parser.add_argument("--batch_size", type=int, default=4, help="images, each in two views")
    parser.add_argument("--num_steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    provenance = facts(seed=0, device=device)
    config = preset(arguments.size)
    torch.manual_seed(0)
    model = CANForPreTraining(config)
    step = stepper(model, torch.randn(arguments.batch_size, 2, 3, *config.image_shape, device=device), device)
    for _ in range(2):
        step()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        for _ in range(arguments.num_steps):
            step()
    operations = {}
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # kernels count with the operation that launched them
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            operations[event.key] = time / 1e6 / arguments.num_steps
    total = sum(operations.values())
    shares = dict.fromkeys(KINDS, 0.0)
    for name, seconds in operations.items():
        shares[kind_of(name)] += seconds / total
    largest = sorted(operations, key=operations.get, reverse=True)[:25]
    report = {
        **provenance, "size": arguments.size, "batch_size": arguments.batch_size,
        "num_steps": arguments.num_steps, "step_seconds": total, "shares": shares,
        "largest": {name: {"kind": kind_of(name), "share": operations[name] / total} for name in largest},
    }  # fmt: skip
    save(f"profile_step-{arguments.size}-{device.type}", report)
    for name, share in shares.items():
        print(f"{name:26}{share:8.1%}")
    for name, entry in report["largest"].items():
        print(f"  {name:50}{entry['share']:8.2%}  {entry['kind']}")


if __name__ == "__main__":
    main()
