"""Fine-tuning, on images of a few colors."""

import io
import logging
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from colored_images import NAMES, QUICK, SMALL, labeled_images, tune
from PIL import Image
from testing_utils import free_port, run_processes
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForMaskedImageModeling,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from modeling_can import CANConfig, CANForImageClassification, CANForPreTraining
from modeling_can.data.crops import RandomCrops
from modeling_can.evaluation import classifier, finetuning
from modeling_can.evaluation.classifier import class_predictions
from modeling_can.evaluation.encoders import load_encoder
from modeling_can.evaluation.features import Extractor, Processes
from modeling_can.evaluation.finetuning import FineTuning, finetune
from modeling_can.evaluation.linear_sgd import linear_probe_sgd
from modeling_can.evaluation.preprocessors import load_preprocessor
from modeling_can.evaluation.robustness import Robustness
from modeling_can.evaluation.settings import Settings
from modeling_can.optimization import layer_groups


# --- Parameters ------------------------------------------------------------------------------------------------------


DEPTH = 4
CLASSIFIERS = {
    "CAN": lambda: CANForImageClassification(CANConfig(**{**SMALL, "num_hidden_layers": DEPTH})),
    "ViT and ViT-MAE": lambda: ViTForImageClassification(ViTConfig(**{**SMALL, "num_hidden_layers": DEPTH})),
    "DINOv2": lambda: Dinov2ForImageClassification(Dinov2Config(**{**SMALL, "num_hidden_layers": DEPTH})),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_layers_learn_at_the_rates_of_the_formula(kind):
    model = CLASSIFIERS[kind]()
    groups = layer_groups(model, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, *_ in found) == sorted(names.values())  # each exactly once
    parameters = dict(model.named_parameters())
    for name, scale, decay in found:
        expected = {f".{layer}.": 0.5 ** (DEPTH - layer) for layer in range(DEPTH)}
        layer = next((key for key in expected if key in name and "layer" in name.split(key)[0]), None)
        if layer is None:
            assert ("embeddings" in name) != name.startswith("classifier") or "layernorm" in name
        assert scale == expected.get(layer, 0.5 ** (DEPTH + 1) if "embeddings" in name else 1.0), name
        plain = parameters[name].ndim == 1 or any(x in name for x in ("cls_token", "mask_token", "position"))
        assert decay == (0.0 if plain else 0.05), name
    assert len({scale for _, scale, _ in found}) == DEPTH + 2


def test_layer_decay_needs_numbered_layers():
    model = ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 2, 1, 1], image_size=32)
    )
    with pytest.raises(ValueError, match="layer_decay=0.65 needs layers.* use layer_decay=1"):
        layer_groups(model, 0.05, 0.65)
    groups = layer_groups(model, 0.05, 1.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["lr_scale"] for group in groups} == {1.0}


