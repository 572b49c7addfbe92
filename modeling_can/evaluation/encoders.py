"""Any vision encoder that transformers can load, as a function from encoded images to pooled features."""

import copy
import functools
import hashlib
import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ViTForImageClassification,
)

from ..conversion.importing import has_classifier
from ..conversion.reading import no_conversion_service, wrong_config
from ..progress import quiet
from .preprocessors import Preprocessor, load_preprocessor


__all__ = [
    "Encoder", "POOLINGS", "classifier_class", "feature_maps", "load_config", "load_encoder", "load_model", "pooled",
    "untrained",
]  # fmt: skip

POOLINGS = ("mean", "cls", "both")
# What no feature needs of the weights of an encoder's parts: poolers, classifiers (timm's models are a single part),
# mask tokens, and tables that older versions of transformers saved, and newer ones compute
_SPARE = re.compile(
    r"(^|\.)((pooler|head|fc|classifier)\.|(mask_token|position_ids|relative_position_index|relative_coords_table)$)"
)


class Encoder(nn.Module):
    """
    Pixel values -> pooled features, for models with (ViT, DINOv2) and without (Swin, ConvNeXt) a class token.

    Args:
        model (`PreTrainedModel`): Returns `last_hidden_state`, as tokens or as a map.
        preprocessor (`Preprocessor`): What makes its pixel values.
        name (`str`): What it is called in results.

    Raises:
        ValueError: if the model takes no pixels, or not of the size that the preprocessor makes.
    """

    def __init__(self, model: nn.Module, preprocessor: Preprocessor, name: str):
        super().__init__()
        self.model, self.preprocessor, self.name = model.eval(), preprocessor, name
        if model.main_input_name != "pixel_values":
            raise ValueError(f"{name} is a {type(model).__name__}, which takes {model.main_input_name} and no images")
        self.options = {}
        if model.config.model_type == "vit_mae":  # which would hide three quarters of the patches in evaluation too
            model.config.mask_ratio = 0.0
        size, theirs = preprocessor.image_size, getattr(model.config, "image_size", None)
        theirs = (theirs, theirs) if isinstance(theirs, int) else theirs
        if theirs is not None and tuple(theirs) != size:
            if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
                self.options["interpolate_pos_encoding"] = True
        try:
            with torch.no_grad():
                self(torch.zeros(1, preprocessor.num_channels, *size))
        except AttributeError as error:
            raise ValueError(
                f"{name} is a {type(model).__name__}, which returns no last_hidden_state to take features from "
                f"({error}); give an encoder, such as the one that it was made of"
            ) from error
        except (ValueError, RuntimeError, TypeError) as error:
            fit = f"--image_size {','.join(map(str, theirs))}" if theirs else "--image_size HEIGHT,WIDTH"
            raise ValueError(
                f"{name} refuses the {preprocessor.num_channels} x {size[0]} x {size[1]} pixels that its processor "
                f"makes: {error}. Give another size ({fit}) or processor (--processor_name_or_path)"
            ) from error

    def forward(self, pixel_values: torch.Tensor, num_layers: int = 1) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): From the preprocessor.
            num_layers (`int`): How many of the last blocks to take the features of, side by side.

        Returns:
            `"mean"`, the mean of the patch tokens, and where there is a class token `"cls"`; each `(B, d)`.
        """
        options = self.options | _image_order(self.model, pixel_values)
        output = self.model(pixel_values=pixel_values, output_hidden_states=num_layers > 1, **options)
        states = [_last_state(self.model, output, pixel_values)]
        if num_layers > 1:  # the last of all is the same as the last_hidden_state, but for the final norm
            states = [*output.hidden_states[-num_layers:-1], *states]
        pooled = [self._pool(state, pixel_values) for state in states]
        return {name: torch.cat([state[name] for state in pooled], dim=1) for name in pooled[0]}

    def _pool(self, state: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        if state.ndim == 4:  # (B, d, h, w)
            return {"mean": state.mean(dim=(2, 3))}
        num_others = _num_others(self.model, state, pixel_values)
        pooled = {"mean": state[:, num_others:].mean(dim=1)}
        return pooled | ({"cls": state[:, 0]} if num_others else {})

    def patch_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The patch tokens of the last hidden state in their places, `(B, d, h, w)`; raises ValueError if the model does
        not tell where its tokens lie in the image.
        """
        options = self.options | _image_order(self.model, pixel_values)
        state = _last_state(self.model, self.model(pixel_values=pixel_values, **options), pixel_values)
        return _in_places(self.model, state, pixel_values)[0]

    @functools.cached_property
    def token_shape(self) -> tuple[int, int, int]:
        """`(d, h, w)` of `patch_tokens`, and raises what it raises."""
        size, device = self.preprocessor.image_size, next(self.parameters()).device
        with torch.no_grad():
            tokens = self.patch_tokens(torch.zeros(1, self.preprocessor.num_channels, *size, device=device))
        return tuple(tokens.shape[1:])

    def digest(self) -> str:
        """SHA-256 of architecture and weights."""
        passing = (
            "_name_or_path",
            "transformers_version",
            "architectures",
            "dtype",
            "id2label",
            "label2id",
            "auto_map",
        )
        facts = {key: value for key, value in self.model.config.to_dict().items() if key not in passing}
        digest = hashlib.sha256(
            f"{type(self.model).__name__} {json.dumps(facts, sort_keys=True, default=str)}".encode()
        )
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith("pooler."):  # not used, and random where a checkpoint has none
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


