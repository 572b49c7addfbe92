"""The code that travels with the weights, and what loading does with folders that are incomplete or hostile."""

import base64
import filecmp
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from testing_utils import inputs, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
)

import modeling_can
from modeling_can import CANConfig, CANForImageClassification, CANForPreTraining, CANModel
from modeling_can.conversion import warm_start
from modeling_can.evaluation.encoders import load_encoder, load_model


PACKAGE = Path(modeling_can.__file__).parent
SHIPPED = ["configuration_can.py", "losses.py", "modeling_can.py"]
AUTO_MAP = {
    "AutoConfig": "configuration_can.CANConfig",
    "AutoModel": "modeling_can.CANModel",
    "AutoModelForPreTraining": "modeling_can.CANForPreTraining",
    "AutoModelForImageClassification": "modeling_can.CANForImageClassification",
}
MODELS = [CANModel, CANForPreTraining, CANForImageClassification]


def auto_map(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["auto_map"]


def assert_ships_can(folder: Path):
    assert auto_map(folder) == AUTO_MAP
    same, _, _ = filecmp.cmpfiles(PACKAGE, folder, SHIPPED, shallow=False)
    assert same == SHIPPED == sorted(path.name for path in folder.glob("*.py"))


# --- What is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CANConfig, *MODELS])
def test_whatever_is_saved_ships_the_same_code_and_the_whole_map(kind, tmp_path):
    config = tiny_config()
    (config if kind is CANConfig else kind(config)).save_pretrained(tmp_path / "first")
    assert_ships_can(tmp_path / "first")
    kind.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_ships_can(tmp_path / "second")


def test_the_trainer_ships_it_and_an_adapter_does_not(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), report_to=[], use_cpu=True)
    Trainer(model=tiny_model(), args=arguments).save_model()
    assert_ships_can(tmp_path / "trainer")

    peft = pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.py")) and not (tmp_path / "adapter" / "config.json").exists()


def test_the_imported_package_is_preferred_to_the_code_in_a_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "modeling_can.py").write_text("raise AssertionError('was run')")
    for trust in (None, False, True):
        assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=trust)) is CANModel
        assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is CANConfig


def test_a_subclass_never_names_code_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "mycan.py").write_text(
        "from modeling_can import CANConfig, CANForPreTraining\n"
        "class MyConfig(CANConfig):\n    model_type = 'mycan'\n"
        "class MyCAN(CANForPreTraining):\n    pass\n"
        "class ShippedCAN(CANForPreTraining):\n    pass\n"
        "ShippedCAN.register_for_auto_class('AutoModelForPreTraining')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import mycan

    # Not registered: the folder is one of CAN, with the weights that the subclass shares with it.
    mycan.MyCAN(tiny_config()).save_pretrained(tmp_path / "plain")
    assert_ships_can(tmp_path / "plain")
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path / "plain")) is CANForPreTraining

    # Registered, as transformers' guide says: its own code goes too, and its name for the Auto class it chose.
    mycan.ShippedCAN(tiny_config()).save_pretrained(tmp_path / "shipped")
    assert auto_map(tmp_path / "shipped") == AUTO_MAP | {"AutoModelForPreTraining": "mycan.ShippedCAN"}
    assert filecmp.cmp(tmp_path / "mycan.py", tmp_path / "shipped" / "mycan.py", shallow=False)

    # Loaded from there as one of ours, it is one of ours again.
    CANForPreTraining.from_pretrained(tmp_path / "shipped").save_pretrained(tmp_path / "ours")
    assert_ships_can(tmp_path / "ours")

    # A configuration of another kind is shipped as itself, and says nothing of our models.
    CANConfig.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "config")
    mycan.MyConfig.from_pretrained(tmp_path / "config").save_pretrained(tmp_path / "other")
    assert auto_map(tmp_path / "other") == {"AutoConfig": "mycan.MyConfig"}
    assert [path.name for path in (tmp_path / "other").glob("*.py")] == ["mycan.py"]


# --- Without the package ---------------------------------------------------------------------------------------------


def run_in(folder: Path, code: str, **variables):
    """Python code in a process of its own, with this folder's `home` as the only cache and a closed standard input."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", **variables}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr


STRANGER = """
import json, sys
from pathlib import Path

sys.modules["modeling_can"] = None  # cannot be imported
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, pipeline

