"""Gradient accumulation with the loss and the gradient of the whole batch, alone and over processes."""

import contextlib

import pytest
import torch
from testing_utils import inputs, run_processes, tiny_config, tiny_model
from torch.nn.parallel import DistributedDataParallel

from modeling_can.pretraining.gradient_caching import accumulated_backward, cached_backward


def step(model, parts: list[dict], caching: bool, no_sync=contextlib.nullcontext):
    arguments = model, [lambda part=part: part for part in parts], lambda loss: loss.backward(), no_sync
    if not caching:
        return accumulated_backward(*arguments)
    return cached_backward(*arguments, tiny_config())


@pytest.fixture(scope="module")
def whole():
    """The gradients and losses of a batch of 8 in one piece."""
    model = tiny_model()
    outputs = model(**inputs(model.config, 8))
    outputs.loss.backward()
    return gradients(model), outputs


@pytest.mark.parametrize("num_parts", [2, 4, 8])  # the last with one image each: no negatives in a micro-batch
def test_caching_gives_the_loss_and_gradient_of_the_whole_batch(whole, num_parts):
    model = tiny_model()
    results = step(model, cut(inputs(model.config, 8), num_parts), caching=True)
    assert_same(gradients(model), whole[0])
    assert len(results) == 4
    for name, value in results.items():
        torch.testing.assert_close(value, whole[1][name].detach())


def test_caching_is_exact_with_more_views_than_two():
    model, other = tiny_model(), tiny_model()
    batch = inputs(model.config, 6, num_views=3)
    outputs = model(**batch)
    outputs.loss.backward()
    results = step(other, cut(batch, 3), caching=True)
    assert_same(gradients(other), gradients(model))
    torch.testing.assert_close(results["contrastive_loss"], outputs.contrastive_loss.detach())


def test_plain_accumulation_is_exact_for_all_but_the_contrastive_term(whole):
    model = tiny_model()
    results = step(model, cut(inputs(model.config, 8), 2), caching=False)
    for name in ("reconstruction_loss", "denoising_loss"):
        torch.testing.assert_close(results[name], whole[1][name].detach())
    assert results["contrastive_loss"] < whole[1].contrastive_loss - 0.3  # about ln 7, against ln 15


def test_the_second_pass_repeats_the_random_numbers_of_the_first():
    model = tiny_model(drop_path_rate=0.5, num_hidden_layers=4).train()
    pixels = torch.randn(8, 2, 3, 32, 48)
    calls = []
    forward = model.projection_head.forward
    model.projection_head.forward = lambda pooled: calls.append(pooled.detach().clone()) or forward(pooled)
    step(model, [{"pixel_values": part} for part in pixels.split(4)], caching=True)
    assert len(calls) == 4
    torch.testing.assert_close(calls[0], calls[2])
    torch.testing.assert_close(calls[1], calls[3])
    assert not torch.allclose(calls[0], calls[1])


def test_gradient_checkpointing_changes_nothing_of_it(whole):
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model, cut(inputs(model.config, 8), 2), caching=True)
    assert_same(gradients(model), whole[0])


def test_under_autocast_it_is_the_whole_batch_under_autocast(whole):
    """To the precision of bf16, whose sums differ with the size of a batch; fp32 is further away."""
    results = {}
    for num_parts in (1, 2):
        model = tiny_model()
        with torch.autocast("cpu", torch.bfloat16):
            step(model, cut(inputs(model.config, 8), num_parts), caching=num_parts > 1)
        results[num_parts] = torch.cat([g.flatten() for g in gradients(model).values()])
    exact = torch.cat([g.flatten() for g in whole[0].values()])
    assert torch.cosine_similarity(results[1], results[2], dim=0) > 0.9999  # plain accumulation: 0.984
    assert (results[1] - results[2]).norm() < (results[1] - exact).norm()


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, weights aside."""

    alive = peak = 0

    def __init__(self, tensor, weights):
        self.tensor = tensor
        self.size = 0 if tensor.untyped_storage().data_ptr() in weights else tensor.nbytes
        Kept.alive += self.size
        Kept.peak = max(Kept.peak, Kept.alive)

    def __del__(self):
        Kept.alive -= self.size


def peak_of_a_step(parts: list[dict]) -> int:
    model = tiny_model()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    Kept.alive = Kept.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(tensor, weights), lambda kept: kept.tensor):
        step(model, parts, caching=len(parts) > 1)
    assert Kept.alive == 0
    return Kept.peak


def test_caching_keeps_the_activations_of_one_micro_batch():
    batch = inputs(tiny_config(), 8)
    whole, part = peak_of_a_step([batch]), peak_of_a_step(cut(batch, 4)[:1])
    assert peak_of_a_step(cut(batch, 4)) < 1.02 * part < 0.3 * whole


def _process(rank, world_size, caching):
    model = DistributedDataParallel(tiny_model())
    part = cut(inputs(model.module.config, 8), world_size)[rank]
    step(model, cut(part, 2), caching, model.no_sync)
    return {name: gradient.numpy() for name, gradient in gradients(model.module).items()}


@pytest.mark.slow
def test_two_processes_that_accumulate_twice_are_one_process(whole):
    for result in run_processes(_process, 2, True):
        assert_same({name: torch.from_numpy(gradient) for name, gradient in result.items()}, whole[0])


def test_plain_accumulation_gives_the_gradient_of_the_whole_batch():
    """Of what are means over images."""
    whole, parts = (tiny_model(contrastive_loss_weight=0) for _ in range(2))
    batch = inputs(whole.config, 8)
    whole(**batch).loss.backward()
    step(parts, cut(batch, 4), caching=False)
    assert_same(gradients(parts), gradients(whole))


def accumulate_in_part(rank, world_size):
    model = DistributedDataParallel(tiny_model(contrastive_loss_weight=0), find_unused_parameters=True)
    step(model, cut(cut(inputs(model.module.config, 8), world_size)[rank], 2), False, model.no_sync)
    return {name: gradient.numpy() for name, gradient in gradients(model.module).items()}


@pytest.mark.slow
def test_two_processes_that_accumulate_plainly_are_one_process():
    whole = tiny_model(contrastive_loss_weight=0)
    whole(**inputs(whole.config, 8)).loss.backward()
    for result in run_processes(accumulate_in_part, 2):
        assert_same({name: torch.from_numpy(gradient) for name, gradient in result.items()}, gradients(whole))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left: dict, right: dict, tolerance=1e-5):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=tolerance, msg=name)


def cut(batch: dict, num_parts: int) -> list[dict]:
    size = len(batch["pixel_values"]) // num_parts
    return [{name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(num_parts)]
