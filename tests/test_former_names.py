"""Names that were changed: read as before, written as today."""

import json

import pytest
import yaml
from testing_utils import ROOT

import modeling_can
from modeling_can import api
from modeling_can.evaluation import settings
from modeling_can.former_names import FORMER_NAMES, current_names
from modeling_can.pretraining.recipe import Recipe, make_recipe, model_fields, parse_arguments, training_fields


FIELDS = {f.name: f for f in [*training_fields(), *model_fields()]}
FLAGS = {f.name: f for group in settings._groups().values() for f in group}
SETTINGS = {former: name for former, name in FORMER_NAMES.items() if name in FIELDS.keys() | FLAGS.keys()}
SOURCE = {"data_dir": "images", "max_steps": 1}


def test_no_former_name_is_used_today_and_none_is_stale():
    assert "greyscale_probability" in SETTINGS
    assert not FORMER_NAMES.keys() & (FIELDS.keys() | FLAGS.keys() | set(FORMER_NAMES.values()))
    package = [path for path in (ROOT / "modeling_can").rglob("*.py") if path.name != "former_names.py"]
    source = "\n".join(path.read_text() for path in package)
    for name in FORMER_NAMES.values():
        assert name in FIELDS.keys() | FLAGS.keys() or f'"{name}"' in source, name


@pytest.mark.parametrize("former", [former for former, name in SETTINGS.items() if name in FIELDS])
def test_a_recipe_takes_former_names_and_is_written_with_todays(former, tmp_path, monkeypatch):
    name = FORMER_NAMES[former]
    default = FIELDS[name].default
    value = not default if isinstance(default, bool) else default / 2  # any other: these are numbers or switches
    monkeypatch.setattr(api, "run", lambda recipe, *_: recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**SOURCE, former: value}))
    wanted = Recipe.from_dict({**SOURCE, name: value})
    line = [f"--{key}={v}" for key, v in SOURCE.items()]
    for made in (
        parse_arguments([str(file)], ""),
        parse_arguments([*line, f"--{former}={value}"], ""),
        parse_arguments([*line, f"--{former}", str(value)], ""),
        make_recipe({**SOURCE, former: value}, {}),
        modeling_can.pretrain({**SOURCE}, **{former: value}),
        modeling_can.pretrain({**SOURCE, former: value}),
    ):
        assert getattr(made, name) == value
        assert former not in made.to_dict()
    assert make_recipe({**SOURCE, former: value}, {}) == wanted
    # The command line and keywords count last, whichever name they or the recipe use
    for in_file, given in ((former, name), (name, former)):
        file.write_text(yaml.safe_dump({**SOURCE, in_file: default}))
        assert getattr(parse_arguments([str(file), f"--{given}={value}"], ""), name) == value
        assert getattr(modeling_can.pretrain(file, **{given: value}), name) == value


@pytest.mark.parametrize("former", [former for former, name in SETTINGS.items() if name in FIELDS])
def test_a_setting_under_both_names_is_refused(former):
    name = FORMER_NAMES[former]
    both = {name: 0.25, former: 0.5}
    message = f"{name}='?0.25'? is given again as {former}='?0.5'?, its former name; remove {former}"
    for make in (
        lambda: Recipe.from_dict({**SOURCE, **both}),
        lambda: make_recipe({**SOURCE, **both}, {}),
        lambda: modeling_can.pretrain(SOURCE, **both),
        lambda: parse_arguments([f"--{key}={value}" for key, value in both.items()], ""),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_results_written_earlier_are_read_under_todays_names():
    kept = {"results": {"can": {"reconstruction": {"hidden_patches": {"db": 20.0}, "picture": "out/sheet.png"}}}}
    read = json.loads(json.dumps(kept), object_hook=current_names)
    assert read["results"]["can"]["reconstruction"] == {"masked_patches": {"db": 20.0}, "figure": "out/sheet.png"}
