"""What is measured: the models, and the baselines to compare them with."""

import os
from functools import partial
from pathlib import Path

from ..progress import tell
from .encoders import Encoder, load_encoder, untrained
from .features import raw_patches, raw_pixels
from .overlap import recipe_of
from .protocol import Entry, Setup
from .tasks import PROTOCOLS


__all__ = ["BASELINES", "is_listed", "load", "make_entries", "named_reference", "planned"]

BASELINES = ("pixels", "untrained", "start")


def make_entries(setup: Setup) -> list[Entry]:
    """The baselines, then the models."""
    settings, fresh, entries = setup.settings, {}, {}
    wanted = {*(settings.baselines or ()), settings.reference_model}
    given = [*settings.model_name_or_path, *{settings.reference_model}.difference({None, "pixels", "untrained"})]
    given = list(dict.fromkeys(map(os.path.normpath, given)))
    measured = [path for path in given if is_listed(path, settings)] if "start" in wanted else []
    starts = {path: start for path in measured if (start := _start_of(path))}
    paths = list(dict.fromkeys([*given, *starts.values()]))
    names = [Path(path).resolve().name if Path(path).is_dir() else path for path in paths]
    for path, name in zip(paths, names, strict=True):
        encoder = _load_in_turn(setup, path, is_needed=path in given)
        if not encoder:
            continue
        kind = "model" if is_listed(path, settings) else "start" if path in starts.values() else "reference"
        shown = path if names.count(name) > 1 or name in BASELINES else name
        entries[path] = entry = _entry(setup, encoder, shown, kind=kind, path=path)
        if "untrained" in wanted and path in given:
            made = _entry(setup, untrained(encoder, settings.seed), f"untrained ({name})", kind="untrained")
            entry.rivals["untrained"] = fresh.setdefault(made.digest, made)
    if len(fresh) == 1:
        next(iter(fresh.values())).name = "untrained"
    for path, start in starts.items():
        if start in entries:
            entries[path].rivals["start"] = entries[start]
    baselines, models = list(fresh.values()), sorted(entries.values(), key=lambda entry: entry.kind != "start")
    if "pixels" in wanted:
        baselines.insert(0, _pixels(entries[given[0]]))
        for entry in models:
            entry.rivals["pixels"] = baselines[0]
    return baselines + models


def _start_of(path: str) -> str | None:
    """What the run that left a model began from, as its recipe says."""
    start = recipe_of(path).get("model_name_or_path")
    return start and os.path.normpath(start)


def _load_in_turn(setup: Setup, path: str, is_needed: bool) -> Encoder | None:
    """A start may be gone, or weights that no Auto class loads; it is then left out, and a line says why."""
    with setup.accelerator.local_main_process_first():  # which downloads it
        try:
            return load(path, setup.settings)
        except ValueError as error:
            if is_needed:
                raise
            fix = f"; to make it loadable: python -m modeling_can.conversion {path} --to can FOLDER"
            if setup.is_main:
                tell(f"not compared with what the run began from: {error}{fix if Path(path).exists() else ''}")
    return None


def _entry(setup: Setup, encoder: Encoder, name: str, kind: str, path: str | None = None) -> Entry:
    digest = encoder.digest()
    encoder.to(setup.device)

    preprocessor = encoder.preprocessor

    def applied(function, images):
        with setup.accelerator.autocast():
            return function(preprocessor.normalize(images.to(setup.device, non_blocking=True)))

    return Entry(
        name=name,
        preprocessor=preprocessor,
        encode=partial(applied, encoder),
        patch_tokens=partial(applied, encoder.patch_tokens),
        digest=digest,
        path=path,
        encoder=encoder,
        kind=kind,
    )


def _pixels(model: Entry) -> Entry:
    """As the model is given them, in the patches that it has."""
    preprocessor, encoder = model.preprocessor, model.encoder
    return Entry(
        name="pixels",
        preprocessor=preprocessor,
        encode=lambda images: {"mean": raw_pixels(preprocessor.normalize(images))},
        patch_tokens=lambda images: raw_patches(preprocessor.normalize(images), encoder.token_shape[1:]),
        digest="pixels",
        kind="pixels",
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
            names[entry.kind] = entry.name
    return names[reference_model if reference_model in names else os.path.normpath(reference_model)]


def planned(entry: Entry, settings, reference: str | None) -> list[str]:
    """
    The tasks of an entry: baselines take those that are for them; a model or a baseline that was named as the
    reference takes those that are for a reference, and a model no more than that, if it is named nowhere else.
    """
    tasks = list(settings.task)
    if entry.kind != "model":
        is_wanted = entry.kind in (settings.baselines or ())
        tasks = [task for task in tasks if is_wanted and PROTOCOLS[task].for_baselines]
    if entry.name == reference:
        tasks += [task for task in settings.task if PROTOCOLS[task].for_reference and task not in tasks]
    return tasks
