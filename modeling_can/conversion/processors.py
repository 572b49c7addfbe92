"""The image processor that comes with a model, and timm's words for what it does."""

import math
from pathlib import Path

from transformers import ImageProcessingMixin, PreTrainedConfig, ViTImageProcessorPil

from ..data.decoding import DECODING


__all__ = ["dinov3_processor", "from_timm_preprocessing", "normalization", "preprocessing", "timm_preprocessing"]

_OPTIONS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_convert_rgb", *DECODING,
)  # fmt: skip


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
        return _for_pillow(values)
    except OSError:
        pass
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except OSError:
        return {}
    return from_timm_preprocessing(values.get("pretrained_cfg") or {})


def dinov3_processor(name_or_path: str) -> ViTImageProcessorPil | None:
    """DINOv3's without torchvision, as `_for_pillow` describes it; `None` where it is another or says too little."""
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError:
        return None
    made = _for_pillow(values)
    return None if made is values else ViTImageProcessorPil.from_dict(made)


def _for_pillow(processor: dict) -> dict:
    """
    A preprocessor_config.json of DINOv3's, whose class exists for torchvision alone, for `ViTImageProcessor`, which
    does the same with Pillow: it resizes before the values are scaled to [0, 1], and so rounds to 1/255. Others, and
    one that does not say its size and normalization, are returned as they are.
    """
    said = {name: processor[name] for name in _OPTIONS if processor.get(name) is not None}
    is_dinov3 = str(processor.get("image_processor_type")).startswith("DINOv3ViTImageProcessor")
    if not is_dinov3 or not {"size", "image_mean", "image_std"} <= said.keys():
        return processor
    return {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": len(said["image_mean"]) == 3, **said}


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
