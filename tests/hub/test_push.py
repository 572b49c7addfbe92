"""Uploads that fail, hang or are overtaken, to a Hub on this machine; and what others can then load from it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import Commit, HubServer, Repository
from huggingface_hub import HfApi, snapshot_download
from testing_utils import ROOT, run_processes, shard, tiny_model

import run_pretraining
from modeling_can import CANForPreTraining
from modeling_can.hub import push
from modeling_can.hub.push import Push
from modeling_can.pretraining.checkpoints import Checkpoints
from modeling_can.pretraining.recipe import Recipe, parse_arguments


RUN = ["--max_steps=6", "--save_steps=2", "--save_total_limit=9", "--per_device_train_batch_size=4",
       "--logging_steps=2", "--hidden_size=32", "--num_hidden_layers=1", "--num_attention_heads=2",
       "--intermediate_size=64", "--decoder_hidden_size=16", "--decoder_num_hidden_layers=1",
       "--decoder_num_attention_heads=2", "--decoder_intermediate_size=32", "--projection_size=8",
       "--probe_dataset_name=none", "--dataloader_num_workers=0", "--shuffle_block_size=50",
       "--push_to_hub"]  # fmt: skip


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    """This process keeps huggingface_hub offline; those that it starts are sent to the server."""
    with HubServer() as hub:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        monkeypatch.setattr(push, "PAUSES", (0.05, 0.05))
        yield hub


@pytest.fixture()
def folder(tmp_path):
    folder = tmp_path / "out"
    for name in ("model.safetensors", "README.md", "metrics.jsonl", "figures/curves.png", "bad_samples.jsonl",
                 "checkpoints/step-2/shared.pt", "checkpoints/step-2/model.safetensors", ".env"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    return folder


PUSHED = {"model.safetensors", "README.md", "metrics.jsonl", "figures/curves.png"}


def wait_until(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:  # a zombie, which nobody waits for, has no command line
        return b"push.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def messages(hub, repo: str) -> list[str]:
    return [commit.message for commit in hub.repositories[repo].commits[1:]]


def tokens_in(folder: Path, hub, *texts: str) -> list:
    """Where the token is, of all places where it must not be."""
    token = hub.token.encode()
    leaks = [path for path in folder.rglob("*") if path.is_file() and token in path.read_bytes()]
    return leaks + [text for text in texts if hub.token in text] + [b"the Hub"] * (token in hub.everything())


# --- The server ------------------------------------------------------------------------------------------------------


def test_the_server_gives_back_what_was_uploaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        assert api.create_repo("model", private=True).repo_id == "me/model"
        hub.cut(times=1)  # huggingface_hub sends it again
        first = api.upload_folder(repo_id="me/model", folder_path=folder, commit_message="first")
        (folder / "README.md").write_text("other")
        api.upload_folder(repo_id="me/model", folder_path=folder)
        assert "cut" in [request.status for request in hub.seen("upload")]
        assert api.model_info("me/model").private
        assert messages(hub, "me/model") == ["first", "Upload folder using huggingface_hub"]
        for revision, readme in ((None, "other"), (first.oid, "this is README.md")):
            copy = Path(
                snapshot_download(
                    "me/model", revision=revision, endpoint=hub.url, token=hub.token, cache_dir=tmp_path / "cache"
                )
            )
            names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
            assert names == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            assert (copy / "README.md").read_text() == readme
            assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        with pytest.raises(OSError, match="401"):  # private: nobody else sees it
            api.model_info("me/model", token=False)
        assert {request.authorization for request in hub.seen("commit")} == {f"Bearer {hub.token}"}


# --- Snapshots and uploads -------------------------------------------------------------------------------------------


def test_a_snapshot_is_what_the_folder_was_then(hub, folder):
    """While the first upload hangs, the folder changes, and newer snapshots come; only the newest is tried again."""
    hub.hang(0.8, times=1, kind="create")
    uploads = Push(folder, "model", private=True)
    assert uploads.check() is None
    uploads.hand_over("first")
    wait_until(lambda: hub.seen("create"))
    uploads.hand_over("second")
    (folder / "metrics.jsonl").write_text("more")
    also = {"last-checkpoint": folder / "checkpoints" / "step-2", "config.json": folder / "README.md"}
    uploads.hand_over("third", lambda snapshot: (snapshot / "README.md").write_text("in training"), also)
    assert sorted(path.name for path in uploads.snapshots.iterdir()) == ["1", "3"]
    snapshot = uploads.snapshots / "3"
    assert (snapshot / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (snapshot / "metrics.jsonl").samefile(folder / "metrics.jsonl")
    with open(folder / "metrics.jsonl", "a") as file:  # what a run does to its folder
        file.write("and more")
    os.replace(folder / "figures" / "curves.png", folder / "model.safetensors")
    for path in (folder / "checkpoints" / "step-2").iterdir():
        path.unlink()
    answer = uploads.finish(60)
    assert answer == {"repository": "me/model", "commit": hub.repositories["me/model"].commits[-1].oid, "error": None}
    assert messages(hub, "me/model") == ["third"] and hub.repositories["me/model"].private
    files = {name: content.decode() for name, content in hub.files("me/model").items()}
    assert files.pop("README.md") == "in training" and files.pop("metrics.jsonl") == "more"
    assert files.pop("config.json") == "this is README.md"
    for name in ("model.safetensors", "shared.pt"):
        assert files.pop(f"last-checkpoint/{name}") == f"this is checkpoints/step-2/{name}"
    assert files == {name: f"this is {name}" for name in ("model.safetensors", "figures/curves.png")}
    assert not uploads.snapshots.exists()


def test_what_stays_here_is_not_even_looked_at(hub, folder, monkeypatch):
    """Snapshots vanish while the next one is made."""
    uploads, looked, scandir = Push(folder, "model"), [], os.scandir
    (uploads.snapshots / "1").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(Path(path)) or scandir(path))
    assert set(uploads.names()) == PUSHED | {"bad_samples.jsonl", ".env"}
    assert looked == [folder, folder / "figures"]


def test_a_hub_that_recovers(hub, folder, monkeypatch):
    monkeypatch.setattr(push, "REQUEST_SECONDS", 0.5)
    hub.fail(429, times=1, kind="create")
    hub.hang(30, times=1, kind="commit")
    uploads = Push(folder, "org/model")
    uploads.hand_over("first")
    answer = uploads.finish(60)
    assert answer["error"] is None and set(hub.files("org/model")) == PUSHED
    assert [request.status for request in hub.seen("create")] == [429, 200, 409]
    assert not hub.repositories["org/model"].private and messages(hub, "org/model") == ["first"]


def test_a_token_that_is_refused_is_not_printed_and_the_command_pushes_later(hub, folder, monkeypatch):
    token, hub.token = hub.token, "hf_another"
    uploads = Push(folder, "model", private=True)
    uploads.hand_over("first")
    answer = uploads.finish(60)
    assert len(hub.seen("create")) == 1 and "401" in answer["error"]  # more of the same would be no use
    assert "Bearer HF_TOKEN" in answer["error"] and token not in json.dumps(answer) + uploads.command()
    hub.token = token
    later = subprocess.run(uploads.command(), shell=True, capture_output=True, text=True, timeout=60)
    assert later.returncode == 0, later.stderr
    assert set(hub.files("me/model")) == PUSHED and hub.repositories["me/model"].private


def test_a_public_repository_is_no_place_for_a_private_run(hub, folder):
    hub.repositories["org/model"] = Repository(False, [Commit("0" * 40, "initial commit", {}, frozenset())])
    uploads = Push(folder, "org/model", private=True)
    uploads.hand_over("first")
    assert "org/model is there already, and it is public" in uploads.finish(60)["error"]
    assert len(hub.seen("create")) == 1 and not hub.large_files and not messages(hub, "org/model")


def test_a_hub_that_hangs_is_given_up(hub, folder):
    hub.hang(600, kind="create")
    uploads = Push(folder, "model")
    uploads.hand_over("first")
    wait_until(lambda: hub.seen("create"))
    begun = time.monotonic()
    assert "you gave it up" in uploads.finish(600, stop=lambda: True)["error"]
    assert time.monotonic() - begun < 3 and uploads.process.poll() is not None and not uploads.snapshots.exists()


def test_what_the_last_try_said_is_told_when_time_is_up(hub, folder, monkeypatch):
    monkeypatch.setattr(push, "PAUSES", (600.0,))
    hub.fail(503, kind="create")
    uploads = Push(folder, "model")
    uploads.hand_over("first")
    wait_until(lambda: uploads.trouble)
    error = uploads.finish(0.1)["error"]
    assert "was not finished in the time that there was; the last try: " in error and "503" in error


def test_what_there_is_to_say_before_training(hub, folder, monkeypatch):
    uploads = Push(folder, "model")
    assert uploads.check() is None
    hub.repositories["me/model"] = Repository(False, [Commit("0" * 40, "initial commit", {}, frozenset())])
    assert "model is on the Hub already: its files are replaced, in new commits" in uploads.check()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="the Hub refuses the token"):
        uploads.check()
    uploads.close()


def test_a_copy_that_cannot_be_made_is_told_at_the_end(hub, folder):
    uploads = Push(folder, "model")

    def full(snapshot):
        raise OSError(28, "No space left on device")

    uploads.hand_over("first", full)
    assert not list(uploads.snapshots.iterdir())
    assert "No space left" in uploads.finish(5)["error"]


def test_what_cannot_work_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match="there is no token to write to me/model with; set HF_TOKEN"):
        Push(tmp_path, "me/model")
    for flags, message in (
        (["--hub_private"], "hub_private=True without push_to_hub uploads nothing; add --push_to_hub"),
        (["--hub_model_id=me/model"], "hub_model_id=me/model without push_to_hub"),
        (["--push_to_hub", "--hub_model_id=me/my model"], "hub_model_id='me/my model'; give --hub_model_id NAME or"),
        (["--push_to_hub", "--output_dir=my out"], "hub_model_id='my out'; give"),
        (["--push_to_hub", "--hub_strategy=never"], "hub_strategy='never' is not one of end, every_save, checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arguments(flags, "")


def test_who_repeats_a_recipe_does_not_push():
    flags = ["--push_to_hub", "--hub_model_id=me/model", "--hub_private", "--hub_strategy=end"]
    recipe = parse_arguments(flags, "")
    again = Recipe.from_dict(recipe.to_dict())
    assert not again.push_to_hub and again.hub_model_id is None and "hub" not in recipe.to_yaml()


def test_of_a_checkpoint_only_its_own_processes_are_read(tmp_path):
    """Beside them in a repository lie those of an earlier run with more processes."""
    path = Checkpoints(tmp_path, 1).save(3, {}, {}, {"rank": 0})
    torch.save({"rank": 1}, path / "process-00001.pt")
    assert Checkpoints.load(path)[2] == [{"rank": 0}]


# --- The whole script ------------------------------------------------------------------------------------------------


def run(hub, folder: Path, *flags: str) -> dict:
    return run_pretraining.main([*RUN, f"--output_dir={folder}", *flags])


def weights(folder: Path) -> dict:
    return CANForPreTraining.from_pretrained(folder).state_dict()


def written(commit: Commit, folder: Path) -> Path:
    for name, content in commit.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_the_script_with(hub, tmp_path, capfd, strategy):
    out = tmp_path / "out"
    results = run(hub, out, "--hub_model_id=org/model", f"--hub_strategy={strategy}")
    commits = hub.repositories["org/model"].commits
    assert results["hub"] == {"repository": "org/model", "commit": commits[-1].oid, "error": None}
    assert json.loads((out / "results.json").read_text()) == results
    assert messages(hub, "org/model")[-1] == "End of training, step 6"
    names = set(commits[-1].files)
    here = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    checkpoint = {name for name in names if name.startswith("last-checkpoint/")}
    assert names - checkpoint == {name for name in here if not name.startswith(("checkpoints/", "bad_samples"))}
    for name in names - checkpoint - {"results.json"}:
        assert commits[-1].files[name] == (out / name).read_bytes(), name
    assert bool(checkpoint) == (strategy == "checkpoint") and not (out / ".push").exists()
    early = commits[1:-1]  # the others were overtaken
    assert (len(early) > 0) == (strategy != "end")
    for commit in early:
        step = int(commit.message.rsplit(" ", 1)[1])
        then = written(commit, tmp_path / str(step))
        assert weights(then).keys() == weights(out).keys()
        saved = Checkpoints.load(out / "checkpoints" / f"step-{step}")[0]
        for name, tensor in weights(then).items():
            assert torch.equal(tensor, saved[name]), name
        assert f"after step {step} of 6" in (then / "README.md").read_text()
        assert json.loads((then / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
        assert set(json.loads((then / "config.json").read_text())) == set(
            json.loads((out / "config.json").read_text())
        )
        assert {"recipe.yaml", "preprocessor_config.json", "figures/reconstructions.png"} <= commit.files.keys()
        assert {n for n in commit.files if n.endswith(".py")} == {n for n in names if n.endswith(".py")}
        if strategy == "checkpoint":  # another machine goes on from it, to the same end
            other = tmp_path / f"other-{step}"
            run(hub, other, f"--resume_from_checkpoint={then / 'last-checkpoint'}", "--hub_model_id=org/other")
            assert f"resumed from {then / 'last-checkpoint'} at step {step}; from here on" in capfd.readouterr().out
            assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
            break
    output = "".join(capfd.readouterr())
    assert not tokens_in(out, hub, output)
    card = (out / "README.md").read_text()
    assert "# model\n" in card and 'model_id = "org/model"' in card


PROCESS = """
import sys
import run_pretraining
from modeling_can.hub import push
from modeling_can.pretraining import results
push.PAUSES, push.REQUEST_SECONDS, push.CHECK_SECONDS, results.WAIT_SECONDS = (0.1,), 1.0, 2.0, 3.0
run_pretraining.main(sys.argv[1:])
"""


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, *RUN, f"--output_dir={folder}", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )


def save_in_part(rank, world_size, folder):
    model = shard(tiny_model())
    if rank == 0:
        model.save_pretrained(folder, state_dict={})


@pytest.mark.slow
def test_a_sharded_model_saves_all_but_its_weights(tmp_path):
    """On one process, which must not wait for the others."""
    run_processes(save_in_part, 2, tmp_path / "sharded")
    tiny_model().save_pretrained(tmp_path / "whole", state_dict={})
    sharded, whole = (
        {path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("sharded", "whole")
    )
    assert sharded == whole and "config.json" in whole and "model.safetensors" not in whole


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["5xx", "hangs", "cuts"])
def test_a_run_ends_well_whatever_the_hub_does(hub, tmp_path, fault):
    {"5xx": lambda: hub.fail(503), "hangs": lambda: hub.hang(600), "cuts": hub.cut}[fault]()
    out = tmp_path / "out"
    process = start(out)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert ("the Hub cannot be used now" in output) == (fault != "cuts")
    assert output.count("failed: ") == 1 and output.index("failed: ") > output.index("6 steps in ")
    command = output.split("later:\n")[1].splitlines()[0].strip()
    assert shlex.split(command)[:3] in (["hf", "upload", "out"], ["hf", "upload", "me/out"])
    assert CANForPreTraining.from_pretrained(out)
    answer = json.loads((out / "results.json").read_text())["hub"]
    assert answer["commit"] is None and answer["error"] in output
    assert not tokens_in(out, hub, output) and not (out / ".push").exists()
    if fault == "cuts":
        hub.heal()
        subprocess.run(command, shell=True, check=True, capture_output=True, timeout=60)
        assert hub.files("me/out")["model.safetensors"] == (out / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_does_not_wait_for_the_hub(hub, tmp_path):
    hub.hang(600, kind="create")
    out = tmp_path / "out"
    process = start(out, "--max_steps=100000")
    wait_until(lambda: hub.seen("create"))
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and time.monotonic() - begun < 20, output
    assert "out is not up to date: " in output and not (out / ".push").exists()


ALONE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("push", sys.argv[1])  # not the package, which takes seconds
push = importlib.util.module_from_spec(spec)
spec.loader.exec_module(push)
uploads = push.Push(pathlib.Path(sys.argv[2]), "model")
uploads.hand_over("first")
while not uploads.process:
    pass
print(uploads.process.pid, flush=True)
uploads.finish(600)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_nothing_for_long(hub, folder):
    """Its upload ends with it, and its snapshot goes with the next one."""
    hub.hang(600, kind="create")
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, push.__file__, str(folder)], stdout=subprocess.PIPE, text=True
    )
    uploader = int(process.stdout.readline())
    wait_until(lambda: hub.seen("create"))
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not is_running(uploader), 10)
    (folder / ".push" / "9").mkdir()
    hub.heal()
    uploads = Push(folder, "model")
    uploads.hand_over("second")
    assert not (folder / ".push" / "9").exists()
    assert uploads.finish(60)["error"] is None and messages(hub, "me/model") == ["second"]


ELSEWHERE = """
import sys