work = Path.cwd()
answers, outputs, batch = {}, {}, load_file(work / "batch.safetensors")
for name, options in {"asked": {}, "refused": {"trust_remote_code": False}}.items():
    try:
        AutoModel.from_pretrained(work / "can.v1", **options)
    except ValueError as error:
        answers[name] = str(error)
answers["modules"] = [name for name in sys.modules if name.startswith("transformers_modules")]

def run(source, label, again=None):
    trusted = {"trust_remote_code": True}
    encoder = AutoModel.from_pretrained(source, **trusted)
    full = AutoModelForPreTraining.from_pretrained(source, **trusted)
    classifier, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True, **trusted)
    answers[f"missing {label}"] = sorted(info["missing_keys"])
    classifier.classifier.load_state_dict(load_file(work / "classifier.safetensors"))
    with torch.no_grad():
        found = {"encoder": encoder.eval()(batch["pixel_values"][:, 0]),
                 "classifier": classifier.eval()(batch["pixel_values"][:, 0]), "full": full.eval()(**batch)}
    for model, output in found.items():
        outputs.update({f"{label} {model} {key}": value.contiguous() for key, value in output.items()})
    if again:
        for model in (encoder, full, classifier):
            model.save_pretrained(work / again / type(model).__name__)

run(work / "can.v1", "folder", again="again")
run(work / "again" / "CANForPreTraining", "again")
run("someone/can", "hub")

# The two snippets that the Hub shows for a model with code of its own, and what they are for.
pipe = pipeline("image-feature-extraction", model="someone/can", trust_remote_code=True)
model = AutoModel.from_pretrained("someone/can", trust_remote_code=True, device_map="auto")
outputs["pipeline"] = torch.tensor(pipe("photo.png"))[0]
pixel_values = load_file(work / "photo.safetensors")["pixel_values"]
with torch.no_grad():
    outputs["device_map"] = model(pixel_values.to(model.device)).last_hidden_state[0].cpu()

config = AutoConfig.from_pretrained(work / "config", trust_remote_code=True)
answers["from config"] = type(AutoModel.from_config(config, trust_remote_code=True)).__name__
config.save_pretrained(work / "again" / "CANConfig")
answers["package"] = sys.modules["modeling_can"] is not None
save_file(outputs, work / "outputs.safetensors")
(work / "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """What a process without the package made of a saved folder, and the models that it should equal."""
    work = tmp_path_factory.mktemp("stranger")
    model, classifier = tiny_model(), CANForImageClassification(tiny_config()).eval()
    classifier.can.load_state_dict(model.can.state_dict())
    model.save_pretrained(work / "saved")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48})
    processor.save_pretrained(work / "saved")
    photo = Image.effect_noise((70, 60), 60).convert("RGB")
    photo.save(work / "photo.png")
    (work / "saved").rename(work / "can.v1")  # it is tied to no place; a dot is no part of a module's name
    model.config.save_pretrained(work / "config")
    # The cache of the Hub as a download leaves it, so that no network is needed.
    cached = work / "home" / "hub" / "models--someone--can"
    shutil.copytree(work / "can.v1", cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    batch, photo = inputs(model.config), dict(processor(photo, return_tensors="pt"))
    save_file(batch, work / "batch.safetensors")
    save_file(photo, work / "photo.safetensors")
    save_file(classifier.classifier.state_dict(), work / "classifier.safetensors")
    run_in(work, STRANGER, HF_HUB_OFFLINE="1")
    with torch.no_grad():
        expected = {
            "encoder": model.can(batch["pixel_values"][:, 0]),
            "classifier": classifier(batch["pixel_values"][:, 0]),
            "full": model(**batch),
        }
        snippets = model.can(**photo).last_hidden_state[0]
    return work, json.loads((work / "answers.json").read_text()), expected, snippets


@pytest.mark.parametrize("source", ["folder", "again", "hub"])
def test_every_auto_class_loads_one_folder_without_the_package(stranger, source):
    work, answers, expected, _ = stranger
    assert not answers["package"] and answers[f"missing {source}"] == ["classifier.bias", "classifier.weight"]
    outputs = load_file(work / "outputs.safetensors")
    for model, output in expected.items():
        for key, value in output.items():
            assert torch.equal(outputs[f"{source} {model} {key}"], value), (model, key)
    assert outputs[f"{source} full loss"].isfinite()


def test_the_snippets_that_the_hub_shows_run_without_the_package(stranger):
    work, _, _, expected = stranger
    outputs = load_file(work / "outputs.safetensors")
    for snippet in ("pipeline", "device_map"):
        torch.testing.assert_close(outputs[snippet], expected, atol=1e-5, rtol=0)


def test_what_was_loaded_by_its_own_code_ships_it_again(stranger):
    work, answers, _, _ = stranger
    for kind in (CANConfig, *MODELS):
        assert_ships_can(work / "again" / kind.__name__)
    assert answers["from config"] == "CANModel"


def test_without_leave_nothing_of_it_is_run(stranger):
    _, answers, _, _ = stranger
    assert answers["modules"] == []
    for name in ("asked", "refused"):  # closed standard input: an error, and no wait for an answer
        assert "pass the argument `trust_remote_code=True`" in answers[name]


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's protocol that pushing a model and loading it need."""

    protocol_version = "HTTP/1.1"
    repositories = {}
    commit = "0" * 40

    def log_message(self, *arguments):
        pass

    def answer(self, body, status: int = 200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, _, *path = self.path.strip("/").split("/")
        if path == ["create"]:
            name = "{organization}/{name}".format(**json.loads(body))
            self.repositories[name] = {}
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if "preupload" in path:
            files = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer({"files": [file | {"uploadMode": "regular"} for file in files]})
        if "commit" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            self.repositories["/".join(path[:2])] |= {name: base64.b64decode(text) for name, text in files.items()}
            url = f"http://{self.headers['Host']}/{'/'.join(path[:2])}/commit/{self.commit}"
            return self.answer({"success": True, "commitUrl": url, "commitOid": self.commit})
        self.answer({"errors": [], "warnings": []})  # the model card is in order

    def do_GET(self):
        path = self.path.strip("/").split("/")
        if path[0] == "api":
            return self.answer({"id": "/".join(path[2:4]), "sha": self.commit})
        content = self.repositories["/".join(path[:2])].get(path[-1])
        if content is None:
            return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})
        self.answer(content, ETag=f'"{path[-1]}"')

    do_HEAD = do_GET


