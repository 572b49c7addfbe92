"""
A GPU computes what a CPU does, in fp32, in bf16 and compiled; and a step never waits for it.

    pytest -m gpu --durations=0 --junitxml=gpu.xml -o junit_family=xunit1    # the file holds the measured distances
    TEST_GPU_DEVICE=cpu pytest -m gpu                                        # tries the tests themselves on a CPU
"""

import contextlib
import json
import math
import os
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from testing_utils import free_port, inputs, tiny_model
from torch.utils._pytree import tree_map

from modeling_can import CANForPreTraining, CANModel
from modeling_can.averages import MetricAverage
from modeling_can.optimization import NonFiniteGuard, learning_rate, parameter_groups
from modeling_can.pretraining.checkpoints import Checkpoints
from modeling_can.pretraining.compiling import compile_model
from modeling_can.pretraining.gradient_caching import cached_backward
from modeling_can.pretraining.step import TrainStep, step_metrics


DEVICE = torch.device(os.environ.get("TEST_GPU_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
NO_GPU = ON_GPU and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a GPU")]
# Heads of 64, for the fast attention kernels. All tests share these sizes and the batch: what one has compiled, the
# next one finds in the compiler's cache.
SIZES = dict(hidden_size=128, num_attention_heads=2, intermediate_size=256, image_size=64, patch_size=16,
             decoder_hidden_size=64, decoder_num_attention_heads=1, decoder_intermediate_size=128,
             projection_size=32)  # fmt: skip
BATCH = 4
LOSSES = ("loss", "contrastive_loss", "reconstruction_loss", "denoising_loss")

# Relative distances that are allowed, several times what rounding explains.
# fp32 rounds by 2^-24 = 6e-8, and sums of some hundred terms are taken in another order: about 1e-6. The one larger
# step is the sine of the noise level's angles, up to 1,000, of which fp32 knows the last 6e-5.
FP32 = {"losses": 1e-5, "image_embeds": 1e-5, "gradient": 1e-5, "parameter": 2e-4}
# bf16 rounds by 2^-8 = 4e-3 what goes into and comes out of some 20 products in a row: independent errors of
# 2^-8 / sqrt(3) add up to sqrt(20) * 2.3e-3 = 1e-2. The losses are means, in which they cancel. InfoNCE divides errors
# of the similarities by its temperature of 0.1, and the ReLUs of its head switch where the sign is in doubt: its
# gradient is 10 % off. So the tests in bf16 weigh it with 1e-6, all but one, which allows the gradient 30 %.
BF16 = {"losses": 1e-2, "image_embeds": 3e-2, "gradient": 3e-2, "parameter": 1e-1}
ALLOWED = {torch.float32: FP32, torch.bfloat16: BF16}
UNCONTRASTED = {"contrastive_loss_weight": 1e-6}


@pytest.fixture(autouse=True)
def plain_fp32():
    """Products of fp32 in fp32, not in TF32; and no compiled code of the test before."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


def model_on(device, dtype=torch.float32, **changes) -> CANForPreTraining:
    """The same weights each time."""
    return tiny_model(**SIZES, **changes).to(device, dtype).train()


def batch_on(device, config, dtype=torch.float32, **options) -> dict:
    """Views and everything that is drawn: the same numbers on every device."""
    return {name: x.to(device, dtype) for name, x in inputs(config, **{"batch_size": BATCH, **options}).items()}


def forward_backward(model, batch, dtype=torch.float32) -> dict:
    """Losses, embeddings and gradients, as fp64 on the CPU."""
    model.zero_grad()
    with torch.autocast(batch["pixel_values"].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    return found(model, output)


def found(model, terms) -> dict:
    return {
        "losses": torch.stack([terms[name].detach().double() for name in LOSSES]).cpu(),
        "image_embeds": terms["image_embeds"].detach().double().cpu(),
        "gradients": {name: p.grad.double().cpu() for name, p in model.named_parameters()},
    }


def distances(result, reference) -> dict[str, float]:
    """
    Largest of the four losses, of the embeddings and of the whole gradient, relative to their size; `parameter`: the
    largest of one parameter's gradient, relative to its own or, where that is smaller, to 1 % of the whole gradient.
    (That of the keys' bias is zero: softmax does not see it.)
    """
    ours, theirs = result["gradients"], reference["gradients"]
    assert ours.keys() == theirs.keys()
    whole = math.hypot(*(x.norm().item() for x in theirs.values()))
    apart = {name: (ours[name] - x).norm().item() for name, x in theirs.items()}
    return {
        "losses": ((result["losses"] - reference["losses"]).abs() / reference["losses"]).max().item(),
        "image_embeds": (result["image_embeds"] - reference["image_embeds"]).norm(dim=-1).max().item(),
        "gradient": math.hypot(*apart.values()) / whole,
        "parameter": max(apart[name] / max(x.norm().item(), 0.01 * whole) for name, x in theirs.items()),
    }


@pytest.fixture
def check(record_property):
    """Fails where a distance is too large (or NaN), with all of them in the message and in the report."""

    def check(result, reference, allowed):
        apart = distances(result, reference)
        for name, value in apart.items():
            record_property(name, f"{value:.2g} of {allowed[name]:g}")
        assert all(value <= allowed[name] for name, value in apart.items()), f"{apart}, allowed {allowed}"

    return check


@contextlib.contextmanager
def steady():
    """What makes the CPU wait for the GPU raises an error, whose traceback names the line; compiling anew does too."""
    with torch.compiler.set_stance("fail_on_recompile"):
        if not ON_GPU:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- Losses and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_fp32_is_that_of_the_cpu(check, reference):
    ours, cpu = model_on(DEVICE), model_on("cpu", reference)
    result = forward_backward(ours, batch_on(DEVICE, ours.config))
    check(result, forward_backward(cpu, batch_on("cpu", cpu.config, reference)), FP32)


@pytest.mark.parametrize("changes, allowed", [
    (UNCONTRASTED, BF16),
    ({}, {**BF16, "gradient": 0.3, "parameter": 0.5}),
], ids=["A + N", "C + A + N"])  # fmt: skip
def test_bf16_is_near_fp64_on_the_cpu(check, changes, allowed):
    ours, cpu = model_on(DEVICE, **changes), model_on("cpu", torch.float64, **changes)
    result = forward_backward(ours, batch_on(DEVICE, ours.config), torch.bfloat16)
    check(result, forward_backward(cpu, batch_on("cpu", cpu.config, torch.float64)), allowed)


@pytest.mark.parametrize("dtype", ALLOWED, ids=["fp32", "bf16"])
def test_the_same_seed_draws_the_same_noise_and_masks(dtype):
    model = model_on(DEVICE)
    pixels = batch_on(DEVICE, model.config)["pixel_values"]

    def losses(seed):
        torch.manual_seed(seed)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
            output = model(pixels)
        return [output[name].item() for name in LOSSES]

    first = losses(3)
    assert losses(3) == first and losses(4) != first  # exactly: no kernel of the forward pass adds in a random order


# --- Augmentation ----------------------------------------------------------------------------------------------------


def augmentation():
    """Every step, each often."""
    from modeling_can.data.augmentations import Augmentation

    return Augmentation(blur_kernel_size=7, grayscale_probability=0.3, solarize_probability=0.3)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_augmentation_is_that_of_the_cpu(compiled, record_property):
    """Some ten steps in fp32 on pixels up to 1, divided by a std of 0.22: about 1e-6. A level of 8 bits is 2e-2."""
    torch.manual_seed(0)
    cpu, ours = augmentation(), augmentation().to(DEVICE)
    views, drawn = torch.randint(256, (BATCH, 2, 3, 64, 64), dtype=torch.uint8), cpu.draw(2 * BATCH, "cpu")
    views[..., :32, :] = views[..., :1, :32, :]  # half of each image is gray
    drawn["jitter"][:6], drawn["grayscale"][:3] = True, False
    if compiled:
        ours.compile_transform()
    result = ours.transform(views.to(DEVICE), tree_map(lambda tensor: tensor.to(DEVICE), drawn)).cpu()
    difference = (result - cpu.transform(views, drawn)).abs().max().item()
    record_property("difference", difference)
    assert difference < (1e-4 if compiled else 1e-5)  # the compiler divides in a faster way


def test_the_augmentation_draws_on_the_device_what_it_should():
    ours, number = augmentation().to(DEVICE), 10_000
    torch.manual_seed(5)
    drawn = ours.draw(number, DEVICE)
    torch.manual_seed(5)
    again = ours.draw(number, DEVICE)
    assert all(x.device.type == DEVICE.type and torch.equal(x, again[name]) for name, x in drawn.items())
    drawn = {name: x.flatten().cpu() for name, x in drawn.items()}
    for name, probability in {"flip": 0.5, "jitter": 0.8, "grayscale": 0.3, "solarize": 0.3}.items():
        assert drawn[name].float().mean().item() == pytest.approx(probability, abs=0.025), name  # five sigma
    blurred = drawn["sigma"][drawn["sigma"] > 0]
    assert len(blurred) / number == pytest.approx(0.5, abs=0.025)
    ranges = {**dict.fromkeys(("brightness", "contrast", "saturation"), (0.6, 1.4)), "hue": (-0.1, 0.1)}
    for name, (low, high) in {**ranges, "sigma": (0.1, 2.0)}.items():
        numbers = blurred if name == "sigma" else drawn[name]
        assert low <= numbers.min() < low + 0.01 * (high - low), name
        assert high >= numbers.max() > high - 0.01 * (high - low), name


# --- A whole step ----------------------------------------------------------------------------------------------------


def test_a_non_finite_gradient_leaves_the_weights_alone():
    model = model_on(DEVICE)
    batch = batch_on(DEVICE, model.config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, fused=True)
    guard = NonFiniteGuard(optimizer)
    for step in range(2):
        if step == 1:
            before = [x.clone() for p, state in optimizer.state.items() for x in (p.detach(), *state.values())]
            batch["pixel_values"][0, 0, 0, 0, 0] = torch.nan
        output = model(**batch)
        output.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        guard.check(step, norm, {name: output[name] for name in LOSSES[1:]}, ["a.jpg"])
        optimizer.step()
        optimizer.zero_grad()
    after = [x for p, state in optimizer.state.items() for x in (p.detach(), *state.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    (sentence,) = guard.report()
    assert sentence.startswith("the gradient of step 1 was not finite") and "a.jpg" in sentence


@pytest.mark.parametrize("how, caching", [("eager", False), ("eager", True), ("blocks", False), ("blocks", True)])
def test_a_step_never_waits_for_the_device(how, caching):
    """The trainer's step, from uint8 views in pinned memory to the averages of the log."""
    model, augment = model_on(DEVICE), augmentation().to(DEVICE)
    if how != "eager":
        compile_model(model, how)
        augment.compile_transform()
    accelerator = Accelerator(cpu=not ON_GPU, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True)
    train_step = TrainStep(
        model=model,
        optimizer=accelerator.prepare(optimizer),
        accelerator=accelerator,
        config=model.config,
        learning_rate=partial(learning_rate, max_steps=10, warmup_steps=2, peak=1e-3),
        caching=caching,
        max_grad_norm=1.0,
    )
    average = MetricAverage(lambda tensor: tensor)
    views = torch.randint(256, (2 if caching else 1, BATCH, 2, 3, 64, 64), dtype=torch.uint8)
    views = views.pin_memory() if ON_GPU else views

    def make_inputs(part):
        return {"pixel_values": augment(part)}

    def update(step):
        output = train_step(step, [partial(make_inputs, part.to(DEVICE, non_blocking=True)) for part in views], ["a"])
        average.update(step_metrics(output.terms, model.config, output.grad_norm), output.finite)

    for step in range(5):
        with contextlib.nullcontext() if step < 2 else steady():  # compiles, allocates
            update(step)
    averages = average.compute()
    assert train_step.guard.report() == [] and {*LOSSES, "grad_norm", "embedding_spread"} == averages.keys()
    assert all(map(math.isfinite, averages.values()))


# --- Runs and their files --------------------------------------------------------------------------------------------


def run(folder, *options) -> tuple[list[dict], dict]:
    """The lines of the log of a run of six steps, and its weights."""
    from accelerate.state import AcceleratorState

    import run_pretraining

    AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the precision of the run before
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    run_pretraining.main([*sizes, "--num_hidden_layers=2", "--decoder_num_hidden_layers=2", "--max_steps=6",
                          f"--per_device_train_batch_size={BATCH}", "--base_learning_rate=0.2", "--save_steps=3",
                          "--logging_steps=1", "--dataloader_num_workers=0", "--probe_dataset_name=none",
                          "--log_with=none", f"--output_dir={folder}", *options])  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "model.safetensors")


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """
    Weights, optimizer, data and random numbers are restored exactly. What follows may differ by rounding on a GPU,
    where the backward pass of attention may add its parts in any order.
    """
    plain = ["--mixed_precision=no", "--torch_compile=false", "--tf32=false"]
    lines, weights = run(tmp_path / "whole", *plain)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-3"
    resumed_lines, resumed_weights = run(tmp_path / "resumed", *plain, f"--resume_from_checkpoint={checkpoint}")
    assert [line["step"] for line in resumed_lines] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, resumed in zip(lines, resumed_lines, strict=True):
        for name in LOSSES:
            assert resumed[name] == pytest.approx(line[name], rel=1e-6), (name, line["step"])
    for name, weight in weights.items():
        if not name.endswith("k_proj.bias"):  # its gradient is zero, and AdamW follows its rounding errors
            torch.testing.assert_close(resumed_weights[name], weight, rtol=0, atol=1e-4)  # a step is up to 3e-3
    model, shared, own = Checkpoints.load(checkpoint)  # as a machine without a GPU reads it
    moments = [x for state in shared["optimizer"]["state"].values() for x in state.values()]
    assert all(x.device.type == "cpu" for x in (*model.values(), *moments))
    assert not ON_GPU or own[0]["rng"]["cuda"] is not None


def test_a_run_in_the_default_precision_learns(tmp_path):
    """bf16 and compiled where the device is a GPU."""
    lines, weights = run(tmp_path, "--max_steps=30", "--save_steps=99", "--tf32=true")
    losses = [line["loss"] for line in lines]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_batch_size_auto_is_one_that_fits(tmp_path):
    lines, _ = run(tmp_path, "--per_device_train_batch_size=auto", "--max_steps=2", "--save_steps=99")
    results = json.loads((tmp_path / "results.json").read_text())
    size = results["global_batch_size"]
    assert len(lines) == 2 and size == 2 ** int(math.log2(size)) <= 1024
    assert f"per_device_train_batch_size: {size}" in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.skipif(not ON_GPU, reason="a CPU's memory has no such limit")
def test_what_does_not_fit_is_no_error():
    from modeling_can.pretraining import batch_size
    from modeling_can.pretraining.recipe import make_recipe

    recipe, accelerator = make_recipe("can-vit-base-patch16-224", {}), Accelerator()
    assert batch_size._fits(recipe, accelerator, 8) and not batch_size._fits(recipe, accelerator, 100_000)


def test_saved_on_the_device_and_loaded_on_a_cpu_the_features_are_the_same(tmp_path):
    model = model_on(DEVICE).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # not what a fresh model has
        features = model.can(pixels.to(DEVICE)).pooler_output.cpu()
        model.save_pretrained(tmp_path)
        loaded = CANModel.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(pixels).pooler_output, features, rtol=1e-5, atol=1e-5)


def test_sharded_it_trains_alike_and_its_state_is_the_plain_one():
    from torch.distributed.fsdp import fully_shard

    from modeling_can.pretraining.checkpoints import whole_state

    def update(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        return [output[name].item() for name in LOSSES]

    plain, sharded = model_on(DEVICE), model_on(DEVICE)
    batch = batch_on(DEVICE, plain.config)
    losses = update(plain, batch)
    address, backend = f"tcp://127.0.0.1:{free_port()}", "nccl" if ON_GPU else "gloo"
    torch.distributed.init_process_group(backend, init_method=address, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh(DEVICE.type, (1,))
        for part in (*sharded.can.layers, *sharded.decoder.layers, sharded):
            fully_shard(part, mesh=mesh)
        assert update(sharded, batch) == pytest.approx(losses, rel=1e-6)
        state, _ = whole_state(sharded)
    finally:
        torch.distributed.destroy_process_group()
    assert state.keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(state[name], weight.cpu(), rtol=1e-6, atol=1e-6)


# --- Compiled, last: it takes the longest ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eager", "blocks"])
def test_gradient_caching_is_one_large_batch(check, how):
    model = model_on(DEVICE)
    batch = batch_on(DEVICE, model.config, batch_size=2 * BATCH)
    whole = forward_backward(model, batch)
    model.zero_grad()
    if how != "eager":
        compile_model(model, how)
    terms = cached_backward(
        model,
        [lambda half=half: {name: x.chunk(2)[half] for name, x in batch.items()} for half in range(2)],
        backward=torch.Tensor.backward,
        no_sync=contextlib.nullcontext,
        config=model.config,
    )
    terms["loss"] = sum(getattr(model.config, f"{name}_weight") * terms[name] for name in LOSSES[1:])
    check(found(model, terms), whole, FP32)


@pytest.mark.parametrize("dtype", ALLOWED, ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["blocks", "model"])
def test_compiled_is_eager(check, how, dtype):
    depth = 2 if how == "blocks" else 1  # the whole model is compiled layer by layer
    changes = UNCONTRASTED if dtype == torch.bfloat16 else {}
    model = model_on(DEVICE, num_hidden_layers=depth, decoder_num_hidden_layers=depth, **changes)
    batch = batch_on(DEVICE, model.config)
    eager = forward_backward(model, batch, dtype)
    compile_model(model, how)
    check(forward_backward(model, batch, dtype), eager, ALLOWED[dtype])
