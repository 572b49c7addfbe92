"""
Sources of images, and the endless stream of view pairs that the trainer reads from them.

Order: the shards of a source are shuffled for every epoch and dealt to the readers (processes x loader workers); where
there are fewer shards than readers, the rows are dealt instead. A reader passes over its own rows exactly once an
epoch, in shuffled blocks, and goes on into the next epoch without a gap. So every batch is full on every process, and
nobody waits for a reader that ran dry.
"""

import itertools
import logging
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from .views import read_bytes


logger = logging.getLogger(__name__)

SAMPLE_DATA = "sample_data"  # the name under which the bundled tiles are a data set
FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow", ".jsonl": "json"}
IMAGES = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    Image.DecompressionBombError,
)  # what Pillow raises on bad files


def resolve_name(name: str) -> str:
    """A name for `datasets.load_dataset`: itself, or where the bundled tiles lie."""
    return str(Path(__file__).parent / "sample_data") if name == SAMPLE_DATA else name


class ImageSource:
    """
    A streamed set of encoded images: exactly one of a Hub id or folder that `datasets.load_dataset` reads, any folder
    of images (nested or flat, labels play no part), or data files.

    Args:
        dataset_name (`str`, *optional*): Hub id, local folder, or `"sample_data"`.
        data_dir (`str`, *optional*): A folder with images anywhere below it.
        data_files (`str` or `list[str]`, *optional*): Paths, globs or URLs of parquet, WebDataset tar, arrow or jsonl.
        split (`str`): Split of `dataset_name`.
        image_column (`str`): Column that holds the images.

    Raises:
        ValueError: if not exactly one source is given, if it holds no images, or has no such column.
    """

    def __init__(self, dataset_name=None, data_dir=None, data_files=None, split="train", image_column="image"):
        given = {"dataset_name": dataset_name, "data_dir": data_dir, "data_files": data_files}
        given = {name: value for name, value in given.items() if value}
        if len(given) != 1:
            raise ValueError(f"give exactly one of dataset_name, data_dir and data_files, got {given or 'none'}")
        data_files = data_files if not data_files or isinstance(data_files, str) else list(data_files)
        self.name = str(dataset_name or data_dir or data_files)
        self.image_column = image_column
        self._builder, self.split = None, split
        if data_dir:
            self.dataset = self._list_folder(Path(data_dir))
        else:
            self.dataset = self._build(dataset_name, data_files)

    def _list_folder(self, folder: Path) -> datasets.IterableDataset:
        if not folder.is_dir():
            raise ValueError(f"data_dir={folder} is not a folder")
        paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        if not paths:
            raise ValueError(
                f"data_dir={folder} holds no images; for parquet or tar files use "
                f"--data_files '{folder}/*.parquet' or --dataset_name {folder}"
            )
        # Files of a class lie together; a shuffled list mixes them beyond the reach of a block.
        paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
        self._num_images = len(paths)
        features = datasets.Features({self.image_column: datasets.Image(decode=False)})
        rows = datasets.Dataset.from_dict({self.image_column: paths}, features=features)
        return rows.to_iterable_dataset(num_shards=min(len(paths), 64))

    def _build(self, dataset_name, data_files) -> datasets.IterableDataset:
        if data_files:
            first = data_files if isinstance(data_files, str) else data_files[0]
            suffix = Path(first).suffix
            if suffix not in FORMATS:
                raise ValueError(f"data_files={data_files} ends in {suffix!r}; known are {', '.join(FORMATS)}")
            arguments = {"path": FORMATS[suffix], "data_files": data_files}
            self.split = "train"
        else:
            arguments = {"path": resolve_name(dataset_name)}
        try:
            builder = datasets.load_dataset_builder(**arguments)
        except FileNotFoundError as error:  # no such files, an empty folder, or no such set on the Hub
            raise ValueError(f"{'data_files' if data_files else 'dataset_name'}={self.name}: {error}") from error
        self._builder = builder
        dataset = builder.as_streaming_dataset(split=self.split)
        columns = dataset.column_names or list(next(iter(dataset)))
        if self.image_column not in columns:
            raise ValueError(f"{self.name} has no column {self.image_column!r}; set image_column to one of {columns}")
        # Undecoded: a picture that datasets fails to decode would end the stream.
        return dataset.select_columns([self.image_column]).cast_column(self.image_column, datasets.Image(decode=False))

    def num_images(self) -> int | None:
        """How many images an epoch has, without reading them: None where only reading would tell."""
        if self._builder is None:
            return self._num_images
        splits = self._builder.info.splits
        if splits and self.split in splits and splits[self.split].num_examples:
            return splits[self.split].num_examples
        files = (self._builder.config.data_files or {}).get(self.split, [])
        if not files or any(not str(file).endswith(".parquet") for file in files):
            return None
        count = 0
        for path in files:
            with fsspec.open(str(path)) as file:
                count += pyarrow.parquet.read_metadata(file).num_rows
        return count


