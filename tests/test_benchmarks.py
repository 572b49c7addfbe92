"""What the benchmarks compare is the same computation."""

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
import variants  # noqa: E402
from straightforward import StraightforwardCAN  # noqa: E402
from variants import largest_batch  # noqa: E402


def test_the_straightforward_can_computes_our_loss():
    ours = tiny_model()
    theirs = StraightforwardCAN(ours.config)
    state = encoder_weights(ours, MAE_FILE)
    for name, tensor in ours.state_dict().items():
        if not name.startswith("can."):
            name = name.replace("decoder.noise_level_embedding.fc1", "level_embed.0")
            name = name.replace("decoder.noise_level_embedding.fc2", "level_embed.2")
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


@pytest.mark.slow
def test_a_variant_that_dies_is_left_out():
    """Of three the second cannot start and the third dies when it is asked for its products."""
    arguments = SimpleNamespace(size="tiny", batch_size=2, device="cpu", rounds=1, study="tried")
    todo = {"first": {}, "second": {"hidden_size": 5}, "third": {"model": "encoder"}}
    measured = variants.measure({name: {**TINY, **changes} for name, changes in todo.items()}, arguments)
    assert measured.keys() == {"first"}
    (figures,) = variants.summary([measured]).values()
    assert figures["speed_over_first"] == figures["predicted_speed_over_first"] == 1