# --- Fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("CAN", (16, 24)), ("ViT", (24, 16)), ("DINOv2", None), ("ViT-MAE", None)])
def test_fine_tuning_learns_and_leaves_a_model_that_others_load(pretrained, tmp_path, kind, size):
    """At the encoder's own size, and at another one."""
    name, folder, test = pretrained(kind), tmp_path / "tuned", labeled_images(40, seed=1)
    preprocessor = load_preprocessor(name, size)
    torch.manual_seed(0)
    before = classifier.new_classifier(name, NAMES, preprocessor.image_size)
    untrained = (class_predictions(before.eval(), preprocessor, test) == test.labels).mean()
    model, facts = tune(name, folder, size=size)
    predictions = class_predictions(model, preprocessor, test)
    assert untrained < 0.6 and (predictions == test.labels).mean() > 0.9
    assert facts["num_steps"] == 32 and facts["batch_size"] == 16
    assert facts["learning_rate"] == pytest.approx(0.1 * 16 / 256)

    start = before.state_dict()
    for parameter, value in model.named_parameters():
        moved = not torch.equal(value, start[parameter])
        assert moved != parameter.endswith("mask_token"), parameter  # which DINOv2 uses in pre-training alone
        assert value.requires_grad == moved, parameter  # DDP waits for what could move
    assert before.classifier.weight.std() < 3e-5 and not before.classifier.bias.any()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]
    classify = pipeline("image-classification", model=str(folder))
    images = [Image.open(io.BytesIO(test.read(row))) for row in range(40)]
    labels = [answers[0]["label"] for answers in classify(images)]
    assert labels == [NAMES[label] for label in predictions]
    saved = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = torch.rand(2, 3, *preprocessor.image_size)
    torch.testing.assert_close(saved(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    assert saved.config.label2id == {label: i for i, label in enumerate(NAMES)}
    encoder = load_encoder(str(folder))
    features = encoder(pixels)["mean"]
    assert encoder.preprocessor.image_size == preprocessor.image_size
    if kind == "CAN":  # whose head is on the mean of the patches
        torch.testing.assert_close(model.classifier(features), model(pixels).logits)


def test_every_layer_moves_at_its_own_rate(pretrained, tmp_path):
    """The first step of Adam is the learning rate itself, whatever the gradient."""
    name = pretrained("CAN")
    recipe = FineTuning(num_epochs=1, batch_size=64, base_learning_rate=0.04, layer_decay=0.1, weight_decay=0.0,
                        warmup_ratio=0.0, drop_path_rate=0.0)  # fmt: skip
    model, _ = tune(name, tmp_path / "tuned", recipe)
    torch.manual_seed(0)
    before = classifier.new_classifier(name, NAMES, (16, 16)).state_dict()
    moved = {key: (value - before[key]).abs().max().item() for key, value in model.state_dict().items()}
    powers = {
        "can.embeddings.patch_embeddings.bias": 3,
        "can.layers.0.mlp.fc1.weight": 2,
        "can.layers.1.mlp.fc1.weight": 1,
        "can.layernorm.weight": 0,
        "classifier.weight": 0,
    }
    for part, power in powers.items():
        assert moved[part] == pytest.approx(0.04 / 4 * 0.1**power, rel=0.05), part


def test_a_run_is_what_a_plain_loop_makes_of_it(pretrained, tmp_path):
    """Every step on all images, so that only the crops differ; nothing is shared with the trainer but the crops."""
    name, train = pretrained("CAN"), labeled_images(32)
    preprocessor = load_preprocessor(name)
    recipe = FineTuning(num_epochs=4, batch_size=32, base_learning_rate=0.08, layer_decay=1, weight_decay=0.3,
                        warmup_ratio=0.25, label_smoothing=0.2, drop_path_rate=0.0, mixup_alpha=0, cutmix_alpha=0,
                        flip_probability=0, randaugment_magnitude=0, random_erasing_probability=0)  # fmt: skip
    model, facts = tune(name, tmp_path / "tuned", recipe, train)
    torch.manual_seed(0)
    plain = classifier.new_classifier(name, NAMES, (16, 16))
    matrices, others = [], []
    for key, parameter in plain.named_parameters():
        (matrices if key.endswith("weight") and "norm" not in key else others).append(parameter)
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0}])
    view = RandomCrops((16, 16), scale=(0.08, 1), num_views=1)
    target = 0.8 * torch.eye(4)[torch.from_numpy(train.labels)] + 0.2 / 4
    losses = []
    for step, rate in enumerate([0.005, 0.01, 0.0075, 0.0025]):  # 0.08 * 32 / 256, warmed up and down again
        pixels = torch.cat([view(train.read(row), epoch=step) for row in range(32)])
        loss = -(target * plain(preprocessor.normalize(pixels)).logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert facts["num_steps"] == 4 and facts["final_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    for (key, value), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not key.endswith("k_proj.bias"):  # see below
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=key)


def test_another_size_leaves_the_function_as_it_was(pretrained):
    for kind in ("CAN", "ViT"):
        name = pretrained(kind)
        torch.manual_seed(0)
        at_home = classifier.new_classifier(name, NAMES, (16, 16)).eval()
        resized = classifier.at_size(at_home, (24, 32)).eval()
        pixels = torch.rand(2, 3, 24, 32)
        expected = at_home(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(resized(pixels).logits, expected)


def test_the_whole_recipe_runs_also_on_gray_images(tmp_path, caplog):
    name = str(tmp_path / "gray")
    CANForPreTraining(CANConfig(**SMALL, num_channels=1)).save_pretrained(name)
    ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    ).save_pretrained(name)
    train, recipe = labeled_images(24, channels=1), FineTuning(num_epochs=2, batch_size=1024)
    with caplog.at_level(logging.WARNING):
        first = tune(name, tmp_path / "one", recipe, train)
    assert "RandAugment leaves out color" in caplog.text
    assert "a step takes 24 images: there are no more than 24 to train on" in caplog.text
    second = tune(name, tmp_path / "two", recipe, train)
    other = tune(name, tmp_path / "three", recipe, train, seed=1)
    assert first.facts["final_loss"] == second.facts["final_loss"] != other.facts["final_loss"]  # reproducible
    assert math.isfinite(first.facts["final_loss"])


def test_fine_tuning_leaves_random_numbers_alone(pretrained, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(pretrained("CAN"), tmp_path / "tuned", FineTuning(num_epochs=1, batch_size=64))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_image_half_of_a_pair_is_fine_tuned(tmp_path, rank):
    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = SiglipConfig(text_config={**text, "vocab_size": 9}, vision_config=SMALL)
    SiglipModel(config).save_pretrained(tmp_path / "pair")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "pair")
    recipe = FineTuning(**{**vars(QUICK), "num_epochs": 1, "lora_rank": rank, "layer_decay": None})
    model, _ = tune(str(tmp_path / "pair"), tmp_path / "tuned", recipe)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    pixels = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    encoder = load_encoder(str(tmp_path / "tuned")).eval()  # without the text encoder, which is gone
    expected = again.vision_model(pixels).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder(pixels)["mean"], expected)
    setup = SimpleNamespace(settings=Settings(model_name_or_path=("tuned",), dataset_name="colors"))
    setup.data = SimpleNamespace(class_names=NAMES)
    entry = SimpleNamespace(path=str(tmp_path / "tuned"), encoder=encoder)
    assert not Robustness().needs_features(setup, entry)  # as it has a classifier of these classes
    with pytest.raises(
        ValueError, match=r"made for \(16, 16\) cannot be fine-tuned at \(32, 32\); use --image_size 16"
    ):
        classifier.new_classifier(str(tmp_path / "pair"), NAMES, (32, 32))


