import numpy as np
import onnxruntime
import pytest
import torch

from mnist_cnn.model import DigitCNN
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import onnx_graph


@pytest.fixture(scope="module")
def model() -> DigitCNN:
    torch.manual_seed(0)
    network = DigitCNN()
    network.calibrate(torch.tensor(embedded_sample()[0].images[:256]))
    return network


@pytest.mark.parametrize("sign", [1, -1])
def test_onnxruntime_says_what_the_model_says(model: DigitCNN, sign: int) -> None:
    with torch.no_grad():
        for norm in model._norms():
            norm.weight.copy_(sign * norm.weight.abs())
    session = onnxruntime.InferenceSession(onnx_graph.to_onnx(model))
    for count in (1, 100):
        images = embedded_sample()[1].images[:count]
        with torch.inference_mode():
            expected = model(torch.tensor(images)).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=1e-4)


def test_a_file_that_is_another_model_is_refused(model: DigitCNN) -> None:
    content = onnx_graph.to_onnx(model)
    with pytest.raises(ValueError, match="the exported file is not this model"):
        onnx_graph._verify(content, DigitCNN().eval())
