"""Settings: what a field declares is what it takes."""

import dataclasses
import math

import pytest

from modeling_can import CANConfig
from modeling_can.evaluation.finetuning import FineTuning
from modeling_can.evaluation.settings import Settings
from modeling_can.fields import Option, check, expand_paths, option
from modeling_can.pretraining.recipe import Recipe


GIVEN = {
    Recipe: {"config": CANConfig(), "data_dir": "images", "max_steps": 1},
    Settings: {"model_name_or_path": ("model",), "dataset_name": "set"},
    FineTuning: {},
}


def wrong_values():
    """For each constraint of each field: the field and a value that breaks this constraint alone."""
    for kind in GIVEN:
        for f in dataclasses.fields(kind):
            declared = f.metadata.get("option", Option(""))
            several, count = "tuple" in str(f.type), (declared.num_values or (1,))[0]
            wrong = {}
            if declared.choices:
                wrong["choices"] = "none of them"
            if "float" in str(f.type) or "int" in str(f.type):
                wrong |= {"infinite": math.inf, "not a number": math.nan}
            for name, step in (("minimum", -1), ("above", 0), ("maximum", 1), ("below", 0)):
                if math.isfinite(getattr(declared, name)):
                    wrong[name] = getattr(declared, name) + step
            wrong = {name: (value,) * count if several else value for name, value in wrong.items()}
            if declared.num_values:
                wrong["num_values"] = (1,) * (declared.num_values[-1] + 1)
            if declared.ascending:
                wrong["ascending"] = (0.75, 0.5)
            if declared.required:
                wrong["required"] = ()
            for name, value in wrong.items():
                yield pytest.param(kind, f.name, value, id=f"{kind.__name__}.{f.name} {name}")


@pytest.mark.parametrize("kind, name, value", wrong_values())
def test_every_constraint_refuses_by_the_name_of_the_field(kind, name, value):
    kind(**GIVEN[kind])
    with pytest.raises(ValueError) as caught:
        kind(**GIVEN[kind] | {name: value})
    message = str(caught.value)
    one = value[0] if isinstance(value, tuple) and value else value
    assert message.startswith((f"{name}={one!r} ", f"{name}={value} ")) or message.startswith(f"give --{name}: ")


@dataclasses.dataclass
class Example:
    share: float = option(0.5, "of the whole", above=0, maximum=1)
    number: int | None = option(None, "of things", minimum=2)
    rates: tuple[float, ...] = option((1.0, 2.0), "low,high", above=0, num_values=(2,), ascending=True)
    mode: bool | str = option("auto", "how", choices=("auto", True))
    place: str | None = option(None, "where", path=True)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"share": 0}, "share=0 is outside (0, 1] (of the whole)"),
        ({"share": math.nan}, "share=nan must be finite (of the whole)"),
        ({"number": 1}, "number=1 must be at least 2 (of things)"),
        ({"rates": (1.0, 0.0)}, "rates=0.0 must be greater than 0 (low,high)"),
        ({"rates": (1.0,)}, "rates=(1.0,) must have 2 values, not 1 (low,high)"),
        ({"rates": (2.0, 1.0)}, "rates=(2.0, 1.0) must not decrease (low,high)"),
        ({"mode": "on"}, "mode='on' is not one of auto, true"),
    ],
)
def test_a_message_gives_field_value_and_fix(given, message):
    check(Example())
    with pytest.raises(ValueError) as caught:
        check(Example(**given))
    assert str(caught.value) == message


def test_paths_alone_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    example = Example(mode="~", place="~/images")
    expand_paths(example)
    assert example.place == "/home/someone/images" and example.mode == "~"


def test_a_constraint_that_is_misspelled_is_refused():
    with pytest.raises(TypeError, match="minimun"):
        option(1, "of things", minimun=0)
