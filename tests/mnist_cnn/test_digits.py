import gzip
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from mnist_cnn.digits import Digits
from mnist_cnn.idx import digits_from_idx, parse_idx, write_idx
from mnist_cnn.sample import embedded_sample

IMAGES = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
LABELS = np.array([0, 9, 4], np.uint8)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_idx_pair_is_read_packed_or_not(pack: Callable[[bytes], bytes]) -> None:
    digits = digits_from_idx(pack(write_idx(IMAGES)), pack(write_idx(LABELS)), "train")
    assert (digits.images == IMAGES).all()
    assert digits.labels.tolist() == [0, 9, 4]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(write_idx(IMAGES), mtime=0)[:-20], "truncated gzip"),
        (gzip.compress(write_idx(IMAGES), mtime=0)[:10] + b"\xff" * 40, "corrupt gzip"),
        (b"PNG!" + write_idx(IMAGES), "not an IDX file"),
        (write_idx(IMAGES)[:9], "ends inside its header"),
        (write_idx(IMAGES)[:-1], "promises 2352 values"),
        (write_idx(IMAGES) + b"\0", "promises 2352 values"),
        (b"", "not an IDX file"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        parse_idx(content, "train-images")
    assert "train-images" in str(error.value)


def test_what_follows_a_gzip_is_refused() -> None:
    with pytest.raises(ValueError, match="goes on for 3 bytes after its gzip data has ended"):
        parse_idx(gzip.compress(write_idx(IMAGES)) + b"PK\3", "train-images")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_promises_too_much_is_refused(pack: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match=r"promises 2352 values .* expected at most 1000"):
        parse_idx(pack(write_idx(IMAGES)), "train-images", limit=1000)


def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_promises() -> None:
    bomb = gzip.compress(write_idx(IMAGES) + bytes(64 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"promises 2352 values .* but holds more than 2352"):
        parse_idx(bomb, "train-images")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_only_bytes_are_written_as_idx() -> None:
    with pytest.raises(ValueError, match="the array is int64; expected uint8"):
        write_idx(LABELS.astype(np.int64))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\); expected uint8"):
        digits_from_idx(write_idx(np.zeros((3, 32, 32), np.uint8)), write_idx(LABELS), "train")


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        digits_from_idx(write_idx(IMAGES), write_idx(LABELS[:2]), "train")


def test_a_label_outside_0_to_9_is_refused() -> None:
    with pytest.raises(ValueError, match="1 labels are outside 0-9, the first is 10"):
        Digits(IMAGES, np.array([0, 10, 4], np.int64))


def test_the_embedded_sample_is_digits_of_every_class_in_both_splits() -> None:
    for split, images in zip(embedded_sample(), (1438, 359), strict=True):
        assert len(split) == images
        assert set(split.labels.tolist()) == set(range(10))
        assert split.images.max() == 255


def test_the_digest_tells_images_labels_and_order_apart() -> None:
    digits = Digits(IMAGES, LABELS.astype(np.int64))
    same = Digits(IMAGES.copy(), LABELS.astype(np.int64))
    reordered = Digits(IMAGES[::-1], digits.labels)
    relabelled = Digits(IMAGES, digits.labels[::-1])
    assert digits.digest() == same.digest()
    assert len({digits.digest(), reordered.digest(), relabelled.digest()}) == 3


def test_more_dimensions_than_an_array_may_have_are_refused_by_name() -> None:
    content = bytes([0, 0, 8, 200]) + b"\0\0\0\1" * 200 + b"\5"
    with pytest.raises(ValueError, match="train-images promises 200 dimensions; expected 1 for"):
        parse_idx(content, "train-images")
