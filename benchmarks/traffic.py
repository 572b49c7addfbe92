"""
What does one product for q, k and v save in memory traffic? Counted on a CPU for an eager step in bf16 autocast.

    python benchmarks/traffic.py

Every operation of the forward and backward pass counts the bytes that it reads and writes, views excepted. Batches of
2 and 6 images give what an image costs and what a step costs, and so the traffic at --batch_size. The CPU's attention
and casts stand in for those of a GPU. Writes traffic.json.
"""

import argparse

import torch
from records import add_out, facts, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import preset

from modeling_can import CANForPreTraining, modeling_can


class Traffic(TorchDispatchMode):
    num_bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view and operation.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.empty):
            tensors = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
            self.num_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def gigabytes(model, batch_size: int) -> float:
    pixels = torch.randn(batch_size, 2, 3, *model.config.image_shape)
    with Traffic() as traffic, torch.autocast("cpu", torch.bfloat16):
        model(pixels).loss.backward()
    model.zero_grad()
    return traffic.num_bytes / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch_size", type=int, default=128)
    add_out(parser)
    arguments = parser.parse_args()
    report = {**facts(seed=0), "size": arguments.size, "batch_size": arguments.batch_size}
    torch.manual_seed(0)
    model, is_plain_linear = CANForPreTraining(preset(arguments.size)), modeling_can.is_plain_linear
    for name, plain in (("one product", is_plain_linear), ("three products", lambda layer: False)):
        modeling_can.is_plain_linear = plain
        few, more = gigabytes(model, 2), gigabytes(model, 6)
        image = (more - few) / 4
        report[name] = {"gb_per_image": image, "gb_per_step": few - 2 * image + arguments.batch_size * image}
        print(f"{name}: {report[name]['gb_per_step']:.1f} GB a step")
    save("traffic", report, arguments.out)


if __name__ == "__main__":
    main()
