from tests.mnist_cnn.conftest import outcomes, reader, splits  # noqa: F401 - fixtures
