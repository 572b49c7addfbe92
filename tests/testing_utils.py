"""What tests of several rooms share: tiny models and their inputs, images, streams, short runs, ports."""

import contextlib
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.multiprocessing as mp
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessorPil

from modeling_can import CANConfig, CANForPreTraining
from modeling_can.data import ViewStream


ROOT = Path(__file__).parent.parent
KEPT = ROOT / "model_cards" / "can-toy-patch4-32-cifar10"


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


def run_processes(function, world_size, *arguments) -> list:
    """Runs `function(rank, world_size, *arguments)` in gloo processes; returns their results in the order of rank."""
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


def encoded_image(size=(40, 30), color=(200, 30, 90), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def identity(encoded: bytes, epoch: int) -> np.ndarray:
    """A view maker that tells which image it was given."""
    return np.array([zlib.crc32(encoded)])


def read(stream: ViewStream, count: int, num_workers: int = 0) -> list[int]:
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers)
    return [int(row["views"]) for row in itertools.islice(loader, count)]


def image_file(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


PHOTO = image_file(Image.effect_noise((90, 60), 80).convert("RGB"), "JPEG")


def noise_file(seed, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


OFF = dict(
    flip_probability=0,
    vertical_flip_probability=0,
    quarter_turn_probability=0,
    color_jitter_probability=0,
    grayscale_probability=0,
    blur_probability=0,
    solarize_probability=0,
)


def encoded(color, size=(40, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, tuple(map(int, color))).save(buffer, "PNG")
    return buffer.getvalue()


NAMES = ["red", "green", "blue"]
VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)


def save(folder: Path, model) -> str:
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def options(models, colors, out, *names, **flags) -> list[str]:
    paths = [models[name] for name in names]
    flags = {"dataset_name": colors, "output_dir": out, "feature_cache": Path(out) / "cache", **flags}
    return ["--model_name_or_path", *paths, *(f"--{name}={value}" for name, value in flags.items())]


def launch_evaluation(argv: list[str], num_processes: int) -> dict:
    """The results of `run_eval.py` in processes of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
               "--num_processes", str(num_processes), "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port())]  # fmt: skip
    if num_processes == 1:
        command = [sys.executable]
    answer = subprocess.run(
        [*command, str(ROOT / "run_eval.py"), *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr[-3000:]
    (out,) = [word.split("=")[1] for word in argv if word.startswith("--output_dir")]
    return json.loads((Path(out) / "results.json").read_text())


TOY = ["can-quickstart", "--max_steps", "3", "--per_device_train_batch_size", "8", "--logging_steps", "2",
       "--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2",
       "--intermediate_size", "64"]  # fmt: skip


RUN = ["can-quickstart", "--max_steps=30", "--save_steps=5", "--per_device_train_batch_size=8",
       "--logging_steps=4", "--hidden_size=32",
       "--num_hidden_layers=1", "--num_attention_heads=2", "--intermediate_size=64", "--probe_dataset_name=none",
       "--warmup_ratio=0.1", "--dataloader_num_workers=1", "--shuffle_block_size=50"]  # fmt: skip


def kill_rank_1(launcher: subprocess.Popen, folder: Path):
    while not list(folder.glob("checkpoints/step-*[0-9]")) and launcher.poll() is None:
        time.sleep(0.01)
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def shard(model):
    """By accelerate's own code, which its `prepare` does not call on a CPU: there it falls back to DDP silently."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.tensor import DTensor

    from modeling_can.pretraining.builders import keep_sharding_exact

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    plugin.set_mixed_precision("bf16")
    keep_sharding_exact(plugin)
    state = SimpleNamespace(fsdp_plugin=plugin)
    model = fsdp2_prepare_model(
        SimpleNamespace(state=state, mixed_precision="no", is_main_process=False, device=torch.device("cpu")), model
    )
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


@contextlib.contextmanager
def no_sync(model):
    """As `Accelerator.no_sync` of a sharded model."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def write_split(folder, split, rows, label=None):
    label = label or ClassLabel(names=["red", "green"])
    features = Features({"image": ImageFeature(), "label": label})
    images = [{"bytes": image, "path": None} for image in rows["image"]]
    Dataset.from_dict({"image": images, "label": rows["label"]}, features=features).to_parquet(
        folder / f"{split}-00000.parquet"
    )
