"""CAN through transformers' own Trainer."""

import torch
from conftest import MAE, tiny_model
from transformers import Trainer, TrainingArguments


class Views(torch.utils.data.Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.views = torch.randn(count, 2, 3, 32, 48, generator=generator)

    def __len__(self):
        return len(self.views)

    def __getitem__(self, index):
        return {"pixel_values": self.views[index]}


def train(folder, batch_size, accumulation):
    # One mask for all, so that nothing is random.
    model = tiny_model(**MAE)
    scores = torch.arange(24.0)
    forward = model.can.embeddings.forward
    model.can.embeddings.forward = lambda pixels, ratio, _, interpolate: forward(
        pixels, ratio, scores.expand(len(pixels), -1), interpolate
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_drop_last=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Views(24))
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], model


def test_accumulation_in_the_trainer_is_a_mean_over_the_batches(tmp_path):
    """With two batches a step, the loss and the weights are those of one batch twice as large."""
    (accumulated, left), (whole, right) = train(tmp_path / "a", 4, 2), train(tmp_path / "b", 8, 1)
    for line, other in zip(accumulated, whole, strict=True):
        assert abs(line["loss"] - other["loss"]) < 1e-4 and abs(line["grad_norm"] - other["grad_norm"]) < 1e-3
    for (name, parameter), other in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-4, rtol=1e-3, msg=name)
