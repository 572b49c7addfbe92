"""The script as a user runs it, at toy size."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from testing_utils import ROOT, TOY, free_port
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

import run_pretraining
from modeling_can.configuration_can import MAE, SIMCLR
from modeling_can.pretraining import builders, loop, probing
from modeling_can.pretraining.plan import _number_of_steps as number_of_steps
from modeling_can.pretraining.recipe import Recipe
from modeling_can.pretraining.run_log import refuse_non_finite


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished toy run of the quickstart recipe, probe included."""
    folder = tmp_path_factory.mktemp("run") / "can-toy"
    results = run_pretraining.main([*TOY, "--output_dir", str(folder)])
    return folder, results


def test_the_output_folder_is_complete(finished):
    folder, results = finished
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "recipe.yaml",
                "metrics.jsonl", "results.json", "figures", "tensorboard"}  # fmt: skip
    expected |= {"configuration_can.py", "losses.py", "modeling_can.py"}  # the code that loads it without the package
    assert {path.name for path in folder.iterdir()} == expected
    figures = {path.name: min(Image.open(path).size) for path in (folder / "figures").iterdir()}
    assert figures.keys() == {"curves.png", "features.png", "reconstructions.png"}
    assert min(figures.values()) > 300
    assert json.loads((folder / "results.json").read_text()) == results
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert {"loss", "contrastive_loss", "reconstruction_loss", "denoising_loss", "grad_norm", "learning_rate",
            "images_per_second", "data_wait", "embedding_spread", "num_bad"} <= lines[0].keys()  # fmt: skip
    assert set(results["probe"]) == {"raw pixels", "untrained encoder", "CAN, pre-trained"}
    recipe = Recipe.from_dict(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert recipe.max_steps == 3 and recipe.config.hidden_size == 32


def test_the_saved_model_is_the_full_trained_one(finished):
    folder, _ = finished
    model = AutoModelForPreTraining.from_pretrained(folder)
    config = model.config
    torch.manual_seed(0)
    fresh = type(model)(config)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, fresh.get_parameter(name))]
    assert len(moved) == len(list(model.named_parameters()))
    processor = AutoImageProcessor.from_pretrained(folder)
    for mode in ("RGB", "L", "RGBA", "P"):
        pixels = processor(Image.new(mode, (90, 50)), return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, 32, 32)
    encoder = AutoModel.from_pretrained(folder)
    assert encoder(pixels).pooler_output.shape == (1, 32)


def test_the_card_has_its_figures_and_its_snippets_run(finished, monkeypatch, tmp_path, capsys):
    """More on cards: tests/hub/test_card.py."""
    folder, results = finished
    card = (folder / "README.md").read_text()
    figures = re.findall(r"\]\((figures/[^)]+)\)", card)
    assert len(figures) == 3 and all((folder / figure).exists() for figure in figures)
    assert f"{100 * results['probe']['CAN, pre-trained']['knn']:.1f}" in card
    assert results["train_flops"] == 24 * results["flops_per_image"] > 0
    for features in results["probe"].values():
        for probe in ("knn", "linear_probe"):
            low, high = features[f"{probe}_interval"]
            assert 0 < low < features[probe] < high < 1 and 0.05 < high - low < 0.1  # of 720 test images
    shutil.copytree(folder, tmp_path / "shipped")  # the snippets' cache and image do not belong into the run's folder
    Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "shipped" / "photo.jpg")
    monkeypatch.chdir(tmp_path / "shipped")
    scope, snippets = {}, re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for snippet in snippets:
        exec(snippet, scope)
    assert len(snippets) == 3 and scope["embedding"].shape == (1, 32)
    assert torch.allclose(torch.tensor(scope["pooled"]), scope["embedding"], atol=1e-6)
    assert scope["predicted"].shape == (2 * 2 * 32, 4 * 4 * 3) and str(scope["output"].loss) in capsys.readouterr().out


