"""Names that settings, results and checkpoints had before. They are still read, silently, and never written."""

__all__ = ["FORMER_NAMES", "current_names"]

FORMER_NAMES = {
    # Settings: flags, keys of a recipe, keywords
    "greyscale_probability": "grayscale_probability",
    # results.json
    "hidden_patches": "masked_patches",
    "neighbours": "neighbors",
    "picture": "figure",
    # Checkpoints
    "ledger_bytes": "bad_samples_bytes",
}


def current_names(values: dict) -> dict:
    """
    The same values by the names of today.

    Raises:
        ValueError: if one of them is given under both of its names.
    """
    for former in values.keys() & FORMER_NAMES.keys():
        if FORMER_NAMES[former] in values:
            raise ValueError(
                f"{FORMER_NAMES[former]}={values[FORMER_NAMES[former]]!r} is given again as {former}="
                f"{values[former]!r}, its former name; remove {former}"
            )
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}
