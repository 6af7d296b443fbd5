"""How many threads a container's quota allows."""

from pathlib import Path

import pytest
import torch

from mnist_cnn.device import follow_quota, read_quota


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_the_quota_of_either_version_is_read(
    files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert read_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "threads"), [("max", 4), ("800000", 4), ("150000", 1)])
def test_torch_starts_no_more_threads_than_the_quota_feeds(
    quota: str, threads: int, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    torch.set_num_threads(4)
    try:
        assert follow_quota(tmp_path) == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
