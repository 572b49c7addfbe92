"""Our encoder, or a classifier of ours, as a graph for onnxruntime."""

import copy
import logging
from pathlib import Path

import torch
from torch import nn

from ..modeling_can import CANForImageClassification, CANPreTrainedModel
from ..progress import INSTALL


__all__ = ["to_onnx"]


def to_onnx(model: CANPreTrainedModel, path: Path):
    """
    Writes the encoder, or the classifier, in fp32 for images of the trained size in batches of any size, and checks
    it in onnxruntime. Input `pixel_values`; outputs `last_hidden_state` and `pooler_output`, or `logits`.

    Raises:
        ValueError: if the packages of the extra `onnx` are missing.
        AssertionError: if onnxruntime computes anything else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which torch needs
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: {INSTALL.format('onnx')}") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # no word about torchvision, which is not needed
    twin = copy.deepcopy(model if isinstance(model, CANForImageClassification) else model.base_model).float().eval()
    names = ["logits"] if isinstance(twin, CANForImageClassification) else ["last_hidden_state", "pooler_output"]

    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.twin = twin

        def forward(self, pixel_values):
            output = self.twin(pixel_values)
            return tuple(output[name] for name in names)

    config, outputs = model.config, Outputs().eval()
    pixels = torch.randn(3, config.num_channels, *config.image_shape, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        outputs,
        (pixels[:2],),
        input_names=["pixel_values"],
        output_names=names,
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch_size")}},
        dynamo=True,
        verbose=False,
    )
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph:
            node.metadata_props.clear()  # where in the code it comes from, with the paths of this machine
    program.save(path, external_data=sum(p.numel() for p in twin.parameters()) > 4e8)  # a file holds 2 GB at most
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(outputs).double()
    for batch in (pixels[:1], pixels):
        with torch.no_grad():
            expected, rounded = exact(batch.double()), outputs(batch)
        computed = session.run(names, {"pixel_values": batch.numpy()})
        for name, truth, ours, theirs in zip(names, expected, rounded, computed, strict=True):
            error, own_error = ((torch.as_tensor(x) - truth).abs().max().item() for x in (theirs, ours))
            bound = max(1e-5 * max(1, truth.abs().max().item()), 4 * own_error)  # of fp32, which deep encoders amplify
            assert error <= bound, f"{name} differs by {error:.1e} in onnxruntime, and by {own_error:.1e} in torch"
