"""From a recipe to a trained model."""

__all__ = []
