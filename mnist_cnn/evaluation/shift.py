"""Distance of a test split from its training split."""

import numpy as np

from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.evaluation.figures import Shift, StyleShift
from mnist_cnn.styles import STYLES, Floats, measure_styles


def measure_shift(training: Digits, test: Digits) -> Shift:
    """Measure the distance of `test` from `training`, in labels and in styles.

    Raises ValueError if either has no image, or only blank ones.
    """
    for name, split in (("training", training), ("test", test)):
        if not len(split):
            raise ValueError(f"the {name} split has no images; expected some to compare")
    counts = [np.bincount(split.labels, minlength=CLASSES) for split in (training, test)]
    shares = [count / count.sum() for count in counts]
    before = measure_styles(training.images)
    after = measure_styles(test.images)
    return Shift(
        training_labels=counts[0].tolist(),
        test_labels=counts[1].tolist(),
        label_distance=float(np.abs(shares[0] - shares[1]).sum() / 2),
        styles=[
            _style_shift(style, _known(before[style]), _known(after[style])) for style in STYLES
        ],
    )


def _known(values: Floats) -> Floats:
    # A blank image has no slant, stroke width or aspect: NaN.
    return values[np.isfinite(values)]


def _style_shift(style: str, before: Floats, after: Floats) -> StyleShift:
    from scipy.stats import ks_2samp

    if not len(before) or not len(after):
        raise ValueError(f"no image has a {style}: every image of a split is blank")
    spread = before.std()
    return StyleShift(
        style=style,
        unit=STYLES[style],
        training_mean=float(before.mean()),
        test_mean=float(after.mean()),
        difference=float((after.mean() - before.mean()) / spread) if spread else 0.0,
        # The p-value is not used; "asymp" is the cheapest that comes with the statistic.
        distance=float(ks_2samp(before, after, method="asymp").statistic),
    )
