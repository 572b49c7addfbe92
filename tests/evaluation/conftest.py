import functools

import pytest
import torch
from colored_images import PRETRAINED
from transformers import (
    ViTImageProcessor,
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder for each kind of encoder."""

    @functools.cache
    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        PRETRAINED[kind]().save_pretrained(folder)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        return str(folder)

    return make
