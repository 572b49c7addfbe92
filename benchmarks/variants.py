"""
What the choices about a step cost: one optimizer step under each of them, as ratios to the first.

    python benchmarks/variants.py --study choices          # compiled, attention, checkpointing, other objectives
    python benchmarks/variants.py --study tried            # what was tried for speed and not taken
    python benchmarks/variants.py --study batch            # growth with the batch
    python benchmarks/variants.py --study image_size       # growth with the image
    python benchmarks/variants.py --study embedding        # forward passes of CANModel and of transformers' ViTModel
    python benchmarks/variants.py --study largest          # the largest batch: on a GPU, or under `ulimit -v`
    python benchmarks/variants.py --study choices --size large --batch_size 128 --rounds 20      # a GPU

Every variant lives in a process of its own, which gives its peak memory, and steps when its turn comes: the rounds are
interleaved and nothing else runs. Medians over the rounds; ratios are medians of the ratios within a round. The order
in which the processes start makes a few percent, so `embedding` has half of its rounds in the reverse order. What is
predicted for a thing tried is what its matrix products would save or cost, timed alone, if nothing else changed. The
largest batch, in multiples of --batch_size, is that whose second step still has the memory, alone on the machine. Peak
memory includes AdamW's states; on a CPU it is what the process held beyond what it held before the model was built.
Writes variants-STUDY-SIZE-DEVICE.json.
"""

import argparse
import resource
import statistics
from collections.abc import Callable
from functools import partial
from multiprocessing import active_children, get_context

import torch
from records import add_out, facts, save
from straightforward import StraightforwardCAN, StraightforwardSimCLR
from tqdm import tqdm
from train_step import SIZES, RecordProducts, preset, product_runner, stepper, timed
from transformers import ViTConfig, ViTModel

from modeling_can import CANConfig, CANForPreTraining, CANModel
from modeling_can.configuration_can import MAE, SIMCLR
from modeling_can.modeling_can import CANAttention, CANModelOutput
from modeling_can.pretraining.compiling import compile_model
from modeling_can.pretraining.cost import training_flops


STUDIES = ("choices", "tried", "batch", "image_size", "embedding", "largest")


def variants(study: str, batch_size: int, on_gpu: bool) -> dict[str, dict]:
    """Name -> what differs: fields of the config; batch_size, compile, checkpointing, attention, model."""
    if study == "choices":
        flash = {"flash attention 2": {"attention": "flash_attention_2"}} if on_gpu else {}
        return {
            "CAN": {},
            "compiled": {"compile": True},
            "eager attention": {"attention": "eager"},
            **flash,
            "gradient checkpointing": {"checkpointing": True},
            "SimCLR, by weights": SIMCLR,
            "SimCLR, straightforward": {**SIMCLR, "model": "simclr"},
            "MAE, by weights": MAE,
        }
    if study == "tried":
        return {
            "CAN": {},
            "three products for q, k and v": {"patch": "three_products"},
            "one pass for each view": {"patch": "two_passes"},
            "AdamW, foreach instead of fused": {"optimizer": {"foreach": True}},
        }
    if study == "batch":
        return {f"{factor * batch_size} images": {"batch_size": factor * batch_size} for factor in (1, 2, 4, 8)}
    if study == "image_size":
        return {f"{size} x {size}": {"image_size": size} for size in (160, 224, 320, 448)}
    if study == "largest":
        return {
            "CAN": {},
            "gradient checkpointing": {"checkpointing": True},
            "straightforward CAN": {"model": "straightforward"},
        }
    return {"CANModel": {"model": "encoder"}, "ViTModel": {"model": "vit"}}


