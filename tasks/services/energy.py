"""Energy and emissions of a piece of work, by codecarbon's estimate."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Meter:
    """Energy and emissions of a piece of work, and the machine that it ran on."""

    kwh: float | None = None
    """None if codecarbon measured nothing, which the card states as a gap."""
    grams_co2e: float | None = None
    machine: dict[str, str | int | float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Return what was measured, by its name in MLflow."""
        figures = {"energy_kwh": self.kwh, "emissions_g_co2e": self.grams_co2e}
        return {name: value for name, value in figures.items() if value is not None}


@contextmanager
def metered() -> Iterator[Meter]:
    """Estimate energy and emissions; the country is `CODECARBON_COUNTRY_ISO_CODE`, else the USA."""
    import psutil
    from codecarbon import OfflineEmissionsTracker

    country = os.environ.get("CODECARBON_COUNTRY_ISO_CODE")
    tracker = OfflineEmissionsTracker(
        country_iso_code=country or "USA",
        save_to_file=False,
        log_level="error",
        allow_multiple_runs=True,
    )
    meter = Meter()
    tracker.start()
    try:
        yield meter
    finally:
        tracker.stop()
        meter.machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count() or 0,
            "memory_gib": psutil.virtual_memory().total / 2**30,
            "python": platform.python_version(),
        }
        # codecarbon raises none of its errors; after one, only its result is missing.
        used = getattr(tracker, "final_emissions_data", None)
        if used is not None:
            counted = Path("/sys/class/powercap/intel-rapl").exists() or used.gpu_count
            meter.kwh = used.energy_consumed
            meter.grams_co2e = 1000 * used.emissions  # codecarbon gives kilograms
            meter.machine |= {
                "processor": used.cpu_model,
                "accelerator": used.gpu_model or "",
                "codecarbon": used.codecarbon_version,
                "cloud_provider": used.cloud_provider,
                "region": used.country_name if country else f"{used.country_name} (assumed)",
                "method": "from the machine's own power counters"
                if counted
                else "from the processor's model and load; no power counter was readable",
            }