@torch.no_grad()
def feature_maps(model: nn.Module, pixel_values: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The patch tokens of the last hidden state in their places, and where the last layer looks. One image at a time,
    because attention weights of all layers are returned.

    Args:
        model (`PreTrainedModel`): As of `Encoder`.
        pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalized pixels.
        options: Further arguments of the model's `forward`.

    Returns:
        The tokens `(B, d, h, w)`, and the attention `(B, h, w)` from the class token to the patches in the last layer,
        the mean over the heads; `None` if the model has no class token or no such weights, as ConvNeXt and Swin.

    Raises:
        ValueError: if the model does not tell where its tokens lie in the image.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    try:
        made = [_feature_map(model, image, options) for image in pixel_values.split(1)]
    finally:
        model.set_attn_implementation(before)
    tokens, attentions = zip(*made, strict=True)
    return torch.cat(tokens), None if attentions[0] is None else torch.cat(attentions)


def _feature_map(model: nn.Module, image: torch.Tensor, options: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    output = model(pixel_values=image, output_attentions=True, **options, **_image_order(model, image))
    tokens, num_others = _in_places(model, _last_state(model, output, image), image)
    attention = None
    weights = (output.get("attentions") or (None,))[-1]  # Data2Vec has the tuple, and nothing in it
    if num_others and weights is not None:
        attention = weights[:, :, 0, num_others:].mean(dim=1).unflatten(1, tokens.shape[-2:])
    return tokens, attention


def _last_state(model: nn.Module, output, pixel_values: torch.Tensor) -> torch.Tensor:
    """The last hidden state; of DINOv3's ConvNeXt its map, which it gives as tokens behind one of the whole image."""
    state = output.last_hidden_state
    if model.config.model_type != "dinov3_convnext":
        return state
    height, width = (side // 32 for side in pixel_values.shape[-2:])
    return state[:, 1:].mT.unflatten(2, (height, width))


def _in_places(model: nn.Module, state: torch.Tensor, pixel_values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The patch tokens of a last hidden state as a map `(B, d, h, w)`, and how many other tokens come before them."""
    if state.ndim == 4:
        return state, 0
    (height, width), num_others = _patch_grid(model, pixel_values), _num_others(model, state, pixel_values)
    merged = math.isqrt(height * width // (state.shape[1] - num_others))  # patches a side that share a token
    grid = (height // merged, width // merged)
    if grid[0] * grid[1] != state.shape[1] - num_others:
        raise ValueError(
            f"a {type(model).__name__} does not tell where its {state.shape[1]} tokens lie in an image of "
            f"{height} x {width} patches; leave it out of the tasks features and segmentation"
        )
    return state[:, num_others:].mT.unflatten(2, grid), num_others


def _num_others(model: nn.Module, state: torch.Tensor, pixel_values: torch.Tensor) -> int:
    """
    How many tokens come before those of the patches: class token, registers. Raises ValueError for YOLOS, which has
    others behind them, and where the model does not tell its patches.
    """
    if hasattr(model.config, "num_detection_tokens"):
        raise ValueError(f"a {type(model).__name__} is a detector, and has tokens of objects behind those of patches")
    height, width = _patch_grid(model, pixel_values)
    return max(0, state.shape[1] - height * width)  # fewer tokens where patches are merged


def _patch_grid(model: nn.Module, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches; raises ValueError where the model does not tell."""
    if not hasattr(model.config, "patch_size"):
        raise ValueError(f"a {type(model).__name__} does not tell which of its tokens are patches")
    patch_size = model.config.patch_size
    patch_shape = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return pixel_values.shape[-2] // patch_shape[0], pixel_values.shape[-1] // patch_shape[1]


def _image_order(model: nn.Module, pixel_values: torch.Tensor) -> dict:
    """What ViT-MAE sorts the patches by: the order of the image. Nothing for other models."""
    if model.config.model_type != "vit_mae":
        return {}
    height, width = _patch_grid(model, pixel_values)
    return {"noise": torch.arange(height * width, device=pixel_values.device).expand(len(pixel_values), -1)}


def pooled(features: dict, pooling: str, name: str):
    """The features meant by `"mean"`, `"cls"` or `"both"`; raises ValueError where there is no class token."""
    if pooling != "mean" and "cls" not in features:
        raise ValueError(f"{name} has no class token, which pooling={pooling!r} needs; use --pooling mean")
    if pooling != "both":
        return features[pooling]
    parts = (features["cls"], features["mean"])
    return torch.cat(parts, 1) if isinstance(parts[0], torch.Tensor) else np.concatenate(parts, 1)


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_encoder(
    name: str,
    processor_name: str | None = None,
    image_size: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    decoding: dict | None = None,
) -> Encoder:
    """
    Args:
        name (`str`): A folder or Hub id. Of a pre-training model or a classifier, the encoder.
        processor_name (`str`, *optional*): Where its image processor is, if not there.
        image_size (`(int, int)`, *optional*): Height and width of the model's input, instead of the processor's own.
        trust_remote_code (`bool`): Whether to run code that comes with the model.
        decoding (`dict`, *optional*): As of `Preprocessor`.

    Raises:
        ValueError: if it cannot be found, is no vision model, lacks weights or a processor, or refuses the size.
    """
    config, kind = load_config(name, trust_remote_code), AutoModel
    if hasattr(config, "vision_config") and has_classifier(config):  # a pair that was fine-tuned has no text encoder
        kind = AutoModelForImageClassification
    model = load_model(name, kind, trust_remote_code)
    if hasattr(model, "vision_model"):  # of a pair with a text encoder: CLIP, SigLIP
        model = model.vision_model
    preprocessor = load_preprocessor(processor_name or name, image_size, trust_remote_code, decoding)
    return Encoder(model, preprocessor, name)


def load_model(name: str, auto_class, trust_remote_code=False, new: tuple[str, ...] = (), **options) -> nn.Module:
    """
    `auto_class.from_pretrained`, in fp32, from safetensors alone: a pickle could run code.

    Args:
        new (`tuple[str, ...]`): Beginnings of the names of weights that may be missing.

    Raises:
        ValueError: if it cannot be found, is of no kind that `auto_class` knows, has its weights in a pickle; if
            weights are missing or of another shape, which would stay random without a word; or if the file has some
            for which its encoder has no place, and without which it computes something else.
    """
    with quiet(), no_conversion_service():
        try:
            model, info = auto_class.from_pretrained(
                name,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be told which
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                dtype=torch.float32,
                **options,
            )
        except OSError as error:
            raise _not_found(name, error) from error
        except StrictDataclassError as error:
            raise wrong_config(name, error) from error
        except (KeyError, ValueError, RuntimeError, SafetensorError, ImportError) as error:  # ImportError: of timm
            raise ValueError(
                f"model_name_or_path={name} cannot be loaded as {auto_class.__name__}: {error}"
            ) from error
    # The pooler of ViT is used by nothing here, and absent from the weights of MAE, DINO and most classifiers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(("pooler.", *new)))
    misshapen = sorted(key for key, *_ in info["mismatched_keys"] if not key.startswith(new))
    if missing or misshapen:
        raise ValueError(
            f"{name} lacks weights of a {type(model).__name__}, which would stay random: "
            f"{', '.join((missing + misshapen)[:5])}{' ...' if len(missing + misshapen) > 5 else ''}; is the folder "
            "complete, and its config.json its own?"
        )
    if left_out := _without_place(model, info["unexpected_keys"], new):
        raise ValueError(
            f"{name} has {len(left_out)} weights for which a {type(model).__name__} of its config.json has no place: "
            f"{', '.join(left_out[:5])}{' ...' if len(left_out) > 5 else ''}; make config.json say what the file has "
            "(model_type, number of layers, registers, gates, biases)"
        )
    return model


def _without_place(model: nn.Module, unexpected: set[str], new: tuple[str, ...]) -> list[str]:
    """
    Those weights of a file that the model did not take although they are of a part that it has. Heads and decoders for
    which it has no part at all stay behind rightly.
    """
    parts = {key.partition(".")[0] for own in (model, model.base_model) for key in own.state_dict()}
    prefix = f"{model.base_model_prefix}."
    return sorted(
        key
        for key in unexpected
        if key.removeprefix(prefix).partition(".")[0] in parts and not _SPARE.search(key) and not key.startswith(new)
    )


def load_config(name: str, trust_remote_code: bool = False):
    """`AutoConfig.from_pretrained`; raises ValueError if it cannot be found, or is of no known kind."""
    with quiet():
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise _not_found(name, error) from error
        except StrictDataclassError as error:
            raise wrong_config(name, error) from error
        except (KeyError, ValueError, ImportError) as error:
            raise ValueError(f"model_name_or_path={name} cannot be loaded: {error}") from error


def _not_found(name: str, error: OSError) -> ValueError:
    reason = str(error).splitlines()[0]
    if "model.safetensors" in reason and (not Path(name).is_dir() or any(Path(name).glob("*.bin"))):
        return ValueError(
            f"model_name_or_path={name} has no weights in safetensors that could be had. A pickle (pytorch_model.bin) "
            "could run code, and is not opened here; of a kind that CAN can start from, it can be written anew: "
            f"python -m modeling_can.conversion {name} --to can FOLDER"
        )
    place = "no model in this folder" if Path(name).is_dir() else "no folder, and no model that the Hub gives"
    return ValueError(
        f"model_name_or_path={name} cannot be loaded: {place} ({reason}). Without a network, download it first (hf "
        f"download {name}) or give a folder"
    )


def classifier_class(name: str, trust_remote_code: bool = False):
    """The class of transformers that puts a classifier on this encoder; raises ValueError if there is none."""
    config = load_config(name, trust_remote_code)
    if config.model_type == "vit_mae":  # transformers has no classifier for ViT-MAE; its encoder is a ViT
        return ViTForImageClassification
    kind, code = AutoModelForImageClassification, config.to_dict().get("auto_map", {})
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or kind.__name__ in code:
        return kind
    fix = "use linear_probe or linear_probe_sgd"
    if config.model_type == "dinov3_vit":
        fix = f"make a CAN of it, which has one: python -m modeling_can.conversion {name} --to can FOLDER"
    raise ValueError(
        f"model_name_or_path={name} is a {config.model_type}, for which transformers has no image classifier to be "
        f"fine-tuned; {fix}"
    )


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same architecture with fresh weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(encoder.model)(copy.deepcopy(encoder.model.config))
    if model.config.model_type == "vit_mae":  # transformers 5 leaves its position table at zero
        model.load_state_dict(
            {k: v for k, v in encoder.model.state_dict().items() if k.endswith("position_embeddings")}, strict=False
        )
    return Encoder(model, encoder.preprocessor, f"untrained {type(model).__name__}")
