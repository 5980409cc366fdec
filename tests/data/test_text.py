"""Text by the name of its dataset: ours, any of tfds, without TensorFlow."""

import sys

import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.translate

from configs import wmt
from jaxformer.config import Config, DataConfig
from jaxformer.data import text
from jaxformer.data.text import load
from jaxformer.errors import UserError


@pytest.fixture
def mocked():
    with tfds.testing.mock_data(num_examples=5000):
        yield


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


def test_a_slice_of_a_split_is_a_split(tmp_path_factory):
    """As in configs/wmt.py, where the validation pairs are the first of the training split."""
    fields = {"name": "steve", "data_dir": str(tmp_path_factory.getbasetemp() / "data")}
    everything, first, rest = (
        load(DataConfig(train=split, **fields), "train")
        for split in ("train", "train[:4000]", "train[4000:]")
    )
    assert (len(first), len(rest)) == (4000, len(everything) - 4000)
    assert [first[0], first[3999], rest[0]] == [everything[i] for i in (0, 3999, 4000)]
    assert list(rest)[-1] == everything[len(everything) - 1]
    assert len({t.fingerprint for t in (everything, first, rest)}) == 3
    with pytest.raises(UserError, match=r"train=.trian. is not a split of steve; it has .*train"):
        load(DataConfig(train="trian", **fields), "train")


WRONG = {
    "no such dataset": ({"name": "wmt19_translat"}, r"name=.wmt19_translat. .*did you mean wmt19_"),
    "nothing near": ({"name": "qqqqqqqq"}, r"configs/steve.py and configs/tsv.py work"),
    "no such pair": ({"name": "wmt19_translate/zh-xx"}, r"name=.wmt19_translate/zh-xx. is not"),
    "no such language": ({"source": "fr"}, r"config.data.source=.fr. is not a language of .*zh"),
    "no split": ({"train": ""}, r"config.data.train is empty: name a split of wmt19_translate"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_name_that_is_not_there_is_told_what_is(mocked, case, tmp_path):
    changes, words = WRONG[case]
    fields = {"name": "wmt19_translate/zh-en", "data_dir": str(tmp_path)} | changes
    with pytest.raises(UserError, match=words):
        load(DataConfig(**fields), "train")


def test_without_a_network_it_says_what_works(monkeypatch, tmp_path):
    class Offline:
        def download_and_prepare(self, **_):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(text, "_registered", lambda data: Offline())
    data = DataConfig(name="wmt19_translate/zh-en", data_dir=str(tmp_path))
    with pytest.raises(
        UserError, match=r"cannot be downloaded \(no route to host\); configs/steve"
    ):
        load(data, "train")


def test_files_are_a_dataset_too(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("你\tyou\n", encoding="utf-8")
    (pair,) = load(DataConfig(name="files", train=str(path)), "train")
    assert pair == ("你", "you", "mine")
    with pytest.raises(UserError, match=r"config\.data\.test is empty: name a file there"):
        load(DataConfig(name="files", test=""), "test")