def test_a_pretrained_beit_gets_the_norm_of_its_pooler_with_the_new_classifier(tmp_path):
    BeitForMaskedImageModeling(BeitConfig(**SMALL)).save_pretrained(tmp_path)
    model = classifier.new_classifier(str(tmp_path), NAMES, (16, 16))
    assert (model.beit.pooler.layernorm.weight == 1).all() and not model.beit.pooler.layernorm.bias.any()


def test_lora_trains_adapters_and_head_and_is_merged(pretrained, tmp_path, monkeypatch):
    from peft import PeftModel

    name, folder, kept = pretrained("CAN"), tmp_path / "tuned", {}
    save = finetuning.save

    def look(model, *arguments):
        kept["trained"] = {n for n, p in model.named_parameters() if p.requires_grad}
        kept["pixels"] = torch.rand(3, 3, 16, 16)
        kept["logits"] = model(pixel_values=kept["pixels"]).logits.detach()
        kept["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}
        return save(model, *arguments)

    monkeypatch.setattr(finetuning, "save", look)
    recipe = FineTuning(**{**vars(QUICK), "lora_rank": 4, "base_learning_rate": 0.2, "layer_decay": None})
    model, facts = tune(name, folder, recipe)
    assert kept["trained"] and all("lora_" in n or "classifier.modules_to_save" in n for n in kept["trained"])
    start = CANForPreTraining.from_pretrained(name).can.state_dict()
    for parameter, value in kept["weights"].items():
        if parameter in kept["trained"]:
            assert "lora_B" not in parameter or value.any(), parameter  # they begin at zero
        elif "original_module" not in parameter:
            there = parameter.removeprefix("base_model.model.can.").replace(".base_layer", "")
            torch.testing.assert_close(value, start[there], rtol=0, atol=0)
    linear = [m for m in CANForPreTraining.from_pretrained(name).can.modules() if isinstance(m, nn.Linear)]
    assert sum("lora_A" in n for n in kept["trained"]) == len(linear)
    head = model.classifier.weight.numel() + model.classifier.bias.numel()
    assert facts["num_trained_parameters"] == head + sum(4 * (m.in_features + m.out_features) for m in linear)

    logits = kept["logits"]
    assert not any("lora" in n for n, _ in model.named_parameters())
    torch.testing.assert_close(model(kept["pixels"]).logits, logits, rtol=1e-4, atol=1e-5)
    saved = AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(saved(kept["pixels"]).logits, logits, rtol=1e-4, atol=1e-5)
    fresh = classifier.new_classifier(name, NAMES, (16, 16))
    assert sorted(path.suffix for path in (folder / "adapter").iterdir()) == [".json", ".safetensors"]
    adapted = PeftModel.from_pretrained(fresh, folder / "adapter").eval()
    torch.testing.assert_close(adapted(pixel_values=kept["pixels"]).logits, logits, rtol=1e-4, atol=1e-5)
    test = labeled_images(40, seed=1)
    assert (class_predictions(model, load_preprocessor(str(folder)), test) == test.labels).mean() > 0.9


# --- Processes -------------------------------------------------------------------------------------------------------


EXACT = FineTuning(
    num_epochs=2,
    batch_size=16,
    base_learning_rate=0.05,
    drop_path_rate=0.0,
    flip_probability=0.5,
    random_erasing_probability=0.0,
)  # fmt: skip  crops, flips, RandAugment, mixup and cutmix are on


def both_tasks(rank, world_size, name, folder, port=None):
    """Weights and figures of fine-tuning and of the probe, on this one of the processes."""
    if port is not None:  # for accelerate, which meets a group that is there
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}  # fmt: skip
        os.environ.update({key: str(value) for key, value in place.items()})
    accelerator, train = Accelerator(cpu=True), labeled_images(70)
    assert accelerator.num_processes == world_size
    answers, seeds, clean = {}, [], finetuning.mix
    finetuning.mix = lambda **options: seeds.append(torch.initial_seed()) or clean(**options)
    for parts in (1, 2):
        recipe = FineTuning(**{**vars(EXACT), "gradient_accumulation_steps": parts})
        model, facts = finetune(
            name, train, NAMES, load_preprocessor(name), accelerator, f"{folder}-{world_size}-{parts}", recipe
        )
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        answers[f"fine-tuned in {parts}"] = facts["final_loss"], weights
    gather_object = list if world_size == 1 else accelerate_gather
    finetuning.mix, answers["seeds"] = clean, seeds
    probe = linear_probe_sgd(
        load_encoder(name), train, 4, num_epochs=2, batch_size=16,
        processes=Processes(rank, world_size, gather_object), gather=accelerator.gather,
    )  # fmt: skip
    weights = {key: value.detach().numpy() for key, value in probe.heads.state_dict().items()}
    processes = Processes(rank, world_size, gather_object)
    predictions = probe.predict(labeled_images(30, seed=1), Extractor(batch_size=8, processes=processes))
    answers["probe"] = probe.table[probe.chosen]["held_out_accuracy"], weights
    assert (predictions is None) == (rank > 0)
    answers["predictions"] = predictions
    return answers


