"""
How good an encoder is:

    python run_eval.py --model_name_or_path MODEL --dataset_name LABELED_SET --task knn,linear_probe

A file for each protocol: what it refuses, how it runs, how its figures are shown. A new one is a class of
`protocol.Protocol` in a file of its own and an item of `tasks.PROTOCOLS`.

- `command`: the order of things. `settings`: the flags. `entries`: models and baselines. `overlap`: what they saw.
- `sets`, `features`, `encoders`, `preprocessors`, `scores`: what protocols work with. `protocol`: what they are, and
  are given.
- `knn`, `linear`, `few_shot`, `retrieval`: on features of the frozen encoder.
- `linear_sgd`, `finetuning`: trained on augmented images, `training_images`; `classifier` is what is fine-tuned.
- `robustness`, `reconstruction`: on other images, and of pixels.
- `segmentation`: on patch tokens, of sets with masks, which `masks` loads.
- `report`: table, card, figure, remarks. `advice`: whether the encoder is worth it. `export`: a classifier to use.
- `embed`, `part_files`: embeddings of any images. `probe`: what the trainer measures again and again.
"""

__all__ = []
