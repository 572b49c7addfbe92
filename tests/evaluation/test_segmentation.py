"""Linear segmentation: against scikit-learn and a fit of all pixels, on shapes that are known; and what it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from testing_utils import image_file, launch_evaluation, options, save, tiny_config
from torch.nn.functional import cross_entropy, interpolate
from transformers import ConvNextConfig, ConvNextModel, PvtConfig, PvtModel, ViTImageProcessorPil

import run_eval
from modeling_can import CANForPreTraining
from modeling_can.evaluation import report, segmentation
from modeling_can.evaluation.features import raw_patches
from modeling_can.evaluation.linear import LinearClassifier
from modeling_can.evaluation.masks import load_masked
from modeling_can.evaluation.preprocessors import Preprocessor
from modeling_can.evaluation.scores import bootstrap_interval_of
from modeling_can.evaluation.segmentation import (
    Segmentation,
    iou,
    mean_iou,
    patch_classifier,
    pixel_counts,
    sampled,
    upsampled_classes,
)


COLORS = np.array([[120, 120, 120], [215, 60, 60], [60, 215, 70], [60, 70, 215]])
NUM_CLASSES, SIZE, PATCH = 4, 32, 4


def shapes(num_images: int, seed: int = 0, align: int = 1, noise: float = 25) -> tuple[np.ndarray, np.ndarray]:
    """Images `(N, 32, 32, 3)` of colored boxes and disks on textured ground, and masks; boxes alone if aligned."""
    rng, masks = np.random.default_rng(seed), np.zeros((num_images, SIZE, SIZE), np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE]
    for mask in masks:
        for _ in range(2):
            top, left, height, width = align * rng.integers((0, 0, 10 // align, 10 // align), 22 // align)
            box = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
            disk = (y - top - 5) ** 2 + (x - left - 5) ** 2 < 50
            mask[box if align > 1 or rng.random() < 0.5 else disk] = rng.integers(1, NUM_CLASSES)
    texture = 20 * np.sin(y * 1.3 + x * 0.7)[..., None]
    images = COLORS[masks] + texture + rng.normal(0, noise, (*masks.shape, 3))
    return images.clip(0, 255).astype(np.uint8), masks


def write(folder: Path, images: np.ndarray, masks: np.ndarray) -> Path:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        Image.fromarray(image).save(folder / "images" / f"{index:03}.jpg", quality=95)
        Image.fromarray(mask).save(folder / "masks" / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory) -> Path:
    """16 images to learn from and 10 to be tested on."""
    folder = tmp_path_factory.mktemp("sets") / "shapes"
    for split, number, seed in (("train", 16, 0), ("test", 10, 1)):
        write(folder / split, *shapes(number, seed))
    return folder


def patches(images: np.ndarray, patch: int = PATCH) -> np.ndarray:
    """The raw pixels of patches, `(N, h, w, d)`."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return raw_patches(pixels, (SIZE // patch, SIZE // patch)).movedim(1, -1).numpy().copy()


