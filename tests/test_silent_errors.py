"""What a model, a trainer or an evaluation would do wrong without a word; each test failed with a planted bug."""

import inspect
import io
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import test_embedding as others
import torch
from accelerate.state import AcceleratorState
from conftest import free_port, inputs, tiny_config, tiny_model
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from test_accumulation import assert_same, cut, gradients, step
from test_data import OFF, PHOTO, identity, picture, read, shards
from test_evaluation import blobs, encoded, write_split
from test_finetuning import pretrained, tune
from test_flags import places, run
from test_run_eval import colours, models, options
from test_run_pretraining import ROOT, TOY
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTImageProcessorPil

import run_eval
import run_pretraining
from modeling_can.averages import MetricAverage
from modeling_can.data import ImageSource, ViewStream
from modeling_can.data.augmentations import Augmentation
from modeling_can.data.crops import RandomCrops, random_box
from modeling_can.data.decoding import BadImage, decode
from modeling_can.evaluation import command, entries, few_shot, finetuning, linear, linear_sgd, protocol, robustness
from modeling_can.evaluation.embed import embed
from modeling_can.evaluation.encoders import Preprocessor, pooled
from modeling_can.evaluation.export import on_class_token_and_mean
from modeling_can.evaluation.features import Extractor
from modeling_can.evaluation.few_shot import draw_shots, few_shot_predictions
from modeling_can.evaluation.linear import LinearClassifier, linear_probe, mean_and_std
from modeling_can.evaluation.probe import Probe
from modeling_can.modeling_can import CANDropPath, CANModel, resize_positions, sincos_positions
from modeling_can.optimization import parameter_groups
from modeling_can.pretraining import builders, feed, gradient_caching, probing
from modeling_can.pretraining import step as a_step
from modeling_can.pretraining.health import embedding_spread
from modeling_can.random_state import interlude
from modeling_can.recipe import Recipe


def test_drawn_noise_is_normal_with_a_level_of_its_own_for_each_view():
    model = tiny_model(noise_std_max=0.2)
    noise, level = model._draw_noise(torch.zeros(400, 2, 3, 32, 48), None, None)
    assert 0 <= level.min() < 0.01 and 0.19 < level.max() <= 0.2
    assert level.mean().item() == pytest.approx(0.1, abs=0.01) and (level[:, 0] != level[:, 1]).any()
    e = noise / level[:, :, None, None, None]
    assert abs(e.mean()) < 0.01 and e.std().item() == pytest.approx(1, abs=0.01)
    assert (e.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.002)


def test_drop_path_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    made = CANDropPath(0.2).train()(torch.ones(20_000, 1, 1)).flatten()
    assert set(made.unique().tolist()) == {0.0, 1.25} and made.mean().item() == pytest.approx(1, abs=0.02)
    model = CANModel(tiny_config(num_hidden_layers=5, drop_path_rate=0.2))
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_covers_attention_and_mlp():
    layer = CANModel(tiny_config(num_hidden_layers=2, drop_path_rate=0.5)).layers[1].train()
    tokens = torch.randn(200, 3, 32)
    made = layer(tokens)
    unchanged = (made == tokens).flatten(1).all(1).float().mean().item()
    assert unchanged == pytest.approx(0.25, abs=0.1)  # both branches are left out


