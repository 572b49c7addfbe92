"""What the benchmarks compare is the same computation."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from testing_utils import ROOT, TINY, inputs, tiny_model

from experiments.cifar10 import runs
from experiments.cifar10.one_run import of_the_log
from experiments.cifar10.report import report
from experiments.keeping import round_weights
from modeling_can import CANConfig, CANForPreTraining
from modeling_can.conversion import MAE_FILE, encoder_weights, join_qkv, their_name
from modeling_can.pretraining.recipe import Recipe
from modeling_can.provenance import git_commit


sys.path.insert(0, str(ROOT / "benchmarks"))
import profile_step  # noqa: E402
import records  # noqa: E402
import train_step  # noqa: E402
import variants  # noqa: E402
from straightforward import StraightforwardCAN  # noqa: E402
from variants import largest_batch  # noqa: E402


@pytest.mark.parametrize("noise_head", ["own", "shared"])
def test_the_straightforward_can_computes_our_loss(noise_head):
    ours = tiny_model(noise_head=noise_head)
    if noise_head == "own":  # which starts at zero
        torch.nn.init.normal_(ours.decoder.noise_head.weight, std=0.1)
    theirs = StraightforwardCAN(ours.config)
    state = encoder_weights(ours, MAE_FILE)
    for name, tensor in ours.state_dict().items():
        if not name.startswith("can."):
            name = name.replace("decoder.noise_level_embedding.fc1", "level_embed.0")
            name = name.replace("decoder.noise_level_embedding.fc2", "level_embed.2")
            name = name.replace("decoder.noise_head", "noise_pred")
            state[their_name(name, MAE_FILE) or name] = tensor
    names = {"patch_embed.proj": "patch_embed", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    for before, after in names.items():
        state = {key.replace(before, after): tensor for key, tensor in state.items()}
    theirs.load_state_dict(join_qkv(state))
    batch = inputs(ours.config)
    expected = ours(**batch).loss
    loss = theirs(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(theirs.patch_embed.bias.grad, ours.can.embeddings.patch_embeddings.bias.grad)
    torch.testing.assert_close(theirs.decoder_embed.weight.grad, ours.decoder.embed.weight.grad)


@pytest.mark.parametrize(("limit", "expected"), [(3, 0), (4, 4), (31, 28), (32, 32), (100, 100), (103, 100)])
def test_the_largest_batch_is_the_last_multiple_that_fits(limit, expected):
    tried = []

    def fits(batch_size):
        tried.append(batch_size)
        return batch_size <= limit

    assert largest_batch(fits, 4) == expected
    assert len(tried) == len(set(tried)) <= 12


@pytest.mark.parametrize("stage", runs.TOY_STAGES)
def test_the_file_of_a_run_is_found_by_its_name_and_holds_its_settings(stage):
    todo = runs.runs_of("toy", stage)
    assert len({runs.path_of(run) for run in todo}) == len({run.name for run in todo}) == len(todo) > 0
    for run in todo:
        assert re.fullmatch(r"[\w.-]{,60}", run.name), run.name  # run_eval.py takes a comma between two models
        result = runs.read(run)
        assert [result[name] for name in ("stage", "method", "seed")] == [run.stage, run.method, run.seed]
        assert run.settings.items() <= result["settings"].items()


def test_the_runs_for_a_gpu_are_a_list_in_the_order_of_their_worth():
    names = ["can-0", "simclr-0", "mae-0", "can-quarter-0", "can-1", "simclr-1", "can-2", "simclr-2", "can-no-noise-0",
             "can-paper-noise-0"]  # fmt: skip
    assert [run.name for run in runs.runs_of("tiny", "main")] == [f"main-{name}" for name in names]
    assert [run.name for run in runs.runs_of("tiny", "downstream")] == [f"downstream-{name}" for name in names]
    trial = runs.trial("tiny", [2e-3])
    assert [run.name for run in trial] == [f"trial-{name}-0.002-0" for name in ("can", "simclr", "mae")]
    for scale in ("tiny", "smoke"):
        assert not runs.runs_of(scale, "search")
        all_runs = [*runs.runs_of(scale, "main"), *runs.runs_of(scale, "trial")]
        assert len({run.name for run in all_runs}) == len({runs.path_of(run) for run in all_runs}) == len(all_runs)
        own = {name for run in all_runs for name in (*run.settings, *runs.METHODS[run.method.split(",")[0]])}
        for run in all_runs:  # they differ in the objective alone
            settings = runs.settings_of(run)
            assert {name: settings[name] for name in settings.keys() - own - {"seed"}} == runs.SCALES[scale]
            recipe = yaml.safe_load(Path(runs.__file__).with_name("recipe.yaml").read_text())
            Recipe.from_dict(recipe | settings | {"probe_dataset_name": "some"})


def test_the_time_of_a_run_is_that_of_its_log(tmp_path):
    lines = [{"step": 10, "images_per_second": 5.0}, {"step": 20, "images_per_second": 50.0, "knn": 0.4},
             {"step": 25, "images_per_second": 40.0, "knn": 0.5}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert of_the_log(tmp_path / "metrics.jsonl", batch_size=10) == {
        "along_the_way": [{"step": 20, "knn": 0.4, "seconds": 22.0}, {"step": 25, "knn": 0.5, "seconds": 23.25}],
        "images_per_second": 40.0,
    }


def test_rounded_weights_load_as_those_of_the_run_in_float32(tmp_path):
    recipe = Recipe(config=CANConfig(**TINY), max_steps=1, image_mean=(0.1, 0.2, 0.3))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    model = CANForPreTraining(recipe.config)
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "kept").mkdir()
    round_weights(tmp_path / "run" / "model.safetensors", tmp_path / "recipe.yaml", tmp_path / "kept")
    loaded, info = CANForPreTraining.from_pretrained(tmp_path / "kept", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.bfloat16().float(), rtol=0, atol=0)
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    written, usual = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("kept", "run"))
    usual.pop("auto_map")
    assert written == usual
    assert json.loads((tmp_path / "kept" / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]


def test_a_report_of_gpu_runs_has_times_and_no_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    report("tiny")
    assert "no results" in capsys.readouterr().out
    figures = {"linear_probe": {"accuracy": 0.9}, "knn": {"20": {"accuracy": 0.88}}}
    pretraining = {"flops_per_image": 4e9, "train_flops": 4e16, "peak_memory": 5e9, "images_per_second": 1,
                   "global_batch_size": 1000, "machine": "A GPU"}  # fmt: skip
    line = {"step": 10, "knn": 0.65, "seconds": 90}
    result = {"images_per_second": 34000, "along_the_way": [line], "pretraining": pretraining}
    (tmp_path / "tiny" / "main").mkdir(parents=True)
    for run in runs.runs_of("tiny", "main")[:2]:
        runs.path_of(run).write_text(json.dumps({**result, "evaluation": {"results": figures}}))
    tried = {"probe": {"CAN, pre-trained": {"knn": 0.5, "linear_probe": 0.6}}}
    tried = {"method": "MAE", "settings": {"base_learning_rate": 0.003}, "pretraining": tried}
    (tmp_path / "tiny" / "trial").mkdir()
    (tmp_path / "tiny" / "trial" / "mae.json").write_text(json.dumps(tried))
    report("tiny")
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert "| SimCLR | 1 | 90.0 | 88.0 | 4000 | 40000 | 34000 | 4.9 | 5.00 |" in text
    assert "| CAN | 40 TFLOP, 1.5 min | 40 TFLOP, 1.5 min |  |  |  |" in text
    assert "| MAE | 0.003 | 50.0 | 60.0 |" in text and "Search" not in text
    assert (tmp_path / "tiny" / "figure.png").exists()


def test_a_copy_without_a_checkout_is_told_its_commit(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("GIT_COMMIT", commit)
    assert git_commit(tmp_path) == commit


def test_a_commit_is_dirty_where_code_differs_and_not_where_a_result_does(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "package").mkdir()
    for name in ("a.py", "a.json", "package/provenance.py"):
        (tmp_path / name).write_text("1\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "a"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert git_commit(tmp_path / "package") is None  # as site-packages in somebody's repository
    (tmp_path / "a.json").write_text("2\n")
    assert re.fullmatch("[0-9a-f]{40}", git_commit(tmp_path))
    (tmp_path / "a.py").write_text("2\n")
    assert re.fullmatch("[0-9a-f]{40}-dirty", git_commit(tmp_path))


def test_a_json_goes_where_it_is_told_and_does_not_say_so(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    records.add_out(parser)
    for argv, expected in {f"--out={tmp_path}/a": "a/name.json", f"--out {tmp_path}/b.json": "b.json"}.items():
        monkeypatch.setattr(sys, "argv", [str(records.FOLDER / "x.py"), "--rounds", "3", *argv.split(), "--toy"])
        arguments, _ = parser.parse_known_args()
        records.save("name", records.facts(seed=0), arguments.out)
        report = json.loads((tmp_path / expected).read_text())
        assert report["command"] == "python benchmarks/x.py --rounds 3 --toy"
    assert parser.parse_args([]).out == records.FOLDER
    assert not list(tmp_path.rglob("*.partial"))


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr(records, "PACKAGES", ("torch", "no-such-package"))
    assert set(records.facts(seed=0)["versions"]) == {"python", "torch"}


def test_the_size_for_cifar_is_that_of_the_study():
    assert train_step.CIFAR == {name: runs.SCALES["tiny"][name] for name in train_step.CIFAR}
    assert train_step.preset("cifar").image_shape == (32, 32)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matrix products"),
        ("triton_per_fused_add_native_layer_norm_3", "compiled, with a sum or LayerNorm"),
        ("triton_red_fused_gelu_backward_sum_12", "compiled, with a sum or LayerNorm"),
        ("triton_poi_fused_addmm_gelu_view_5", "compiled, element-wise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "LayerNorm"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>", "LayerNorm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)>", "GELU"),
        (
            "void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float>>",
            "AdamW",
        ),
        (
            "at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
            "copies, gathers, joins",
        ),
        ("Memcpy DtoD (Device -> Device)", "copies, gathers, joins"),
        ("void at::native::distribution_elementwise_grid_stride_kernel<float, 4>", "random numbers"),
        (
            "at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "additions and sums",
        ),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, sum_functor>>", "additions and sums"),
    ],
)
def test_kernels_are_sorted_by_their_names(kernel, kind):
    assert profile_step.kind_of_kernel(kernel) == kind


def test_only_kernels_count_and_those_side_by_side_are_busy_once():
    kernels = [("kernel", "a", 0, 4), ("kernel", "b", 2, 4), ("gpu_memcpy", "c", 8, 1), ("kernel", "a", 20, 2)]
    others = [("gpu_user_annotation", "step", 0, 30), ("cuda_runtime", "cudaLaunchKernel", 0, 9)]
    trace = [{"cat": c, "name": n, "ts": t, "dur": d} for c, n, t, d in [*others, *kernels]] + [{"ph": "M"}]
    seconds, busy, number = profile_step.kernels({"traceEvents": trace})
    assert seconds == pytest.approx({"a": 6e-6, "b": 4e-6, "c": 1e-6})
    assert busy == pytest.approx(9e-6) and number == 4


def test_a_row_that_fails_is_reported_and_the_others_are_measured(monkeypatch):
    def fails(config):
        raise torch.OutOfMemoryError("no memory")

    arguments = SimpleNamespace(size="quickstart", batch_size=2, device="cpu", rounds=1, orders=1, products=False)
    monkeypatch.setitem(train_step.ROWS, "whole", ("CAN, compiled whole", fails, None))
    monkeypatch.setattr(train_step, "large_product_tflops", lambda device: 1.0)
    keys = ["straightforward", "eager", "whole"]
    report = train_step.summary([train_step.measure(keys, arguments)], keys, arguments)
    results = report["results"]
    assert results["CAN, compiled whole"] == {"error": "OutOfMemoryError: no memory"}
    assert results["straightforward CAN"]["speed_over_straightforward"] == 1
    ours = results["CAN"]
    assert ours["speed_over_straightforward"] == report["speed_of_can_over_straightforward"] > 0
    assert ours["images_per_second"] == pytest.approx(2 / ours["step_seconds"])
    assert ours["tflops"] == pytest.approx(ours["gflop_per_image"] * ours["images_per_second"] / 1e3)


@pytest.mark.slow
def test_a_variant_that_dies_is_left_out():
    """Of three the second cannot start and the third dies when it is asked for its products."""
    arguments = SimpleNamespace(size="tiny", batch_size=2, device="cpu", rounds=1, study="tried")
    todo = {"first": {}, "second": {"hidden_size": 5}, "third": {"model": "encoder"}}
    measured = variants.measure({name: {**TINY, **changes} for name, changes in todo.items()}, arguments)
    assert measured.keys() == {"first"}
    (figures,) = variants.summary([measured]).values()
    assert figures["speed_over_first"] == figures["predicted_speed_over_first"] == 1
