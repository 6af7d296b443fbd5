"""The device, its number format, a container's CPU quota, and memory kept during training.

The README of `training` has the measurements.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "bf16", "fp32"]

# Parameters of glibc's mallopt (malloc.h), and the value that both have by default.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_DEFAULT_BYTES = 128 * 1024


def choose_device(requested: Device) -> "torch.device":
    """Return the device to train on; `auto` is cuda, else mps, else cpu.

    Raises ValueError if the device requested by name is not available.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested == "auto":
        return torch.device(next(name for name, found in available.items() if found))
    if not available[requested]:
        names = ", ".join(name for name, found in available.items() if found)
        raise ValueError(
            f"device {requested!r} is not on this machine; found {names}: "
            "choose one of these or 'auto'"
        )
    return torch.device(requested)


def choose_precision(requested: Precision, device: "torch.device") -> "torch.dtype":
    """Return the dtype of convolutions; `auto` is bfloat16 where the hardware multiplies it."""
    import torch

    if requested != "auto":
        return torch.bfloat16 if requested == "bf16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public function
    return torch.bfloat16 if fast else torch.float32


def follow_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Limit torch's threads to the CPU quota of the container; return their number.

    Threads beyond the quota are put to sleep while others wait for them at a barrier. torch itself
    follows the affinity of the process, but not the quota.
    """
    import torch

    quota = read_quota(cgroup)
    threads = torch.get_num_threads()
    if quota is not None and quota < threads:
        threads = max(1, int(quota))
        torch.set_num_threads(threads)
    return threads


def read_quota(cgroup: Path) -> float | None:
    """Return the CPU quota of this process's control group, in cores; None without a quota.

    Source: "cpu.max" of control groups version 2, "cpu.cfs_quota_us" of version 1.
    """
    with suppress(FileNotFoundError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(FileNotFoundError):
        folder = cgroup / "cpu"
        microseconds = int((folder / "cpu.cfs_quota_us").read_text())
        period = (folder / "cpu.cfs_period_us").read_text()
        # Without a quota the file holds -1.
        return microseconds / int(period) if microseconds > 0 else None
    return None


def fits(nbytes: int, device: "torch.device") -> bool:
    """Return True if data of this size can stay on the device for the whole training."""
    if device.type != "cuda":
        return True  # cpu and mps share the memory that already holds the data
    import torch

    # Activations need memory as well.
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes < free // 2


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process until the end of the block, so that steps reuse its pages.

    With glibc's defaults every activation above 128 KiB is mapped anew, and the kernel zeroes it
    page by page. Without glibc this does nothing.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    assert libc is not None
    libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_BYTES)
        libc.malloc_trim(0)


@contextmanager
def determinism(device: "torch.device", *, wanted: bool) -> Iterator[None]:
    """Make a GPU's results bitwise repeatable, or fast; restore torch's settings afterwards.

    Those of a CPU are repeatable anyway, for a fixed number of threads.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    # torch refuses deterministic products of matrices on a GPU without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