def fitted(images: np.ndarray, masks: np.ndarray, patch: int = PATCH) -> LinearClassifier:
    """With C = 1, as no image is held out."""
    size = (4 * SIZE // patch, 4 * SIZE // patch)
    labels = np.stack([sampled(mask, size) for mask in masks]).astype(np.float32)
    return patch_classifier(patches(images, patch), labels, NUM_CLASSES, num_fit=len(images))


def score(weight: np.ndarray, bias: np.ndarray, test: tuple[np.ndarray, np.ndarray], patch: int = PATCH) -> float:
    """mIoU on images and masks."""
    logits = torch.from_numpy(patches(test[0], patch) @ weight.T + bias).movedim(-1, 1)
    predicted = [upsampled_classes(part, (SIZE, SIZE)) for part in logits]
    pairs = zip(predicted, torch.from_numpy(test[1]).long(), strict=True)
    return float(mean_iou(sum(pixel_counts(*pair, NUM_CLASSES) for pair in pairs).numpy()))


# --- The measure -----------------------------------------------------------------------------------------------------


def test_the_mean_iou_is_scikit_learns_and_that_of_a_confusion_matrix():
    rng = np.random.default_rng(0)
    mask, predicted = rng.choice([-1, 0, 1, 3], (40, 50)), rng.integers(0, 5, (40, 50))
    counts = pixel_counts(torch.from_numpy(predicted), torch.from_numpy(mask), 5).numpy()
    true, guess = mask[mask >= 0], predicted[mask >= 0]
    occurring = [0, 1, 3]  # class 2 is predicted, and 4 as well, where neither is
    assert mean_iou(counts) == pytest.approx(jaccard_score(true, guess, labels=occurring, average="macro"))
    confusion = confusion_matrix(true, guess, labels=range(5))
    assert np.array_equal(counts, [confusion.diagonal(), confusion.sum(1), confusion.sum(0)])
    assert np.isnan(iou(counts)[[2, 4]]).all()
    by_hand = np.array([[6, 1], [7, 3], [8, 2]])  # of 10 pixels [[6, 1], [2, 1]]
    np.testing.assert_allclose(iou(by_hand), [6 / 9, 1 / 4])
    assert np.isnan(mean_iou(np.zeros((3, 2))))


def test_pixels_that_do_not_count_change_nothing():
    rng = np.random.default_rng(0)
    mask, predicted = torch.from_numpy(rng.integers(-1, 3, (30, 20))), torch.from_numpy(rng.integers(0, 3, (30, 20)))
    other = torch.where(mask < 0, (predicted + 1) % 3, predicted)
    assert not torch.equal(other, predicted)
    assert torch.equal(pixel_counts(other, mask, 3), pixel_counts(predicted, mask, 3))


def test_the_interval_covers_the_mean_iou_of_all_images_as_often_as_it_says():
    rng = np.random.default_rng(0)
    quality = rng.beta(6, 2, 20_000)  # of each image
    true = rng.integers(50, 400, (20_000, 3)).astype(float)
    right = np.round(true * quality[:, None])
    missed = true - right
    population = np.stack([right, true, right + missed[:, [1, 2, 0]]], axis=1)
    truth, covered = mean_iou(population.sum(axis=0)), 0
    for draw in range(200):
        images = population[rng.integers(0, len(population), 60)]
        low, high = bootstrap_interval_of(mean_iou, images, seed=draw, num_resamples=200)
        covered += low <= truth <= high
    assert 0.88 < covered / 200 < 0.99
    alone = population[:1]
    assert bootstrap_interval_of(mean_iou, alone) == (mean_iou(alone[0]), mean_iou(alone[0]))
    perfect = np.repeat(true[:20, None], 3, axis=1)
    assert bootstrap_interval_of(mean_iou, perfect) == (pytest.approx(0.025 ** (1 / 20)), 1.0)


def test_logits_are_upsampled_as_interpolate_does_however_many_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, 6, generator=generator)
    expected = interpolate(logits[None], (33, 21), mode="bilinear")[0].argmax(dim=0)
    for limit in (1, 3 * 33 * 21, 2**25):
        monkeypatch.setattr(segmentation, "_MAX_LOGITS", limit)
        assert torch.equal(upsampled_classes(logits, (33, 21)), expected)
    tokens, weights = torch.randn(3, 5, 6, 8, generator=generator), torch.randn(9, 4, generator=generator)
    labels = torch.arange(3 * 20 * 24).view(3, 20, 24)
    expected = interpolate((tokens @ weights[:-1] + weights[-1]).movedim(-1, 1), (20, 24), mode="bilinear")
    for limit in (1, 2**25):
        monkeypatch.setattr(segmentation, "_MAX_LOGITS", limit)
        made, order = map(torch.cat, zip(*segmentation._upsampled(weights, tokens, labels), strict=True))
        torch.testing.assert_close(made, expected.movedim(1, -1).flatten(0, 2), atol=1e-5, rtol=0)
        assert torch.equal(order, labels.flatten())


def test_the_sampled_pixels_are_those_at_the_centers():
    mask = np.arange(48).reshape(6, 8)
    assert np.array_equal(sampled(mask, (6, 8)), mask)
    assert np.array_equal(sampled(mask, (2, 8)), mask[[1, 4]])
    assert np.array_equal(sampled(mask, (12, 4)), mask.repeat(2, axis=0)[:, 1::2])


# --- The fit ---------------------------------------------------------------------------------------------------------


