import io
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from mnist_cnn.model import DigitCNN


@pytest.fixture(scope="module")
def model() -> DigitCNN:
    torch.manual_seed(0)
    network = DigitCNN()
    network.calibrate(_images(256))
    return network


def _images(count: int) -> torch.Tensor:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return torch.from_numpy(pixels)


def test_uint8_images_become_float32_logits(model: DigitCNN) -> None:
    logits = model(_images(3))
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32


def test_an_image_is_classified_the_same_alone_and_among_a_thousand(model: DigitCNN) -> None:
    images = _images(1000)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image) for image in torch.split(images[:20], 1)])
    torch.testing.assert_close(alone, together[:20], atol=1e-4, rtol=1e-4)


def test_an_export_takes_any_number_of_images(model: DigitCNN) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (_images(2),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for count in (1, 7, 300):
        images = _images(count)
        torch.testing.assert_close(exported(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_folded_model_says_what_the_model_says(model: DigitCNN, sign: int) -> None:
    twin = deepcopy(model)
    norms = [layer for layer in twin.features if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5).mul_(sign)
            norm.bias.uniform_(-0.5, 0.5)
    folded = twin.folded()
    kept = [layer for layer in folded.features if isinstance(layer, nn.BatchNorm2d)]
    assert len(kept) == (0 if sign > 0 else 1)  # the one after max-pooling
    images = _images(64)
    torch.testing.assert_close(folded(images), twin(images), atol=1e-4, rtol=1e-4)


def test_statistics_of_groups_do_not_depend_on_how_many_arrive_together() -> None:
    torch.manual_seed(0)
    network = DigitCNN().train()
    network.group_statistics(32)
    images = _images(96)
    together = network(images)
    apart = torch.cat([network(part) for part in torch.split(images, 32)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    network.group_statistics(96)
    assert not torch.allclose(network(images), together, atol=1e-2)


def test_calibration_makes_eval_equal_to_training_on_the_same_images() -> None:
    torch.manual_seed(0)
    network = DigitCNN()
    images = _images(512)
    network.calibrate(images)
    in_eval = network(images)
    assert not network.training
    in_training = network.train()(images)
    torch.testing.assert_close(in_eval, in_training, atol=2e-2, rtol=2e-2)


def test_training_leaves_the_running_statistics_alone(model: DigitCNN) -> None:
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()(_images(64))
    model.eval()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
