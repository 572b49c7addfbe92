"""
The command, which writes the encoder of a source into a new folder:

    python -m modeling_can.conversion SOURCE --to can|dinov2|dinov2_with_registers|dinov3_vit|vit|timm|onnx OUT
"""

import argparse
from pathlib import Path

from transformers import PreTrainedConfig

from ..hub import EXPORTS
from ..modeling_can import CANForImageClassification
from ..progress import quiet, report_errors, tell
from .export import convert
from .importing import has_classifier
from .processors import preprocessing


__all__ = ["main"]


def main(
    argv: list[str] | None = None,
    description: str = "Weights from other models and for them.",
    program: str = "python -m modeling_can.conversion",
):
    """The command line; raises ValueError or OSError for what the user can fix."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        help="folder or Hub id of a CAN, ViT, ViT-MAE, DINOv2, DINOv3 or timm ViT, or a .pth / .safetensors of MAE's",
    )
    parser.add_argument(
        "--to",
        choices=EXPORTS,
        required=True,
        dest="target",
        help="; ".join(f"{name}: {text}" for name, text in EXPORTS.items())
        + ". dinov2 (with registers, too) needs a square grid of patches, onnx the extra [onnx]",
    )
    parser.add_argument("folder", type=Path, help="where to write it; must not exist, or be empty")
    parser.add_argument(
        "--num_attention_heads", type=int, help="of a file of weights, which does not tell, if its width is unusual"
    )
    arguments = parser.parse_args(argv)
    with quiet():
        model = convert(**vars(arguments))
    config, kind = model.config, type(model).__name__
    tell(
        f"{arguments.source} -> {arguments.folder} ({arguments.target}): {kind}, {config.num_hidden_layers} layers of "
        f"width {config.hidden_size} with {config.num_attention_heads} heads, {model.num_parameters() / 1e6:.2f} M "
        f"parameters; {', '.join(sorted(path.name for path in arguments.folder.iterdir()))}"
    )
    had_classifier = not Path(arguments.source).is_file() and _source_has_classifier(arguments.source)
    stays = arguments.target in ("vit", "dinov3_vit") or not isinstance(model, CANForImageClassification)
    if had_classifier and stays:
        tell("its classifier is left out: only CAN's own goes along, and not to vit or dinov3_vit")
    if not preprocessing(arguments.source):
        tell("no image processor came with it: normalize images as those that it was trained on")


def _source_has_classifier(name_or_path: str) -> bool:
    values, _ = PreTrainedConfig.get_config_dict(name_or_path)
    return values.get("num_classes", 0) > 0 or has_classifier(PreTrainedConfig.from_dict(values))


if __name__ == "__main__":
    with report_errors("modeling_can.conversion"):
        main()
