"""Measure training, inference, memory and checkpoints beside two peers' recipes, in one run.

    MNIST_MIRROR=file:///folder/with/the/four/archives python tests/benchmarks/training.py

`--write` puts the table of presets into `mnist_cnn/training/README.md`.

Each measurement runs in a process of its own. The original recipe runs before, between and
after ours, and every ratio is to its two runs nearest in time, because machines drift. The test
split is used once a run, after training. Nothing here passes or fails.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "mnist_cnn/training/README.md"
BEGIN = "<!-- presets: tests/benchmarks/training.py --write -->"
END = "<!-- end of presets -->"
PRESETS = {"quick": 1.0, "standard": 1.0, "best": 0.5}
"""Each preset's share of `--seeds`."""
ONLY = ["peers", *PRESETS, "profile", "inference", "checkpointing", "memory"]
PACKAGES = ["torch", "torchvision", "numpy", "mlflow", "pillow"]

Job = dict[str, Any]


def training_jobs(chosen: list[str], seeds: int, rounds: int, epochs: int | None) -> list[Job]:
    """Return the trainings in the order in which they run: peer, ours, peer, ours, …, peer."""
    ours = [
        {"job": "ours", "preset": preset, "seed": seed}
        for seed in range(seeds)
        for preset, share in PRESETS.items()
        if preset in chosen and seed < max(1, round(share * seeds))
    ]
    if "peers" not in chosen:
        return ours
    jobs: list[Job] = []
    for turn in range(rounds + 1):
        jobs.append({"job": "peer", "name": "original", "seed": turn, "epochs": epochs})
        if turn < rounds:
            jobs += ours[turn * len(ours) // rounds : (turn + 1) * len(ours) // rounds]
    jobs.append({"job": "peer", "name": "pytorch-example", "seed": 0, "epochs": 1})
    return jobs


def other_jobs(chosen: list[str]) -> list[Job]:
    """Return the jobs that compare things within themselves."""
    jobs: list[Job] = [
        {"job": "profile", "preset": "standard"},
        {"job": "inference", "preset": "standard", "rounds": 7, "compiled": True},
        {"job": "checkpointing", "preset": "standard", "pairs": 5},
        *(
            {"job": "memory", "preset": "standard", "times": times, "streamed": streamed}
            for times, streamed in ((1, False), (10, False), (1, True), (10, True))
        ),
    ]
    return [job for job in jobs if job["job"] in chosen]


def run(job: Job, device: str, threads: int | None) -> Job:
    """Run one job in a process of its own and return it with its result."""
    about = {**job, "device": device, "threads": threads, "spawned": time.time()}
    command = [sys.executable, "-m", "tests.benchmarks.measure", json.dumps(about)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; its message is above")
    return {**job, "result": json.loads(done.stdout.splitlines()[-1])}


def name_of(job: Job) -> str:
    """Return the name of a training in the tables."""
    return str(job.get("name") or job["preset"])


def full_seconds(result: Job, key: str = "seconds") -> float:
    """Return the seconds of the whole recipe; a peer's missing epochs are extrapolated."""
    return float(result[key] * result.get("published_epochs", result["epochs"]) / result["epochs"])


def add_ratios(runs: list[Job]) -> None:
    """Add to each training the ratio of its time to the mean of the original recipe's around it."""
    peers = [i for i, job in enumerate(runs) if job.get("name") == "original"]
    for i, job in enumerate(runs):
        around = [*[p for p in peers if p < i][-1:], *[p for p in peers if p > i][:1]]
        if around and i not in peers:
            peer = statistics.mean(full_seconds(runs[p]["result"]) for p in around)
            job["result"]["ratio"] = full_seconds(job["result"]) / peer


def mean_spread(values: list[float]) -> dict[str, float]:
    """Return n, mean and sample standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"n": len(values), "mean": statistics.mean(values), "spread": spread}


def summarise(runs: list[Job]) -> dict[str, Job]:
    """Return n, mean and spread of each figure, by the name of the training."""
    summary: dict[str, Job] = {}
    for name in dict.fromkeys(map(name_of, runs)):
        results = [job["result"] for job in runs if name_of(job) == name]
        numbers = {k for k, v in results[0].items() if isinstance(v, int | float)}
        entry: Job = {k: mean_spread([r[k] for r in results]) for k in sorted(numbers)}
        for key in ("seconds", "cpu_seconds"):
            entry[f"full_{key}"] = mean_spread([full_seconds(r, key) for r in results])
        entry["extrapolated"] = results[0]["epochs"] < results[0].get("published_epochs", 0)
        entry["dtype"] = results[0].get("dtype", "float32")
        summary[name] = entry
    return summary


def cell(entry: Job, key: str, scale: float = 1, digits: int = 2) -> str:
    """Return the mean and spread of one figure; a dash if it was not measured."""
    if key not in entry:
        return "-"
    value = entry[key]
    spread = f" ±{value['spread'] * scale:.{digits}f}" if value["n"] > 1 else ""
    return f"{value['mean'] * scale:.{digits}f}{spread}"


def training_table(summary: dict[str, Job]) -> str:
    """Return the trainings as lines of text."""
    head = (
        "recipe",
        "n",
        "test accuracy %",
        "wall s",
        "of original %",
        "CPU s",
        "import s",
        "warm-up s",
    )
    rows = [(*head, "GFLOP/s", "of GEMM peak %")]
    for name, entry in summary.items():
        mark = " extrapolated" if entry["extrapolated"] else ""
        epochs = f" ({entry['epochs']['mean']:g} epochs measured)" if mark else ""
        rows.append(
            (
                name + epochs,
                str(entry["seconds"]["n"]),
                cell(entry, "accuracy", 100),
                cell(entry, "full_seconds") + mark,
                cell(entry, "ratio", 100),
                cell(entry, "full_cpu_seconds") + mark,
                cell(entry, "import_seconds"),
                cell(entry, "warmup_seconds"),
                cell(entry, "gflops", 1, 1),
                cell(entry, "gemm_share", 100, 1)
                + (f" {entry['dtype']}" if "gflops" in entry else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def preset_table(summary: dict[str, Job], machine: Job) -> str:
    """Return accuracy and time of each recipe as Markdown, with the machine below."""
    lines = ["| recipe | n | test accuracy, % | seconds | of the original recipe's time, % |"]
    lines.append("|---|---|---|---|---|")
    for name, entry in summary.items():
        mark = " extrapolated" if entry["extrapolated"] else ""
        lines.append(
            f"| `{name}` | {entry['seconds']['n']} | {cell(entry, 'accuracy', 100)} "
            f"| {cell(entry, 'full_seconds', 1, 1)}{mark} | {cell(entry, 'ratio', 100, 1)} |"
        )
    return "\n".join([*lines, "", f"{machine['cores']} cores of {machine['cpu']}."])


def write_table(table: str, readme: Path = README) -> None:
    """Replace the text between the markers of the README."""
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def hardware() -> Job:
    """Return the CPU, cores, system and load of this machine."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = lines[0].partition(": ")[2] if lines else cpu
    load = os.getloadavg()[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "load_before": load}


def main() -> None:
    """Run the chosen jobs, print their tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="runs a preset; best: half as many")
    parser.add_argument("--only", default=",".join(ONLY), help="comma-separated; %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="stretches between the peer's runs")
    parser.add_argument("--peer-epochs", type=int, help="of the original, the rest extrapolated")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or auto")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="%(default)s")
    parser.add_argument("--write", action="store_true", help="write the README's table of presets")
    given = parser.parse_args()
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(ONLY):
        parser.error(f"--only has {', '.join(sorted(unknown))}; choose from {', '.join(ONLY)}")
    if not os.environ.get("MNIST_MIRROR"):
        parser.error(
            "MNIST_MIRROR is not set; give it the file:// or http:// address of a folder with the "
            "four MNIST archives, or `sample` for the few digits that need no download"
        )
    report: Job = {
        "arguments": {k: str(v) for k, v in vars(given).items()},
        "hardware": hardware(),
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES}
        | {"python": platform.python_version()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    trainings = training_jobs(chosen, given.seeds, given.rounds, given.peer_epochs)
    jobs = trainings + other_jobs(chosen)
    runs: list[Job] = []
    for number, job in enumerate(jobs, 1):
        start = time.perf_counter()
        runs.append(run(job, given.device, given.threads))
        took = time.perf_counter() - start
        runs[-1]["process_seconds"] = took
        about = " ".join(f"{k}={v}" for k, v in job.items() if v is not None)
        print(f"[{number}/{len(jobs)}] {about}: {took:.1f} s", file=sys.stderr, flush=True)
    add_ratios(runs[: len(trainings)])
    report["training"] = summarise(runs[: len(trainings)])
    report["runs"] = runs
    given.json.write_text(json.dumps(report, indent=1))
    if given.write:
        write_table(preset_table(report["training"], report["hardware"]))
    tables = [training_table(report["training"])] if trainings else []
    for job in runs[len(trainings) :]:
        about = " ".join(
            f"{k}={v}" for k, v in job.items() if k not in ("result", "process_seconds")
        )
        tables.append(
            about + "\n" + "\n".join(f"  {k}: {_text(v)}" for k, v in job["result"].items())
        )
    print("\n\n".join(tables))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "".join(f"\n    {k}: {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        stats = mean_spread(value)
        return f"{stats['mean']:.4g} ±{stats['spread']:.2g} (n={stats['n']})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
