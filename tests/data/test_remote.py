"""Shards on a real HTTP server that drops connections, answers 503, stalls, or loses a file."""

import itertools
import threading
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_server import FaultyServer
from testing_utils import identity

from modeling_can.data import ImageSource, ViewStream


@pytest.fixture()
def server(sources):  # noqa: F811
    with FaultyServer(Path(sources["parquet"]["data_files"]).parent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_every_sample_comes_once_through_a_faulty_connection(server, sources, impatient, kind):  # noqa: F811
    source = ImageSource(data_files=[f"{server.url}/{shard}.{kind}" for shard in range(5)])
    if kind == "parquet":
        assert source.num_images() == 120
    server.faults = ["drop", "503", None, None, "stall", None, "503", "drop", None, "503", "503"]
    stream = iter(ViewStream(source, identity, block_size=7))
    for epoch in range(2):
        seen = [int(sample["views"]) for sample in itertools.islice(stream, 120)]
        assert sorted(seen) == sources["crcs"], epoch
    assert server.befallen == ["drop", "503", "stall", "503", "drop", "503", "503"]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_url_may_have_a_query(server, sources, kind):  # noqa: F811
    source = ImageSource(data_files=[f"{server.url}/{shard}.{kind}?download=1" for shard in range(5)])
    assert source.num_images() == (120 if kind == "parquet" else None)
    stream = iter(ViewStream(source, identity))
    assert sorted(int(sample["views"]) for sample in itertools.islice(stream, 120)) == sources["crcs"]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_shard_that_is_gone_stops_the_run_by_name(server, sources, impatient, kind):  # noqa: F811
    source = ImageSource(data_files=[f"{server.url}/{shard}.{kind}" for shard in range(5)])
    server.gone = {f"3.{kind}"}
    with pytest.raises(OSError, match=rf"3\.{kind}.*no image was skipped"):
        list(itertools.islice(ViewStream(source, identity), 120))


def test_images_behind_urls_are_tried_again_and_missing_ones_reported(server, impatient, tmp_path):
    (server.folder / "gone.png").write_bytes(b"")
    server.gone = {"gone.png"}
    names = [f"images/{i}.png" for i in range(6)] + ["gone.png"]
    links = [{"bytes": None, "path": f"{server.url}/{name}"} for name in names]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(links, kind)}), tmp_path / "links.parquet")
    server.faults = [None, "drop", "503", None, "drop"]
    stream = ViewStream(ImageSource(data_files=f"{tmp_path}/links.parquet"), identity, max_bad_fraction=0.2)
    samples = list(itertools.islice(stream, 12))
    expected = {zlib.crc32((server.folder / name).read_bytes()) for name in names[:6]}
    assert {int(sample["views"]) for sample in samples[:6]} == expected
    assert [reason for sample in samples for reason in sample["bad"]] == ["missing"]

    server.is_down = True  # altogether, and for a while
    threading.Timer(0.5, lambda: setattr(server, "is_down", False)).start()
    samples = list(itertools.islice(stream, 6))
    assert {int(sample["views"]) for sample in samples} == expected


def test_a_damaged_local_shard_stops_the_run_at_once(sources, tmp_path):  # noqa: F811
    for kind, damage in (("parquet", 100), ("tar", 700)):  # in the tar, within an image
        whole = Path(sources[kind]["data_files"].replace("*", "0"))
        damaged = tmp_path / f"damaged.{kind}"
        damaged.write_bytes(whole.read_bytes())
        stream = ViewStream(ImageSource(data_files=[str(whole), str(damaged)]), identity)
        damaged.write_bytes(whole.read_bytes()[: 4096 + damage])
        with pytest.raises(OSError, match="cannot be read: .*no image was skipped"):
            list(itertools.islice(stream, 48))
    with pytest.raises(ValueError, match=r"damaged\.tar is cut off"):
        ImageSource(data_files=str(damaged))
