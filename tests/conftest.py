import os
import socket
import traceback
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
# Read when torch is imported: small models are no faster with more, and two processes give the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from modeling_can import CANConfig, CANForPreTraining  # noqa: E402
from modeling_can.configuration_can import MAE, SIMCLR  # noqa: E402, F401  for the tests


KEPT = Path(__file__).parent.parent / "model_cards" / "can-toy-patch4-32-cifar10"
TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=(32, 48),
    patch_size=8,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
    projection_size=8,
)


def tiny_config(**changes) -> CANConfig:
    return CANConfig(**{**TINY, **changes})


def tiny_model(**changes) -> CANForPreTraining:
    torch.manual_seed(0)
    return CANForPreTraining(tiny_config(**changes)).eval()


def inputs(config: CANConfig, batch_size: int = 4, num_views: int = 2, seed: int = 1) -> dict:
    """Everything random that a forward pass takes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (batch_size, num_views, config.num_channels, *config.image_shape)
    return {
        "pixel_values": torch.randn(pixels, generator=generator),
        "pixel_noise": torch.randn(pixels, generator=generator),
        "noise_level": torch.rand(pixels[:2], generator=generator) * config.noise_std_max,
        "masking_scores": torch.rand(*pixels[:2], config.num_patches, generator=generator),
    }


def without_noise(batch: dict) -> dict:
    return {name: batch[name] for name in ("pixel_values", "masking_scores")}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _process(rank, world_size, port, function, arguments, queue):
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
        )
        queue.put((rank, function(rank, world_size, *arguments), None))
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def run_processes():
    """Runs `function(rank, world_size, *arguments)` in gloo processes; returns their results in the order of rank."""

    def run(function, world_size, *arguments):
        context = mp.get_context("spawn")
        queue, port = context.SimpleQueue(), free_port()
        processes = [
            context.Process(target=_process, args=(rank, world_size, port, function, arguments, queue))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            answers = sorted((queue.get() for _ in processes), key=lambda answer: answer[0])
        finally:
            for process in processes:
                process.join(timeout=60)
                if process.is_alive():
                    process.kill()
        for rank, _, error in answers:
            assert error is None, f"process {rank}:\n{error}"
        return [result for _, result, _ in answers]

    return run
