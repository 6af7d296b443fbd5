"""Each piece of the benchmark runs on the embedded sample; nothing is held against the clock."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mnist_cnn.model import DigitCNN
from mnist_cnn.sample import embedded_sample
from tests.benchmarks import baselines, measure, training

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _sample_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, because two that wait for each other crawl on a busy machine."""
    monkeypatch.setenv("MNIST_MIRROR", "sample")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", baselines.RECIPES)
def test_a_peer_has_the_published_number_of_parameters(name: str) -> None:
    recipe = baselines.RECIPES[name]
    assert sum(p.numel() for p in recipe.network().parameters()) == recipe.parameters


@pytest.mark.parametrize("name", baselines.RECIPES)
def test_a_peer_sees_the_digits_as_they_are(name: str) -> None:
    digits, recipe = embedded_sample()[1], baselines.RECIPES[name]
    image, label = recipe.dataset(digits)[7]
    pixels = torch.from_numpy(digits.images[7]) / 255
    assert label == digits.labels[7]
    torch.testing.assert_close(image[0] * recipe.deviation + recipe.mean, pixels)


@pytest.mark.parametrize("name", baselines.RECIPES)
def test_a_peer_learns(name: str) -> None:
    result = measure.measure_peer(name, seed=0, device="cpu", epochs=1)
    assert result["accuracy"] > 0.5
    assert result["epochs"] == 1


def test_the_seed_recipe_merges_and_splits_afresh_and_the_example_does_not() -> None:
    train, test = embedded_sample()
    parts = baselines.RECIPES["original"].split(train, test, 0)
    everything = len(train) + len(test)
    assert [round(len(part) / everything, 2) for part in parts] == [0.7, 0.15, 0.15]
    merged = sorted(image.tobytes() for part in parts for image in part.images)
    assert merged == sorted(image.tobytes() for half in (train, test) for image in half.images)
    assert baselines.RECIPES["pytorch-example"].split(train, test, 0) == (train, test, test)


def test_our_flops_are_those_of_the_convolutions() -> None:
    model = DigitCNN((16, 32, 64, 64))
    inside = 12 * 12 * 16 * 25 + 10 * 10 * 32 * 16 * 9 + 3 * 3 * 64 * 32 * 9
    inside += 64 * 64 * 9 + 64 * 10
    assert measure.flop_per_image(model, 8) == 6 * inside - 2 * 12 * 12 * 16 * 25


def test_the_mapped_copies_are_those_in_memory(tmp_path: Path) -> None:
    digits = embedded_sample()[1]
    copies = [measure._enlarge(digits, 3, folder) for folder in (None, tmp_path)]
    assert copies[0].digest() == copies[1].digest()
    assert (copies[0].images[: len(digits)] == digits.images).all()
    assert len(copies[0]) == 3 * len(digits)


def test_the_peak_memory_is_seen() -> None:
    with measure.PeakMemory() as peak:
        before = peak.private
        held = torch.ones(64, 2**18)
        time.sleep(0.1)
    assert peak.private > before + 32
    assert held.any()


def test_a_ratio_is_to_the_peers_around() -> None:
    peer = {"published_epochs": 5, "epochs": 5}
    runs: list[training.Job] = [
        {"name": "original", "result": {"seconds": 10.0, **peer}},
        {"preset": "quick", "result": {"seconds": 3.0, "epochs": 1}},
        {"name": "original", "result": {"seconds": 4.0, **peer, "epochs": 1}},
        {"preset": "quick", "result": {"seconds": 3.0, "epochs": 1}},
    ]
    training.add_ratios(runs)
    assert [job["result"].get("ratio") for job in runs] == [None, 0.2, None, 0.15]


def test_one_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, training.__file__, "--seeds=1", "--only=quick", "--threads=1"]
    command.append(f"--json={file}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    report = json.loads(file.read_text())
    assert report["training"]["quick"]["accuracy"]["n"] == 1
    assert 0 < report["training"]["quick"]["gemm_share"]["mean"] < 1
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "test accuracy %" in done.stdout


def test_the_table_of_presets_replaces_the_one_in_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    before = training.README.read_text()
    readme.write_text(before)
    result = {"seconds": 2.0, "cpu_seconds": 4.0, "accuracy": 0.99, "epochs": 2.0}
    runs: list[training.Job] = [{"preset": "standard", "result": dict(result)} for _ in range(2)]
    table = training.preset_table(training.summarise(runs), {"cores": 2, "cpu": "a CPU"})
    training.write_table(table, readme)
    training.write_table(table, readme)
    after = readme.read_text()
    assert "| `standard` | 2 | 99.00 ±0.00 | 2.0 ±0.0 | - |\n\n2 cores of a CPU.\n" in after
    assert after.partition(training.BEGIN)[0] == before.partition(training.BEGIN)[0]
    assert after.partition(training.END)[2] == before.partition(training.END)[2]


def test_an_address_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNIST_MIRROR")
    command = [sys.executable, training.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "MNIST_MIRROR is not set" in done.stderr


def test_what_compares_within_itself_runs() -> None:
    assert len(measure.measure_checkpointing("quick", "cpu", pairs=1)["ratio"]) == 1
    memory = measure.measure_memory("quick", "cpu", 2, streamed=True)
    assert memory["images"] == 2 * 1438
    assert sum(measure.measure_profile("quick", "cpu")["share"].values()) <= 1


@pytest.mark.filterwarnings("ignore::Warning")
def test_every_way_to_predict_agrees() -> None:
    """Warnings are mlflow's and torch.export's own; what is measured is the answer."""
    result = measure.measure_inference("quick", "cpu", 1, compiled=False)
    assert all(share > 0.97 for share in result["agreement"].values())
    assert set(result["batched_seconds"]) == set(result["single_us"])
    assert {"eager fp32", "stored program", "onnxruntime"} < set(result["single_us"])
