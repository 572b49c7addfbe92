"""Measures against their definitions, the verdict against planted faults, the preflight against the peers' bugs."""

import json
import math
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image
from testing_utils import run_processes, tiny_config, tiny_model

import run_pretraining
from modeling_can import modeling_can
from modeling_can.cli import exit_status
from modeling_can.data.crops import RandomCrops
from modeling_can.losses import contrastive_loss, normalize_patches, patch_errors
from modeling_can.pretraining import builders, checks
from modeling_can.pretraining.checks import check_disk, check_positives
from modeling_can.pretraining.cost import peak_memory
from modeling_can.pretraining.health import (
    effective_rank,
    embedding_health,
    embedding_spread,
    findings,
    trivial_losses,
    verdict,
)
from modeling_can.progress import duration


TOY = ["--per_device_train_batch_size=8", "--hidden_size=32", "--num_hidden_layers=1", "--num_attention_heads=2",
       "--intermediate_size=64", "--probe_dataset_name=none", "--dataloader_num_workers=0"]  # fmt: skip


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_effective_rank_counts_directions():
    assert effective_rank(torch.eye(7, 20)) == pytest.approx(7, abs=1e-3)
    assert effective_rank(torch.ones(7, 20)) == pytest.approx(1, abs=1e-2)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 1e-9]))) == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("num_views", [2, 3])
