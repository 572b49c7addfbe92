"""The image processor that comes with a model, and timm's words for what it does."""

import math
from pathlib import Path

from transformers import ImageProcessingMixin, PreTrainedConfig


__all__ = ["from_timm_preprocessing", "normalization", "preprocessing", "timm_preprocessing"]


def normalization(name_or_path: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that the images of a checkpoint were normalized with; `None` if it does not say."""
    values = preprocessing(name_or_path)
    if "image_mean" not in values or "image_std" not in values:
        return None
    return list(values["image_mean"]), list(values["image_std"])


def preprocessing(name_or_path: str) -> dict:
    """What is in a source's preprocessor_config.json, or what timm's config.json says instead; empty if nothing is."""
    if Path(name_or_path).is_file():
        return {}
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
        values.pop("auto_map", None)  # code of the source's, which stays there
        return values
    except OSError:
        pass
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except OSError:
        return {}
    return from_timm_preprocessing(values.get("pretrained_cfg") or {})


def timm_preprocessing(processor: dict) -> dict:
    """timm's words for what a processor does that resizes, perhaps crops the center, and normalizes."""
    edge, crop = (processor.get(key) or {} for key in ("size", "crop_size"))
    named = {"interpolation": {2: "bilinear", 3: "bicubic"}.get(processor.get("resample"))}
    if processor:
        normalizes = processor.get("do_normalize", True)
        named["mean"] = list(processor["image_mean"]) if normalizes else [0.0] * 3
        named["std"] = list(processor["image_std"]) if normalizes else [1.0] * 3
    if processor.get("do_center_crop") and "shortest_edge" in edge and crop:
        share = max(crop.values()) / edge["shortest_edge"]
        while math.floor(max(crop.values()) / share) < edge["shortest_edge"]:  # as timm rounds
            share = math.nextafter(share, 0)
        named["crop_pct"] = share
    elif "height" in edge:
        named |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return {key: value for key, value in named.items() if value is not None}


def from_timm_preprocessing(pretrained: dict) -> dict:
    """
    A preprocessor_config.json, the inverse of `timm_preprocessing`; empty unless timm's `pretrained_cfg` says all that
    is needed.
    """
    if not {"mean", "std", "crop_pct", "input_size", "interpolation"} <= pretrained.keys():
        return {}
    height, width = pretrained["input_size"][1:]
    size = {"height": height, "width": width}
    if pretrained.get("crop_mode") != "squash":
        size = {"shortest_edge": math.floor(max(height, width) / pretrained["crop_pct"])}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": len(pretrained["mean"]) == 3,
        "size": size,
        "do_center_crop": "shortest_edge" in size,
        "crop_size": {"height": height, "width": width},
        "image_mean": list(pretrained["mean"]),
        "image_std": list(pretrained["std"]),
        "resample": {"bilinear": 2, "bicubic": 3}.get(pretrained["interpolation"], 3),
    }