def test_the_readmes_snippet_runs(finished, monkeypatch, tmp_path):
    snippet = re.search(r"```python\n(import modeling_can.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(
        1
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(snippet.replace('"model_cards/can-toy-patch4-32-cifar10"', repr(str(finished[0]))), scope)
    assert scope["embedding"].shape == (1, 32)


def test_a_finished_run_is_not_overwritten_unless_asked(finished, tmp_path):
    folder, results = finished
    with pytest.raises(ValueError, match="already holds a finished run.*--overwrite_output_dir"):
        run_pretraining.main([*TOY, "--output_dir", str(folder)])
    assert json.loads((folder / "results.json").read_text()) == results


def test_a_job_that_starts_again_after_its_end_does_no_harm(finished, tmp_path, capfd):
    folder, results = finished
    weights = (folder / "model.safetensors").read_bytes()
    assert run_pretraining.main([*TOY, "--output_dir", str(folder), "--resume_from_checkpoint=latest"]) == results
    told, from_weights = capfd.readouterr().out, f"--model_name_or_path {folder} --output_dir NEW"
    assert "is finished: nothing to do" in told and from_weights in told and "raise" not in told
    for options in (["--max_steps=9"], []):  # there is no checkpoint to go on from, or it is another run's
        wanted = "latest" if options else str(tmp_path / "checkpoints" / "step-2")
        with pytest.raises(ValueError, match=f"already holds a finished run.*no checkpoint: .*{from_weights}"):
            run_pretraining.main([*TOY, "--output_dir", str(folder), f"--resume_from_checkpoint={wanted}", *options])
    with pytest.raises(ValueError, match="is model_name_or_path, whose weights it would replace"):
        run_pretraining.main([*TOY, f"--output_dir={folder}", f"--model_name_or_path={folder}"])
    assert (folder / "model.safetensors").read_bytes() == weights


def test_what_no_run_wrote_stays(tmp_path):
    (tmp_path / "tsconfig.json").write_text("{}")
    (tmp_path / "bad_samples.jsonl").write_text("{}\n")  # of a run that was killed before its first line
    run_pretraining.main([*TOY, "--output_dir", str(tmp_path), "--probe_dataset_name=none"])
    assert (tmp_path / "tsconfig.json").exists() and not (tmp_path / "bad_samples.jsonl").exists()


def test_accelerates_own_accumulation_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(ValueError, match="would divide the loss once more; give --gradient_accumulation_steps after"):
        run_pretraining.main([*TOY, "--output_dir", str(tmp_path)])


def test_the_same_seed_gives_the_same_run_and_another_one_another(finished, tmp_path):
    _, results = finished
    again = run_pretraining.main(
        [*TOY, "--output_dir", str(tmp_path), "--overwrite_output_dir", "--probe_dataset_name", "none"]
    )
    assert again["final_losses"] == results["final_losses"] and "probe" not in again
    other = run_pretraining.main(
        [*TOY, "--output_dir", str(tmp_path), "--overwrite_output_dir", "--probe_dataset_name", "none", "--seed", "1"]
    )
    assert other["final_losses"] != results["final_losses"]


def test_a_folder_of_images_trains_for_epochs_with_bad_files_counted(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(16):
        Image.effect_noise((60 + i, 50), 60).convert("RGB").save(images / f"{i}.jpg")
    (images / "broken.jpg").write_bytes(b"not an image")
    results = run_pretraining.main(
        [
            "--data_dir",
            str(images),
            "--num_train_epochs",
            "2",
            "--per_device_train_batch_size",
            "8",
            "--output_dir",
            str(tmp_path / "out"),
            "--probe_dataset_name",
            "none",
            "--blur_probability",
            "0.5",
            "--dataloader_num_workers",
            "1",
            "--max_grad_norm",
            "1",
            "--crop_scale",
            "0.5,1",
            "--max_bad_fraction",
            "0.1",
            "--measure_mean_std",
        ]  # fmt: skip
    )
    assert results["num_images"] == 17 and results["num_steps"] == round(2 * 17 / 8)
    assert results["bad_samples"] == {"not_an_image": 1}
    (line,) = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(images / "broken.jpg")
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert not recipe["measure_mean_std"] and all(0.4 < mean < 0.6 for mean in recipe["image_mean"])  # noise about 128


def test_a_data_set_built_in_python_trains_and_too_many_bad_images_stop_the_run(tmp_path):
    images = [Image.effect_noise((40, 40), 60).convert("RGB") for _ in range(16)]
    options = ["--output_dir", str(tmp_path / "out"), "--probe_dataset_name", "none"]
    results = run_pretraining.main([*TOY, *options], Dataset.from_dict({"image": images}))
    assert results["num_images"] == 16
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["dataset_name"] is None
    rows = Dataset.from_dict({"image": [None, *images]})
    with pytest.raises(ValueError, match=r"1 of 17 images .* max_bad_fraction=0.01; .*--max_bad_fraction"):
        run_pretraining.main([*TOY, *options, "--overwrite_output_dir"], rows)


def test_it_trains_in_a_thread_too(tmp_path):
    """As in a notebook's server or an app, where Python delivers no signals."""
    rows = Dataset.from_dict({"image": [Image.effect_noise((40, 40), 60).convert("RGB") for _ in range(16)]})
    options = ["--output_dir", str(tmp_path / "out"), "--probe_dataset_name", "none"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_pretraining.main, [*TOY, *options], rows).result()["num_images"] == 16


@pytest.mark.slow
def test_grayscale_non_square_images_train_probe_and_draw(tmp_path):
    settings = {"num_channels": 1, "image_mean": 0.5, "image_std": 0.2, "image_size": "32,48", "norm_pix_loss": True}
    results = run_pretraining.main([*TOY, "--output_dir", str(tmp_path / "out"), *flags(settings)])
    assert results["probe"]["CAN, pre-trained"]["knn"] > 0
    assert (tmp_path / "out" / "figures" / "reconstructions.png").exists()


@pytest.mark.slow
def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        run_pretraining.main(["--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out")])
    (tmp_path / "images" / "a.jpg").write_bytes(b"text")
    command = [sys.executable, str(ROOT / "run_pretraining.py"), "--data_dir", str(tmp_path / "images"),
               "--output_dir", str(tmp_path / "out"), "--probe_dataset_name", "none"]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "none of the first 1 images can be read" in answer.stderr
    assert answer.stderr.endswith("a.jpg: no image in its 4 bytes: text, 'text'\n")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [SIMCLR, MAE], ids=["SimCLR", "MAE"])
