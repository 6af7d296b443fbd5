import gzip
import struct
from collections.abc import Callable

import numpy as np
import pytest

from mnist_cnn.digits import Digits, digits_from_idx, embedded_sample, parse_idx


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


IMAGES = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
LABELS = np.array([0, 9, 4], np.uint8)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_idx_pair_is_read_packed_or_not(pack: Callable[[bytes], bytes]) -> None:
    digits = digits_from_idx(pack(idx(IMAGES)), pack(idx(LABELS)), "train")
    assert (digits.images == IMAGES).all()
    assert digits.labels.tolist() == [0, 9, 4]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(idx(IMAGES))[:-20], "truncated gzip"),
        (gzip.compress(idx(IMAGES))[:10] + b"\xff" * 40, "corrupt gzip"),
        (b"PNG!" + idx(IMAGES), "not an IDX file"),
        (idx(IMAGES)[:9], "ends inside its header"),
        (idx(IMAGES)[:-1], "promises 2352 values"),
        (idx(IMAGES) + b"\0", "promises 2352 values"),
        (b"", "not an IDX file"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        parse_idx(content, "train-images")
    assert "train-images" in str(error.value)


def test_a_gzip_bomb_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_cnn.digits._MAX_IDX_BYTES", 1000)
    with pytest.raises(ValueError, match="unpacks to more than 1000 bytes"):
        parse_idx(gzip.compress(bytes(100_000)), "train-images")


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\); expected uint8"):
        digits_from_idx(idx(np.zeros((3, 32, 32), np.uint8)), idx(LABELS), "train")


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        digits_from_idx(idx(IMAGES), idx(LABELS[:2]), "train")


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
