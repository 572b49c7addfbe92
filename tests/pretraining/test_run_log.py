"""What a run hands to its trackers."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from testing_utils import TOY

import run_pretraining
from modeling_can.configuration_can import SIMCLR
from modeling_can.pretraining import run_log
from modeling_can.pretraining.run_log import log_image


class Trackio:
    """The module, as far as accelerate's tracker and the run use it."""

    def __init__(self):
        self.logged, self.config = [], SimpleNamespace(update=lambda values, **options: None)

    def init(self, project: str, **options):
        return SimpleNamespace(
            log=lambda values, step=None: self.logged.append((step, values)),
            finish=lambda: None,
        )

    class Image:
        def __init__(self, value: np.ndarray, caption: str | None = None):
            self.value = value


@pytest.mark.parametrize("objective", [{}, SIMCLR])
def test_trackio_gets_the_images_of_a_run(tmp_path, monkeypatch, objective):
    """accelerate's own tracker, above a module that keeps what it is given."""
    trackio = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TRACKIO])
    options = {
        "output_dir": tmp_path,
        "log_with": "trackio",
        "save_steps": 2,
        "probe_dataset_name": "none",
        **objective,
    }
    run_pretraining.main([*TOY, *(f"--{name}={value}" for name, value in options.items())])
    images = {}
    for step, values in trackio.logged:
        for name, value in values.items():
            if isinstance(value, Trackio.Image):
                assert value.value.dtype == np.uint8 and value.value.shape[2] == 3
                images.setdefault(name, []).append(step)
    names = ["features"] if objective else ["reconstructions", "features"]
    assert images == {name: [2, 3] for name in names}
    assert {path.stem for path in (tmp_path / "figures").glob("[!e]*.png")} == {"curves", *names}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tensorboard", (1, 4, 6, 3)),
        ("wandb", [(4, 6, 3)]),
        ("swanlab", [(4, 6, 3)]),
        ("aim", (4, 6, 3)),
        ("clearml", (4, 6, 3)),
    ],
)
def test_every_tracker_gets_images_in_its_own_form(name, expected):
    taken = []
    tracker = SimpleNamespace(
        name=name, log_images=lambda values, step, **options: taken.append((values, step, options))
    )
    log_image(tracker, "features", np.zeros((4, 6, 3), np.uint8), 5)
    ((values, step, options),) = taken
    image = values["features"]
    assert ([x.shape for x in image] if isinstance(image, list) else image.shape) == expected and step == 5
    assert options == ({"dataformats": "NHWC"} if name == "tensorboard" else {})


def test_a_tracker_without_images_gets_none():
    log_image(SimpleNamespace(name="mlflow"), "features", np.zeros((4, 6, 3), np.uint8), 5)


@pytest.mark.parametrize(("silent_seconds", "is_told"), [(0.0, True), (120, False)])
def test_a_slow_run_with_a_recipe_says_early_how_long_it_takes(tmp_path, monkeypatch, capsys, silent_seconds, is_told):
    monkeypatch.setattr(run_log, "_SILENT_SECONDS", silent_seconds)
    run_pretraining.main(
        [*TOY, "--max_steps=4", "--logging_steps=3", "--probe_dataset_name=none", f"--output_dir={tmp_path}"]
    )
    said = capsys.readouterr().out
    assert bool(re.search(r"step 2 of 4 took \S+ s, so that about \S+ s are left\nstep 3 of 4: ", said)) == is_told