def test_where_the_color_is_the_class_patches_tell_it_and_shuffled_masks_do_not(tmp_path):
    train, test = shapes(40, align=PATCH, noise=10), shapes(20, seed=1, align=PATCH, noise=10)
    right = fitted(*train)
    assert score(right.weight, right.bias, test) > 0.9
    shuffled = fitted(train[0], train[1][np.random.default_rng(0).permutation(40)])
    only_ground = pixel_counts(torch.zeros(test[1].shape, dtype=int), torch.from_numpy(test[1]).long(), NUM_CLASSES)
    by_chance = mean_iou(only_ground.numpy())
    assert by_chance < 0.25
    assert score(shuffled.weight, shuffled.bias, test) < by_chance + 0.1


def test_a_fit_of_sampled_pixels_is_nearly_as_good_as_one_of_all():
    """With the same penalty. The fractions of the classes in the patches are a worse target: borders get blunt."""
    (images, masks), test, patch = shapes(40), shapes(20, seed=1), 8
    head = fitted(images, masks, patch)
    tokens = torch.from_numpy(patches(images, patch))
    mean, std = tokens.mean((0, 1, 2)), tokens.std((0, 1, 2), correction=0)
    tokens, target = (tokens - mean) / std, torch.from_numpy(masks).long()
    one_hot = torch.nn.functional.one_hot(target, NUM_CLASSES).movedim(-1, 1).float()
    fractions = torch.nn.functional.avg_pool2d(one_hot, patch)

    def of_pixels(logits):
        return cross_entropy(interpolate(logits, (SIZE, SIZE), mode="bilinear"), target)

    scores = [score(head.weight, head.bias, test, patch)]
    for loss_of in (of_pixels, lambda logits: cross_entropy(logits, fractions)):
        weights = torch.zeros(len(mean) + 1, NUM_CLASSES, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def closure(weights=weights, optimizer=optimizer, loss_of=loss_of):
            optimizer.zero_grad()
            loss = loss_of((tokens @ weights[:-1] + weights[-1]).movedim(-1, 1))
            loss = loss + weights[:-1].square().sum() / (2 * head.inverse_penalty * len(images))
            loss.backward()
            return loss

        optimizer.step(closure)
        weight = (weights[:-1].detach() / std[:, None]).T.numpy()
        bias = weights[-1].detach().numpy() - weight @ mean.numpy()
        scores.append(score(weight, bias, test, patch))
    sampled_pixels, all_pixels, of_patches = scores
    assert sampled_pixels == pytest.approx(all_pixels, abs=0.01)
    assert of_patches < all_pixels - 0.05


def test_ignored_pixels_are_not_learned_from():
    images, masks = shapes(6)
    masks = masks.astype(int)
    ignored = np.random.default_rng(0).random(masks.shape) < 0.3
    heads = [fitted(images, np.where(ignored, -1, other)) for other in (masks, (masks + 1) % NUM_CLASSES)]
    assert not np.allclose(heads[0].weight, heads[1].weight)
    changed = np.where(ignored, -1, masks)
    assert np.array_equal(fitted(images, changed).weight, heads[0].weight)
    nothing = np.full_like(masks[:2], -1)
    more = fitted(np.concatenate([images, images[:2]]), np.concatenate([changed, nothing]))
    assert np.isfinite(more.weight).all()


@pytest.mark.parametrize("uncounted", [slice(4, 5), slice(0, 4)])
def test_the_penalty_is_not_chosen_by_images_without_a_pixel_that_counts(uncounted):
    images, masks = shapes(5)
    labels = np.stack([sampled(mask, (SIZE, SIZE)) for mask in masks]).astype(np.float32)
    chosen = patch_classifier(patches(images), labels, NUM_CLASSES, num_fit=4)
    assert chosen.inverse_penalty in segmentation.INVERSE_PENALTIES and 0 < chosen.held_out_score <= 1
    labels[uncounted] = -1
    made, expected = (patch_classifier(patches(images), labels, NUM_CLASSES, num_fit=number) for number in (4, 5))
    assert (made.inverse_penalty, made.held_out_score) == (1.0, None)
    assert np.array_equal(made.weight, expected.weight)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(models, shapes_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    copies = {name: str(shutil.copytree(models[name], out / name)) for name in ("can", "dinov2")}
    flags = {"task": "segmentation", "update_card": "true", "reference_model": copies["dinov2"]}
    return out, run_eval.main(options(copies, str(shapes_folder), out / "out", "can", **flags))


def test_models_and_baselines_stand_side_by_side(measured, shapes_folder):
    out, results = measured
    assert json.loads((out / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["results"]) == ["pixels", "untrained (can)", "untrained (dinov2)", "can", "dinov2"]
    assert results["data"]["class_names"] == ["0", "1", "2", "3"] and results["data"]["num_test"] == 10
    for figures in results["results"].values():
        (made,) = figures.values()
        assert made["interval"][0] <= made["mean_iou"] <= made["interval"][1]
        assert made["pixel_accuracy_interval"][0] <= made["pixel_accuracy"] <= made["pixel_accuracy_interval"][1]
        assert np.mean(list(made["iou"].values())) == pytest.approx(made["mean_iou"])
        assert made["patches"] == [4, 4] and made["num_train"] == 16
    assert results["results"]["pixels"]["segmentation"]["mean_iou"] > 0.5
    table = report.table(results["results"])
    row = next(line for line in table.splitlines() if line.startswith("linear segmentation, mIoU"))
    assert all(f"{100 * figures['segmentation']['mean_iou']:.1f} ±" in row for figures in results["results"].values())
    assert Image.open(out / "out" / "figures" / "segmentation-can.png").width > 300
    assert not (out / "dinov2" / "README.md").exists()  # the reference alone
    card = ModelCard.load(out / "can" / "README.md")
    entries = {entry.metric_type: entry for entry in card.data.eval_results}
    value = results["results"]["can"]["segmentation"]["mean_iou"]
    assert entries["mean_iou"].metric_value == round(value, 4) and "linear segmentation, mIoU" in card.text
    assert {entry.task_type for entry in entries.values()} == {"image-segmentation"}


def test_columns_and_a_flat_folder_give_what_folders_give(measured, models, shapes_folder, tmp_path):
    """The masks with other values, one of them beyond 8 bits, as PNG and TIFF, under other names."""
    _, results = measured
    values = np.array([7, 8, 254, 1000])
    for split in ("train", "test"):
        rows = {"photo": [], "annotation": []}
        for path in sorted((shapes_folder / split / "images").iterdir()):
            rows["photo"].append({"bytes": path.read_bytes(), "path": None})
            mask = values[np.asarray(Image.open(shapes_folder / split / "masks" / f"{path.stem}.png"))]
            file = tmp_path / ("mask.png" if split == "train" else "mask.tif")
            Image.fromarray(mask.astype(np.uint16 if split == "train" else np.int32)).save(file)
            rows["annotation"].append({"bytes": file.read_bytes(), "path": None})
        features = datasets.Features({name: datasets.Image() for name in rows})
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{split}-00000.parquet")
    flags = {"task": "segmentation", "image_column": "photo", "mask_column": "annotation", "baselines": "none"}
    again = run_eval.main(options(models, str(tmp_path / "set"), tmp_path / "out", "can", **flags, batch_size=7))
    made, expected = (run["results"]["can"]["segmentation"] for run in (again, results))
    assert list(made["iou"]) == ["7", "8", "254", "1000"]
    assert list(made["iou"].values()) == list(expected["iou"].values()) and made["interval"] == expected["interval"]

    flat = tmp_path / "flat"
    for kind in ("images", "masks"):
        shutil.copytree(shapes_folder / "train" / kind, flat / kind)
    sizes_and_seeds = ((None, 0), (0.2, 0), (0.2, 1))
    first, second, other = (load_masked(str(flat), test_size=size, seed=seed) for size, seed in sizes_and_seeds)
    assert (len(first.train), len(first.test), first.test_size) == (13, 3, 0.2)
    paths = [{row["image"]["path"] for row in made.test.images} for made in (first, second, other)]
    assert paths[0] == paths[1] != paths[2]
    assert not paths[0] & {row["image"]["path"] for row in first.train.images}
    for index in range(3):
        image, mask = first.test.images[index]["image"]["path"], first.test.masks[index]["mask"]["path"]
        assert Path(image).stem == Path(mask).stem


def test_palette_images_hold_indices_and_orientation_turns_the_image_alone(tmp_path):
    images, masks = shapes(5)
    folder = write(tmp_path / "flat", images[:, :20], masks[:, :20])
    indexed = Image.fromarray(masks[0, :20])
    indexed.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert indexed.mode == "P"
    indexed.save(folder / "masks" / "000.png")
    turned = Image.fromarray(np.rot90(images[1, :20]))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    turned.save(folder / "images" / "001.jpg", exif=exif, quality=95)
    data = load_masked(str(folder), test_size=0.2)
    found = {}
    for split in (data.train, data.test):
        found |= {Path(row["mask"]["path"]).stem: split.mask(index) for index, row in enumerate(split.masks)}
    values = np.array([int(name) for name in data.class_names])
    assert all(np.array_equal(values[found[f"{index:03}"]], masks[index, :20]) for index in range(5))


def test_the_test_masks_choose_nothing(measured, models, shapes_folder, tmp_path):
    _, results = measured
    planted = shutil.copytree(shapes_folder, tmp_path / "planted")
    for path in (planted / "test" / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) + 1) % NUM_CLASSES).save(path)
    flags = {"task": "segmentation", "baselines": "none"}
    other = run_eval.main(options(models, str(planted), tmp_path / "out", "can", **flags))
    ours, theirs = (run["results"]["can"]["segmentation"] for run in (results, other))
    assert ours["mean_iou"] != theirs["mean_iou"]
    assert all(ours[name] == theirs[name] for name in ("C", "held_out_mean_iou"))


def test_training_images_are_drawn_where_their_patches_would_not_fit(
    models, shapes_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(segmentation, "_MAX_BYTES", 7 * 4 * 16 * (32 + 16))  # of 7 images
    flags = {"task": "segmentation", "baselines": "none"}
    results = run_eval.main(options(models, str(shapes_folder), tmp_path, "can", **flags))
    assert results["results"]["can"]["segmentation"]["num_train"] == 7
    assert "can: segmentation learns from 7 of 16 training images" in capsys.readouterr().out


def test_a_sheet_that_cannot_be_written_costs_no_figures(measured, models, shapes_folder, tmp_path, capsys):
    _, results = measured
    (tmp_path / "figures" / "segmentation-can.png").mkdir(parents=True)
    flags = {"task": "segmentation", "baselines": "none"}
    again = run_eval.main(options(models, str(shapes_folder), tmp_path, "can", **flags))
    made, expected = (run["results"]["can"]["segmentation"] for run in (again, results))
    assert made == {name: value for name, value in expected.items() if name != "figure"}
    assert "can: the sheet of test images could not be drawn: " in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(models, shapes_folder, tmp_path):
    results = []
    for num_processes in (1, 2):
        flags = {"task": "segmentation", "batch_size": 4, "baselines": "pixels"}
        argv = options(models, str(shapes_folder), tmp_path / str(num_processes), "can", **flags)
        results.append(launch_evaluation(argv, num_processes)["results"])
        results[-1]["can"]["segmentation"].pop("figure")
    assert results[0] == results[1]


# --- What is refused -------------------------------------------------------------------------------------------------


def resize(folder: Path):
    Image.new("L", (31, 32)).save(folder / "train" / "masks" / "003.png")


def drop(folder: Path):
    (folder / "train" / "masks" / "003.png").unlink()


def colored(folder: Path):
    Image.new("RGB", (32, 32)).save(folder / "train" / "masks" / "003.png")


def compressed(folder: Path):
    (folder / "train" / "masks" / "003.png").unlink()
    Image.new("L", (32, 32)).save(folder / "train" / "masks" / "003.jpg")


def damaged(folder: Path):
    (folder / "test" / "masks" / "003.png").write_bytes(b"no image")


def unknown(folder: Path):
    Image.new("L", (32, 32), 9).save(folder / "test" / "masks" / "003.png")


def empty(folder: Path):
    for path in (folder / "test" / "images").iterdir():
        path.unlink()


def gone(folder: Path):
    shutil.rmtree(folder / "test")
    (folder / "other" / "images").mkdir(parents=True)


def binary(folder: Path):
    for path in folder.glob("*/masks/*"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)


def uncounted(folder: Path):
    for path in (folder / "test" / "masks").iterdir():
        Image.new("L", (32, 32), 255).save(path)


def twice(folder: Path):
    shutil.copy(folder / "train" / "images" / "003.jpg", folder / "train" / "images" / "003.jpeg")


def without_masks(folder: Path):
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "masks")


@pytest.mark.parametrize(
    "change, message",
    [
        (resize, r"train/masks/003.png has 32 x 31 pixels, and its image 32 x 32 .*make both of one size"),
        (drop, r"1 images have no mask, the first is .*train/images/003.jpg; put its mask at .*masks/003.png"),
        (colored, r"train/masks/003.png has pixels of type RGB, .*save class indices as a grayscale or palette PNG"),
        (compressed, r"train/masks/003.jpg is a JPEG, which changes .*PNG"),
        (damaged, r"test/masks/003.png cannot be read \(text, 'no image'\); fix it, or remove it and its image$"),
        (unknown, r"test/masks/003.png has pixels of class 9, which no mask to learn from has; .*--ignore_index 9"),
        (empty, r"test: no image in .*test/images; put some there"),
        (gone, r"test: no folder .*test/images; make it, or name other splits"),
        (binary, r"train: the masks have a single class, 0, besides ignore_index=255; .*--ignore_index -1"),
        (uncounted, r"test: no pixel of its masks counts"),
        (twice, r"003.jpeg and 003.jpg, of one name; remove one"),
        (without_masks, r"no column 'mask'; set mask_column to one of image, or give a folder with images/"),
    ],
)
def test_what_the_user_can_fix_is_said_with_the_fix(shapes_folder, tmp_path, change, message):
    folder = shutil.copytree(shapes_folder, tmp_path / "shapes")
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_masked(str(folder), test_size=None)


def columns(folder: Path, **damaged: int) -> str:
    """A parquet set of 8 images and masks, those of the rows in `damaged` cut in half."""
    images, masks = shapes(8)
    rows = {"image": images, "mask": masks}
    for kind, pixels in rows.items():
        files = [image_file(Image.fromarray(one), "PNG") for one in pixels]
        if kind in damaged:
            files[damaged[kind]] = files[damaged[kind]][: len(files[damaged[kind]]) // 2]
        rows[kind] = [{"bytes": file, "path": None} for file in files]
    features = datasets.Features({kind: datasets.Image() for kind in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("test_size", [0.0, 0.5])
def test_a_damaged_image_is_named_by_its_row_in_the_set(models, tmp_path, test_size):
    folder = columns(tmp_path, image=5)
    flags = {"task": "segmentation", "baselines": "none", "test_split": "train", "test_size": test_size}
    with pytest.raises(ValueError, match=r", train: the image of row 5 cannot be used \(damaged: "):
        run_eval.main(options(models, folder, tmp_path / "out", "can", **flags))


def test_a_damaged_mask_is_named_by_its_row_in_the_set(tmp_path):
    with pytest.raises(ValueError, match=r", train: the mask of row 5 cannot be read"):
        load_masked(columns(tmp_path, mask=5))
    data = load_masked(columns(tmp_path), test_size=0.5)
    found = {data.train.mask_name(0), data.test.mask_name(0), data.test.select(np.array([3, 1])).mask_name(1)}
    held_out = [int(row) for row in data.test.rows]
    assert sorted([*held_out, *data.train.rows]) == list(range(8)) and held_out != list(range(4))
    rows = (data.train.rows[0], held_out[0], held_out[1])
    assert found == {f"{tmp_path}, train: the mask of row {row}" for row in rows}


def test_255_is_a_class_where_nothing_is_ignored(shapes_folder, tmp_path):
    folder = shutil.copytree(shapes_folder, tmp_path / "shapes")
    binary(folder)
    data = load_masked(str(folder), ignore_index=-1)
    mask = np.asarray(Image.open(folder / "test" / "masks" / "000.png"))
    assert data.class_names == ["0", "255"] and np.array_equal(data.test.mask(0), mask // 255)
    shown = load_masked(str(shapes_folder), ignore_index=3)
    original = np.asarray(Image.open(shapes_folder / "test" / "masks" / "000.png")).astype(int)
    assert shown.class_names == ["0", "1", "2"]
    assert np.array_equal(shown.test.mask(0), np.where(original == 3, -1, original))


def test_encoders_and_processors_that_do_not_fit_are_refused_in_words(models, shapes_folder, tmp_path):
    torch.manual_seed(0)
    own = {
        "pvt": save(tmp_path / "pvt", PvtModel(PvtConfig(image_size=32, depths=[1] * 4))),
    }
    odd = SimpleNamespace(reads_arrays=False, in_two_steps=False, processor=ViTImageProcessorPil())
    with pytest.raises(ValueError, match="the ViTImageProcessorPil of odd does something else: --proc"):
        Segmentation().check(None, SimpleNamespace(name="odd", preprocessor=odd))
    for name, flags, message in (
        ("pvt", {}, "does not tell which of its tokens are patches"),
        ("can", {"task": "segmentation,knn"}, "segmentation stands alone; got task=segmentation,knn"),
        ("can", {"ignore_index": -2}, "ignore_index=-2 must be at least -1"),
        ("can", {"pixel_range": "0,255"}, "segmentation task takes RGB and gray images, and .*can takes arrays"),
    ):
        flags = {"task": "segmentation", **flags}
        with pytest.raises(ValueError, match=message):
            run_eval.main(options(models | own, str(shapes_folder), tmp_path / "out", name, **flags))


def test_a_model_that_reads_arrays_is_refused_before_a_mask_is_read(models, shapes_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(models["can"], tmp_path / "bands"))
    processor = ViTImageProcessorPil.from_pretrained(folder).to_dict() | {"pixel_range": [0, 255]}
    ViTImageProcessorPil.from_dict(processor).save_pretrained(folder)
    message = "takes RGB and gray images, and bands takes arrays, .*use another task, on a set with labels"
    given = options(models | {"bands": str(folder)}, str(shapes_folder), tmp_path, "can", "bands", task="segmentation")
    with pytest.raises(ValueError, match=message):  # by check: it is not the first
        run_eval.main(given)
    monkeypatch.setattr("modeling_can.evaluation.command.load_masked", None)
    given = options({"bands": str(folder)}, str(shapes_folder), tmp_path, "bands", task="segmentation")
    with pytest.raises(ValueError, match=message.replace("bands", ".*bands")):
        run_eval.main(given)


def test_gray_models_are_measured_and_drawn(shapes_folder, tmp_path):
    folder = tmp_path / "gray"
    CANForPreTraining(tiny_config(image_size=32, num_channels=1)).save_pretrained(folder)
    gray = {"image_mean": [0.5], "image_std": [0.2], "do_convert_rgb": False}
    ViTImageProcessorPil(size={"height": 32, "width": 32}, **gray).save_pretrained(folder)
    flags = {"task": "segmentation", "baselines": "none"}
    results = run_eval.main(options({"gray": str(folder)}, str(shapes_folder), tmp_path / "out", "gray", **flags))
    sheet = Image.open(results["results"]["gray"]["segmentation"]["figure"]).convert("RGB")
    red, green, blue = np.moveaxis(np.asarray(sheet).astype(int), -1, 0)
    is_gray = (red == green) & (green == blue)
    third = sheet.width // 3
    assert is_gray[:, :third].all() and not is_gray[:, third:].all()
    assert 0 < red[:, :third].mean() < 255 and len(np.unique(red[:, :third])) > 50  # neither black nor blank


def test_images_are_seen_whole_where_the_processor_crops_and_maps_do_as_tokens_do(shapes_folder, tmp_path):
    torch.manual_seed(0)
    folder = save(tmp_path / "convnext", ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)))
    processor = ViTImageProcessorPil(
        size={"height": 80, "width": 80}, do_center_crop=True, crop_size={"height": 64, "width": 64}
    )
    processor.save_pretrained(folder)
    preprocessor = Preprocessor(processor)
    encoded = (shapes_folder / "train" / "images" / "000.jpg").read_bytes()
    whole = preprocessor.whole(encoded)
    assert whole.shape == (3, 64, 64)
    expected = Image.open(shapes_folder / "train" / "images" / "000.jpg").resize((64, 64), Image.Resampling.BILINEAR)
    difference = whole.permute(1, 2, 0).float().numpy() - np.asarray(expected).astype(float)
    assert abs(difference).max() <= 1  # of rounding
    flags = {"task": "segmentation", "baselines": "pixels"}
    results = run_eval.main(options({"it": folder}, str(shapes_folder), tmp_path / "out", "it", **flags))
    assert all(figures["segmentation"]["patches"] == [2, 2] for figures in results["results"].values())