class WithoutThePackage:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("modeling_can", "run_pretraining"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutThePackage)
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

inputs = torch.load(sys.argv[1])
name, options = sys.argv[2], {"trust_remote_code": True}
with torch.no_grad():
    pretraining = AutoModelForPreTraining.from_pretrained(name, **options).eval()(**inputs)
    encoder = AutoModel.from_pretrained(name, **options).eval()(inputs["pixel_values"][:, 0])
torch.save([encoder.pooler_output, encoder.last_hidden_state, pretraining.logits, pretraining.image_embeds,
            pretraining.loss], sys.argv[3])
print(AutoImageProcessor.from_pretrained(name).crop_size)
"""


@pytest.mark.slow
def test_from_pixels_to_the_hub_to_somebody_without_this_package(hub, tmp_path):
    out = tmp_path / "out"
    run(hub, out, "--hub_model_id=me/name", "--hub_private")
    local = CANForPreTraining.from_pretrained(out).eval()
    generator, config = torch.Generator().manual_seed(0), local.config
    pixels = (3, 2, config.num_channels, *config.image_shape)
    inputs = {
        "pixel_values": torch.randn(pixels, generator=generator),
        "pixel_noise": torch.randn(pixels, generator=generator),
        "noise_level": torch.rand(3, 2, generator=generator),
        "masking_scores": torch.rand(3, 2, config.num_patches, generator=generator),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = hub.environment(tmp_path / "fresh")
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE, str(tmp_path / "inputs.pt"), "me/name", str(tmp_path / "outputs.pt")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    with torch.no_grad():
        encoder, pretraining = local.can(inputs["pixel_values"][:, 0]), local(**inputs)
    wanted = [encoder.pooler_output, encoder.last_hidden_state, pretraining.logits, pretraining.image_embeds,
              pretraining.loss]  # fmt: skip
    for there, here in zip(torch.load(tmp_path / "outputs.pt"), wanted, strict=True):
        assert torch.equal(there, here)
    assert str(config.image_shape[0]) in process.stdout
