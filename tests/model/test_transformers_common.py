"""
transformers' own tests for all its models, on CAN. They come with its source distribution, which .ci/run fetches:

    pip download --no-deps --no-binary transformers transformers==VERSION
    TRANSFORMERS_SOURCE=transformers-VERSION pytest -m slow tests/model/test_transformers_common.py
"""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from testing_utils import TINY, inputs, tiny_config
from transformers.models.auto import modeling_auto

from modeling_can import CANConfig, CANForImageClassification, CANForPreTraining, CANModel
from modeling_can.modeling_can import CANPatchLinear


SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip(
        "TRANSFORMERS_SOURCE does not name the unpacked source of transformers "
        f"(pip download --no-deps --no-binary transformers transformers=={transformers.__version__})",
        allow_module_level=True,
    )

pytestmark = pytest.mark.slow
PACKAGE = "transformers_tests"  # theirs is called `tests`, as our folder is

# What the tests import but the source distribution, which has the top folder of the tests alone, leaves out.
LEFT_OUT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},  # ours: test_export.py
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},  # CAN writes no text
    "utils.test_configuration_utils": {  # a value other than the default for what every configuration has
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["CANModel"],
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "problem_type": "regression",
        }
    },
}


def common(name: str) -> types.ModuleType:
    """A module of transformers' tests."""
    if PACKAGE not in sys.modules:
        sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
        sys.modules[PACKAGE].__path__ = [str(Path(SOURCE, "tests"))]
        for left_out, content in LEFT_OUT.items():
            module = sys.modules[f"{PACKAGE}.{left_out}"] = types.ModuleType(f"{PACKAGE}.{left_out}")
            vars(module).update(content)
    # They import the transformers beside them; these tests are about the one that is installed.
    with mock.patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


class Tester:
    """What the tests ask about the model and its inputs."""

    batch_size = 3
    is_training = True
    num_hidden_layers = TINY["num_hidden_layers"]
    num_attention_heads = TINY["num_attention_heads"]
    hidden_size = TINY["hidden_size"]

    def __init__(self, pretrains: bool):
        self.pretrains = pretrains
        num_patches = self.get_config().num_patches
        self.seq_length = 1 + (num_patches // 2 if pretrains else num_patches)

    def get_config(self) -> CANConfig:
        return tiny_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[CANConfig, dict]:
        config = self.get_config()
        # Masks and noise are given, so that a model is as deterministic as the tests want it.
        batch = inputs(config, batch_size=self.batch_size)
        return config, batch if self.pretrains else {"pixel_values": batch["pixel_values"][:, 0]}


class CommonTests(common("test_modeling_common").ModelTesterMixin):
    pretrains = False
    test_resize_embeddings = False  # of a vocabulary, which CAN has not
    test_can_init_all_missing_weights_before_2023 = True  # or it is skipped: our files do not begin with a year

    @classmethod
    def setUpClass(cls):
        # The tests know by these names which model takes labels and which is an encoder without a loss.
        for mapping, model_class in {
            "MODEL_MAPPING_NAMES": CANModel,
            "MODEL_FOR_PRETRAINING_MAPPING_NAMES": CANForPreTraining,
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": CANForImageClassification,
        }.items():
            named = mock.patch.dict(getattr(modeling_auto, mapping), {"can": model_class.__name__})
            cls.enterClassContext(named)

    def setUp(self):
        self.model_tester = Tester(self.pretrains)

    def test_model_get_set_embeddings(self):
        """As theirs, but for a linear layer: an image has no vocabulary."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), CANPatchLinear)
            other = torch.nn.Linear(10, 10)
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)
            self.assertIsNone(model.get_output_embeddings())


class EncoderTest(CommonTests, unittest.TestCase):
    all_model_classes = (CANModel, CANForImageClassification)

    def test_config(self):
        tester = common("test_configuration_common").ConfigTester(
            self, config_class=CANConfig, has_text_modality=False, hidden_size=36
        )
        tester.run_common_tests()


class PreTrainingTest(CommonTests, unittest.TestCase):
    all_model_classes = (CANForPreTraining,)
    pretrains = True
    additional_model_inputs = ["pixel_noise", "noise_level", "masking_scores"]  # or two models would draw others

    def test_batching_equivalence(self):
        """Of what is predicted: an image alone has no negatives, so it has no contrastive loss."""
        prepare = self._prepare_for_class
        self._prepare_for_class = lambda *args: {**prepare(*args), "return_loss": False}
        super().test_batching_equivalence()

    # Here, hidden states get the axis of the views on their way out: the loss is not made of those very tensors.
    @unittest.skip("only for the first class of a model, which is CANModel")
    def test_retain_grad_hidden_states_attentions(self):
        pass


del CommonTests  # or pytest would collect it too
