"""The embedded sample: scikit-learn's handwritten digits, which need no network."""

import numpy as np

from mnist_cnn.digits import SIDE, Digits

_TEST_EVERY = 5


def embedded_sample() -> tuple[Digits, Digits]:
    """Return scikit-learn's 1,797 handwritten digits as a training and a test split.

    The 8 x 8 images of 0 to 16 are scaled to 20 x 20 and centred in 28 x 28, as MNIST's are. Every
    fifth image is in the test split. The data do not name the writers, so this split, unlike
    MNIST's, is not writer-disjoint.

    Source: E. Alpaydin, C. Kaynak, UCI Optical Recognition of Handwritten Digits (1998);
    scikit-learn has its test part, by 13 writers.
    """
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    raw = load_digits()
    # (N, 8, 8) to (N, 20, 20)
    scaled = zoom(raw.images, (1, 20 / 8, 20 / 8), order=1, grid_mode=True, mode="nearest")
    pixels = np.clip(np.rint(scaled * (255 / 16)), 0, 255).astype(np.uint8)
    margin = (SIDE - 20) // 2
    images = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)))  # (N, 28, 28)
    labels = raw.target.astype(np.int64)
    test = np.arange(len(labels)) % _TEST_EVERY == _TEST_EVERY - 1  # (N,)
    return Digits(images[~test], labels[~test]), Digits(images[test], labels[test])