def test_embedding_health_is_what_wang_and_isola_define(num_views):
    embeds = unit(5, num_views, 8)
    health, views = embedding_health(embeds), range(num_views)
    pairs = [(embeds[i, v], embeds[j, w]) for i in range(5) for j in range(5) if i != j for v in views for w in views]
    squares = torch.stack([(a - b).square().sum() for a, b in pairs])
    positives = torch.stack([embeds[:, v] - embeds[:, w] for v in views for w in views if v != w])
    assert health["alignment"] == pytest.approx(positives.square().sum(-1).mean().item(), abs=1e-5)
    assert health["uniformity"] == pytest.approx((-2 * squares).exp().mean().log().item(), abs=1e-5)
    cosines = torch.stack([a @ b for a, b in pairs])
    assert health["negative_similarity"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    collapsed = embedding_health(unit(1, 1, 8).expand(5, 2, 8))
    assert collapsed["uniformity"] == pytest.approx(0, abs=1e-5) and collapsed["alignment"] == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize(("norm_pix_loss", "num_views"), [(False, 2), (True, 2), (False, 4)])
def test_trivial_losses_are_those_of_trivial_models(norm_pix_loss, num_views):
    config = tiny_config(norm_pix_loss=norm_pix_loss, noise_std_max=0.5)
    pixels = torch.randn(6, num_views, 3, 32, 48) * 2 + torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    trivial = trivial_losses(config, pixels, num_contrasted=6)
    same = unit(1, 1, 8).expand(6, num_views, 8)
    assert trivial["contrastive"] == pytest.approx(contrastive_loss(same, 0.1).item(), abs=1e-4)
    if norm_pix_loss:
        target = normalize_patches(modeling_can.patchify(pixels, config.patch_shape))
        prediction = torch.zeros_like(target)
    else:
        target = modeling_can.patchify(pixels, config.patch_shape)
        channel_means = pixels.mean(dim=(0, 1, 3, 4), keepdim=True).expand_as(pixels)
        prediction = modeling_can.patchify(channel_means, config.patch_shape)
    assert trivial["reconstruction"] == pytest.approx(patch_errors(prediction, target).mean().item(), rel=1e-4)
    noise = torch.rand(10**6) * 0.5 * torch.randn(10**6)
    assert trivial["denoising"] == pytest.approx(noise.square().mean().item(), rel=0.02)


GOOD = {"contrastive_loss": 2.0, "contrastive_trivial": 5.5, "reconstruction_loss": 0.2, "reconstruction_trivial": 1.0,
        "denoising_loss": 5e-4, "denoising_trivial": 8e-4, "grad_norm": 1.0, "data_wait": 0.02, "effective_rank": 40.0,
        "negative_similarity": 0.1}  # fmt: skip


def lines(num=20, **last):
    """A good run of 1,000 steps, but for its last five lines."""
    return [{"step": 50 * (i + 1), **GOOD, **(last if i >= num - 5 else {})} for i in range(num)]


@pytest.mark.parametrize("changes, name, words", [
    ({"negative_similarity": 0.99, "effective_rank": 1.3}, "collapse", "cosine of 0.990 and fill 1.3 directions"),
    ({"contrastive_loss": 5.49}, "contrastive", "no better than guessing: 5.49 against 5.5"),
    ({"reconstruction_loss": 1.1}, "reconstruction", "no better than the mean color: 1.1 against 1"),
    ({"denoising_loss": 8e-4}, "denoising", "the noise head is hardly better than predicting zero"),
    ({"denoising_loss": 8e-4}, "denoising", "; train longer, raise noise_std_max or denoising_loss_weight, or leave "),
    ({"data_wait": 0.6}, "starving", "waits for data 60% of the time; raise dataloader_num_workers"),
    ({"grad_norm": 30.0}, "gradient", "ten times and more its median of 1"),
    ({"grad_norm": 0.0}, "no_gradient", "nothing is learned"),
    ({"knn": 0.4}, "no_better", "before training: k-NN 40.0%, untrained encoder 50.0%"),
])  # fmt: skip
def test_every_fault_has_its_sentence_and_no_other(changes, name, words):
    before = ("untrained encoder", 0.5)
    found = findings(lines(**changes), 100, 1000, before)
    assert found.keys() == {name} and words in found[name]
    assert verdict(lines(**changes), 100, 1000, before) == [found[name]]


def test_a_good_run_is_called_healthy_and_a_young_one_young():
    assert verdict(lines(), 100, 1000)[0].startswith("healthy: C 2 (trivial: 5.5), A 0.2")
    assert verdict(lines(num=2), 100, 1000) == ["too early to judge what is learned"]
    short = [{**line, "knn": 0.4} for line in lines(num=2)]
    assert verdict(short, 100, 1000, ("the start", 0.5)) == ["too early to judge what is learned"]
    (ended,) = verdict(short, 100, short[-1]["step"], ("the start", 0.5))  # however short it was
    assert ended.startswith("the features are worse than before training: k-NN 40.0%, the start 50.0%")
    assert verdict(short, 100, short[-1]["step"], ("the start", 0.3)) == ["too early to judge what is learned"]
    falling = lines()
    falling[10]["knn"], falling[-1]["knn"] = 0.8, 0.7
    assert "k-NN 70.0%, after 80.0% at step 550" in findings(falling, 100, 1000)["falling"]


def test_a_run_whose_updates_are_left_out_is_not_healthy():
    few = [{**line, "num_nonfinite": 10 + (i > 17)} for i, line in enumerate(lines())]
    assert verdict(few, 100, 1000)[0].startswith("healthy")
    names = {"step", "data_wait", "num_nonfinite"}  # what is left of lines in which no update counted
    many = [{k: v for k, v in {**line, "num_nonfinite": line["step"] - 1}.items() if k in names} for line in lines()]
    for until in (1, 20):  # also early
        (sentence,) = verdict(many[:until], 100, 1000)
        assert sentence.startswith(f"{[49, 250][until == 20]} of the last {[50, 250][until == 20]} updates were left")


def collapse(monkeypatch):
    head = modeling_can.CANProjectionHead
    forward = head.forward
    one = unit(1, 1)
    monkeypatch.setattr(
        head,
        "forward",
        lambda self, pooled: torch.nn.functional.normalize(
            one.to(pooled.device) + 1e-3 * forward(self, pooled), dim=-1
        ),  # also on the meta device, where FLOPs are counted
    )


def dead_head(monkeypatch):
    forward = modeling_can.CANDecoder.forward
    monkeypatch.setattr(modeling_can.CANDecoder, "forward", lambda *args, **kwargs: 0 * forward(*args, **kwargs))


def starving(monkeypatch):
    make = RandomCrops.__call__
    monkeypatch.setattr(RandomCrops, "__call__", lambda *args: time.sleep(0.004) or make(*args))


@pytest.mark.parametrize("fault, sentences", [
    (collapse, ["the embeddings have collapsed"]),
    (dead_head, ["no better than the mean color", "the noise head is hardly better than predicting zero"]),
    pytest.param(starving, ["the device waits for data"], marks=pytest.mark.slow),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_a_planted_fault_is_named_in_log_metrics_results_and_card(tmp_path, monkeypatch, capfd, fault, sentences):
    fault(monkeypatch)
    results = run_pretraining.main([*TOY, "--max_steps=130", "--logging_steps=10", f"--output_dir={tmp_path / 'out'}"])
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    card, log = (tmp_path / "out" / "README.md").read_text(), capfd.readouterr().out
    for sentence in sentences:
        for place in (results["health"], last["health"]):
            assert any(sentence in entry for entry in place), place
        assert sentence in card and ", health: " in log and sentence in log
        assert sentence.encode() in next((tmp_path / "out" / "tensorboard" / "out").glob("events*")).read_bytes()


# --- Preflight -------------------------------------------------------------------------------------------------------


def preflight(folder, *options) -> int:
    argv = [*TOY, "--preflight", "--max_steps=1000", f"--output_dir={folder}", *options]
    return exit_status(run_pretraining.main(argv))


def test_preflight_says_ready_and_leaves_the_folder_free(tmp_path, capfd):
    assert preflight(tmp_path) == 0
    output = capfd.readouterr().out
    assert output.strip().endswith("preflight: ready") and output.count("  ok  ") == 7 and "FAIL" not in output
    assert "images/s (measured over 10 steps" in output and "for 1000 steps of 8 images" in output
    assert min(Image.open(tmp_path / "figures" / "preflight.png").size) > 300
    run_pretraining.main([*TOY, "--max_steps=1", f"--output_dir={tmp_path}"])  # a run may begin there
    assert preflight(tmp_path, "--overwrite_output_dir") == 0 and (tmp_path / "results.json").exists()  # and stay


def test_preflight_judges_small_batches_fairly(tmp_path):
    accumulated = ["--per_device_train_batch_size=1", "--gradient_accumulation_steps=4"]
    assert preflight(tmp_path, *accumulated) == 0
    assert preflight(tmp_path, "--per_device_train_batch_size=2", "--num_hidden_layers=4", "--drop_path_rate=0.6") == 0


def test_preflight_misses_no_set_that_the_run_needs(tmp_path):
    with pytest.raises(Exception, match="nobody/nothing"):
        run_pretraining.main([*TOY, "--preflight", "--probe_dataset_name=nobody/nothing", f"--output_dir={tmp_path}"])


def wrong_statistics(monkeypatch):
    return ["--image_std=50,50,50"]  # of pixels in [0, 255], as in a published linear probe


def left_out_of_the_optimizer(monkeypatch):
    groups = builders.parameter_groups
    monkeypatch.setattr(builders, "parameter_groups", lambda model, decay: groups(model.can, decay))


def positions_of_zero(monkeypatch):
    sincos = modeling_can.sincos_positions
    monkeypatch.setattr(modeling_can, "sincos_positions", lambda *args: 0 * sincos(*args))


def detached_head(monkeypatch):
    forward = modeling_can.CANProjectionHead.forward
    monkeypatch.setattr(modeling_can.CANProjectionHead, "forward", lambda *args: forward(*args).detach())


def wrong_positives(monkeypatch):
    def other_image(embeds, temperature):
        return contrastive_loss(torch.stack([embeds[:, 0], embeds[:, 1].roll(1, 0)], 1), temperature)

    monkeypatch.setattr("modeling_can.pretraining.preflight.contrastive_loss", other_image)


def full_disk(monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage)


@pytest.mark.parametrize("fault, words", [
    (wrong_statistics, "set image_mean and image_std"),
    (left_out_of_the_optimizer, "left out: projection_head.fc1.weight"),
    (positions_of_zero, "gives different patches the same position"),
    (detached_head, "parameters without a gradient: projection_head.fc1.weight"),
    (wrong_positives, "positive is not its own other view"),
    (full_disk, "lower save_total_limit"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_preflight_finds(tmp_path, monkeypatch, capfd, fault, words):
    options = [*(fault(monkeypatch) or []), "--per_device_train_batch_size=16"]
    assert preflight(tmp_path, *options) == 1
    output = capfd.readouterr().out
    assert words in output and "FAIL" in output and "preflight: NOT ready, 1 checks failed" in output


def _positives(rank, world_size):
    def ranks_forgotten(embeds, temperature):  # as if every process numbered its images from 0
        keys = torch.cat([unit(2 * len(embeds), embeds.shape[-1], seed=9), embeds.flatten(0, 1)])
        itself = torch.arange(2 * len(embeds))
        logits = (embeds.flatten(0, 1) @ keys.T / temperature).scatter(1, itself[:, None] + len(itself), -math.inf)
        return torch.nn.functional.cross_entropy(logits, itself ^ 1)

    return [check_positives(loss, 4, 16, rank, torch.device("cpu")) for loss in (contrastive_loss, ranks_forgotten)]


@pytest.mark.slow
def test_positives_are_checked_over_processes():
    for right, wrong in run_processes(_positives, 2):
        assert right is None and "not its own other view" in wrong


def test_the_room_for_checkpoints_is_weights_and_two_moments(tmp_path, monkeypatch):
    model = tiny_model()
    size = sum(p.numel() for p in model.parameters()) * 4
    for free, is_enough in ((size * 10, True), (size * 10 - 1, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder, usage=usage: usage)
        assert (check_disk(tmp_path, 2, model.parameters()) is None) == is_enough


def test_peak_memory_is_bytes_of_this_process(monkeypatch):
    now = psutil.Process().memory_info().rss
    assert now <= peak_memory(torch.device("cpu")) < psutil.virtual_memory().total
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, where psutil knows the peak
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=now))
    assert peak_memory(torch.device("cpu")) == now


def test_durations_are_read_by_people():
    assert [duration(s) for s in (40, 200, 7500, 280_000)] == ["40 s", "3 min", "2 h 5 min", "3 d 5 h"]


def test_spread_is_1_everywhere_and_0_in_one_place():
    everywhere = torch.nn.functional.normalize(torch.randn(2000, 2, 64), dim=-1)
    assert embedding_spread(everywhere).item() == pytest.approx(1, abs=0.02)
    assert embedding_spread(everywhere[:1, :1].expand(50, 2, 64)).item() == pytest.approx(0, abs=1e-6)