def worker(pipe, config, changes: dict, batch_size: int, device: str):
    """Builds the variant, then answers "step" and "products" (a step's alone) with seconds, "memory" with GiB."""
    device = torch.device(device)
    changes = dict(changes)
    batch_size = changes.pop("batch_size", batch_size)
    words = ("compile", "checkpointing", "attention", "model", "patch", "optimizer")
    own = {name: changes.pop(name) for name in words if name in changes}
    config = CANConfig.from_dict({**config.to_dict(), **changes})
    torch.manual_seed(0)
    pixels = torch.randn(batch_size, 2, 3, *config.image_shape, device=device)
    before = memory(device)
    run = inference(own["model"], config, pixels) if own.get("model") in ("encoder", "vit") else None
    if run is None:
        models = {"simclr": StraightforwardSimCLR, "straightforward": StraightforwardCAN}
        model = models.get(own.get("model"), CANForPreTraining)(config)
        if "attention" in own:
            model.set_attn_implementation(own["attention"])
        if own.get("checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if own.get("compile"):  # as the trainer does
            compile_model(model, "blocks")
        if isinstance(model, CANForPreTraining):
            model.freeze_unused_parameters()
        if "patch" in own:
            globals()[own["patch"]](model)
        run = stepper(model, pixels, device, **own.get("optimizer", {}))
    for _ in range(2):
        run()
    pipe.send({"batch_size": batch_size, "gflop_per_image": training_flops(config) / 1e9})
    products = None
    while (word := pipe.recv()) != "end":
        if word == "memory":
            pipe.send(memory(device) - before)
            continue
        if word == "products" and not products:  # only now, as their operands take memory
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
            with autocast, RecordProducts() as recorder:
                model(pixels).loss.backward()
            model.zero_grad()
            torch.cuda.empty_cache()  # the other variants are on the device as well
            products = product_runner(recorder.products, device)
        pipe.send(timed(products if word == "products" else run, device))


def three_products(model):
    for module in model.modules():
        if isinstance(module, CANAttention):
            module.project = partial(project_apart, module)


def project_apart(self, hidden_states):
    return tuple(layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))


def two_passes(model):
    """Encoder and decoder take one half of the images after the other."""
    encode, decode = model.can.forward, model.decoder.forward

    def encode_halves(pixel_values, **kwargs):
        first, second = (encode(half, **kwargs) for half in pixel_values.chunk(2))
        names = ("last_hidden_state", "pooler_output", "mask", "ids_restore")
        return CANModelOutput(**{name: torch.cat([first[name], second[name]]) for name in names})

    def decode_halves(hidden_states, ids_restore, grid_shape, noise_level):
        halves = zip(hidden_states.chunk(2), ids_restore.chunk(2), noise_level.chunk(2), strict=True)
        return torch.cat([decode(hidden, ids, grid_shape, level) for hidden, ids, level in halves])

    model.can.forward, model.decoder.forward = encode_halves, decode_halves


def inference(name: str, config, pixels):
    """A forward pass over both views, as so many images."""
    pixels = pixels.flatten(0, 1)
    if name == "vit":
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
                 "patch_size")  # fmt: skip
        model = ViTModel(ViTConfig(**{field: getattr(config, field) for field in names}), add_pooling_layer=False)
    else:
        model = CANModel(config)
    model = model.to(pixels.device).eval()

    @torch.inference_mode()
    def run():
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            model(pixels)

    return run


