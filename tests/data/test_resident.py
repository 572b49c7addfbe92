"""Images that are decoded once and cropped on the device: the same crops, an exact order, an exact resume."""

import itertools
import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from testing_utils import TINY, encoded_image

import run_pretraining
from modeling_can.data import ImageSource, ViewStream, resident, resume, view_loader
from modeling_can.data.crops import RandomCrops
from modeling_can.data.folders import SAMPLE_DATA
from modeling_can.data.resident import CropPlan, ResidentLoader, crop, read_images, resident_images


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiles():
    return ImageSource(SAMPLE_DATA)


@pytest.fixture(scope="module")
def encoded(tiles):
    """CRC-32 -> bytes of some tiles."""
    block, _ = next(tiles.blocks(tiles.dataset, block_size=64))
    return {zlib.crc32(image["bytes"]): image["bytes"] for image in tiles.images(block)}


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 40), (31, 33)])
def test_crops_are_those_of_the_loader(tiles, encoded, resample, shape):
    crops = RandomCrops(shape, scale=(0.05, 1), resample=resample, seed=3)
    images = read_images(tiles, crops, CPU)
    assert images.pixels.dtype == torch.uint8 and len(images.pixels) == len(images.names) == len(images.checksums)
    height, width = images.pixels.shape[2:]
    for checksum, file in encoded.items():
        (index,) = np.flatnonzero(images.checksums == checksum)[:1]
        boxes = torch.tensor([crops.boxes((width, height), 7, checksum)])
        ours = crop(images.pixels[index : index + 1], boxes, shape, resample)[0]
        torch.testing.assert_close(ours.int(), crops(file, epoch=7).int(), rtol=0, atol=1)


def test_weights_of_a_crop_stay_inside_its_box():
    weights = resident.resize_weights(torch.tensor([4.0]), torch.tensor([9.0]), 32, 16, "bicubic")[0]
    torch.testing.assert_close(weights.sum(1), torch.ones(16), rtol=0, atol=1e-3)  # 16 bits
    assert weights[:, 4:9].any() and not weights[:, :4].any() and not weights[:, 9:].any()


def test_the_order_does_not_depend_on_the_workers(tiles):
    crops = RandomCrops((32, 32))
    first, second = (read_images(tiles, crops, CPU, num_workers) for num_workers in (0, 2))
    assert first.names == second.names and torch.equal(first.pixels, second.pixels)


def plan(num_images=10, batch_size=4, **options) -> CropPlan:
    return CropPlan(np.arange(num_images), (32, 32), RandomCrops((8, 8), seed=5), batch_size, **options)


def test_an_epoch_has_every_image_once_and_epochs_differ():
    batches = [plan()[index][0].tolist() for index in range(10)]
    epochs = np.array(list(itertools.chain(*batches))).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_processes_share_the_batch_of_one():
    whole = plan(batch_size=8)
    parts = [plan(process_index=rank, num_processes=2) for rank in (0, 1)]
    for index in range(5):
        for ours, expected in zip(zip(*(part[index] for part in parts), strict=True), whole[index], strict=True):
            assert torch.equal(torch.cat(ours), expected)


def test_boxes_are_those_of_the_epoch():
    checksums = np.array([11, 22, 33])
    crops = RandomCrops((8, 8), seed=5)
    indices, boxes = CropPlan(checksums, (40, 30), crops, 3)[2]
    for index, box in zip(indices.tolist(), boxes.tolist(), strict=True):
        assert box == [list(b) for b in crops.boxes((40, 30), 2, int(checksums[index]))]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_where_it_was(tiles, num_workers):
    crops = RandomCrops((32, 32))
    images = read_images(tiles, crops, CPU)

    def loader():
        return ResidentLoader(images, crops, 16, num_workers)

    first = loader()
    batches = list(itertools.islice(first, 5))
    state = first.state_dict()
    expected = list(itertools.islice(first, 3))[0]  # a second iteration of the same object goes on as well
    second = loader()
    assert second.resume([json.loads(json.dumps(state), object_hook=as_tuples)])
    again = next(iter(second))
    assert again["images"] == expected["images"] != batches[-1]["images"]
    assert torch.equal(second.views(again), first.views(expected))


def as_tuples(state: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in state.items()}