def accelerate_gather(items: list) -> list:
    from accelerate.utils import gather_object

    return gather_object(items)


@pytest.mark.slow
def test_two_processes_do_what_one_does(pretrained, tmp_path):
    name = pretrained("CAN")
    (one,) = (both_tasks(0, 1, name, tmp_path / "tuned"),)
    two = run_processes(both_tasks, 2, name, tmp_path / "tuned", free_port())
    start = CANForPreTraining.from_pretrained(name).can.layernorm.weight
    assert not np.allclose(one["fine-tuned in 1"][1]["can.layernorm.weight"], start.detach().numpy(), atol=1e-3)
    for task in ("fine-tuned in 1", "fine-tuned in 2", "probe"):
        loss, weights = one["fine-tuned in 1" if task != "probe" else "probe"]
        for other_loss, other_weights in (one[task], *(answers[task] for answers in two)):
            assert other_loss == pytest.approx(loss, abs=1e-5), task
            for key, value in weights.items():
                # What is added to all keys changes no attention: its gradient is rounding, which AdamW makes steps of.
                atol = 1e-3 if key.endswith("k_proj.bias") else 1e-5
                np.testing.assert_allclose(other_weights[key], value, atol=atol, err_msg=f"{task} {key}")
    np.testing.assert_array_equal(two[0]["predictions"], one["predictions"])
    seeds = [answers["seeds"][:8] for answers in two]  # of what each process draws for itself, one a step
    assert len(set(seeds[0] + seeds[1])) == 16 and one["seeds"][:8] == seeds[0]


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": 0}, "num_epochs=0 must be at least 1"),
        ({"base_learning_rate": math.inf}, "base_learning_rate=inf must be finite"),
        ({"mixup_alpha": -1.0}, "mixup_alpha=-1.0 must be at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is outside \[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate=-0.1 is outside \[0, 1\)"),
        ({"flip_probability": 1.5}, r"flip_probability=1.5 is outside \[0, 1\]"),
        ({"warmup_ratio": 2.0}, r"warmup_ratio=2.0 is outside \[0, 1\]"),
        ({"randaugment_magnitude": 11.0}, "randaugment_magnitude=11.0 is outside"),
        ({"layer_decay": 1.1}, r"layer_decay=1.1 is outside \(0, 1\]"),
        ({"layer_decay": 0.9, "lora_rank": 4}, "layer_decay=0.9 with lora_rank=4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FineTuning(**changes)


def test_what_is_left_open_follows_the_method():
    assert (FineTuning().base_learning_rate, FineTuning().layer_decay) == (5e-4, 0.65)
    assert FineTuning(lora_rank=8).layer_decay == 1


def test_fine_tuning_refuses_what_cannot_be(pretrained, tmp_path, monkeypatch):
    name = pretrained("CAN")
    with pytest.raises(ValueError, match="batch_size=15 is not a multiple of 2 .*processes x .*in pairs.*; use 16"):
        tune(name, tmp_path / "tuned", FineTuning(batch_size=15))
    with pytest.raises(ValueError, match="1 images to train on are fewer than a step needs, 2"):
        tune(name, tmp_path / "tuned", QUICK, train=labeled_images(1))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").touch()
    with pytest.raises(ValueError, match="there is not empty; give a new folder"):
        tune(name, tmp_path / "there")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank=4 needs peft: pip install -e \"\.\[lora\]\" -c constraints.txt"):
        tune(name, tmp_path / "tuned", FineTuning(lora_rank=4))
    assert not (tmp_path / "tuned").exists()


