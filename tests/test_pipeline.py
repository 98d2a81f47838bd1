"""Reading records: every record once an epoch, the same batches on any number of processes, exact resume."""

import functools
import itertools
import shutil

import jaxtyping
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds
from grain.checkpoint import CheckpointRestore, CheckpointSave

from rcm_jax.config import UserError
from rcm_jax.data import digits, pipeline
from rcm_jax.state import FAULTS


def make_source(count):
    """Records whose every field tells their number."""
    return [
        {
            "latent": np.full((2, 1, 1, 3), number, ml_dtypes.bfloat16),
            "text": np.full((4, 5), number, np.float32),
            "prompt": f"record {number}".encode(),
        }
        for number in range(count)
    ]


def numbers(batch):
    """The record numbers of a batch, after checking that its fields belong together."""
    prompts = [int(prompt.removeprefix("record ")) for prompt in batch["prompt"]]
    assert batch["latent"].dtype == batch["text"].dtype == np.float32
    assert batch["latent"].shape == (len(prompts), 2, 1, 1, 3)
    assert batch["text"].shape == (len(prompts), 4, 5)
    assert batch["latent"][:, 0, 0, 0, 0].tolist() == batch["text"][:, 0, 0].tolist() == prompts
    return prompts


def take(loader, count):
    return [numbers(next(loader)) for _ in range(count)]


