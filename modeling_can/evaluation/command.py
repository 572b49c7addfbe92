"""The order of an evaluation: processes, data, models, checks; then the tasks of each model; then what is shown."""

import contextlib
import dataclasses
import json
import time
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs

from ..files import make_folder, write
from ..hub import short_name, update_card
from ..optimization import mixed_precision
from ..progress import tell
from ..provenance import run_facts
from ..rendezvous import INIT_METHOD
from .advice import advice
from .embed import embed_task
from .entries import is_listed, make_entries, named_reference, planned
from .export import NUM_EXAMPLES, check_export, export, is_exported
from .finetuning import FineTuning
from .masks import load_masked
from .overlap import seen_in_pretraining
from .preprocessors import load_processor, takes_arrays
from .processes import check_processes, end_training, forget_settings
from .protocol import Entry, Features, Setup
from .report import CAPTION, card_results, evaluation_figure, measures, remarks, table
from .segmentation import Segmentation
from .sets import load_labeled
from .settings import Settings
from .tasks import EMBED, PROTOCOLS


__all__ = ["run"]


def run(settings: Settings, fine_tuning: FineTuning, command: list[str]) -> dict:
    """
    Runs the tasks; returns what `results.json` holds. Called by every process. Raises ValueError for what the user can
    fix.

    Args:
        command (`list[str]`): To be kept with the results.
    """
    started = time.perf_counter()
    accelerator = _processes(settings)
    results = {
        "command": command,
        **run_facts(
            accelerator.device, ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "evaluate")
        ),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "seed": settings.seed,
    }
    output_dir = Path(settings.output_dir)
    if (output_dir / "recipe.yaml").exists():
        raise ValueError(
            f"output_dir={output_dir} holds a pre-training run, whose results.json this would replace; give another"
        )
    make_folder("output_dir", output_dir)
    if EMBED in settings.task:
        return embed_task(settings, accelerator, results)

    setup = _setup(settings, fine_tuning, accelerator)
    settings = setup.settings
    entries = make_entries(setup)
    reference = named_reference(entries, settings.reference_model)
    plan = {entry.name: planned(entry, settings, reference) for entry in entries}
    for entry in entries:
        _check(setup, entry, plan[entry.name])
    results |= _subject(setup, entries)
    if setup.is_main:
        data = setup.data
        tell(
            f"{len(data.train):,} images of {data.train.num_classes} classes to learn from, "
            f"{len(data.test):,} to be tested on ({settings.dataset_name}); "
            f"{', '.join(name for name in plan if plan[name])}; {accelerator.num_processes} process(es), "
            f"{accelerator.device}"
        )
    for entry in entries:
        _measure(setup=setup, entry=entry, tasks=plan[entry.name], results=results, started=started)
    if setup.is_main:
        _finish(setup=setup, entries=entries, reference=reference, results=results, started=started)
    end_training(accelerator)
    return results


def _processes(settings: Settings) -> Accelerator:
    forget_settings()
    accelerator = Accelerator(
        mixed_precision=mixed_precision(settings.mixed_precision),
        kwargs_handlers=[InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(days=30))],  # they wait
    )
    check_processes(accelerator)
    return accelerator


def _setup(settings: Settings, fine_tuning: FineTuning, accelerator: Accelerator) -> Setup:
    """The set, with labels or masks, and what the protocols make of it before a model is loaded."""
    has_masks = Segmentation.name in settings.task
    with accelerator.local_main_process_first():
        columns = {
            "dataset_name": settings.dataset_name,
            "config_name": settings.dataset_config_name,
            "train_split": settings.train_split,
            "test_split": settings.test_split,
            "image_column": settings.image_column,
            "test_size": settings.test_size,
            "seed": settings.seed,
        }
        arrays = _reads_arrays(settings)
        if has_masks:
            if arrays:  # before all masks are read
                Segmentation.refuse_arrays(settings.model_name_or_path[0])
            data = load_masked(
                **columns,
                mask_column=settings.mask_column,
                ignore_index=settings.ignore_index,
                is_shown=accelerator.is_main_process,
            )
        else:
            data = load_labeled(**columns, label_column=settings.label_column or "label", arrays=arrays)
    if data.test_size and settings.test_size is None and accelerator.is_main_process:
        tell(
            f"{settings.dataset_name} has no test split: {data.test_size:.0%} of "
            f"{'the images' if has_masks else 'every class'} is held out to be tested on, drawn with "
            f"seed={settings.seed} (--test_size for another fraction)"
        )
    settings = dataclasses.replace(settings, test_size=data.test_size)
    setup = Setup(settings, fine_tuning, accelerator, data)
    for name, protocol in PROTOCOLS.items():
        if name in settings.task:
            setup.prepared[name] = protocol.prepare(setup)
    return setup