def test_a_processor_of_another_kind_is_refused(pretrained, tmp_path):
    preprocessor = load_preprocessor(pretrained("CAN"))
    preprocessor.in_two_steps = False
    with pytest.raises(ValueError, match="does more than resize, crop, rescale and normalize"):
        finetune(
            pretrained("CAN"), labeled_images(8), NAMES, preprocessor, Accelerator(cpu=True), tmp_path / "x", QUICK
        )


def test_a_gradient_that_is_not_finite_stops_before_the_update(pretrained, tmp_path, monkeypatch):
    """Nothing is saved, and the weights are those of the step before."""
    kept, clean = [], finetuning.mix

    def poisoned(images, step, **options):
        kept.append([p.detach().clone() for p in spied[0].parameters()])
        return clean(images * (math.nan if step == 3 else 1), step=step, **options)

    spied, make = [], finetuning.new_classifier
    monkeypatch.setattr(finetuning, "new_classifier", lambda **options: spied.append(make(**options)) or spied[0])
    monkeypatch.setattr(finetuning, "mix", poisoned)
    monkeypatch.setattr(finetuning, "LOG_STEPS", 4)
    with pytest.raises(FloatingPointError, match="gradient of step 3 was not finite.*of the images in rows"):
        tune(pretrained("CAN"), tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists() and len(kept) == 4
    moved = [not torch.equal(one, two) for one, two in zip(kept[2], kept[3], strict=True)]
    assert any(moved)
    assert all(torch.equal(one, two) for one, two in zip(kept[3], spied[0].parameters(), strict=True))


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