def noise_file(seed, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_of_one_size_have_different_boxes(monkeypatch):
    boxes = []
    monkeypatch.setattr("modeling_can.data.crops.random_box", lambda *a: boxes.append(random_box(*a)) or boxes[-1])
    make = RandomCrops((16, 16))
    for seed in (0, 1):
        make(noise_file(seed))
    assert boxes[:2] != boxes[2:]


def test_boxes_lie_anywhere_and_aspects_are_uniform_in_the_logarithm():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((400, 400), (0.05, 0.15), (0.5, 2.0), rng) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    for place in (boxes[:, 0] / (400 - width), boxes[:, 1] / (400 - height)):
        assert scipy.stats.kstest(place, "uniform").pvalue > 1e-3
    aspects = np.log(width / height) / np.log(4) + 0.5
    assert scipy.stats.kstest(aspects, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest((width * height / 400**2 - 0.05) / 0.1, "uniform").pvalue > 1e-3


def test_a_picture_is_cropped_anew_in_every_epoch(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(color=(i, 2, 3), format="PNG"))
    epochs = []
    stream = ViewStream(
        ImageSource(data_dir=str(tmp_path)), lambda encoded, epoch: epochs.append(epoch) or np.zeros(1)
    )
    reading = iter(stream)
    for _ in range(9):
        next(reading)
    assert epochs == [0, 0, 0, 1, 1, 1, 2, 2, 2]


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
def test_two_processes_that_accumulate_plainly_are_one_process(run_processes):
    whole = tiny_model(contrastive_loss_weight=0)
    whole(**inputs(whole.config, 8)).loss.backward()
    for result in run_processes(accumulate_in_part, 2):
        assert_same({name: torch.from_numpy(gradient) for name, gradient in result.items()}, gradients(whole))


def test_matrices_decay_and_nothing_else_does():
    model = tiny_model()
    decay, no_decay = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    decaying = {names[id(p)] for p in decay["params"]}
    assert decaying == {n for n in names.values() if n.endswith("weight") and "norm" not in n}
    assert decaying | {names[id(p)] for p in no_decay["params"]} == set(names.values())


# --- the script ------------------------------------------------------------------------------------------------------


def test_every_update_is_made_as_the_recipe_says(places, tmp_path, monkeypatch):
    updates, temperatures, orders = [], set(), []

    class Spied(torch.optim.AdamW):
        def step(self, *arguments, **options):
            norm = torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])
            updates.append(([(g["lr"], tuple(g["betas"]), g["weight_decay"]) for g in self.param_groups], norm.item()))
            return super().step(*arguments, **options)

    contrast, stream = gradient_caching.contrastive_loss, feed.ViewStream
    monkeypatch.setattr(torch.optim, "AdamW", Spied)
    monkeypatch.setattr(
        gradient_caching,
        "contrastive_loss",
        lambda e, temperature: temperatures.add(temperature) or contrast(e, temperature),
    )
    monkeypatch.setattr(feed, "ViewStream", lambda *a, **k: orders.append(a[2]) or stream(*a, **k))
    settings = {"data_dir": "pictures", "max_steps": 4, "gradient_accumulation_steps": 2, "warmup_ratio": 0.5,
                "seed": 5, "base_learning_rate": 0.032, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9,
                "max_grad_norm": 0.01, "temperature": 0.2, "patch_size": 8}  # fmt: skip
    results = run(places, tmp_path, settings)
    assert results["learning_rate"] == pytest.approx(0.001)  # 0.032 * 8 / 256
    rates = [[group[0] for group in groups] for groups, _ in updates]
    assert rates == [pytest.approx([rate, rate]) for rate in (0.001 / 3, 0.002 / 3, 0.001, 0.0005)]
    for groups, norm in updates:
        assert [group[1:] for group in groups] == [((0.8, 0.9), 0.1), ((0.8, 0.9), 0.0)]
        assert norm == pytest.approx(0.01, rel=1e-3)  # clipped
    assert temperatures == {0.2} and orders == [5]


def test_views_augmentation_and_processor_are_as_the_recipe_says(monkeypatch):
    bound = inspect.signature(builders.Augmentation).bind
    monkeypatch.setattr(builders, "Augmentation", lambda *a, **k: bound(*a, **k).arguments)
    augmentation = dict(image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), flip_probability=0.3,
                        color_jitter=(0.1, 0.2, 0.3, 0.05), color_jitter_probability=0.51, greyscale_probability=0.11,
                        blur_probability=0.91, blur_sigma=(0.5, 1.5), solarize_probability=0.31)  # fmt: skip
    views = dict(crop_scale=(0.3, 0.9), crop_ratio=(0.9, 1.1), resample="bicubic", seed=5, num_views=2)
    recipe = Recipe.from_dict({"data_dir": "x", "max_steps": 1, "image_size": (32, 48), "patch_size": (8, 16),
                               "high_bit_depth": "stretch", **augmentation, **views})  # fmt: skip
    made = builders.augmentation(recipe)
    assert made.pop("blur_kernel_size") == 3
    assert made == {name.removeprefix("image_"): value for name, value in augmentation.items()}
    make = builders.view_maker(recipe)
    assert (make.scale, make.ratio, make.resample, make.seed, make.num_views) == tuple(views.values())
    assert make.image_shape == (32, 48) and make.decoding["min_size"] == (8, 16)
    assert make.decoding["high_bit_depth"] == "stretch" and make.decoding["num_channels"] == 3
    processor = builders.image_processor(recipe)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor.resample == 3 and dict(processor.crop_size) == {"height": 32, "width": 48}
    assert dict(processor.size) == {"shortest_edge": round(48 * 256 / 224)}


