"""Training as transformers does it: gradient checkpointing, compiling, the losses of a classifier."""

import pytest
import torch
from each_model import CLOSE, assert_same, build, example, scalar

from modeling_can import CANForImageClassification, CANForPreTraining


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_number(kind, use_reentrant):
    assert kind.supports_gradient_checkpointing
    model = build(kind, hidden_dropout_prob=0.1, drop_path_rate=0.2).train()
    results = []
    for switched_on in (False, True):
        if switched_on:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout
        value = scalar(model(**example(model)))
        value.backward()
        results.append((value.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (value, gradients), (again, recomputed) = results
    assert torch.equal(value, again) and gradients.keys() == recomputed.keys() and len(gradients) > 30
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def assert_compiles(kind, backend: str, **tolerance):
    model = build(kind)
    expected = model(**example(model))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(compiled(**example(model)), expected, **tolerance)


@pytest.mark.slow  # tests/model/test_modeling.py has a quick one of pre-training alone
def test_compiling_in_one_graph_changes_no_number(kind):
    assert_compiles(kind, "aot_eager", **CLOSE)


@pytest.mark.slow
def test_the_default_compiler_changes_no_number():
    assert_compiles(CANForPreTraining, "inductor", atol=1e-4, rtol=1e-4)  # fused sums, in yet another order


@pytest.mark.parametrize(
    "problem, labels, loss",
    [
        ("single_label_classification", torch.tensor([0, 1, 2, 4]), torch.nn.functional.cross_entropy),
        ("multi_label_classification", torch.eye(5)[:4], torch.nn.functional.binary_cross_entropy_with_logits),
        ("regression", torch.linspace(0, 1, 20).view(4, 5), torch.nn.functional.mse_loss),
    ],
)
def test_a_classifier_learns_the_problem_that_its_labels_or_its_configuration_say(problem, labels, loss):
    for problem_type in (problem, None) if problem != "regression" else (problem,):
        model = build(CANForImageClassification, problem_type=problem_type)
        given = labels.long() if problem_type is None and problem == "single_label_classification" else labels
        output = model(example(model)["pixel_values"], labels=given)
        torch.testing.assert_close(output.loss, loss(output.logits, labels))