def test_stream_and_resident_images_go_on_from_each_other_approximately(tiles):
    crops = RandomCrops((32, 32))
    images = read_images(tiles, crops, CPU)
    stream = view_loader(ViewStream(tiles, crops), 16)
    num_epoch = len(images.names) // 16
    list(itertools.islice(stream, num_epoch + 5))
    ours = ResidentLoader(images, crops, 16)
    assert not ours.resume([stream.state_dict()])
    assert abs(ours.next_batch - num_epoch - 5) <= 1
    fresh = view_loader(ViewStream(tiles, crops), 16)
    assert not resume(fresh, [ours.state_dict()])
    state = fresh.dataset.state_dict()
    assert state["epoch"] == 1 and abs(state["skip"] - 5 * 16) <= 16


def test_other_images_do_not_go_on_exactly(tiles):
    crops = RandomCrops((32, 32))
    images = read_images(tiles, crops, CPU)
    before = ResidentLoader(images, crops, 16)
    fewer = resident.ResidentImages(images.pixels[1:], images.checksums[1:], images.names[1:], [])
    assert not ResidentLoader(fewer, crops, 16).resume([before.state_dict()])
    assert ResidentLoader(images, crops, 16).resume([before.state_dict()])


@pytest.fixture
def folder(tmp_path):
    """Images of three sizes."""
    (tmp_path / "images").mkdir()
    for index in range(12):
        size = [(64, 48), (48, 64), (80, 80)][index % 3]
        encoded = encoded_image(size, color=(20 * index, 0, 255), format="PNG")
        (tmp_path / "images" / f"{index}.png").write_bytes(encoded)
    return tmp_path / "images"


def test_several_sizes_are_brought_to_one_where_that_is_asked_for(folder):
    source, crops = ImageSource(data_dir=folder), RandomCrops((28, 21))
    images, remark = resident_images(True, source, crops, CPU, 0)
    assert images.pixels.shape == (12, 3, 32, 24)
    assert remark.startswith(
        "the images have several sizes: each was resized and cropped to 32 x 24 pixels; 12 images"
    )
    for index, name in enumerate(images.names):  # one color each
        file = int(name.split("/")[-1].removesuffix(".png"))
        assert images.pixels[index].flatten(1).unique(dim=1).flatten().tolist() == [20 * file, 0, 255]


def test_too_much_for_the_memory(tiles, monkeypatch):
    monkeypatch.setattr(resident, "MEMORY_FRACTION", 1e-6)
    with pytest.raises(ValueError, match=r"data_on_device=true, but the decoded images take .* GB, more than"):
        resident_images(True, tiles, RandomCrops((32, 32)), CPU, 0)


def test_on_a_cpu_auto_streams(tiles):
    assert resident_images("auto", tiles, RandomCrops((32, 32)), CPU, 0) == (None, None)
    assert resident_images(False, tiles, RandomCrops((32, 32)), CPU, 0) == (None, None)


def train(folder, output_dir, **settings) -> dict:
    settings = {**TINY, "image_size": 32, "data_dir": folder, "output_dir": output_dir, "data_on_device": True,
                "probe_dataset_name": None, "per_device_train_batch_size": 4, "dataloader_num_workers": 1,
                "log_with": "none", "logging_steps": 1, "max_steps": 8, "max_bad_fraction": 0.5,
                **settings}  # fmt: skip
    return run_pretraining.main(["can-quickstart", *(f"--{name}={value}" for name, value in settings.items())])


def test_a_run_resumes_exactly_and_counts_bad_images_once(folder, tmp_path, capfd):
    for path in folder.iterdir():
        Image.effect_noise((40, 40), 50).convert("RGB").save(path)
    (folder / "broken.png").write_bytes(b"no image")
    whole = train(folder, tmp_path / "whole", save_steps=3, save_total_limit=9)
    assert whole["bad_samples"] == {"not_an_image": 1} and whole["num_steps"] == 8
    assert "12 images stay on the device" in capfd.readouterr().out
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-3", tmp_path / "part" / "checkpoints" / "step-3")
    shutil.copy(tmp_path / "whole" / "bad_samples.jsonl", tmp_path / "part")
    part = train(folder, tmp_path / "part", resume_from_checkpoint="latest")
    assert "from here on the run is what it would have been" in capfd.readouterr().out
    assert part["bad_samples"] == {"not_an_image": 1} and part["final_losses"] == whole["final_losses"]
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("part", "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_preflight_counts_bad_images(folder, tmp_path, capfd):
    (folder / "broken.png").write_bytes(b"no image")
    found = train(folder, tmp_path / "out", preflight=True)
    assert found == {"ready": True} and "bad       1 images so far" in capfd.readouterr().out


def test_too_many_bad_images_stop_the_run(folder, tmp_path):
    for index in range(20):
        (folder / f"broken{index}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="20 of 32 images of .* are bad, more than max_bad_fraction=0.5"):
        train(folder, tmp_path / "out")
