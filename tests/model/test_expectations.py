"""What code written for transformers' vision models takes for granted, of each of the three classes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import inputs, tiny_config
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from modeling_can import CANConfig, CANForImageClassification, CANForPreTraining, CANModel
from modeling_can.modeling_can import sincos_positions


MODELS = [CANModel, CANForPreTraining, CANForImageClassification]


def build(kind, **changes):
    torch.manual_seed(0)
    return kind(tiny_config(num_labels=5, **changes)).eval()


def example(model, batch_size: int = 4) -> dict:
    """Arguments of a forward pass with nothing left to chance; a classifier's with labels."""
    batch = inputs(model.config, batch_size)
    if isinstance(model, CANForPreTraining):
        return batch
    pixels = {"pixel_values": batch["pixel_values"][:, 0]}
    return pixels if isinstance(model, CANModel) else pixels | {"labels": torch.arange(batch_size) % 5}


def scalar(output) -> torch.Tensor:
    """The loss, or of a model without one a number that depends on all tokens, which a layer norm gives one square."""
    return output.loss if "loss" in output else output.last_hidden_state.pow(3).mean()


def assert_same(left, right, **tolerance):
    assert list(left) == list(right)
    for name, value in left.items():
        if isinstance(value, tuple):
            for one, other in zip(value, right[name], strict=True):
                torch.testing.assert_close(one, other, **tolerance)
        else:
            torch.testing.assert_close(value, right[name], **tolerance)


EXACT = dict(atol=0, rtol=0)
CLOSE = dict(atol=1e-5, rtol=1e-5)  # another order of the same sums in fp32


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


# --- Outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_is_deterministic_and_leaves_training_mode_random(kind):
    model = build(kind, hidden_dropout_prob=0.5)
    batch = example(model)
    assert_same(model(**batch), model(**batch), **EXACT)
    model.train()
    assert scalar(model(**batch)) != scalar(model(**batch))


@torch.no_grad()
def test_a_tuple_holds_what_the_named_output_holds(kind):
    model = build(kind, attn_implementation="eager")
    batch = example(model) | {"output_hidden_states": True, "output_attentions": True}
    named, plain = model(**batch), model(**batch, return_dict=False)
    assert type(plain) is tuple and len(plain) == len(named.to_tuple())
    for value, other in zip(plain, named.to_tuple(), strict=True):
        torch.testing.assert_close(value, other, **EXACT)
    model.config.return_dict = False
    assert type(model(**batch)) is tuple


@torch.no_grad()
def test_hidden_states_and_attentions_are_one_a_layer_and_the_embeddings(kind):
    model = build(kind, attn_implementation="eager")
    plain = model(**example(model))
    assert plain.hidden_states is None and plain.attentions is None
    for by_config in (False, True):
        model.config.output_hidden_states = model.config.output_attentions = by_config
        asked = {} if by_config else {"output_hidden_states": True, "output_attentions": True}
        output = model(**example(model), **asked)
        layers = model.config.num_hidden_layers
        assert len(output.hidden_states) == layers + 1 and len(output.attentions) == layers
        tokens = output.hidden_states[0].shape[-2]
        for state, attention in zip(output.hidden_states[1:], output.attentions, strict=True):
            assert state.shape[-2:] == (tokens, model.config.hidden_size)
            assert attention.shape[-3:] == (model.config.num_attention_heads, tokens, tokens)
            assert state.shape[:-2] == attention.shape[:-3]
            torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
        final = model.base_model.layernorm(output.hidden_states[-1])
        if kind is CANModel:
            torch.testing.assert_close(output.last_hidden_state, final, **EXACT)
        if kind is CANForImageClassification:
            torch.testing.assert_close(output.logits, model.classifier(final[:, 1:].mean(1)), **EXACT)


@torch.no_grad()
def test_asking_for_more_changes_no_number(kind):
    model = build(kind, attn_implementation="eager")
    plain = model(**example(model))
    more = model(**example(model), output_hidden_states=True, output_attentions=True)
    for name, value in plain.items():
        torch.testing.assert_close(value, more[name], **EXACT)


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_in_a_batch(kind):
    model = build(kind, contrastive_loss_weight=0)  # which compares the pictures of a batch
    batch = example(model)
    per_picture = [name for name, value in model(**batch).items() if value.ndim]
    assert per_picture
    whole = model(**batch)
    for index in range(4):
        alone = model(**{name: value[index : index + 1] for name, value in batch.items()})
        for name in per_picture:
            torch.testing.assert_close(alone[name][0], whole[name][index], **CLOSE)


@torch.no_grad()
def test_eager_and_sdpa_agree_in_every_output(kind):
    model = build(kind)
    model.set_attn_implementation("eager")
    eager = model(**example(model))
    model.set_attn_implementation("sdpa")
    assert_same(model(**example(model)), eager, **CLOSE)