SEEDS = """
import os, sys, torch, run_pretraining
from modeling_can.data.augmentations import Augmentation
from modeling_can.averages import MetricAverage

forward = Augmentation.forward
def told(self, views):
    os.write(1, f"\\ndraws {torch.get_rng_state().sum().item()}\\n".encode())  # in one piece
    return forward(self, views)
Augmentation.forward = told
compute = MetricAverage.compute
def averaged(self):
    averages = compute(self)
    os.write(1, f"\\nmeans {averages['reconstruction_loss']}\\n".encode())
    return averages
MetricAverage.compute = averaged
run_pretraining.main(sys.argv[1:])
"""


def test_processes_draw_other_noise_and_masks_and_log_their_mean(tmp_path):
    (tmp_path / "seeds.py").write_text(SEEDS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port()), str(tmp_path / "seeds.py"), *TOY, "--max_steps=1",
               f"--output_dir={tmp_path / 'out'}", "--probe_dataset_name=none"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    drawn, means = ([x for x in answer.stdout.splitlines() if x.startswith(word)] for word in ("draws", "means"))
    assert len(drawn) == 2 and drawn[0] != drawn[1], answer.stderr[-2000:]
    assert len(means) == 2 and means[0] == means[1]


def test_averages_begin_anew_after_each_look():
    average = MetricAverage(lambda tensor: tensor)
    for values, counts in (((1.0, 3.0), (True, True)), ((5.0, float("nan")), (True, False))):
        for value, count in zip(values, counts, strict=True):
            average.update({"loss": torch.tensor(value)}, torch.tensor(count))
        assert average.compute() == {"loss": 2.0 if values[0] == 1 else 5.0}


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_few_shots_are_standardised_by_all_training_images():
    (train, labels), (test, _) = blobs(300), blobs(200, seed=1)
    for draw, predictions in enumerate(few_shot_predictions(train, labels, test, 3, "2", num_draws=3)):
        chosen = draw_shots(labels, "2", np.random.default_rng((0, draw)))
        probe = linear_probe(train[chosen], labels[chosen], 3, moments=mean_and_std(train))
        np.testing.assert_array_equal(predictions, probe.predict(test))


def test_other_preprocessing_or_precision_makes_other_features(models, colours, tmp_path, monkeypatch):
    made, counts, extract = [], [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda *a: made.append(1) or extract(*a))
    for flags in ({}, {}, {"image_size": 48}, {"mixed_precision": "bf16"}):
        AcceleratorState._reset_state(True)
        run_eval.main(options(models, colours, tmp_path, "can", task="knn", baselines="none", **flags))
        counts.append(len(made))
    AcceleratorState._reset_state(True)
    assert counts == [2, 2, 4, 6]  # training and test images


def test_a_classifier_may_have_its_classes_in_another_order(models, colours, tmp_path):
    pytest.importorskip("imagecorruptions")
    other, order = shutil.copytree(models["classifier"], tmp_path / "other"), [2, 0, 1]
    config, weights = (
        json.loads((other / "config.json").read_text()),
        safetensors.torch.load_file(other / "model.safetensors"),
    )
    names = [config["id2label"][str(index)] for index in order]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (other / "config.json").write_text(json.dumps(config))
    for key in ("classifier.weight", "classifier.bias"):
        weights[key] = weights[key][order]
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    argv = options({**models, "other": str(other)}, colours, tmp_path, "classifier", "other", task="robustness",
                   corruptions="noise", baselines="none")  # fmt: skip
    one, two = (figures["robustness"] for figures in run_eval.main(argv)["results"].values())
    assert one["by_corruption"] == two["by_corruption"] and one["clean"] == two["clean"]
    assert one["head"] == "its own classifier"