def memory(device: torch.device) -> float:
    """GiB, at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="choices", choices=STUDIES)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batch_size", type=int, default=4, help="images, each in two views")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    todo = variants(arguments.study, arguments.batch_size, device.type == "cuda")
    report = {**facts(seed=0, device=device), "study": arguments.study, "size": arguments.size}
    results = {}
    if arguments.study == "largest":
        for name, changes in todo.items():
            results[name] = {"batch_size": largest_batch(partial(fits, changes, arguments), arguments.batch_size)}
            print(f"{name}: {results[name]['batch_size']} images", flush=True)
    else:
        report["rounds"] = arguments.rounds
        parts = [measure(todo, arguments)]
        if arguments.study == "embedding":
            parts.append(measure(dict(reversed(todo.items())), arguments))
        results = summary(parts)
        if next(iter(results), None) != next(iter(todo)):
            raise SystemExit("the first variant failed, to which all are compared")
        for name, r in results.items():
            print(f"{name:26}{r['images_per_second']:10.2f} images/s{r['speed_over_first']:8.3f}"
                  f"{r['peak_memory_gib']:8.2f} GiB")  # fmt: skip
    save(f"variants-{arguments.study}-{arguments.size}-{device.type}", {**report, "results": results}, arguments.out)


def start(changes: dict, batch_size: int, arguments):
    """A worker that has warmed up, and what it says of itself. Raises EOFError if it died of it."""
    context = get_context("forkserver")  # imports once for all: the largest batch takes dozens of processes
    context.set_forkserver_preload(["modeling_can.pretraining.compiling", "modeling_can.pretraining.cost"])
    ours, theirs = context.Pipe()
    what = (theirs, preset(arguments.size), changes, batch_size, arguments.device)
    context.Process(target=worker, args=what, daemon=True).start()
    theirs.close()
    return ours, ours.recv()


def fits(changes: dict, arguments, batch_size: int) -> bool:
    try:
        pipe, _ = start(changes, batch_size, arguments)
        pipe.send("end")
        return True
    except EOFError:
        return False
    finally:
        for process in active_children():  # its memory is free only then
            process.join()


def largest_batch(fits: Callable[[int], bool], first: int) -> int:
    """The largest multiple of `first` that fits, by doubling, then halving what is in between; 0 if none does."""
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
    while high - low > first:
        middle = (low + high) // (2 * first) * first
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure(todo: dict, arguments) -> dict[str, dict]:
    """Name -> what the worker says of itself, and its answers. One that dies, of memory say, is left out."""
    pipes, measured = {}, {}

    def leave_out(name: str):
        print(f"{name}: failed, left out (its message is above)")
        pipes.pop(name, None), measured.pop(name, None)

    def ask(word: str, round_: int = 0):
        for name in list(pipes)[:: -1 if round_ % 2 else 1]:
            try:
                pipes[name].send(word)
                measured[name].setdefault(word, []).append(pipes[name].recv())
            except (EOFError, OSError):
                leave_out(name)

    for name, changes in todo.items():  # one after the other: they warm up alone
        try:
            pipes[name], measured[name] = start(changes, arguments.batch_size, arguments)
        except EOFError:
            leave_out(name)
    for round_ in tqdm(range(arguments.rounds)):
        ask("step", round_)
    ask("memory")
    if arguments.study == "tried":
        for round_ in tqdm(range(arguments.rounds + 1), desc="products alone"):  # the first round warms up
            ask("products", round_)
    for pipe in pipes.values():
        pipe.send("end")
    for process in active_children():
        process.join()
    return measured


def summary(parts: list[dict[str, dict]]) -> dict[str, dict]:
    """Medians over the rounds of all parts, ratios to the first variant of the first part."""
    first, results = next(iter(parts[0]), None), {}
    for name in [name for name in parts[0] if all(name in part for part in parts)]:
        own, base = [part[name] for part in parts], [part[first] for part in parts]
        step_seconds = [second for part in own for second in part["step"]]
        per_image, theirs = (
            [second / part["batch_size"] for part in those for second in part["step"]] for those in (own, base)
        )
        results[name] = {
            "batch_size": own[0]["batch_size"],
            "gflop_per_image": own[0]["gflop_per_image"],
            "step_seconds": statistics.median(step_seconds),
            "images_per_second": 1 / statistics.median(per_image),
            "speed_over_first": statistics.median(f / s for f, s in zip(theirs, per_image, strict=True)),
            "peak_memory_gib": max(part["memory"][0] for part in own),
        }
        if "products" in own[0]:
            pairs = zip(own[0]["products"][1:], base[0]["products"][1:], strict=True)
            more = statistics.median(s - b for s, b in pairs)
            results[name]["predicted_speed_over_first"] = 1 / (1 + more / results[first]["step_seconds"])
    return results


if __name__ == "__main__":
    main()
