"""Two gloo processes against one process on the joined batch."""

import pytest
import torch
from testing_utils import inputs, run_processes, tiny_model, without_noise

from modeling_can.configuration_can import MAE, SIMCLR


def step(model, batch):
    """Loss and gradients, of the DistributedDataParallel wrapper or the model itself."""
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {
        name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }


OBJECTIVES = {"CAN": {}, "SimCLR": SIMCLR, "MAE": MAE, "CAN, three views": {}}


def batch_of(objective: str, config) -> dict:
    batch = inputs(config, batch_size=6, num_views=3 if "three" in objective else 2)
    return batch if config.noise_std_max else without_noise(batch)


def half_a_step(rank, world_size):
    """What one of the processes gets from its share of the batch, for each objective."""
    answers = {}
    for objective, changes in OBJECTIVES.items():
        model = tiny_model(**changes)
        model.freeze_unused_parameters()
        batch = batch_of(objective, model.config)
        share = {name: tensor.chunk(world_size)[rank] for name, tensor in batch.items()}
        loss, gradients = step(torch.nn.parallel.DistributedDataParallel(model), share)
        torch.distributed.all_reduce(loss)
        answers[objective] = (loss / world_size).item(), {name: g.numpy() for name, g in gradients.items()}
    return answers


@pytest.fixture(scope="module")
def two_processes():
    return run_processes(half_a_step, 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_give_the_loss_and_gradient_of_one(two_processes, objective):
    model = tiny_model(**OBJECTIVES[objective])
    model.freeze_unused_parameters()
    loss, gradients = step(model, batch_of(objective, model.config))
    for answers in two_processes:
        other_loss, other_gradients = answers[objective]
        assert other_loss == pytest.approx(loss.item(), abs=1e-5)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(torch.from_numpy(other_gradients[name]), gradient, atol=1e-5, rtol=0)