PUSH = """
import sys
sys.modules["modeling_can"] = None  # cannot be imported
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

model = AutoModelForPreTraining.from_pretrained("can.v1", trust_remote_code=True)
model.push_to_hub("me/pushed")
model.save_pretrained("saved_model", push_to_hub=True, repo_id="me/saved")
model.config.push_to_hub("me/configuration")
model.config.save_pretrained("saved_configuration", push_to_hub=True, repo_id="me/saved_configuration")
for kind in (AutoModel, AutoModelForImageClassification, AutoModelForPreTraining):
    assert kind.from_pretrained("me/pushed", trust_remote_code=True).num_parameters() > 0
"""


@pytest.mark.slow
def test_a_push_takes_it_along(tmp_path):
    tiny_model().save_pretrained(tmp_path / "can.v1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            run_in(tmp_path, PUSH, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_TOKEN="hf_none")
        finally:
            server.shutdown()
    assert sorted(Hub.repositories) == ["me/configuration", "me/pushed", "me/saved", "me/saved_configuration"]
    for name, files in Hub.repositories.items():
        for file in SHIPPED:
            assert files[file] == (PACKAGE / file).read_bytes(), (name, file)
        assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP, name
        assert ("model.safetensors" in files) == (name in ("me/pushed", "me/saved")), name


# --- Loud loading ----------------------------------------------------------------------------------------------------


def changed(folder: Path, change) -> Path:
    """A saved pre-training folder whose tensors went through `change`."""
    tiny_model().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_is_the_model_in_shards_at_another_place_and_in_any_precision(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(tiny_config()).eval()
    model.save_pretrained(tmp_path / "here", max_shard_size="40KB")
    assert len(list((tmp_path / "here").glob("model-*.safetensors"))) > 1
    for path in (tmp_path / "here").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    folder = (tmp_path / "here").rename(tmp_path / "there")
    for options in ({}, {"device_map": "auto"}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}):
        loaded, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        assert not any(info.values()), (options, info)
        assert loaded.dtype == options.get("dtype", torch.float32)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name].cpu(), tensor.to(loaded.dtype)), (options, name)


