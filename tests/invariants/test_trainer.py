"""CAN through transformers' own Trainer."""

import pytest
import torch
from testing_utils import inputs, tiny_model
from transformers import Trainer, TrainingArguments

from modeling_can.configuration_can import MAE


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


def test_evaluate_reports_the_loss_of_the_model(tmp_path):
    """Without a hint such as `label_names`: the Trainer finds `return_loss=True` in the signature."""
    model = tiny_model()
    batch = inputs(model.config, batch_size=8)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        eval_dataset=[{name: tensor[index] for name, tensor in batch.items()} for index in range(8)],
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    output = trainer.predict(trainer.eval_dataset)  # keeps what the model predicts as well
    assert output.metrics["test_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert any(getattr(array, "shape", None) == (8, 2, 24, 192) for array in output.predictions)


def test_without_the_loss_the_predictions_stay():
    model = tiny_model()
    batch = inputs(model.config)
    outputs, predicted = model(**batch), model(**batch, return_loss=False)
    losses = {"loss", "contrastive_loss", "reconstruction_loss", "denoising_loss"}
    assert outputs.keys() - predicted.keys() == losses
    assert all(torch.equal(outputs[name], value) for name, value in predicted.items())
