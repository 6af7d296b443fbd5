"""One optimizer step, in as many pieces as memory asks for, on one device or several."""

import logging
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from mnist_cnn.device import choose_precision
from mnist_cnn.digits import SIDE
from mnist_cnn.model import DigitCNN
from mnist_cnn.training.optimizer import Optimizer
from mnist_cnn.training.recipe import TrainingConfig

_log = logging.getLogger(__name__)


class Learner:
    """The model, its optimizer, and what the current epoch has seen.

    Raises ValueError for a micro-batch that batch normalisation's groups do not fill.
    """

    def __init__(self, config: TrainingConfig, place: torch.device, share: int, world: int) -> None:
        self._recipe, self._place, self._share, self._world = config.recipe(), place, share, world
        group = self._recipe.norm_group
        if config.micro_batch is not None and config.micro_batch % group:
            raise ValueError(
                f"micro_batch is {config.micro_batch}; expected a multiple of {group}, "
                "the images that share batch normalisation's statistics"
            )
        # A CPU's caches like small pieces, a GPU likes the whole.
        self.micro_batch = min(
            config.micro_batch or (share if place.type == "cuda" else group), share
        )
        self.warnings: list[str] = []
        self.dtype = choose_precision(config.precision, place)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = DigitCNN(self._recipe.channels)
        self.model.to(place)
        self.model.to(memory_format=torch.channels_last).train()
        self.model.group_statistics(group)
        self._net: nn.Module = self.model
        if world > 1:
            self._net = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        cuda = place.type == "cuda"
        self.compiled = config.compile == "always" or (config.compile == "auto" and cuda)
        if self.compiled:
            self._forward = torch.compile(self._net, dynamic=False)
        else:
            self._forward = self._net
        self._optimizer = Optimizer(
            self.model.named_parameters(),
            filter_rate=self._recipe.filter_rate,
            momentum=self._recipe.momentum,
            rate=self._recipe.learning_rate,
            weight_decay=self._recipe.weight_decay,
        )
        self._sums = torch.zeros(2, device=place)  # of the epoch: loss, images that were right

    def step(self, images: Tensor, labels: Tensor, number: int, steps: int) -> Tensor:
        """Take step `number` of `steps`, from 1; halve the micro-batch for as long as memory lacks.

        Returns the loss of each image before the step, float32, of all processes' shares.

        Raises MemoryError when halving would change the mathematics. On a GPU nothing here waits
        for the device.
        """
        losses, right = self._gradients_in_memory(images, labels)
        warm = self._recipe.warmup * steps
        rising = number / warm if warm else 1.0
        self._optimizer.step(number, min(rising, (steps - number + 1) / (steps - warm)))
        self._sums += torch.stack([losses.sum(), right])
        if self._world == 1:
            return losses
        everyones = [torch.empty_like(losses) for _ in range(self._world)]
        distributed.all_gather(everyones, losses)
        return torch.cat(everyones)

    def warm_up(self) -> None:
        """Compile, and let a GPU's libraries choose, over blank images; learns nothing."""
        if not self.compiled and self._place.type != "cuda":
            return
        blank = torch.zeros(self._share, SIDE, SIDE, dtype=torch.uint8, device=self._place)
        zeros = torch.zeros(self._share, dtype=torch.int64, device=self._place)
        self._gradients_in_memory(blank, zeros)[1].item()  # waits for the device
        self._optimizer.zero_grad()

    def _gradients_in_memory(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        while True:
            try:
                return self._gradients(images, labels)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self._halve(error)

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the mean loss; return each loss, and how many were right."""
        self._optimizer.zero_grad()
        losses: list[Tensor] = []
        right: list[Tensor] = []
        for first in range(0, self._share, self.micro_batch):
            part = slice(first, first + self.micro_batch)
            last = first + self.micro_batch >= self._share
            with nullcontext() if last or self._world == 1 else self._net.no_sync():  # type: ignore[operator]  # DDP's
                with torch.autocast(self._place.type, self.dtype, self.dtype != torch.float32):
                    logits = self._forward(images[part].to(self.dtype))
                loss = functional.cross_entropy(
                    logits,
                    labels[part],
                    reduction="none",
                    label_smoothing=self._recipe.label_smoothing,
                )
                (loss.sum() / self._share).backward()
            losses.append(loss.detach())
            right.append((logits.argmax(1) == labels[part]).sum())
        return torch.cat(losses), torch.stack(right).sum()

    def _halve(self, error: RuntimeError) -> None:
        smaller = self.micro_batch // 2
        if self._world > 1 or not smaller or smaller % self._recipe.norm_group:
            raise MemoryError(
                f"{self._place} has no memory for {self.micro_batch} images at a time, and fewer "
                "would change the mathematics; lower training.batch_size"
            ) from error
        sentence = (
            f"{self._place} has no memory for {self.micro_batch} images at a time; going on with "
            f"{smaller}, gradients added up: the result is the same"
        )
        _log.warning("%s", sentence)
        self.warnings.append(sentence)
        self.micro_batch = smaller

    def end_epoch(self) -> tuple[float, float]:
        """Return the sums of the epoch's losses and of its right images, and forget them."""
        if self._world > 1:
            distributed.all_reduce(self._sums)
        loss, right = self._sums.tolist()
        self._sums.zero_()
        return loss, right

    def validate(
        self, sample: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> tuple[float, float]:
        """Return mean cross entropy (nats) and accuracy, statistics being those of `sample`."""
        self.model.calibrate(sample)
        loss, right, images = 0.0, 0, 0
        with torch.inference_mode():
            for part, labels in batches:
                logits = self.model(part)
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
                images += len(labels)
        self.model.train()
        return loss / images, right / images

    def is_finite(self) -> bool:
        """Tell whether the epoch's loss and every weight are finite; waits for the device."""
        tensors = [self._sums, *self.model.parameters()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint must hold; copy into them to restore."""
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer = {f"optimizer.{n}": tensor for n, tensor in self._optimizer.state().items()}
        return {**model, **optimizer, "sums": self._sums}


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory")
    )
