"""What a run's length, batch and learning rate are, derived once."""

import dataclasses

from ..optimization import learning_rate, peak_learning_rate
from .recipe import Recipe


__all__ = ["Plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    Args:
        num_images (`int` or `None`): In an epoch, where it is known.
        num_micro_batches (`int`): That a step consists of.
        global_batch_size (`int`): Images of a step, over processes and micro-batches.
        caching (`bool`): Whether micro-batches are contrasted with each other (gradient caching).
        num_contrasted (`int`): Images that are contrasted with each other.
        max_steps, warmup_steps (`int`)
        frozen_steps (`int`): At first, in which the encoder stays as it is.
        peak_learning_rate (`float`): After the warm-up: the base rate times global_batch_size / 256.
    """

    num_images: int | None
    num_micro_batches: int
    global_batch_size: int
    caching: bool
    num_contrasted: int
    max_steps: int
    warmup_steps: int
    frozen_steps: int
    peak_learning_rate: float

    @classmethod
    def of(cls, recipe: Recipe, num_images: int | None, num_processes: int) -> "Plan":
        num_micro_batches = recipe.gradient_accumulation_steps
        global_batch_size = recipe.per_device_train_batch_size * num_processes * num_micro_batches
        caching = num_micro_batches > 1 and recipe.gradient_caching and recipe.config.contrastive_loss_weight > 0
        max_steps = _number_of_steps(recipe, global_batch_size, num_images)
        return cls(
            num_images=num_images,
            num_micro_batches=num_micro_batches,
            global_batch_size=global_batch_size,
            caching=caching,
            num_contrasted=global_batch_size if caching else global_batch_size // num_micro_batches,
            max_steps=max_steps,
            warmup_steps=round(recipe.warmup_ratio * max_steps),
            frozen_steps=int(recipe.frozen_encoder_ratio * max_steps),
            peak_learning_rate=peak_learning_rate(recipe.base_learning_rate, global_batch_size),
        )

    def learning_rate(self, step: int, first_step: int = 0) -> float:
        """Of a step, 0-based; of what is frozen before `first_step`."""
        peak = self.peak_learning_rate
        return learning_rate(step, self.max_steps, self.warmup_steps, peak=peak, first_step=first_step)


def _number_of_steps(recipe: Recipe, global_batch_size: int, num_images: int | None) -> int:
    if recipe.max_steps is not None:
        return recipe.max_steps
    num_samples = recipe.num_train_samples
    if recipe.num_train_epochs is not None:
        if num_images is None:
            raise ValueError(
                f"num_train_epochs={recipe.num_train_epochs}, but the source does not tell how many images it has; "
                "use --num_train_samples or --max_steps"
            )
        num_samples = recipe.num_train_epochs * num_images
    return max(1, round(num_samples / global_batch_size))
