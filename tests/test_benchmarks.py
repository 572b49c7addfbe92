"""What the benchmarks compare is the same computation."""

import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, inputs, tiny_model

from modeling_can.conversion import MAE_FILE, encoder_weights, join_qkv, their_name


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import claims  # noqa: E402
import evidence  # noqa: E402
import profile_step  # noqa: E402
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


@pytest.mark.parametrize("stage", claims.STAGES)
def test_the_runs_of_the_study_have_names_that_files_and_the_evaluation_can_bear(stage):
    names = [run.name for run in claims.STAGES[stage]("toy")]
    assert len(names) == len(set(names)) > 0
    for name in names:  # run_eval.py takes a comma between two models
        assert re.fullmatch(r"[\w.='-]+", name) and len(f"{name}.partial") <= 255, name


def test_a_copy_without_a_checkout_is_told_its_commit(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert evidence.commit() is None
    monkeypatch.setenv("GIT_COMMIT", commit)
    assert evidence.commit() == commit


def test_a_json_goes_where_it_is_told_and_does_not_say_so(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    evidence.add_out(parser)
    for argv, expected in {f"--out={tmp_path}/a": "a/name.json", f"--out {tmp_path}/b.json": "b.json"}.items():
        monkeypatch.setattr(sys, "argv", [str(evidence.FOLDER / "x.py"), "--rounds", "3", *argv.split(), "--toy"])
        arguments, _ = parser.parse_known_args()
        evidence.save("name", evidence.facts(seed=0), arguments.out)
        report = json.loads((tmp_path / expected).read_text())
        assert report["command"] == "python benchmarks/x.py --rounds 3 --toy"
    assert parser.parse_args([]).out == evidence.FOLDER
    assert not list(tmp_path.rglob("*.partial"))


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr(evidence, "PACKAGES", ("torch", "no-such-package"))
    assert set(evidence.facts(seed=0)["versions"]) == {"python", "torch"}


def test_the_size_for_cifar_is_that_of_the_study():
    assert train_step.CIFAR == {name: claims.SCALES["tiny"][name] for name in train_step.CIFAR}
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
