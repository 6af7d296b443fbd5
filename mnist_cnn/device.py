"""What the machine offers: the device, the number format, and memory that is kept, not returned."""

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

# glibc's mallopt parameters (malloc.h), and the values that it starts with.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _DEFAULT_BYTES = -1, -3, 128 * 1024


def choose_device(requested: Device) -> "torch.device":
    """Return the device to train on; `auto` takes cuda, else mps, else cpu.

    Raises ValueError if a device that was asked for by name is not there.
    """
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested == "auto":
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[requested]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise ValueError(
            f"device {requested!r} is not on this machine; found {found}: "
            "choose one of these or 'auto'"
        )
    return torch.device(requested)


def choose_precision(requested: Precision, place: "torch.device") -> "torch.dtype":
    """Return the dtype of convolutions; `auto` takes bfloat16 where the hardware multiplies it."""
    import torch

    if requested != "auto":
        return torch.bfloat16 if requested == "bf16" else torch.float32
    if place.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = place.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public question
    return torch.bfloat16 if fast else torch.float32


def follow_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Let torch start no more threads than a container's CPU quota feeds; return their number.

    Threads beyond it are put to sleep while others wait for them at a barrier, which made training
    up to forty times slower. torch follows the affinity of the process by itself.
    """
    import torch

    quota = read_quota(cgroup)
    threads = torch.get_num_threads()
    if quota is not None and quota < threads:
        threads = max(1, int(quota))
        torch.set_num_threads(threads)
    return threads


def read_quota(cgroup: Path) -> float | None:
    """Return how many cores the control group of this process may use; None without a quota.

    Source: "cpu.max" of control groups version 2, "cpu.cfs_quota_us" of version 1.
    """
    with suppress(FileNotFoundError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(FileNotFoundError):
        folder = cgroup / "cpu"
        microseconds = int((folder / "cpu.cfs_quota_us").read_text())
        period = (folder / "cpu.cfs_period_us").read_text()
        return microseconds / int(period) if microseconds > 0 else None
    return None


def fits(nbytes: int, place: "torch.device") -> bool:
    """Tell whether data of this size may stay on the device for the whole training."""
    if place.type != "cuda":
        return True  # cpu and mps share the memory that the data already are in
    import torch

    free, _ = torch.cuda.mem_get_info(place)
    return nbytes < free // 2


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process, so that each step finds its pages mapped.

    With glibc's defaults every activation above 128 KiB is mapped anew and zeroed page by page by
    the kernel; that made training 1.2 to 20 times slower on a virtual machine, the larger the batch
    the worse. Elsewhere than on Linux with glibc this does nothing. The memory is returned at the
    end.
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
def determinism(wanted: bool, place: "torch.device") -> Iterator[None]:  # noqa: FBT001 - a switch of the config
    """Make one GPU repeat itself bitwise; a CPU does so anyway for a fixed number of threads."""
    import torch

    if place.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
