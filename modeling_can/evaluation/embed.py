"""The task that writes embeddings of any images; it needs no labels, and stands alone."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import ClassLabel, Value

from ..data import ImageSource
from ..files import write
from ..progress import tell
from .embedding import embed, totals
from .encoders import pooled
from .entries import load


__all__ = ["embed_task"]


def embed_task(settings, accelerator: Accelerator, results: dict) -> dict:
    """The task that writes embeddings; each process does its share, and waits for no other."""
    with accelerator.local_main_process_first():
        encoder = load(settings.model_name_or_path[0], settings)
    digest = encoder.digest()
    encoder.to(accelerator.device)

    @torch.no_grad()
    def encode(pictures):
        with accelerator.autocast():
            pixels = encoder.preprocessor.normalise(pictures.to(accelerator.device, non_blocking=True))
            return pooled(encoder(pixels), settings.pooling, encoder.name)

    def source_with(label_column: str | None) -> ImageSource:
        return ImageSource(
            settings.dataset_name,
            settings.data_dir,
            settings.data_files,
            settings.dataset_split,
            settings.image_column,
            settings.streaming,
            extra_columns=tuple(filter(None, (settings.id_column, label_column))),
            config_name=settings.dataset_config_name,
        )

    label_column, source = settings.label_column, source_with(settings.label_column)
    if label_column is None and isinstance(source.features.get("label"), Value | ClassLabel):
        label_column, source = "label", source_with("label")
    if source.left_out_line and accelerator.is_main_process:
        tell(source.left_out_line)
    facts = {
        "weights": digest,
        "pooling": settings.pooling,
        "preprocessing": encoder.preprocessor.facts(),
        "mixed_precision": accelerator.mixed_precision,
    }
    figures = embed(
        source,
        encoder.preprocessor.decode,
        encode,
        settings.output_dir,
        facts,
        batch_size=min(settings.batch_size, settings.rows_per_file),
        num_workers=settings.dataloader_num_workers,
        dtype=settings.embedding_dtype,
        rows_per_file=settings.rows_per_file,
        id_column=settings.id_column,
        label_column=label_column,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_bad_fraction=settings.max_bad_fraction,
    )
    own = gather_object([(figures["new_images"], figures["images_per_second"])])
    new_images, speed = map(sum, zip(*own, strict=True))
    results["model"] = {"path": settings.model_name_or_path[0], "sha256": digest}
    results["left_out"] = source.left_out
    results["embed"] = {**totals(settings.output_dir), "new_images": new_images, "images_per_second": speed}
    if accelerator.is_main_process:
        write(Path(settings.output_dir) / "results.json", json.dumps(results, indent=2) + "\n")
        bad = ", ".join(f"{count} {reason}" for reason, count in results["embed"]["bad"].items())
        of = f" of split {source.split}" if settings.dataset_name else ""
        tell(
            f"{results['embed']['num_images']:,} embeddings{of} in {results['embed']['files']} files, "
            f"{new_images:,} of them new at {speed:.0f} images/s; bad images: {bad or 'none'}. "
            f"results.json, and for load_dataset('parquet', data_files=...): {settings.output_dir}/part-*.parquet"
        )
    accelerator.end_training()
    return results