@pytest.mark.parametrize("pooling", ["mean", "cls", "both"])
def test_a_probe_reads_as_a_layer_what_it_was_fitted_on(pooling):
    features = {"cls": torch.randn(5, 4), "mean": torch.randn(5, 4)}
    read = pooled(features, pooling, "a model")
    probe = LinearClassifier(np.random.randn(3, read.shape[1]).astype(np.float32), np.ones(3, np.float32), 1.0, None)
    head = on_class_token_and_mean(probe, pooling)
    expected = read @ torch.from_numpy(probe.weight).T + torch.from_numpy(probe.bias)
    torch.testing.assert_close(head(torch.cat([features["cls"], features["mean"]], 1)), expected)


def test_the_seed_reaches_what_is_trained(models, colours, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    seeds = []
    for task, module in (("finetune", finetuning), ("linear_probe_sgd", linear_sgd)):
        function = getattr(module, task)

        def spy(*arguments, function=function, **keywords):
            seeds.append(inspect.signature(function).bind(*arguments, **keywords).arguments["seed"])
            raise Enough

        monkeypatch.setattr(module, task, spy)
        with pytest.raises(Enough):
            run_eval.main(options(models, colours, tmp_path, "can", task=task, seed=7))
    assert seeds == [7, 7]


# --- data, views, probe ----------------------------------------------------------------------------------------------


def test_a_single_shard_is_shuffled_anew_in_every_epoch(shards):
    source = ImageSource(data_files=f"{shards[0]}/train-0.parquet")
    rows = read(ViewStream(source, identity), 6 * 6)
    assert len({tuple(rows[6 * epoch : 6 * epoch + 6]) for epoch in range(6)}) > 4


def test_too_many_bad_images_stop_the_stream_after_a_thousand():
    rows = {"image": [{"bytes": PHOTO, "path": None}] * 100 + [{"bytes": b"text", "path": None}] * 1400}
    source = ImageSource(dataset=Dataset.from_dict(rows, features=Features({"image": ImageFeature()})))
    with pytest.raises(ValueError, match=r" of 10\d\d images .* are bad"):  # and not of 1500, after the whole pass
        list(ViewStream(source, RandomCrops((16, 16))))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_views_are_resized_as_pillow_does(resample):
    made = RandomCrops((16, 16), scale=(1, 1), ratio=(1, 1), resample=resample)(noise_file(0, size=(48, 48)))[0]
    theirs = Image.open(io.BytesIO(noise_file(0, size=(48, 48)))).resize((16, 16), Image.Resampling[resample.upper()])
    assert abs(made.permute(1, 2, 0).int() - torch.from_numpy(np.asarray(theirs).astype(np.int32))).max() <= 2


def test_the_least_size_is_height_and_width():
    wide = picture(size=(40, 20))  # 20 high
    assert decode(wide, min_size=(20, 40)).shape == (20, 40, 3)
    with pytest.raises(BadImage, match="20 x 40 pixels, less than 21 x 8"):
        decode(wide, min_size=(21, 8))
    with pytest.raises(BadImage):
        decode(wide, min_size=(8, 41))


def test_the_trainers_probe_asks_20_neighbours(tmp_path):
    names = ClassLabel(names=["red", "green"])
    write_split(
        tmp_path, "train", {"image": [encoded([v] * 3) for v in (100, *[101] * 25)], "label": [0] + [1] * 25}, names
    )
    write_split(tmp_path, "test", {"image": [encoded([100] * 3)], "label": [1]}, names)
    preprocessor = Preprocessor(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    probe = Probe(str(tmp_path), None, "train", "test", "image", "label", preprocessor)
    embed = lambda pixels: torch.stack([torch.ones(len(pixels)), pixels.mean((1, 2, 3))], 1)  # noqa: E731
    assert probe.measure(embed, linear=False)["knn"] == 1  # the nearest one alone is of the other class


def test_every_block_is_shuffled_in_its_own_way(tmp_path):
    pictures = [picture(color=(i * 10, 5, 100), format="PNG") for i in range(24)]
    rows = {"image": [{"bytes": p, "path": None} for p in pictures]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(tmp_path / "one.parquet")
    place = {int(identity(p, 0)[0]): i for i, p in enumerate(pictures)}
    order = [
        place[x]
        for x in read(ViewStream(ImageSource(data_files=f"{tmp_path}/one.parquet"), identity, block_size=6), 24)
    ]
    blocks = [tuple(i - 6 * block for i in order[6 * block : 6 * block + 6]) for block in range(4)]
    assert all(sorted(block) == list(range(6)) for block in blocks) and len(set(blocks)) > 2


def test_layer_norm_eps_and_dropouts_are_those_of_the_configuration():
    model = tiny_model(layer_norm_eps=0.25)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.25}
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        for attention in ("eager", "sdpa"):
            dropped = tiny_model(**{name: 0.5}).train()
            dropped.set_attn_implementation(attention)
            batch = inputs(dropped.config)
            assert dropped(**batch).loss != dropped(**batch).loss, name
            assert dropped.eval()(**batch).loss == dropped(**batch).loss, name


def test_positions_in_half_precision_are_resized_in_full():
    half = sincos_positions((4, 6), 32).bfloat16()
    expected = resize_positions(half.float(), (4, 6), (7, 5)).bfloat16()
    assert torch.equal(resize_positions(half, (4, 6), (7, 5)), expected)


def test_spread_is_1_everywhere_and_0_in_one_place():
    everywhere = torch.nn.functional.normalize(torch.randn(2000, 2, 64), dim=-1)
    assert embedding_spread(everywhere).item() == pytest.approx(1, abs=0.02)
    assert embedding_spread(everywhere[:1, :1].expand(50, 2, 64)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [0, 3])
def test_a_row_that_the_ledger_has_stays_bad(tmp_path, bad):
    others.write_parquet(tmp_path / "one.parquet", [picture(color=color, format="PNG") for color in others.COLORS])

    def prepare_then(encoded):
        if encoded == picture(color=others.COLORS[bad], format="PNG"):
            raise BadImage("missing", "a server refuses, and later no more")
        return others.prepare(encoded)

    source = ImageSource(data_files=f"{tmp_path}/one.parquet")
    options = {"rows_per_file": 6, "max_bad_fraction": 0.5}
    others.embed_until_killed(source, tmp_path, 6, prepare_then, **options)
    result = embed(source, others.prepare, others.encode, tmp_path, others.FACTS, batch_size=6, **options)
    assert [record["row"] for record in others.ledger(tmp_path)] == [f"0:{bad}"] and result["bad"] == {"missing": 1}


def test_probes_meet_the_model_in_evaluation_and_leave_it_in_training(tmp_path, monkeypatch):
    made, probed, trained = [], [], []

    class Kept(builders.CANForPreTraining):
        def __init__(self, config):
            super().__init__(config)
            made.append(self)

    class Spied(torch.optim.AdamW):
        def step(self, *arguments, **options):
            trained.append(made[0].training)
            return super().step(*arguments, **options)

    def measure(self, embed, linear=True):
        if embed is not probing.raw_pixels:
            probed.append(made[0].training)
        return {
            "knn": 0.5,
            "linear_probe": 0.5,
            "num_test": 2,
            "knn_interval": [0, 1],
            "linear_probe_interval": [0, 1],
        }

    monkeypatch.setattr(builders, "CANForPreTraining", Kept)
    monkeypatch.setattr(torch.optim, "AdamW", Spied)
    monkeypatch.setattr(probing.Probe, "measure", measure)
    run_pretraining.main([*TOY, "--probe_every=1", f"--output_dir={tmp_path}"])
    assert trained == [True] * 3 and probed == [False] * 5  # before, after each step, at the end


def test_fine_tuning_follows_its_recipe(pretrained, tmp_path, monkeypatch):
    models_made, modes, augmentations = [], [], []
    make, mix, augment = finetuning.new_classifier, finetuning.mix, finetuning.Augmentation
    monkeypatch.setattr(finetuning, "new_classifier", lambda **o: models_made.append(make(**o)) or models_made[0])
    alphas = lambda o: (o["mixup_alpha"], o["cutmix_alpha"])  # noqa: E731
    monkeypatch.setattr(finetuning, "mix", lambda **o: modes.append((models_made[0].training, alphas(o))) or mix(**o))
    monkeypatch.setattr(finetuning, "Augmentation", lambda **o: augmentations.append(o) or augment(**o))
    options = {"flip_probability": 0.4, "randaugment_magnitude": 8.0, "random_erasing_probability": 0.2}
    options |= {"num_epochs": 2, "batch_size": 32, "drop_path_rate": 0.3, "mixup_alpha": 0.7, "cutmix_alpha": 0.9}
    recipe = finetuning.FineTuning(**options)
    tune(pretrained("CAN"), tmp_path / "tuned", recipe)
    assert modes == [(True, (0.7, 0.9))] * 4 and len(augmentations) == 1
    assert augmentations[0].items() >= {name: options[name] for name in list(options)[:3]}.items()
    assert models_made[0].can.layers[-1].drop_path.rate == 0.3


def test_every_generator_of_random_numbers_is_kept_apart():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    with interlude():
        first = draw()
    assert draw() == first


def test_the_seed_reaches_all_that_is_drawn(models, colours, tmp_path, monkeypatch):
    pytest.importorskip("imagecorruptions")
    seeds = {}
    where = {"load_labelled": command, "few_shot_predictions": few_shot, "linear_probe": linear,
             "bootstrap_interval": protocol, "untrained": entries}  # fmt: skip
    for name, module in where.items():
        function = getattr(module, name)

        def spy(*arguments, name=name, function=function, **keywords):
            bound = inspect.signature(function).bind(*arguments, **keywords)
            bound.apply_defaults()
            seeds.setdefault(name, set()).add(bound.arguments["seed"])
            return function(*arguments, **keywords)

        monkeypatch.setattr(module, name, spy)
    corrupted = []

    class Spied(robustness.Corrupted):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            corrupted.append(self.seed)

    monkeypatch.setattr(robustness, "Corrupted", Spied)
    run_eval.main(options(models, colours, tmp_path, "can", task="few_shot,linear_probe,robustness", shots=2, seed=7,
                          num_draws=2, test_size=0.3, corruptions="noise", baselines="untrained"))  # fmt: skip
    assert len(seeds) == 5 and all(values == {7} for values in seeds.values()), seeds
    assert corrupted[-1] == 7  # the first only checks


def test_a_resumed_run_cuts_its_ledger_back(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.effect_noise((60, 50), 60).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    argv = [*TOY, f"--data_dir={tmp_path / 'images'}", f"--output_dir={tmp_path / 'out'}", "--probe_dataset_name=none",
            "--dataloader_num_workers=0"]  # fmt: skip
    run_pretraining.main([*argv, "--max_steps=2", "--save_steps=1"])
    ledger = tmp_path / "out" / "bad_samples.jsonl"
    ledger.write_text(json.dumps({"reason": "missing"}) + "\n")  # as if written after the checkpoint
    results = run_pretraining.main([*argv, "--max_steps=3", "--save_steps=9", "--resume_from_checkpoint=latest"])
    assert results["bad_samples"] == {} and ledger.read_text() == ""


def test_the_logged_loss_is_the_weighted_sum():
    config = tiny_config()
    terms = {
        "contrastive_loss": torch.tensor(5.0),
        "reconstruction_loss": torch.tensor(0.5),
        "denoising_loss": torch.tensor(2.0),
    }
    metrics = a_step.step_metrics(terms, config, torch.tensor(1.0))
    assert metrics["loss"].item() == pytest.approx(0.03 * 5 + 0.67 * 0.5 + 0.3 * 2 / (0.05**2 / 3))


def test_jitter_and_blur_are_as_strong_as_asked():
    torch.manual_seed(0)
    views = torch.randint(60, 190, (16, 2, 3, 16, 16), dtype=torch.uint8)

    def change(**options):
        augment = Augmentation(mean=(0,) * 3, std=(1,) * 3, blur_kernel_size=5, **{**OFF, **options})
        return (augment(views) - views / 255).abs().mean().item()

    for name, probability, weak, strong in (
        ("color_jitter", "color_jitter_probability", (0.01, 0, 0, 0), (0.6, 0, 0, 0)),
        ("blur_sigma", "blur_probability", (0.1, 0.11), (2.0, 2.1)),
    ):
        assert change(**{name: weak, probability: 1.0}) < 0.01 < 0.05 < change(**{name: strong, probability: 1.0})


def test_every_version_of_a_picture_draws_anew():
    robustness = pytest.importorskip("test_robustness")
    versions = robustness.Corrupted(robustness.preprocessor(), ["gaussian_noise"], (3, 3))(robustness.encoded(0), 0)
    assert not torch.equal(versions[0], versions[1])
