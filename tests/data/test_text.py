"""Text by the name of its dataset: ours, any of tfds, without TensorFlow."""

import errno
import os
import sys
import zipfile

import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.translate

from configs import wmt
from jaxformer.config import Config, DataConfig
from jaxformer.data.text import load
from jaxformer.errors import UserError


class TinyTranslate(tfds.core.GeneratorBasedBuilder):
    """A dataset such as tfds registers them: two languages, no domains."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.Translation(languages=("zh", "en"))
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4010), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"zh": f"第{i}句", "en": f" sentence {i}\n"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny")
    load(tiny(made), "train")
    return made


@pytest.fixture
def mocked():
    with tfds.testing.mock_data(num_examples=5000):
        yield


def tiny(folder, **changes):
    return DataConfig(**{"name": "tiny_translate", "data_dir": str(folder)} | changes)


@pytest.mark.parametrize("preset", ["base", "base_de_en"])
def test_the_texts_of_the_paper_are_read_by_name(mocked, preset, tmp_path):
    values = wmt.get_config(preset)
    values.data.data_dir = str(tmp_path)
    data = Config.of(values).data
    splits = {split: load(data, split) for split in ("train", "valid", "test")}
    assert len({opened.fingerprint for opened in splits.values()}) == 3
    for opened in splits.values():
        pair = opened[0]
        assert pair.source
        assert pair.target
        assert pair.domain == data.name.split("/")[0]
        assert len(opened) == 5000  # reading in order is broken in the mock of tfds 4.9.10
    assert "tensorflow" not in sys.modules


def test_a_dataset_is_built_once_and_read_without_tensorflow(folder, monkeypatch):
    built = {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record*")}
    monkeypatch.setattr(TinyTranslate, "_generate_examples", None)  # it cannot be built again
    text = load(tiny(folder), "train")
    wanted = [(f"第{i}句", f"sentence {i}", "tiny_translate") for i in range(4010)]
    assert sorted(text) == sorted(wanted)
    assert [text[i] for i in (0, 1500, 4009)] == [list(text)[i] for i in (0, 1500, 4009)]
    swapped = load(tiny(folder, source="en", target="zh"), "train")
    assert swapped[7] == (text[7].target, text[7].source, "tiny_translate")
    assert text.fingerprint == load(tiny(folder), "train").fingerprint != swapped.fingerprint
    assert built == {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record*")}
    assert len(built) == 2
    assert "tensorflow" not in sys.modules


def test_a_slice_of_a_split_is_a_split(folder):
    """As in configs/wmt.py, where the validation pairs are the first of the training split."""
    everything, first, rest = (
        load(tiny(folder, train=split), "train")
        for split in ("train", "train[:4000]", "train[4000:]")
    )
    assert (len(everything), len(first), len(rest)) == (4010, 4000, 10)
    assert list(everything) == [*first, *rest]
    assert rest[9] == everything[4009]
    assert len({text.fingerprint for text in (everything, first, rest)}) == 3


WRONG_SPLITS = {
    "": "is empty: name a split of tiny_translate there",
    "trian": "=.trian. is not a split of tiny_translate; it has train, validation",
    "train[:0]": r"=.train\[:0\]. selects nothing of tiny_translate .*; write it like",
    "train[9999:]": r"selects nothing of tiny_translate .*4010 examples.*; write it like",
    "train[4000": r"selects nothing of tiny_translate .*split .train\[4000.*; write it like",
}


@pytest.mark.parametrize("where", WRONG_SPLITS)
def test_a_split_that_is_not_there_is_told(folder, where):
    with pytest.raises(UserError, match=r"^config\.data\.valid.*" + WRONG_SPLITS[where]):
        load(tiny(folder, valid=where), "valid")


WRONG_NAMES = {
    "no such dataset": ({"name": "wmt19_translat"}, r"name=.wmt19_translat. .*did you mean wmt19_"),
    "nothing near": ({"name": "qqqqqqqq"}, r"configs/steve.py and configs/tsv.py work"),
    "no such pair": (
        {"name": "wmt19_translate/zh-xx"},
        r"name=.wmt19_translate/zh-xx. is not .*did you mean wmt19_translate/zh-en",
    ),
    "no such version": ({"name": "wmt19_translate/zh-en:9.9.9"}, r"only: 1\.0\.0.*/zh-en"),
    "a config of ours": ({"name": "zh_en/full"}, r"name=.zh_en/full. is not .*did you mean zh_en"),
    "no source": ({"source": "fr"}, r"config.data.source=.fr. is not a language of .*; it has zh"),
    "no target": ({"target": "de"}, r"config.data.target=.de. is not a language of .*; it has zh"),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_a_name_that_is_not_there_is_told_what_is(mocked, case, tmp_path):
    changes, words = WRONG_NAMES[case]
    fields = {"name": "wmt19_translate/zh-en", "data_dir": str(tmp_path)} | changes
    with pytest.raises(UserError, match=words):
        load(DataConfig(**fields), "train")


def test_files_in_another_format_are_told_with_their_folder(tmp_path):
    TinyTranslate(data_dir=tmp_path).download_and_prepare(file_format="parquet")
    with pytest.raises(UserError, match=rf"data_dir=.{tmp_path}. cannot be opened .*PARQUET"):
        load(tiny(tmp_path), "train")


@pytest.mark.parametrize("kind", [OSError, ConnectionError, tfds.download.DownloadError])
def test_without_a_network_it_says_what_works(monkeypatch, tmp_path, kind):
    def offline(*_):
        raise kind("no route to host")

    monkeypatch.setattr(TinyTranslate, "_split_generators", offline)
    works = r"\(no route to host\); configs/steve\.py and configs/tsv\.py work without a network"
    with pytest.raises(UserError, match=r"name=.tiny_translate. cannot be downloaded " + works):
        load(tiny(tmp_path), "train")
    assert not list(tmp_path.rglob("*.array_record*"))


def test_a_full_disk_is_told_with_its_folder(monkeypatch, tmp_path):
    def full(*_):  # as array_record, which is C++, says it
        raise RuntimeError(f"Failed to finalize: write() failed: {os.strerror(errno.ENOSPC)}; at 9")

    monkeypatch.setattr(TinyTranslate, "_split_generators", full)
    with pytest.raises(UserError, match=rf"data_dir='{tmp_path}' is on a full disk; make room"):
        load(tiny(tmp_path), "train")


def test_archives_that_tfds_opens_with_tensorflow_only_are_told(monkeypatch, tmp_path):
    archive = tmp_path / "some.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("some.txt", "text")

    monkeypatch.setattr(TinyTranslate, "_split_generators", lambda _, it: it.extract(archive))
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # not installed
    with pytest.raises(UserError, match=r"pip install tensorflow-cpu .* configs/steve\.py"):
        load(tiny(tmp_path / "data"), "train")


def test_a_mistake_in_a_builder_is_no_mistake_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setattr(TinyTranslate, "_split_generators", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(tiny(tmp_path), "train")


def test_files_are_a_dataset_too(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("你\tyou\n", encoding="utf-8")
    (pair,) = load(DataConfig(name="files", train=str(path)), "train")
    assert pair == ("你", "you", "mine")
    with pytest.raises(UserError, match=r"config\.data\.test is empty: name a file there"):
        load(DataConfig(name="files", test=""), "test")