@pytest.mark.parametrize("key", ["can.embeddings.position_embeddings", "can.layers.1.mlp.fc1.weight"])
def test_a_missing_tensor_is_reported_and_refused_by_the_scripts(key, tmp_path):
    folder = changed(tmp_path, lambda weights: weights.pop(key))
    model, info = CANForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {key}
    assert torch.isfinite(model.state_dict()[key]).all()  # drawn, not left as memory was
    with pytest.raises(ValueError, match=f"lacks weights of a CANModel.*{key.removeprefix('can.')}"):
        load_model(str(folder), AutoModel)


def test_an_unknown_tensor_is_reported(tmp_path):
    folder = changed(tmp_path, lambda weights: weights.update({"can.extra": torch.zeros(1)}))
    for kind in MODELS:
        _, info = kind.from_pretrained(folder, output_loading_info=True)
        assert {key.removeprefix("can.") for key in info["unexpected_keys"]} == {"extra"}, kind


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    folder = changed(tmp_path, lambda weights: weights.update({"can.layernorm.bias": torch.zeros(3)}))
    for kind in MODELS:
        with pytest.raises(RuntimeError, match="mismatch"):
            kind.from_pretrained(folder)
    with pytest.raises(ValueError, match="lacks weights of a CANModel.*layernorm.bias"):
        load_model(str(folder), AutoModel)


@pytest.mark.parametrize("size", [0, 5000])
def test_a_truncated_file_is_refused_by_name(size, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded.*header"):
        load_model(str(tmp_path), AutoModel)


def test_a_missing_shard_is_refused_by_name(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load_model(str(tmp_path), AutoModel)


# --- Untrusted folders -----------------------------------------------------------------------------------------------


class Malice:
    """Unpickling this creates a file."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


def write_pickle(path: Path, trace: Path, form: str):
    if form == "plain":
        path.write_bytes(pickle.dumps({"can.layernorm.bias": Malice(trace)}))
    else:
        content = {"can.layernorm.bias": Malice(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


def test_malice_works_where_it_is_let(tmp_path):
    """Or the tests below could not fail."""
    write_pickle(tmp_path / "pytorch_model.bin", tmp_path / "trace", "zip")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)["can.layernorm.bias"].close()
    assert (tmp_path / "trace").exists()


def test_pickles_beside_good_weights_are_not_opened(tmp_path):
    trace, folder = tmp_path / "trace", tmp_path / "model"
    tiny_model().save_pretrained(folder)
    for name in ("pytorch_model.bin", "model.pkl", "training_args.bin", "optimizer.bin", "adapter_model.bin"):
        write_pickle(folder / name, trace, "plain")
    AutoModel.from_pretrained(folder)
    load_model(str(folder), AutoModel)
    warm_start(tiny_model(), str(folder))
    assert not trace.exists()


@pytest.mark.parametrize("form", ["plain", "zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_instead_of_weights_is_never_run(form, tmp_path):
    trace, folder = tmp_path / "trace", tmp_path / "model"
    tiny_config().save_pretrained(folder)
    write_pickle(folder / "pytorch_model.bin", trace, form)
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):  # by transformers itself
        AutoModel.from_pretrained(folder)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        warm_start(tiny_model(), str(folder))
    with pytest.raises(ValueError, match="no weights in safetensors.*python -m modeling_can.conversion"):
        load_model(str(folder), AutoModel)
    assert not trace.exists()


@pytest.mark.parametrize("model_type", ["can", "foreign"])
def test_code_in_a_foreign_folder_is_not_run_without_leave(model_type, tmp_path):
    trace, folder = tmp_path / "trace", tmp_path / "model"
    tiny_model().save_pretrained(folder)
    malice = f"open({str(trace)!r}, 'w').close()\n"
    (folder / "evil.py").write_text(malice)
    names = ("AutoConfig", "AutoModel", "AutoModelForPreTraining")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {name: f"evil.{name}" for name in names}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "evil.Evil"}}))
    with pytest.raises(ValueError, match="contains custom code"):
        load_encoder(str(folder))
    if model_type == "can":
        warm_start(tiny_model(), str(folder))
    else:
        with pytest.raises(ValueError, match="foreign"):
            warm_start(tiny_model(), str(folder))
    assert not trace.exists()
    with pytest.raises((ValueError, AttributeError)):  # evil.py defines none of these names
        load_encoder(str(folder), trust_remote_code=True)
    assert trace.exists()
