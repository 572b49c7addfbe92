"""Quantized weights: what stores them is not what computes with them, and the features stay what they were."""

import pytest
import torch
from testing_utils import KEPT
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    BitsAndBytesConfig,
    TorchAoConfig,
)


LIBRARIES = ["bitsandbytes 4", "bitsandbytes 8", "torchao 4", "torchao 8"]
KINDS = [*(pytest.param(kind, marks=pytest.mark.slow) for kind in LIBRARIES), "dynamic"]
PIXELS = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def quantized(auto_class, kind: str, folder=KEPT) -> nn.Module:
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(auto_class.from_pretrained(folder), {nn.Linear})
    library, bits = kind.split()
    pytest.importorskip(library, reason=f"{library} is not installed (extra quantization)")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}) if library == "bitsandbytes" else torchao_config(bits)
    return auto_class.from_pretrained(folder, quantization_config=config, device_map="cpu")


def torchao_config(bits: str) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    # Of the kinds with 4 bits, the one that a CPU computes: Int4WeightOnlyConfig has kernels for GPUs alone.
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return TorchAoConfig(four if bits == "4" else Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)  # the head is new
    # 64, as bitsandbytes on a CPU wants widths in multiples of its blocks
    AutoModelForImageClassification.from_pretrained(KEPT, num_labels=64).save_pretrained(folder)
    return folder


def similarity(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return nn.functional.cosine_similarity(ours.float(), exact, dim=-1).mean().item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_features_stay(kind, classifier_folder):
    exact = AutoModel.from_pretrained(KEPT)(PIXELS).pooler_output
    assert similarity(quantized(AutoModel, kind)(PIXELS).pooler_output, exact) > 0.98
    exact = AutoModelForImageClassification.from_pretrained(classifier_folder)(PIXELS).logits
    logits = quantized(AutoModelForImageClassification, kind, classifier_folder)(PIXELS).logits
    assert similarity(logits, exact) > 0.95  # a random head in 4 bits too: 0.975 to 0.985 over seeds


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_losses_stay(kind):
    generator = torch.Generator().manual_seed(1)
    batch = {
        "pixel_values": torch.stack([PIXELS, PIXELS.flip(-1)], dim=1),
        "pixel_noise": torch.randn(16, 2, 3, 32, 32, generator=generator),
        "noise_level": torch.rand(16, 2, generator=generator) * 0.25,
        "masking_scores": torch.rand(16, 2, 64, generator=generator),
    }
    exact = AutoModelForPreTraining.from_pretrained(KEPT)(**batch)
    outputs = quantized(AutoModelForPreTraining, kind)(**batch)
    # Through the projection head in 4 bits: 0.945 with the kept weights; unrelated embeddings have about 0
    assert similarity(outputs.image_embeds, exact.image_embeds) > (0.9 if kind.endswith("4") else 0.98)
    for name in ("contrastive_loss", "reconstruction_loss"):
        assert outputs[name].item() == pytest.approx(exact[name].item(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIBRARIES)
@torch.no_grad()
def test_what_is_saved_quantized_is_loaded_quantized(kind, tmp_path):
    model = quantized(AutoModel, kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    layer = "layers.0.mlp.fc1"
    assert type(loaded.get_submodule(layer).weight) is type(model.get_submodule(layer).weight) is not nn.Parameter
    assert torch.equal(loaded(PIXELS).pooler_output, model(PIXELS).pooler_output)


def test_an_adapter_on_four_bits_is_trained(classifier_folder):
    peft = pytest.importorskip("peft", reason="peft is not installed (extra test)")
    model = quantized(AutoModelForImageClassification, "bitsandbytes 4", classifier_folder)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model(PIXELS, labels=torch.arange(16)).loss.backward()
    adapted = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert adapted and all(p.grad is not None and p.grad.any() for p in adapted.values())