@pytest.mark.parametrize(("records", "batch_size"), [(12, 4), (10, 4), (3, 7), (1, 2), (200, 16)])
def test_every_epoch_has_every_record_once(records, batch_size):
    epochs = 3
    batches = take(
        pipeline.make_loader(make_source(records), batch_size=batch_size, seed=0), -(-epochs * records // batch_size)
    )
    stream = list(itertools.chain(*batches))
    for epoch in range(epochs):
        assert sorted(stream[epoch * records : (epoch + 1) * records]) == list(range(records))


def test_epochs_and_seeds_have_their_own_order():
    orders = []
    for seed in (0, 1):
        first, second = take(pipeline.make_loader(make_source(50), batch_size=50, seed=seed), 2)
        orders += [tuple(first), tuple(second)]
    assert len({*orders, tuple(range(50))}) == 5


def test_one_seed_is_one_order():
    first, again = (take(pipeline.make_loader(make_source(20), batch_size=8, seed=3), 6) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("rows", [range(12), range(4, 8), [0, 1, 6, 7], [11]])
def test_a_process_reads_its_rows_of_the_batches_that_all_read(rows):
    whole, some = (
        take(pipeline.make_loader(make_source(50), batch_size=12, seed=0, rows=wanted), 9) for wanted in (None, rows)
    )
    assert some == [[batch[row] for row in rows] for batch in whole]


@pytest.mark.parametrize("taken", [0, 1, 5, 17])
@pytest.mark.parametrize("prefetch", [0, 1, 8])
def test_a_position_resumes_exactly(taken, prefetch):
    make = functools.partial(pipeline.make_loader, make_source(30), batch_size=8, seed=0, prefetch=prefetch)
    loader = make()
    take(loader, taken)
    state = loader.get_state()
    ahead = take(loader, 6)
    resumed = make()
    take(resumed, 3)
    resumed.set_state(state)
    assert take(resumed, 6) == ahead


def test_a_position_resumes_on_another_number_of_processes():
    source = make_source(30)
    loader = pipeline.make_loader(source, batch_size=8, seed=0)
    take(loader, 4)
    half = pipeline.make_loader(source, batch_size=8, seed=0, rows=range(4, 8))
    half.set_state(loader.get_state())
    assert take(half, 5) == [batch[4:] for batch in take(loader, 5)]


def test_a_position_lies_in_an_orbax_checkpoint(tmp_path):
    make = functools.partial(pipeline.make_loader, make_source(30), batch_size=8, seed=0)
    loader = make()
    take(loader, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=CheckpointSave(loader)))
        manager.wait_until_finished()
        ahead = take(loader, 4)
        resumed = make()
        manager.restore(5, args=ocp.args.Composite(data=CheckpointRestore(resumed)))
    assert take(resumed, 4) == ahead


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_evaluation_reads_all_records_once_in_stored_order(batch_size):
    batches = list(pipeline.read_in_order(make_source(10), batch_size=batch_size))
    assert list(itertools.chain(*map(numbers, batches))) == list(range(10))
    assert {len(batch["prompt"]) for batch in batches[:-1]} <= {batch_size}


def test_prompts_may_be_str_or_bytes_and_any_unicode():
    source = make_source(2)
    source[0]["prompt"], source[1]["prompt"] = "köttbullar 肉", "köttbullar 肉".encode()
    assert pipeline.read(source, range(2))["prompt"].tolist() == ["köttbullar 肉"] * 2


@pytest.mark.parametrize("rows", [[], [-1], [0, 8]])
def test_rows_that_a_batch_does_not_have_are_refused(rows):
    with pytest.raises(ValueError, match="must be some of the 8 of a batch"):
        pipeline.make_loader(make_source(8), batch_size=8, seed=0, rows=rows)


def test_an_empty_source_is_refused():
    with pytest.raises(UserError, match="the source has no records"):
        pipeline.make_loader([], batch_size=1, seed=0)


def test_a_record_without_a_key_is_refused():
    source = make_source(3)
    del source[1]["text"]
    with pytest.raises(UserError, match=r"record 1 lacks 'text', it has \['latent', 'prompt'\]"):
        pipeline.read(source, range(3))


@pytest.mark.parametrize("key", ["latent", "text"])
def test_a_record_of_another_shape_is_refused(key):
    source = make_source(3)
    source[2][key] = source[2][key][:1]
    with pytest.raises(UserError, match=rf"'{key}' of record 2 has shape \(1, .*\), of the first \("):
        pipeline.read(source, range(3))


class Unreadable(list):
    """Records of which number 4 lies on a bad sector."""

    def __getitem__(self, index):
        if index == 4:
            raise OSError("bad sector")
        return super().__getitem__(index)


@pytest.fixture
def no_type_checks():
    """Type checks look into containers."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_bad_record_is_left_out_by_name_and_moves_no_other(in_memory):
    source = Unreadable(make_source(8))
    del source[1]["text"]
    source[2]["latent"] = source[2]["latent"][:1]
    source[3]["text"] = source[3]["text"].astype(np.float64)
    source[5]["prompt"] = b"caf\xe9"
    source[6]["prompt"] = 6
    faults = {1: "missing_key", 2: "shape", 3: "dtype", 4: "unreadable", 5: "text", 6: "dtype"}

    source = pipeline.InMemory(source) if in_memory else source
    batch = next(pipeline.make_loader(source, batch_size=16, seed=0))

    order = np.concatenate(take(pipeline.make_loader(make_source(8), batch_size=16, seed=0), 1))
    for row, number in enumerate(order):
        fault = batch["fault"][row]
        assert (FAULTS[fault - 1] if fault else None) == faults.get(number)
        assert (f"record {number}" in batch["reason"][row]) == bool(fault)
        assert batch["prompt"][row] == ("" if fault else f"record {number}")
        for key in ("latent", "text"):
            np.testing.assert_array_equal(batch[key][row], 0 if fault else number)


def test_a_source_without_a_sound_record_is_refused():
    source = make_source(3)
    for record in source:
        del record["latent"]
    with pytest.raises(UserError, match="record 0 lacks 'latent'"):
        pipeline.make_loader(source, batch_size=1, seed=0)


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    return digits.build(tmp_path_factory.mktemp("data"), limit=2).data_path


def test_digits_are_built_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "build", functools.partial(digits.build, limit=1))
    source = pipeline.open_source("digits", tmp_path, "validation")
    batch = next(pipeline.make_loader(source, batch_size=4, seed=0))
    assert {key: value.shape for key, value in batch.items()} == {
        "latent": (4, 8, 16, 16, 1),
        "text": (4, 8, 32),
        "prompt": (4,),
        "fault": (4,),
        "reason": (4,),
    }
    assert set(batch["prompt"]) <= set(digits.captions())


def test_a_folder_of_records_is_opened_by_its_path(digits_folder):
    for name, data_dir in ((digits_folder, "elsewhere"), ("1.0.0", digits_folder.parent)):
        source = pipeline.open_source(name, data_dir, "train")
        assert len(source) == 64
    whole = pipeline.read(source, range(64))
    part = pipeline.open_source(digits_folder, ".", "train[16:32]")
    np.testing.assert_array_equal(pipeline.read(part, range(16))["latent"], whole["latent"][16:32])


def test_loading_stored_records_gives_what_was_stored(digits_folder):
    source = pipeline.open_source(digits_folder, ".", "train")
    in_order = pipeline.read(source, range(64))
    loaded = next(pipeline.make_loader(source, batch_size=64, seed=0))
    order = np.lexsort(loaded["latent"].reshape(64, -1).T)
    expected = np.lexsort(in_order["latent"].reshape(64, -1).T)
    for key in ("latent", "text"):
        np.testing.assert_array_equal(loaded[key][order], in_order[key][expected])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing' holds no dataset_info\.json: set data.name to 'digits' or a TFDS"):
        pipeline.open_source("nothing", tmp_path, "train")


@pytest.mark.parametrize(
    ("file", "keep", "cause"),
    [
        ("dataset_info.json", 0.5, "ParseError"),
        ("features.json", 0.5, "JSONDecodeError"),
        ("features.json", None, "ValueError"),
    ],
)
def test_a_damaged_folder_is_named(file, keep, cause, digits_folder, tmp_path):
    folder = tmp_path / "1.0.0"
    shutil.copytree(digits_folder, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if keep is not None:
        (folder / file).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=rf"{folder}' cannot be read as a TFDS data set \({cause}.*\): copy it again$"):
        pipeline.open_source(folder, ".", "train")


def test_a_missing_split_is_named(digits_folder):
    with pytest.raises(UserError, match=r"split='test' is not in .*: choose from \['train', 'validation'\]"):
        pipeline.open_source(digits_folder, ".", "test")


class Other(tfds.core.GeneratorBasedBuilder):
    """A data set of features given as a class attribute."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    features = None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {name: np.zeros(feature.shape, np.float32) for name, feature in self.features.items()}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"video": (2, 4, 4, 3), "text": (8, 32)}, r"lack 'latent', they have \['text', 'video'\]"),
        (
            {"latent": (4, 4, 3), "text": (8, 32)},
            r"'latent' in the records of .* has shape \(4, 4, 3\): it must have 4",
        ),
    ],
)
def test_a_data_set_of_other_features_is_refused_when_opened(tmp_path, monkeypatch, shapes, message):
    features = {
        name: tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="bytes") for name, shape in shapes.items()
    }
    monkeypatch.setattr(Other, "features", features)
    builder = Other(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(UserError, match=message):
        pipeline.open_source(builder.data_path, ".", "train")
