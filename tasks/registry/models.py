"""Load models from MLflow, with unpickling forbidden."""

import os
import tempfile
from typing import TYPE_CHECKING

from tasks.registry.versions import download
from tasks.services.mlflow import RegistryError, RegistryUnreachable, registry_errors

if TYPE_CHECKING:
    from torch import nn


class ModelUnusable(RuntimeError):
    """A model of the registry cannot be loaded or does not classify digits."""


def load_model(address: str) -> "tuple[nn.Module, int]":
    """Load a model from MLflow with unpickling forbidden; return it and its file's size in bytes.

    The module maps uint8 (N, 28, 28) to float32 logits (N, 10). Raises ModelUnusable for a model
    that is gone or damaged, RegistryUnreachable if MLflow cannot deliver it now.
    """
    import mlflow.pytorch
    import torch
    from mlflow.exceptions import MlflowException

    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with registry_errors(f"the files of {address}"):
                path = download(address, folder)
            network: nn.Module = mlflow.pytorch.load_model(str(path))
        except RegistryUnreachable:  # a RegistryError too, but no fault of the model
            raise
        except (RegistryError, MlflowException, OSError, RuntimeError) as error:
            raise ModelUnusable(
                f"{address} does not load ({error}); its artifact is gone or damaged: roll back to "
                "a version that loads, or retrain"
            ) from error
        # The stored graph works channel by channel; with weights in this order it is twice as fast.
        network.to(memory_format=torch.channels_last)
        return network, (path / "data" / "model.pt2").stat().st_size
