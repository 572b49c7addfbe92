"""What is shown of the figures: a table, the entries of a model card, a figure, remarks."""

from pathlib import Path

from huggingface_hub import EvalResult
from matplotlib.figure import Figure

from ..hub import short_name
from ..plots import plain, save_figure
from .protocol import Measure
from .tasks import PROTOCOLS


__all__ = ["CAPTION", "card_results", "evaluation_figure", "measures", "remarks", "table"]

CAPTION = "in % (noise: dB); ± is half the 95 % interval of the test images; of few labels, the spread of the draws"


def measures(figures: dict, pooling: str = "mean") -> dict[str, Measure]:
    """A model's figures by their headings; `pooling` is that of the frozen features."""
    shown = [(protocol.rank, name, protocol.rows) for name, protocol in PROTOCOLS.items()]
    shown.append((0, "exported", _exported_rows))
    rows = {}
    for _, name, make in sorted(shown, key=lambda item: item[0]):
        if name in figures:
            rows |= make(figures[name], pooling)
    return rows


def _exported_rows(figures: dict, pooling: str) -> dict[str, Measure]:
    own = pooling if figures["head"] == "linear probe" else "mean"
    return {"exported classifier": Measure(figures["accuracy"], figures["interval"], pooling=own)}


def card_results(results: dict, figures: dict, name: str) -> list[EvalResult]:
    """A model's figures as entries of the Hub's `model-index`; accuracies and mIoU in [0, 1]."""
    seen = (
        {"test_images_seen_without_labels": True} if results["models"][name]["test_images_seen_without_labels"] else {}
    )
    data, where = results["data"], short_name(results["data"]["dataset_name"])
    return [
        EvalResult(
            task_type=measure.task_type,
            dataset_type=where,
            dataset_name=where,
            dataset_config=data["config_name"],
            dataset_split=data["test_split"],
            metric_type=measure.metric,
            metric_name=heading if measure.pooling == "mean" else f"{heading} ({measure.pooling})",
            metric_value=round(measure.value, 4),
            metric_args=({"interval_95": [round(end, 4) for end in measure.interval]} if measure.interval else {})
            | seen
            or None,
        )
        for heading, measure in measures(figures, results["pooling"]).items()
        if not heading.startswith("...")  # of a plain guess
    ]


def table(results: dict[str, dict]) -> str:
    """The models side by side, shares in %, each with half the width of its interval (few-shot: its deviation)."""
    columns = {name: measures(figures) for name, figures in results.items()}
    headings = list(dict.fromkeys(heading for column in columns.values() for heading in column))

    def cell(heading: str, measure: Measure | None) -> str:
        if measure is None:
            return ""
        factor, spread = 1 if heading.endswith("dB") else 100, measure.spread
        if spread is None and measure.interval:
            spread = (measure.interval[1] - measure.interval[0]) / 2
        return f"{factor * measure.value:.1f}" + (f" ±{factor * spread:.1f}" if spread is not None else "")

    rows = [["", *columns]]
    rows += [[heading, *(cell(heading, column.get(heading)) for column in columns.values())] for heading in headings]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:{'<' if not i else '>'}{widths[i]}}" for i, text in enumerate(row)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def evaluation_figure(results: dict[str, dict], path: Path) -> bool:
    """
    Saves the panels of the protocols that have one, a line for each model, where they were measured; returns whether
    any was.

    Args:
        results (`dict[str, dict]`): As in `results.json`: model -> task -> figures.
    """
    panels = {name: protocol.panel for name, protocol in PROTOCOLS.items() if protocol.panel}
    panels = {task: panel for task, panel in panels.items() if any(task in tasks for tasks in results.values())}
    if not panels:
        return False
    shown = [model for model, tasks in results.items() if tasks.keys() & panels.keys()]
    colors = {model: f"C{index}" for index, model in enumerate(shown)}
    figure = Figure((1 + 4 * len(panels), 3.6))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (task, panel) in zip(axes[0], panels.items(), strict=True):
        ticks = []
        for model, tasks in results.items():
            if task not in tasks:
                continue
            points = tasks[task][panel.key] if panel.key else tasks[task]
            ticks = list(points)
            accuracy = [100 * point["accuracy"] for point in points.values()]
            low, high = ([100 * point["interval"][end] for point in points.values()] for end in (0, 1))
            style = "o-" if panel.is_line else "o"
            axis.plot(ticks, accuracy, style, markersize=3, linewidth=1, color=colors[model])
            if panel.is_line:
                axis.fill_between(ticks, low, high, color=colors[model], alpha=0.2)
            else:
                axis.vlines(ticks, low, high, colors=colors[model], alpha=0.5)
        axis.set_title(f"{panel.title}, accuracy in %", fontsize=9)
        axis.set_xlabel(panel.label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for model, color in colors.items():  # whichever panels it is in
        axes[0, 0].plot([], [], "o-", markersize=3, linewidth=1, color=color, label=plain(model))
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, path)
    return True


def remarks(results: dict) -> list[str]:
    """What else a reader of the figures has to know."""
    lines = []
    for name, model in results["models"].items():
        if model["test_images_seen_without_labels"]:
            lines.append(f"{name} was pre-trained on test images too, without their labels")
        if model["test_images_seen_without_labels"] is None:
            lines.append(f"{name} was pre-trained on a part of this set; whether on test images, is not known")
    return lines