class ViewStream(torch.utils.data.IterableDataset):
    """
    One process's share of a source as an endless stream of `{"views": uint8 (2, C, H, W), "num_skipped": int}`, to be
    given to a torch `DataLoader` (never to `accelerator.prepare`, which would split it once more).

    An image that cannot be read is skipped, counted in `num_skipped` of the next one, and the first few are named in
    the log.

    Args:
        source (`ImageSource`): Where the images come from.
        make_views (callable): `(encoded bytes, epoch) -> (2, C, H, W)` uint8 array.
        seed (`int`): Of the order.
        process_index, num_processes (`int`): This process among those that share the source.
        block_size (`int`): Encoded images that a reader holds and shuffles at a time.

    Raises:
        ValueError: while iterating, when a whole pass over a reader's rows finds no readable image.
    """

    def __init__(self, source, make_views, seed=0, process_index=0, num_processes=1, block_size=1024):
        self.source, self.make_views, self.seed = source, make_views, seed
        self.process_index, self.num_processes, self.block_size = process_index, num_processes, block_size

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, num_readers = self.process_index * num_workers + worker_id, self.num_processes * num_workers
        dataset = self.source.dataset
        strategy = "shards" if dataset.num_shards >= num_readers else "examples"
        if strategy == "examples" and reader == 0:
            logger.warning(
                "%s has %d shards for %d readers: every reader reads everything and keeps its rows of it",
                self.source.name, dataset.num_shards, num_readers,
            )  # fmt: skip
        num_skipped = 0
        for epoch in itertools.count():
            rows = split_dataset_by_node(dataset, rank=reader, world_size=num_readers, strategy=strategy)
            # Shuffles the shards, then deals them, with this very number as the seed, alike on all readers. It must be
            # said to the split set, which starts at epoch 0 (file order) whatever its parent was told.
            rows.set_epoch(1 + self.seed + 1_000_003 * epoch)
            num_read = 0
            # iter(batch_size) is also the one way of reading that does not split among the workers a second time.
            for index, block in enumerate(rows.iter(batch_size=self.block_size)):
                images = block[self.source.image_column]
                for i in np.random.default_rng((self.seed, epoch, reader, index)).permutation(len(images)):
                    try:
                        views = self.make_views(read_bytes(images[i]), epoch)
                    except UNREADABLE as error:
                        num_skipped += 1
                        if num_skipped <= 3:
                            logger.warning(
                                "skipped an image of %s (%s): %s",
                                self.source.name,
                                images[i] and images[i]["path"],
                                error,
                            )
                        continue
                    yield {"views": torch.from_numpy(views), "num_skipped": num_skipped}
                    num_read, num_skipped = num_read + 1, 0
            if num_read == 0:
                raise ValueError(
                    f"{self.source.name} has no readable image among the rows of reader {reader} of {num_readers} "
                    f"({num_skipped} unreadable); use fewer readers, or check that the files are images"
                )