def test_the_limits_of_the_dial_train_under_two_processes(tmp_path, limit):
    # --multi_gpu is accelerate's word for several processes; without a GPU they talk over gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port()), str(ROOT / "run_pretraining.py"), *TOY,
               "--output_dir", str(tmp_path / "out"), "--probe_dataset_name", "none", *flags(limit)]  # fmt: skip
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_processes"] == 2 and results["global_batch_size"] == 16
    assert results["frozen"] == (["decoder"] if limit is SIMCLR else ["projection_head"])


@pytest.mark.parametrize("caching", [True, False])
def test_accumulation_trains_with_more_negatives_or_the_same(tmp_path, caching):
    options = {"output_dir": tmp_path, "gradient_accumulation_steps": 4, "gradient_caching": caching,
               "per_device_train_batch_size": 4, "probe_dataset_name": "none", "max_steps": 1}  # fmt: skip
    results = run_pretraining.main([*TOY, *flags(options)])
    assert results["global_batch_size"] == 16
    # At the start InfoNCE is about the logarithm of the number of candidates: 31, or 7.
    assert abs(results["final_losses"]["contrastive_loss"] - math.log(31 if caching else 7)) < 0.6


def test_lengths_are_derived_once():
    recipe = Recipe.from_dict({"data_dir": "x", "num_train_epochs": 2.5})
    assert number_of_steps(recipe, 10, 100) == 25
    with pytest.raises(ValueError, match="--num_train_samples or --max_steps"):
        number_of_steps(recipe, 10, None)
    recipe = Recipe.from_dict({"data_dir": "x", "num_train_samples": 64})
    assert number_of_steps(recipe, 16, None) == 4


def test_non_finite_numbers_stop_the_run_with_the_terms():
    averages = {"loss": 1.0, "grad_norm": float("nan")}
    with pytest.raises(FloatingPointError, match="grad_norm not finite by step 5: loss 1.0.*base_learning_rate"):
        refuse_non_finite(5, averages, "stop")
    refuse_non_finite(5, averages, "skip")


@pytest.mark.slow
@pytest.mark.parametrize("name, num_images", [("photos", 1000), ("cifar10", 50_000)])
def test_parquet_shards_of_others_are_read_and_trained_on(tmp_path, name, num_images):
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/data/{name}")
    results = run_pretraining.main(
        [*TOY, "--data_files", f"{folder}/train-*.parquet", "--output_dir", str(tmp_path), "--probe_dataset_name=none"]
    )
    assert results["num_images"] == num_images and results["bad_samples"] == {}


@pytest.mark.slow
def test_the_quickstart_learns_as_promised(tmp_path):
    """
    The README's command: all three terms learn; +4 points over the untrained encoder in both, +25 over pixels in the
    linear probe. (The card's seeds gain 5.3 to 10.1. Another kind of CPU rounds otherwise, like another seed.)
    """
    command = [sys.executable, str(ROOT / "run_pretraining.py"), "--output_dir", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(command, check=True, timeout=900, env=environment)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["health"][0].startswith("healthy: C ") and " N " in results["health"][0]
    probe = results["probe"]
    pixels, untrained, trained = (probe[name] for name in ("raw pixels", "untrained encoder", "CAN, pre-trained"))
    assert trained["knn"] >= untrained["knn"] + 0.04
    assert trained["linear_probe"] >= untrained["linear_probe"] + 0.04
    assert trained["linear_probe"] >= pixels["linear_probe"] + 0.25


def test_machine_and_commit_are_those_of_the_start(tmp_path, monkeypatch):
    train, known = loop.train, []
    monkeypatch.setattr(loop, "train", lambda run, first_step: known.append(dict(run.facts)) or train(run, first_step))
    results = run_pretraining.main([*TOY, f"--output_dir={tmp_path}", "--probe_dataset_name=none"])
    assert known[0]["git_commit"] == results["git_commit"] and known[0]["machine"] == results["machine"]


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


def test_a_resumed_run_cuts_its_bad_sample_log_back(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.effect_noise((60, 50), 60).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    argv = [*TOY, f"--data_dir={tmp_path / 'images'}", f"--output_dir={tmp_path / 'out'}", "--probe_dataset_name=none",
            "--dataloader_num_workers=0"]  # fmt: skip
    run_pretraining.main([*argv, "--max_steps=2", "--save_steps=1"])
    log = tmp_path / "out" / "bad_samples.jsonl"
    log.write_text(json.dumps({"reason": "missing"}) + "\n")  # as if written after the checkpoint
    results = run_pretraining.main([*argv, "--max_steps=3", "--save_steps=9", "--resume_from_checkpoint=latest"])
    assert results["bad_samples"] == {} and log.read_text() == ""
