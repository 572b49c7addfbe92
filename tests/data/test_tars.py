"""Images in zip files: each process opens an archive once, and anew after a connection error."""

import itertools
import os
import zipfile
import zlib

import pytest
from fsspec.implementations.zip import ZipFileSystem
from testing_utils import encoded_image, identity, read

from modeling_can.data import ImageSource, ViewStream, reading


@pytest.fixture()
def zipped(tmp_path):
    """A folder with a zip of 24 images, and their CRC-32."""
    images = [encoded_image(color=(number * 10, 200, 100)) for number in range(24)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, image in enumerate(images):
            archive.writestr(f"{number:02}.jpg", image)
    return tmp_path, sorted(map(zlib.crc32, images))


def test_the_index_of_a_zip_is_read_once_and_not_for_every_image(zipped, monkeypatch):
    folder, crcs = zipped
    source, opened, init = ImageSource(str(folder)), [], ZipFileSystem.__init__
    monkeypatch.setattr(ZipFileSystem, "__init__", lambda self, *a, **k: opened.append(1) or init(self, *a, **k))
    reading.open_archive.cache_clear()
    stream = iter(ViewStream(source, identity))
    assert sorted(int(sample["views"]) for sample in itertools.islice(stream, 24)) == crcs
    num_listings = len(opened)  # datasets lists the archive
    assert num_listings <= 4
    assert sorted(int(sample["views"]) for sample in itertools.islice(stream, 24)) == crcs
    assert len(opened) - num_listings <= 3


def test_forked_workers_open_the_zip_for_themselves(zipped):
    folder, crcs = zipped
    source = ImageSource(str(folder))
    read(ViewStream(source, identity), 2)  # opens it in this process
    assert reading.open_archive.cache_info().currsize
    for _ in range(3):
        assert sorted(read(ViewStream(source, identity), 48, num_workers=2)) == sorted(2 * crcs)


def test_a_zip_is_opened_anew_after_a_connection_error(zipped, monkeypatch):
    monkeypatch.setattr("modeling_can.data.sources.RETRY_SECONDS", (0, 0))
    folder, crcs = zipped
    source, image = ImageSource(str(folder)), {"bytes": None, "path": f"zip://00.jpg::{folder}/a.zip"}
    reading.open_archive.cache_clear()
    assert zlib.crc32(source.fetch(image)) in crcs
    reading.open_archive(
        os.getpid(), "zip", f"{folder}/a.zip"
    ).zip.fp.close()  # what a dropped connection leaves behind

    def fails(*arguments, **options):
        raise ConnectionError("reset")

    reading.open_archive(os.getpid(), "zip", f"{folder}/a.zip").open = fails
    assert zlib.crc32(source.fetch(image)) in crcs
