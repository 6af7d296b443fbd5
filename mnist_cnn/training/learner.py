"""One optimizer step, in micro-batches that fit in memory, on one device or several."""

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
    """The model, its optimizer, and the running sums of the current epoch.

    `share` is the number of a batch's images for this process, `world` the number of processes.
    Raises ValueError for a micro-batch that is not a multiple of batch normalisation's group.
    """

    def __init__(
        self, config: TrainingConfig, device: torch.device, share: int, world: int
    ) -> None:
        self._recipe = config.recipe()
        self._device = device
        self._share = share
        self._world = world
        group = self._recipe.norm_group
        if config.micro_batch is not None and config.micro_batch % group:
            raise ValueError(
                f"micro_batch is {config.micro_batch}; expected a multiple of {group}, "
                "the images that share batch normalisation's statistics"
            )
        # Small micro-batches stay in a CPU's caches; a GPU is faster with the whole batch.
        cuda = device.type == "cuda"
        self.micro_batch = min(config.micro_batch or (share if cuda else group), share)
        self.warnings: list[str] = []
        self.dtype = choose_precision(config.precision, device)
        # The weights come from the seed; the caller's random state stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = DigitCNN(self._recipe.channels)
        self.model.to(device)
        self.model.to(memory_format=torch.channels_last).train()
        self.model.group_statistics(group)
        self._net: nn.Module = self.model
        if world > 1:
            self._net = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
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
        self._sums = torch.zeros(2, device=device)  # of the epoch: loss, correct images

    def step(self, images: Tensor, labels: Tensor, number: int, steps: int) -> Tensor:
        """Take step `number` of `steps`, from 1, on images uint8 (share, 28, 28).

        Returns the loss of each image of the whole batch before the step, float32 (N,). On a GPU
        nothing here waits for the device.

        Halves the micro-batch while memory runs out; raises MemoryError when halving would change
        the mathematics.
        """
        losses, right = self._gradients_in_memory(images, labels)  # (share,), ()
        # The learning rate schedule: one line up to the peak during warm-up, one down to zero after
        # it. They cross where warm-up ends, so the lower of the two is the schedule.
        warm = self._recipe.warmup * steps
        rising = number / warm if warm else 1.0
        falling = (steps - number + 1) / (steps - warm)
        self._optimizer.step(number, min(rising, falling))
        self._sums += torch.stack([losses.sum(), right])
        if self._world == 1:
            return losses
        gathered = [torch.empty_like(losses) for _ in range(self._world)]  # (share,) each
        distributed.all_gather(gathered, losses)
        return torch.cat(gathered)  # (N,)

    def warm_up(self) -> None:
        """Compile the network and tune a GPU's kernels on blank images; the weights stay."""
        if not self.compiled and self._device.type != "cuda":
            return
        blank = torch.zeros(self._share, SIDE, SIDE, dtype=torch.uint8, device=self._device)
        zeros = torch.zeros(self._share, dtype=torch.int64, device=self._device)
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
        """Accumulate the gradients of the mean loss; return losses (share,), correct images ()."""
        self._optimizer.zero_grad()
        losses: list[Tensor] = []
        right: list[Tensor] = []
        for first in range(0, self._share, self.micro_batch):
            part = slice(first, first + self.micro_batch)
            last = first + self.micro_batch >= self._share
            # Processes exchange gradients once a step: in the last micro-batch's backward pass.
            with nullcontext() if last or self._world == 1 else self._net.no_sync():  # type: ignore[operator]  # DDP's
                with torch.autocast(self._device.type, self.dtype, self.dtype != torch.float32):
                    logits = self._forward(images[part].to(self.dtype))  # (micro_batch, 10)
                loss = functional.cross_entropy(
                    logits,
                    labels[part],
                    reduction="none",
                    label_smoothing=self._recipe.label_smoothing,
                )
                # Divided by the share: the gradients of all micro-batches sum to those of the mean.
                (loss.sum() / self._share).backward()
            losses.append(loss.detach())
            right.append((logits.argmax(1) == labels[part]).sum())
        return torch.cat(losses), torch.stack(right).sum()

    def _halve(self, error: RuntimeError) -> None:
        smaller = self.micro_batch // 2
        if self._world > 1 or not smaller or smaller % self._recipe.norm_group:
            raise MemoryError(
                f"{self._device} has no memory for {self.micro_batch} images at a time, and fewer "
                "would change the mathematics; lower training.batch_size"
            ) from error
        sentence = (
            f"{self._device} has no memory for {self.micro_batch} images at a time; going on with "
            f"{smaller}, gradients added up: the result is the same"
        )
        _log.warning("%s", sentence)
        self.warnings.append(sentence)
        self.micro_batch = smaller

    def end_epoch(self) -> tuple[float, float]:
        """Return the epoch's sum of losses and its number of correct images, and reset both."""
        if self._world > 1:
            distributed.all_reduce(self._sums)
        loss, right = self._sums.tolist()
        self._sums.zero_()
        return loss, right

    def validate(
        self, sample: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> tuple[float, float]:
        """Return mean cross entropy (nats) and accuracy on the validation split.

        `sample`, uint8 (N, 28, 28), gives batch normalisation its statistics; `batches` yields
        images and labels.
        """
        self.model.calibrate(sample)
        loss = 0.0
        right = 0
        images = 0
        with torch.inference_mode():
            for part, labels in batches:
                logits = self.model(part)  # (n, 10)
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
                images += len(labels)
        self.model.train()
        return loss / images, right / images

    def is_finite(self) -> bool:
        """Return True if the epoch's loss and every weight are finite; waits for the device."""
        # One number for all tensors, so a GPU is waited for once.
        tensors = [self._sums, *self.model.parameters()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors of a checkpoint; copy into them to restore it."""
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer = {f"optimizer.{n}": tensor for n, tensor in self._optimizer.state().items()}
        return {**model, **optimizer, "sums": self._sums}


def _out_of_memory(error: RuntimeError) -> bool:
    # On other devices than cuda it is a plain RuntimeError, which only its text distinguishes.
    return isinstance(error, torch.OutOfMemoryError) or any(
        phrase in str(error) for phrase in ("out of memory", "can't allocate memory")
    )
