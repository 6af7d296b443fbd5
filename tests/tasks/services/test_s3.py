import pytest

from deployments.stack import Stack
from mnist_cnn.digits import Digits
from mnist_cnn.sample import embedded_sample
from tasks.datasets.snapshots import read_split, write_snapshot
from tasks.services.s3 import StorageRefused, StorageUnreachable, Store


@pytest.fixture(scope="module")
def sample() -> tuple[Digits, Digits]:
    return embedded_sample()


def test_what_is_put_can_be_read_and_listed(store: Store) -> None:
    address = store.put("a/b.json", b"{}")
    assert store.get(store.name_of(address)) == b"{}"
    assert store.names("a/") == ["a/b.json"]
    assert store.has("a/b.json")
    assert not store.has("a/c.json")


def test_an_absent_object_is_named(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match=r"a/c\.json holds nothing"):
        store.get("a/c.json")


def test_the_check_leaves_nothing_behind(store: Store) -> None:
    store.check()
    assert store.names("") == []


@pytest.mark.parametrize("address", ["mnist-retraining", "s3://", "https://bucket"])
def test_an_address_that_is_no_store_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="expected s3://BUCKET"):
        Store(address)


def test_a_missing_bucket_is_named(stack: Stack) -> None:
    with pytest.raises(StorageRefused, match="bucket 'elsewhere' does not exist; create it"):
        Store("s3://elsewhere").put("a", b"")


def test_wrong_credentials_are_told_from_a_missing_object(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageRefused, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store("s3://mnist-retraining").has("a")


def test_absent_credentials_are_said_to_be_absent(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageRefused, match="no complete S3 credentials were found"):
        Store("s3://mnist-retraining").put("a", b"")


def test_a_server_that_does_not_answer_is_named(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(StorageUnreachable, match=r"127\.0\.0\.1:1.*`make up` starts the local one"):
        Store("s3://mnist-retraining").put("a", b"")


def test_a_snapshot_is_read_back_as_it_was_written(
    store: Store, sample: tuple[Digits, Digits]
) -> None:
    snapshot = write_snapshot(store, "digits", *sample, "a test")
    train, test = sample
    assert read_split(snapshot, "train").digest() == train.digest()
    assert read_split(snapshot, "test").digest() == test.digest()
    assert snapshot.model_name == "digits-cnn"
    assert snapshot.images("train") == 1438


def test_the_same_data_has_the_same_digest_and_is_not_sent_again(
    store: Store, sample: tuple[Digits, Digits], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_snapshot(store, "digits", *sample, "a test")
    monkeypatch.setattr(Store, "put", lambda *_: pytest.fail("something was uploaded"))
    assert write_snapshot(store, "digits", *sample, "a test") == first


def test_the_manifest_is_written_last(
    store: Store, sample: tuple[Digits, Digits], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, names = Store.put, list[str]()

    def note(store: Store, name: str, content: bytes) -> str:
        names.append(name)
        return put(store, name, content)

    monkeypatch.setattr(Store, "put", note)
    snapshot = write_snapshot(store, "digits", *sample, "a test")
    folders = [name.split("/")[2] for name in names]
    assert folders == ["shards"] * 4 + ["snapshots"] * 2
    assert names[-1] == f"datasets/digits/snapshots/{snapshot.digest}.json"


def test_a_shard_that_was_changed_is_not_read(store: Store, sample: tuple[Digits, Digits]) -> None:
    train, test = sample
    snapshot = write_snapshot(store, "digits", train, test, "a test")
    name = "datasets/digits/shards/{}.parquet"
    another = store.get(name.format(snapshot.train[0].digest))
    store.put(name.format(snapshot.test[0].digest), another)
    with pytest.raises(ValueError, match="was changed after it was accepted"):
        read_split(snapshot, "test")
