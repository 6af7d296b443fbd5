"""Export of the CNN to ONNX: onnxruntime needs a fraction of torch's time for one image."""

from typing import Any

import numpy as np
import torch
from torch import nn

from mnist_cnn.digits import CLASSES, SIDE
from mnist_cnn.model import DigitCNN

_OPSET = 17
_TOLERANCE = 1e-3


def to_onnx(model: DigitCNN) -> bytes:
    """Return an ONNX file that maps `images`, uint8 (N, 28, 28), to `logits`, float32 (N, 10).

    Raises ValueError if onnxruntime's logits differ from the model's.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    weights = [numpy_helper.from_array(np.array([1]), "axis")]

    def add(kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def tensors(layer: nn.Module) -> list[str]:
        # The order of a layer's state is the order of ONNX's inputs; only `num_batches_tracked` of
        # batch normalisation has no counterpart.
        names = [f"{len(nodes)}.{name}" for name in layer.state_dict() if "num_" not in name]
        for name in names:
            values = layer.state_dict()[name.partition(".")[2]].cpu().numpy()
            weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return names

    folded = model.folded()
    last = add("Cast", add("Unsqueeze", "images", "axis"), to=TensorProto.FLOAT)  # (N, 1, 28, 28)
    for layer in folded.features:
        if isinstance(layer, nn.Conv2d):
            last = add("Conv", last, *tensors(layer), strides=list(layer.stride))
        elif isinstance(layer, nn.BatchNorm2d):
            last = add("BatchNormalization", last, *tensors(layer), epsilon=layer.eps)
        elif isinstance(layer, nn.MaxPool2d):
            last = add("MaxPool", last, kernel_shape=[2, 2], strides=[2, 2])
        else:
            last = add("Relu", last)
    add("Gemm", add("Flatten", last), *tensors(folded.classify), output="logits", transB=1)
    before = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SIDE, SIDE])
    after = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
    graph = helper.make_graph(nodes, "DigitCNN", [before], [after], weights)
    opset = [helper.make_opsetid("", _OPSET)]
    content: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    onnx.checker.check_model(content)
    _verify(content, model)
    return content


def _verify(content: bytes, model: DigitCNN) -> None:
    import onnxruntime

    images = np.random.default_rng(0).integers(0, 256, (64, SIDE, SIDE), dtype=np.uint8)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    # An operator that means something else in ONNX shows here, not in production.
    off = float(np.abs(session.run(None, {"images": images})[0] - expected).max())
    if not off < _TOLERANCE:
        raise ValueError(
            f"onnxruntime's logits are {off:.2g} away from torch's; expected less than "
            f"{_TOLERANCE}: the exported file is not this model"
        )