def _reads_arrays(settings: Settings) -> bool:
    """Whether the first model does; one that cannot be loaded is refused later, and better."""
    with contextlib.suppress(ValueError):
        name = settings.processor_name_or_path or settings.model_name_or_path[0]
        return takes_arrays(load_processor(name, settings.trust_remote_code), settings.decoding)
    return False


def _check(setup: Setup, entry: Entry, tasks: list[str]):
    """Raises ValueError for what a task would refuse, before anything takes time."""
    settings = setup.settings
    for name, protocol in PROTOCOLS.items():
        if name in tasks:
            protocol.check(setup, entry)
    if settings.export_classifier and is_exported(setup, entry):
        check_export(setup, entry)
    if settings.update_card and entry.path and is_listed(entry.path, settings) and not Path(entry.path).is_dir():
        raise ValueError(
            f"update_card: {entry.path} is no folder; download the model (hf download {entry.path} --local-dir "
            "FOLDER), measure that, and upload its README.md"
        )


def _subject(setup: Setup, entries: list[Entry]) -> dict:
    """What the results are about."""
    settings, data = setup.settings, setup.data
    held_out = f"{settings.test_size:g} of {settings.train_split}"
    return {
        "data": {
            "dataset_name": settings.dataset_name,
            "config_name": settings.dataset_config_name,
            "train_split": settings.train_split,
            "test_split": held_out if settings.test_size else settings.test_split,
            "num_train": len(data.train),
            "num_test": len(data.test),
            "class_names": data.class_names,
        },
        "models": {
            entry.name: {
                "path": entry.path,
                "sha256": entry.digest,
                "test_images_seen_without_labels": seen_in_pretraining(entry.path, settings),
            }
            for entry in entries
            if entry.path
        },
        "pooling": settings.pooling,
        "results": {},
        "seconds": {},
    }


def _measure(setup: Setup, entry: Entry, tasks: list[str], results: dict, started: float):
    """Runs the tasks of an entry; what each found is written at once, so that a fault costs one task."""
    features, seconds, data = Features(), {}, setup.data
    if any(PROTOCOLS[task].needs_features(setup, entry) for task in tasks):
        began = time.perf_counter()
        features = Features(*(setup.features(entry, split) for split in (data.train, data.test)))
        seconds["features"] = time.perf_counter() - began
    for task in tasks:
        protocol, began = PROTOCOLS[task], time.perf_counter()
        figures = protocol.run(setup, entry, features) if setup.is_main or not protocol.on_features else None
        seconds[task] = time.perf_counter() - began
        if setup.is_main:
            tell(f"{entry.name}: {task} in {seconds[task]:.1f} s")
            results["results"].setdefault(entry.name, {})[task] = figures
            results["seconds"][entry.name] = seconds
            _write(setup, results, started)


def _finish(setup: Setup, entries: list[Entry], reference: str | None, results: dict, started: float):
    """What needs the figures of all: classifier, comparison, table, figure, remarks, cards."""
    settings, output_dir = setup.settings, setup.output_dir
    if settings.export_classifier:
        (entry,) = (entry for entry in entries if is_exported(setup, entry))
        results["results"][entry.name]["exported"] = export(setup, entry, results)
    if reference:
        for task in settings.task:
            PROTOCOLS[task].compare(results["results"], reference)
    advised = {entry.name: advice(entry) for entry in entries if entry.kind == "model"}
    results["advice"] = {name: made for name, made in advised.items() if made}
    _write(setup, results, started)
    drawn = evaluation_figure(results["results"], output_dir / "figures" / "evaluation.png")
    if any(measures(figures) for figures in results["results"].values()):
        tell(f"\n{CAPTION}\n\n{table(results['results'])}")
    for made in results["advice"].values():
        tell(f"\n{made['text']}")
    written = [f"{output_dir}/results.json", *([f"{output_dir}/figures/evaluation.png"] if drawn else [])]
    tasks = [figures for model in results["results"].values() for figures in model.values()]
    written += [figures["figure"] for figures in tasks if "figure" in figures]
    tell(f"\nFigures: {', '.join(written)}")
    for line in remarks(results):
        tell(f"Note: {line}")
    if settings.export_classifier:
        folder = settings.export_classifier
        tell(
            f"A classifier for the image-classification pipeline: {folder}. Of the test images, {folder}/examples "
            f"holds up to {NUM_EXAMPLES}: remove those that are not yours to show before you publish it"
        )
    if settings.update_card:
        for name, model in results["models"].items():
            if not is_listed(model["path"], settings):  # no more than the reference
                continue
            made = results["advice"].get(name)
            update_card(
                model["path"],
                card_results(results, results["results"][name], name),
                {short_name(settings.dataset_name): made["text"]} if made else {},
            )
            tell(f"Updated: {model['path']}/README.md")


def _write(setup: Setup, results: dict, started: float):
    results["total_seconds"] = time.perf_counter() - started
    write(setup.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
