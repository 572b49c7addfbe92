"""Local files and folders: odd names, what is left out, and fingerprints that tell changed sources."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from testing_utils import TOY, encoded_image, identity, read

import run_pretraining
from modeling_can.data import ImageSource, ViewStream, folders
from modeling_can.data.folders import image_extensions, load_arguments
from modeling_can.evaluation.sets import load_labeled
from modeling_can.evaluation.settings import parse
from modeling_can.fields import parse_value
from modeling_can.pretraining.recipe import Recipe, parse_arguments


def fill(folder: Path, *names: str, start: int = 0) -> list[int]:
    """Writes a distinct image under each name; returns their CRC-32."""
    crcs = []
    for number, name in enumerate(names, start):
        content = encoded_image(color=(number * 10 % 256, 200, 100))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        crcs.append(zlib.crc32(content))
    return sorted(crcs)


def parquet(path: Path, num_rows: int = 3):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": encoded_image(color=(i * 40, 1, 2)), "path": None} for i in range(num_rows)]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(path)


# --- What is left out ------------------------------------------------------------------------------------------------


def test_every_file_of_a_folder_is_read_or_counted(tmp_path, monkeypatch):
    crcs = fill(
        tmp_path, "a.jpg", "b/c.JPE", "b/d.tga", "e.mpo"
    )  # content of JPEGs, as the end of a name is all to go by
    fill(tmp_path, "f", "1.2.840.17", "g.heic", "h.HEIC", "i.eps", "j.h5")
    fill(tmp_path, "._a.jpg", ".ipynb_checkpoints/a.jpg", ".cache/deep/x.jpg")
    for run, mark in (("run", "recipe.yaml"), ("evaluation", "results.json"), ("tried", "figures/preflight.png")):
        fill(tmp_path, f"{run}/figures/curves.png", f"{run}/{mark}")
    crcs += fill(tmp_path, "atlas/figures/1.png", start=20)  # of nobody's run
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    source = ImageSource(data_dir=str(tmp_path))
    assert sorted(read(ViewStream(source, identity), 5)) == sorted(crcs)
    assert source.left_out == {
        "without extension": 2, ".heic": 2, ".eps": 1, ".h5": 1, ".yaml": 1, ".json": 1, "hidden": 3,
        "in figures of runs": 4, "unreadable folders": 1,
    }  # fmt: skip
    line = source.left_out_line
    assert line.startswith(f"data_dir={tmp_path}: reads 5 images; left out: 4 in figures of runs, 3 hidden, 2 .heic, ")
    assert line.endswith(f"; 1 folder may not be read: {tmp_path}/secret")
    assert ImageSource(data_dir=str(tmp_path / "run" / "figures")).num_images() == 1  # where they are asked for


def test_a_folder_of_images_alone_gets_no_line_and_an_empty_one_says_what_it_holds(tmp_path):
    fill(tmp_path / "good", "a.jpg", "b/c.png")
    source = ImageSource(data_dir=str(tmp_path / "good"))
    assert (source.left_out, source.left_out_line) == ({}, "")
    fill(tmp_path / "phone", "1.heic", "2.heic")
    with pytest.raises(ValueError, match=r"holds no images; .*left out: 2 \.heic"):
        ImageSource(data_dir=str(tmp_path / "phone"))


def test_the_line_stays_short():
    text = folders.counts({f".{i}a": 100 - i for i in range(20)})
    assert text.startswith("100 .0a, 99 .1a") and text.endswith(f", {sum(range(81, 93)):,} of other kinds")


def test_extensions_are_those_that_pillow_reads():
    assert {".jpg", ".jpeg", ".jpe", ".png", ".tga", ".webp", ".tiff", ".pgm", ".mpo"} <= image_extensions()
    assert not {".pdf", ".eps", ".wmf", ".h5", ".grib", ".bufr", ".mpg", ".heic"} & image_extensions()


def test_results_and_card_state_what_was_left_out(tmp_path, capsys):
    fill(tmp_path / "p", *(f"{i}.jpg" for i in range(8)), "x.heic")
    argv = [*TOY, f"--data_dir={tmp_path}/p", f"--output_dir={tmp_path}/p/out"]
    results = run_pretraining.main(argv)
    assert results["left_out"] == {".heic": 1} == json.loads((tmp_path / "p/out/results.json").read_text())["left_out"]
    assert f"data_dir={tmp_path}/p: reads 8 images; left out: 1 .heic\n" in capsys.readouterr().out
    assert "| files skipped | 1 .heic |" in (tmp_path / "p/out/README.md").read_text()
    assert ImageSource(data_dir=str(tmp_path / "p")).num_images() == 8  # without the figures of this run


# --- Splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_split_words_in_names_of_images_are_told(tmp_path, streaming):
    fill(tmp_path, "cat/cat train 1.jpg", *(f"cat/{i}.jpg" for i in range(9)))
    fill(tmp_path, "dog/dog test 1.jpg", *(f"dog/{i}.jpg" for i in range(9)))
    source = ImageSource(str(tmp_path), streaming=streaming)
    assert sum(len(source.images(block)) for block, _ in source.blocks(source.dataset)) == 1
    assert source.left_out == {"in no split": 18, "in split test": 1}
    expected = f"dataset_name={tmp_path}, split train: reads 1 images; left out: 18 in no split, 1 in split test; "
    assert source.left_out_line.startswith(expected)
    assert f"--data_dir '{tmp_path}', which reads all images" in source.left_out_line
    (tmp_path / "cat" / "cat train 1.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"dataset_split=train: .*left out: 18 in no split, 1 in split test.*data_dir"
    ):
        ImageSource(str(tmp_path), streaming=streaming)


def test_a_class_called_after_a_split_and_other_files_are_told(tmp_path):
    fill(tmp_path, "airport/1.jpg", "train station/1.jpg", "zoo/1.jpg", "zoo/2.heic")
    assert ImageSource(str(tmp_path)).left_out == {"in no split": 2, ".heic": 1}
    for name in ("train-0000", "test-0000", "more"):
        parquet(tmp_path / "shards" / f"{name}.parquet")
    source = ImageSource(str(tmp_path / "shards"))
    assert source.left_out == {"in no split": 1} and "--data_dir" not in source.left_out_line


def test_images_behind_links_to_folders_are_told(tmp_path):
    """`data_dir` follows them, datasets does not; of links to files it reads all."""
    fill(tmp_path / "elsewhere", "1.jpg", "2.jpg", "3.jpg")
    fill(tmp_path / "set", "cat/1.jpg", start=5)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    source = ImageSource(str(tmp_path / "set"))
    assert source.left_out == {"behind links to folders": 3} and source.num_images() == 2
    assert (
        "datasets follows no links to folders" in source.left_out_line and "train and test" not in source.left_out_line
    )
    assert source.left_out_line.endswith(f"or give --data_dir '{tmp_path}/set', which reads all images")
    assert ImageSource(data_dir=str(tmp_path / "set")).num_images() == 5
    (tmp_path / "link").symlink_to(tmp_path / "set" / "cat")  # the whole set by a link
    assert ImageSource(str(tmp_path / "link")).left_out == {}


def test_usual_folders_get_no_line(tmp_path):
    fill(tmp_path / "classes", "train/cat/test 1.jpg", "train/dog/1.jpg", "test/cat/train.jpg", "test/dog/1.jpg")
    fill(tmp_path / "flat", "cat/1.jpg", "dog/2.jpg", "README.md", ".hidden.jpg")
    (tmp_path / "flat" / "README.md").write_text("---\nlicense: mit\n---\n")
    for split in ("train", "test"):
        parquet(tmp_path / "shards" / f"{split}-0000.parquet")
    (tmp_path / "shards" / "README.md").write_text("# Shards")
    parquet(tmp_path / "chosen" / "a.parquet")
    parquet(tmp_path / "chosen" / "b.parquet")
    (tmp_path / "chosen" / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: a.parquet\n---\n")
    for name, num_files in (("classes", 2), ("flat", 2), ("shards", 1), ("chosen", 1)):
        source = ImageSource(str(tmp_path / name))
        assert (source.left_out, source.left_out_line) == ({}, ""), name
        assert len(source._files()) == num_files


def test_a_set_that_holds_figures_of_a_run_is_refused(tmp_path):
    fill(tmp_path, "a/1.jpg", "b/1.jpg", "out/figures/curves.png", "out/recipe.yaml")
    with pytest.raises(ValueError, match=r"holds the figures of a run, .*out/figures.*give --data_dir"):
        ImageSource(str(tmp_path))
    with pytest.raises(ValueError, match=r"out/figures, which .*another place$"):
        load_labeled(str(tmp_path))
    assert ImageSource(data_dir=str(tmp_path)).num_images() == 2


def test_labeled_sets_tell_it_once(tmp_path, caplog):
    fill(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(2)), *(f"test/{c}/1.jpg" for c in "ab"))
    with caplog.at_level(logging.WARNING):
        load_labeled(str(tmp_path))
        assert not caplog.records
        fill(tmp_path, "more/a/1.jpg", start=9)
        load_labeled(str(tmp_path))
    (record,) = caplog.records
    assert "left out: 1 in no split" in record.message and "--data_dir" not in record.message


# --- A folder by the name of a data set ------------------------------------------------------------------------------


def test_class_folders_are_mixed_and_counted(tmp_path):
    """As of `data_dir`: datasets sorts them, so that the images of a block, and of a batch, would be of one class."""
    names = [f"{kind}/{number}.png" for kind in ("ants", "bees", "cats") for number in range(20)]
    crcs = fill(tmp_path, *names)
    source = ImageSource(str(tmp_path))
    assert source.num_images() == 60 and sorted(read(ViewStream(source, identity), 60)) == sorted(crcs)
    block, _ = next(source.blocks(source.dataset, block_size=15))
    assert {Path(image["path"]).parent.name for image in block["image"]} == {"ants", "bees", "cats"}
    again, _ = next(ImageSource(str(tmp_path)).blocks(source.dataset, block_size=15))
    assert again == block
    (tmp_path / "metadata.csv").write_text("file_name\nants/3.png\nbees/25.png\n")  # says which images there are
    assert ImageSource(str(tmp_path)).num_images() is None


def test_a_folder_shows_no_bars_of_downloads(tmp_path, capfd):
    fill(tmp_path, *(f"{split}/{kind}/{i}.jpg" for split in ("train", "test") for kind in "ab" for i in range(9)))
    load_labeled(str(tmp_path))
    ImageSource(str(tmp_path), streaming=False)
    assert not re.search("Downloading|Generating|Resolving", capfd.readouterr().err)
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("load", [ImageSource, load_labeled])
def test_a_folder_of_many_files_says_first_that_it_takes_time(tmp_path, monkeypatch, capsys, load):
    monkeypatch.setattr(folders, "_MANY", 20)
    fill(tmp_path, *(f"{kind}/{i}.jpg" for kind in "ab" for i in range(9)))
    load(str(tmp_path), **({"test_size": 0.2} if load is load_labeled else {}))
    assert "slowly" not in capsys.readouterr().out
    fill(tmp_path / "a", "18.jpg", "19.jpg", start=20)
    folders.say_that_listing_is_slow.cache_clear()
    load(str(tmp_path), **({"test_size": 0.2} if load is load_labeled else {}))
    said = capsys.readouterr().out
    assert f"{tmp_path}: datasets lists files slowly, 10,000 in about 10 s" in said
    assert (f"--data_dir '{tmp_path}' lists all images" in said) == (load is ImageSource)


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photos [2023]", "a, b and c", "{x}", "what?", "tilde ~"])
def test_names_are_literal_where_such_a_file_exists(tmp_path, name):
    folder = tmp_path / name
    crcs = fill(folder / "p", "cat [1]/a.jpg", "cat [1]/b.jpg", "dog/c.jpg")
    parquet(folder / "train.parquet")
    parquet(folder / "shards" / "train-0.parquet")
    parquet(folder / "shards" / "test-0.parquet", 2)
    (folder / "shards" / "notes.txt").write_text("no parquet")
    for streaming in (True, False):
        for given in (f"{folder}/train.parquet", [f"{folder}/train.parquet"], f"{folder}/*.parquet"):
            source = ImageSource(data_files=given, streaming=streaming)
            assert source.num_images() == 3 == len(set(read(ViewStream(source, identity), 3)))
        source = ImageSource(str(folder / "p"), streaming=streaming)
        assert sorted(read(ViewStream(source, identity), 3)) == crcs and source.left_out == {}
        assert ImageSource(str(folder / "shards"), split="test", streaming=streaming).num_images() == 2
    assert load_labeled(str(folder / "p"), test_split="train").class_names == ["cat [1]", "dog"]
    words = ["--data_files", str(folder / "train.parquet"), "--max_steps=1"]
    recipe = parse_arguments(words, "")
    assert recipe.data_files == str(folder / "train.parquet")
    for words in ([str(folder)], [str(folder), "other"]):
        settings, _ = parse(["--model_name_or_path", *words, "--dataset_name=sample_data"])
        assert settings.model_name_or_path == tuple(words)


def test_a_folder_with_brackets_and_configurations_is_refused(tmp_path):
    parquet(tmp_path / "[x]" / "a.parquet")
    (tmp_path / "[x]" / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: a.parquet\n---\n")
    with pytest.raises(ValueError, match=r"\[x\] has configurations.*rename the folder"):
        load_arguments(str(tmp_path / "[x]"))


def test_several_words_and_commas_are_lists_as_ever(tmp_path):
    assert parse_value("x", "a.parquet,b.parquet", str | list[str] | None) == ("a.parquet", "b.parquet")
    assert parse_value("x", ["a,b", "c"], tuple[str, ...]) == ("a,b", "c")
    (tmp_path / "a, b").mkdir()
    parquet(tmp_path / "a, b" / "1.parquet")
    assert parse_value("x", f"{tmp_path}/a, b/*.parquet", str | list[str]) == f"{tmp_path}/a, b/*.parquet"


def test_braces_are_refused_with_what_to_write():
    for given in ("shards/{000..123}.tar", ["shards/{000..123}.tar"], "https://host/shards/{000..123}.tar"):
        with pytest.raises(ValueError, match=r"\{000\.\.123\}\.tar has braces.*write \*: .*shards/\*\.tar"):
            ImageSource(data_files=given)


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    base = {"dataset_name": "sample_data", "max_steps": 1}
    paths = ("output_dir", "model_name_or_path", "probe_dataset_name", "resume_from_checkpoint", "dataset_name")
    recipe = Recipe.from_dict({**base, **dict.fromkeys(paths, "~/x")})
    assert [getattr(recipe, name) for name in paths] == [f"{tmp_path}/x"] * 5
    assert Recipe.from_dict({"data_dir": "~/x", "max_steps": 1}).data_dir == f"{tmp_path}/x"
    several = Recipe.from_dict({"data_files": ["~/a.tar", "https://host/~me/b.tar"], "max_steps": 1}).data_files
    assert several == (f"{tmp_path}/a.tar", "https://host/~me/b.tar")
    (tmp_path / "recipe.yaml").write_text("data_dir: ~/photos\nmax_steps: 1\n")
    assert parse_arguments(["~/recipe.yaml"], "").data_dir == f"{tmp_path}/photos"
    names = ("output_dir", "dataset_name", "processor_name_or_path", "feature_cache", "further_sets", "data_dir",
             "data_files", "reference_model")  # fmt: skip
    settings, _ = parse(["--model_name_or_path", "~/m", "~/n", *(f"--{name}=~/x" for name in names)])
    assert settings.model_name_or_path == (f"{tmp_path}/m", f"{tmp_path}/n")
    assert [getattr(settings, name) for name in names] == [f"{tmp_path}/x"] * len(names)


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_added_removed_and_replaced_files_but_not_the_place(tmp_path):
    fill(tmp_path / "a", "x/1.jpg", "x/2.jpg", "3.jpg")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    parquet(tmp_path / "s" / "train.parquet")
    shutil.copytree(tmp_path / "s", tmp_path / "elsewhere" / "s")

    def of(place: Path, **options) -> list[str]:
        options = {"streaming": options.get("streaming", True)}
        return [
            ImageSource(data_dir=str(place)).fingerprint,
            ImageSource(str(place), **options).fingerprint,
        ]

    first = of(tmp_path / "a")
    assert first == of(tmp_path / "elsewhere" / "b") == of(tmp_path / "a", streaming=False)
    changed = tmp_path / "elsewhere" / "b"
    content = (changed / "3.jpg").read_bytes()
    (changed / "3.jpg").write_bytes(content + b"\0")  # another file of that name
    replaced = of(changed)
    (changed / "3.jpg").write_bytes(content)
    fill(changed, "4.jpg")
    added = of(changed)
    (changed / "4.jpg").unlink()
    (changed / "x" / "1.jpg").unlink()
    removed = of(changed)
    for number in range(2):
        assert len({prints[number] for prints in (first, replaced, added, removed)}) == 4

    files = [
        ImageSource(data_files=f"{place}/s/*.parquet").fingerprint for place in (tmp_path, tmp_path / "elsewhere")
    ]
    parquet(tmp_path / "s" / "train.parquet", 4)
    assert files[0] == files[1] != ImageSource(data_files=f"{tmp_path}/s/*.parquet").fingerprint


def test_a_link_to_nowhere_is_a_missing_image_and_no_crash(tmp_path):
    fill(tmp_path, "1.jpg")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    assert ImageSource(data_dir=str(tmp_path)).num_images() == 2


@pytest.mark.slow
def test_a_stream_that_is_left_open_ends_quietly_with_python(tmp_path):
    fill(tmp_path, "1.jpg")
    lines = [
        "from modeling_can.data import ImageSource, ViewStream",
        f"stream = iter(ViewStream(ImageSource(data_dir={str(tmp_path)!r}), lambda encoded, epoch: [0]))",
        "next(stream)",
    ]
    answer = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert answer.returncode == 0 and "in blocks" not in answer.stderr, answer.stderr


@pytest.mark.parametrize("pattern", ["a_*.tar", "*.parquet", "none.tar", "**/*.jsonl"])
def test_data_files_that_match_nothing_are_refused_by_name(tmp_path, monkeypatch, pattern):
    with pytest.raises(
        ValueError, match=rf"data_files={re.escape(f'{tmp_path}/{pattern}')} is no file, and matches none"
    ):
        ImageSource(data_files=f"{tmp_path}/{pattern}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"it begins at the working directory, {tmp_path}"):
        ImageSource(data_files=[pattern])


def test_a_signature_of_a_url_changes_no_fingerprint():
    signed = [f"https://host/a.parquet?token={token}" for token in "xy"]
    first, second = (folders.fingerprint([url]) for url in signed)
    assert first == second != folders.fingerprint(["https://host/b.parquet"])
