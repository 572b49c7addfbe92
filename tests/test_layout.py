"""The rules of the house: which file may import what, and what the import costs."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_can"
HUB = {"configuration_can", "losses", "modeling_can"}  # these travel with the weights as remote code


def imports(path: Path) -> set[str]:
    """Modules that a file imports, relative ones with their leading dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            found |= {dots + node.module} if node.module else {dots + alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_files_import_torch_transformers_strict_and_each_other(name):
    standard = set(sys.stdlib_module_names)
    for module in imports(PACKAGE / f"{name}.py"):
        if module.startswith("."):
            assert module[1:] in HUB, f"{name} imports {module}"
        else:
            top = module.split(".")[0]
            assert top in {"torch", "transformers"} | standard or module == "huggingface_hub.dataclasses", module


def test_remote_code_copies_exactly_the_hub_files():
    from transformers.dynamic_module_utils import get_relative_import_files

    needed = get_relative_import_files(PACKAGE / "modeling_can.py")
    assert {Path(path).stem for path in needed} | {"modeling_can"} == HUB


def test_accelerate_stays_in_the_loop_and_processes_in_the_losses():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name not in ("pretraining", "evaluation"):
            assert not any(module.split(".")[0] == "accelerate" for module in imports(path)), path
        assert not {"run_eval", "run_pretraining"} & imports(path), path
        modules = {module for module in imports(path) if module.startswith("torch.distributed")}
        # What processes say to each other; how they meet; and of sharded state
        if path.name not in ("losses.py", "rendezvous.py", "checkpoints.py"):
            assert not modules, path
            attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
            assert "torch.distributed" not in map(ast.unparse, attributes), path
    no_model = [
        PACKAGE / f"{name}.py"
        for name in ("evaluation/embed", "evaluation/features", "evaluation/part_files", "optimization")
    ]
    protocols = imports(PACKAGE / "evaluation" / "tasks.py")  # they are given modules, and know no class of ours
    no_model += [PACKAGE / "evaluation" / f"{name[1:]}.py" for name in protocols if name.startswith(".")]
    for path in [*no_model, *(PACKAGE / "data").glob("*.py"), *(PACKAGE / "hub").glob("*.py")]:
        assert not {".modeling_can", "..modeling_can"} & imports(path), path


ROOMS = ("data", "hub", "conversion", "evaluation", "pretraining")  # from the ground up


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_none_above_it_and_its_files_no_circle(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    files = {path.stem: imports(path) for path in (PACKAGE / room).glob("*.py")}
    for name, modules in files.items():
        others = {module[2:].split(".")[0] for module in modules if re.match(r"\.\.\w", module)}
        assert not others & above, name
    siblings = {
        name: {module[1:] for module in modules if re.fullmatch(r"\.\w+", module)} for name, modules in files.items()
    }
    TopologicalSorter(siblings).prepare()  # raises CycleError


def test_settings_know_no_room():
    assert {module for module in imports(PACKAGE / "fields.py") if module.startswith(".")} == {
        ".files",
        ".former_names",
    }
    for name in ("files", "former_names"):
        assert not any(module.startswith(".") for module in imports(PACKAGE / f"{name}.py"))
    for path in PACKAGE.rglob("*.py"):  # cards and evaluation read a recipe's file; a Recipe is the trainer's alone
        recipes = {module for module in imports(path) if module.split(".")[-1] == "recipe"}
        assert not recipes or path.parent.name == "pretraining" or path.name in ("api.py", "cli.py"), path


IMPORT_ALL = """
import ast, importlib.util, logging, os, random, signal, sys, warnings
from pathlib import Path
import datasets, matplotlib, numpy, PIL.Image, PIL.ImageFile, torch, transformers

def state():
    rc = {name: str(dict.__getitem__(matplotlib.rcParams, name)) for name in matplotlib.rcParams}
    loggers = {name: logging.getLogger(name).level for name in sorted(logging.root.manager.loggerDict)}
    return {
        "environment": dict(os.environ), "sys.path": list(sys.path), "streams": [id(sys.stdout), id(sys.stderr)],
        "matplotlib": rc, "pyplot": "matplotlib.pyplot" in sys.modules, "warnings": list(map(str, warnings.filters)),
        "datasets": {name: str(value) for name, value in vars(datasets.config).items() if name.isupper()},
        "loggers": loggers, "root": (logging.root.level, list(map(str, logging.root.handlers))),
        "transformers": transformers.utils.logging.is_progress_bar_enabled(),
        "torch": [torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
                  torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                  torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, str(torch.get_rng_state())],
        "random": [random.getstate(), str(numpy.random.get_state())],
        "PIL": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
    }

root = Path(sys.argv[1])
files = sorted(root.glob("modeling_can/**/*.py"))
if importlib.util.find_spec("skimage") is None:  # which only the script that cuts the bundled tiles needs
    files = [path for path in files if path.name != "build.py"]
for path in files:  # what other packages change, as they are imported, is not ours
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            exec(ast.unparse(node), {})
sys.path.insert(0, str(root))
before = state()
for path in files:
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(name)
after = state()
known = before["loggers"].keys()
after["loggers"] = {name: level for name, level in after["loggers"].items() if name in known or level}
print([name for name in before if before[name] != after[name]])
"""


def test_importing_changes_nothing_for_the_users_process():
    command = [sys.executable, "-c", IMPORT_ALL, str(ROOT)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.stdout.strip() == "[]", answer.stdout[:3000] + answer.stderr


WITHOUT_POSIX = """
import ast, importlib, os, signal, sys
from pathlib import Path

root = Path(sys.argv[1])
files = [path for path in sorted(root.glob("modeling_can/**/*.py")) if path.name != "build.py"]
for path in files:  # other packages have their own ways
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            exec(ast.unparse(node), {})
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("SIGALRM", "SIGKILL", "SIGUSR1", "pthread_sigmask", "setitimer", "sigwaitinfo"):
    delattr(signal, name)
for name in ("nice", "sched_getaffinity"):
    delattr(os, name)
sys.path.insert(0, str(root))
for path in files:
    importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))

from modeling_can.data.loading import outlive_stop_signals
from modeling_can.pretraining.run_folder import lock, unlock
from modeling_can.pretraining.stopping import StopSignals
with StopSignals(None, None) as stop:
    signal.raise_signal(signal.SIGTERM)
    print(stop.wanted())
unlock(lock(Path(sys.argv[2])))
outlive_stop_signals(0)
"""


@pytest.mark.slow
def test_windows_lacks_nothing_that_is_needed(tmp_path):
    command = [sys.executable, "-c", WITHOUT_POSIX, str(ROOT), str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.stdout.strip() == "True" and answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_is_public(path):
    nodes = ast.parse(path.read_text()).body
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = {
        name.id
        for node in nodes
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    (names,) = [ast.literal_eval(node.value) for node in nodes if ast.unparse(node).startswith("__all__ = ")]
    assert len(names) == len(set(names)) and set(names) <= defined | assigned | imported
    constants = {name for name in assigned if name.isupper()}
    assert {name for name in defined | constants if not name.startswith("_")} <= set(names)


def scripts_and_package() -> list[Path]:
    return [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py"), *(ROOT / "demo").glob("*.py")]


def test_of_many_arguments_all_but_four_are_by_keyword():
    """Of the package's own functions and classes, by their names; torch's have other customs."""
    trees = {path: ast.parse(path.read_text()) for path in scripts_and_package()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for path, tree in trees.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            assert len(call.args) <= 4 or name not in ours, f"{path}, line {call.lineno}: {ast.unparse(call)}"


def test_only_two_files_print():
    for path in [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")]:
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        allowed = path.name in ("cli.py", "progress.py", "build.py")  # the last cuts the bundled photos, by hand
        assert allowed or "print" not in map(ast.unparse, calls), path


def test_files_and_functions_fit_their_reader():
    folders = (PACKAGE, *(ROOT / name for name in ("benchmarks", "demo", "experiments", "tests")))
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        text = path.read_text()
        assert len(text.splitlines()) <= (900 if path.name == "modeling_can.py" else 600), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 100, (path, node.name)


def test_no_test_imports_another():
    tests = [*(ROOT / "tests").rglob("*.py")]
    names = {path.stem for path in tests if path.stem.startswith("test_")} | {"conftest"}
    for path in tests:
        assert not names & imports(path), path
    assert len({path.name for path in tests if path.stem in names - {"conftest"}}) == len(names) - 1  # each once


def test_importing_needs_torch_and_transformers_alone():
    code = f"""
import sys
from importlib.machinery import PathFinder
sys.path.insert(0, {str(ROOT)!r})
blocked = {{"accelerate", "datasets", "evaluate", "kornia", "matplotlib", "peft", "PIL", "pyarrow", "scipy", "sklearn",
           "torchvision"}}
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
import modeling_can, transformers
from transformers import AutoConfig, AutoModel
config = AutoConfig.for_model("can", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
print(type(AutoModel.from_config(config)).__name__)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.stdout.strip() == "CANModel", answer.stderr