@torch.no_grad()
def test_other_sizes_need_leave_and_leave_the_configuration_alone(kind):
    model = build(kind)
    before = model.config.to_dict()
    larger = inputs(tiny_config(image_size=(64, 40)))  # 40 patches instead of 24
    batch = larger if kind is CANForPreTraining else {"pixel_values": larger["pixel_values"][:, 0]}
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(**batch)
    output = model(**batch, interpolate_pos_encoding=True)
    if kind is CANModel:
        assert output.last_hidden_state.shape == (4, 41, 32)
    assert all(value.isfinite().all() for value in output.values()) and model.config.to_dict() == before
    own = example(model)
    assert_same(model(**own, interpolate_pos_encoding=True), model(**own), **EXACT)


# --- Training --------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow  # tests/test_modeling.py has a quick one of pre-training alone
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


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_a_model_made_on_the_meta_device_is_initialised_afterwards(kind):
    with torch.device("meta"):
        model = kind(tiny_config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    base = model.base_model
    torch.testing.assert_close(base.embeddings.position_embeddings, sincos_positions((4, 6), 32), **EXACT)
    assert base.embeddings.cls_token.abs().max() > 0 and base.layers[0].mlp.fc1.weight.std() > 0.01


@torch.no_grad()
def test_half_precision_gives_nearly_the_same(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    expected = scalar(model(**example(model)))
    for dtype, digits in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        half = kind.from_pretrained(tmp_path, dtype=dtype).eval()
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        torch.testing.assert_close(scalar(half(**example(half))).float(), expected, rtol=digits, atol=digits)


@torch.no_grad()
def test_copies_and_pickles_are_the_model(kind):
    model = build(kind)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other(**example(model)), model(**example(model)), **EXACT)
        other.base_model.layernorm.bias.add_(1)
        assert not torch.equal(other.base_model.layernorm.bias, model.base_model.layernorm.bias)


def test_the_input_embeddings_are_the_patch_projection(kind):
    model = build(kind)
    projection = model.get_input_embeddings()
    assert projection is model.base_model.embeddings.patch_embeddings
    new = torch.nn.Linear(projection.in_features, projection.out_features)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is model.base_model.embeddings.patch_embeddings is new
    assert model.get_output_embeddings() is None
    model.enable_input_require_grads()  # what PEFT does under gradient checkpointing
    model.requires_grad_(False)
    assert scalar(model(**example(model))).requires_grad


def test_parameters_are_counted_as_torch_counts_them(kind):
    model = build(kind)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == count == model.num_parameters(only_trainable=True)  # positions are buffers
    model.base_model.requires_grad_(False)
    inside = sum(parameter.numel() for parameter in model.base_model.parameters())
    assert model.num_parameters(only_trainable=True) == count - inside
    assert model.get_memory_footprint() == 4 * sum(tensor.numel() for tensor in model.state_dict().values())


# --- Configuration and pipelines -------------------------------------------------------------------------------------


def test_labels_and_fields_of_ones_own_survive(tmp_path):
    names = {0: "cat", 1: "dog", 2: "bird"}
    config = tiny_config(id2label=names, label2id={name: i for i, name in names.items()}, made_by="me")
    CANForImageClassification(config).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label == names and model.config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    assert model.num_labels == model.config.num_labels == model.classifier.out_features == 3
    assert model.config.made_by == "me"
    wider = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    assert wider.classifier.out_features == 4


def test_a_configuration_is_made_by_its_type_and_compares_by_value():
    config = AutoConfig.for_model("can", **{"hidden_size": 32, "num_attention_heads": 2})
    assert type(config) is CANConfig and config.hidden_size == 32
    assert config == CANConfig(hidden_size=32, num_attention_heads=2) != CANConfig()
    assert config == copy.deepcopy(config)
    assert CANConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)) for _ in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("task", ["image-feature-extraction", "image-classification"])
def test_pipelines_take_a_folder(task, tmp_path, pictures):
    model = build(CANModel if task == "image-feature-extraction" else CANForImageClassification)
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48})
    processor.save_pretrained(tmp_path)
    pipe = pipeline(task, model=str(tmp_path), device="cpu")
    expected = model(**processor(pictures, return_tensors="pt"))
    if task == "image-feature-extraction":
        for features, state in zip(pipe(pictures), expected.last_hidden_state, strict=True):
            torch.testing.assert_close(torch.tensor(features)[0], state, **CLOSE)
        pooled = pipe(pictures, pool=True)
        torch.testing.assert_close(torch.tensor(pooled)[:, 0], expected.pooler_output, **CLOSE)
    else:
        for answers, logits in zip(pipe(pictures, top_k=5), expected.logits, strict=True):
            scores = {answer["label"]: answer["score"] for answer in answers}
            probabilities = logits.softmax(-1)
            assert scores == pytest.approx({f"LABEL_{i}": probabilities[i].item() for i in range(5)}, abs=1e-5)
