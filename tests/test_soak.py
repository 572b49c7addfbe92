"""Long streams. pytest -m soak"""

import itertools
import resource
from pathlib import Path

import pytest

from modeling_can.data import ImageSource, ViewStream, view_loader
from modeling_can.data.crops import RandomCrops


@pytest.mark.soak
def test_memory_is_flat_from_10_000_to_200_000_samples():
    stream = ViewStream(ImageSource(dataset_name="sample_data"), RandomCrops((32, 32)))
    batches = iter(view_loader(stream, 100))

    def resident_after(num_batches):
        next(itertools.islice(batches, num_batches - 1, None))
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    before = resident_after(100)
    after = resident_after(1900)
    assert after < 1.05 * before, f"{before:.0f} MiB after 10,000 samples, {after:.0f} after 200,000"
