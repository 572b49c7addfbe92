"""What is measured: the models, and the baselines to compare them with."""

import os
from pathlib import Path

from .encoders import Encoder, load_encoder, untrained
from .features import raw_pixels
from .protocol import Entry, Setup
from .tasks import PROTOCOLS


__all__ = ["BASELINES", "is_listed", "load", "make_entries", "named_reference", "planned"]

BASELINES = ("pixels", "untrained")


def make_entries(setup: Setup) -> list[Entry]:
    """The baselines, then the models."""
    settings, baselines, models = setup.settings, [], []
    wanted_baselines = {*(settings.baselines or ()), settings.reference_model}
    paths = [os.path.normpath(path) for path in settings.model_name_or_path]
    if settings.reference_model not in (None, *BASELINES):
        paths.append(os.path.normpath(settings.reference_model))
    paths = list(dict.fromkeys(paths))
    names = [Path(path).resolve().name if Path(path).is_dir() else path for path in paths]
    for path, name in zip(paths, names, strict=True):
        with setup.accelerator.local_main_process_first():  # which downloads it
            encoder = load(path, settings)
        models.append(_entry(setup, encoder, path if names.count(name) > 1 or name in BASELINES else name, path))
        fresh = untrained(encoder, settings.seed)
        if "untrained" in wanted_baselines and fresh.digest() not in [b.digest for b in baselines]:
            baselines.append(_entry(setup, fresh, f"untrained ({name})"))
    if len(baselines) == 1:
        baselines[0].name = "untrained"
    if "pixels" in wanted_baselines:
        preprocessor = models[0].preprocessor
        encode = lambda images: {"mean": raw_pixels(preprocessor.normalize(images))}  # noqa: E731
        baselines.insert(0, Entry("pixels", preprocessor, encode, "pixels"))
    return baselines + models


def _entry(setup: Setup, encoder: Encoder, name: str, path: str | None = None) -> Entry:
    digest = encoder.digest()
    encoder.to(setup.device)

    def encode(images):
        with setup.accelerator.autocast():
            return encoder(encoder.preprocessor.normalize(images.to(setup.device, non_blocking=True)))

    return Entry(
        name=name, preprocessor=encoder.preprocessor, encode=encode, digest=digest, path=path, encoder=encoder
    )


def load(path: str, settings) -> Encoder:
    return load_encoder(
        name=path,
        processor_name=settings.processor_name_or_path,
        image_size=settings.image_shape,
        trust_remote_code=settings.trust_remote_code,
        decoding=settings.decoding,
    )


def is_listed(path: str, settings) -> bool:
    """Whether a model is one to be measured, and not only the reference."""
    return path in map(os.path.normpath, settings.model_name_or_path)


def named_reference(entries: list[Entry], reference_model: str | None) -> str | None:
    """The name of the entry that was given as the reference."""
    if not reference_model:
        return None
    names = {entry.path: entry.name for entry in entries if entry.path}
    for entry in reversed(entries):  # of several untrained ones the first
        if entry.path is None:
            names["untrained" if entry.encoder else "pixels"] = entry.name
    return names[reference_model if reference_model in names else os.path.normpath(reference_model)]


def planned(entry: Entry, settings, reference: str | None) -> list[str]:
    """
    The tasks of an entry: baselines take those that are for them; a model or a baseline that was named as the
    reference takes robustness, and a model no more than that, if it is named nowhere else.
    """
    if entry.path is None:
        kind = "untrained" if entry.encoder else "pixels"
        is_wanted = kind in (settings.baselines or ())
        tasks = [task for task in settings.task if is_wanted and PROTOCOLS[task].for_baselines]
    else:
        tasks = list(settings.task) if is_listed(entry.path, settings) else []
    is_reference = entry.name == reference and "robustness" in settings.task
    return tasks + (["robustness"] if is_reference and "robustness" not in tasks else [])
