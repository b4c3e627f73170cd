"""Generated from chapters/08_carbon.py by chapters/export.py; edit the chapter."""

__all__ = [
    "PUE",
    "KG_PER_KWH",
    "emissions",
    "grids",
    "grid",
    "tokens_per_second",
    "mfu",
    "Energy",
    "Meter",
    "CarbonConfig",
    "cli",
]


# ---------- chapters/08_carbon.py · Table 2

import json
import logging
import os
from dataclasses import dataclass
from functools import cache

from llama2lib.launch import one_line_errors
from llama2lib.roofline import A100

PUE = 1.1  # the data centre's power over its computers' (Llama 1, section 6)
KG_PER_KWH = 0.385  # CO2 equivalent, mean of the grid of the United States (Llama 1, section 6)


def emissions(gpu_hours: float, watts: float, pue: float = PUE, kg_per_kwh: float = KG_PER_KWH) -> float:
    """Tonnes of CO2 equivalent of so many hours at a power in watts (Table 2).

    ValueError for negative numbers, or a PUE below 1.
    """
    if min(gpu_hours, watts, kg_per_kwh) < 0 or pue < 1:
        found = f"{gpu_hours} hours, {watts} W, PUE {pue}, {kg_per_kwh} kg/kWh"
        raise ValueError(f"{found}: expected nothing negative, and a PUE of at least 1")
    return gpu_hours * watts / 1000 * pue * kg_per_kwh / 1000


# ---------- chapters/08_carbon.py · What is left out

@cache
def grids() -> dict[str, float]:
    "kg of CO2 equivalent for a kWh in each country, by its ISO code of three letters (codecarbon's table)."
    try:
        from codecarbon.input import DataSource
    except ImportError:
        raise ImportError("codecarbon is not installed: pip install -e '.[carbon]'") from None
    with open(DataSource().global_energy_mix_data_path, encoding="utf-8") as file:
        rows = json.load(file)
    return {code: row["carbon_intensity"] / 1000 for code, row in rows.items() if row.get("carbon_intensity")}


def grid(country: str) -> float:
    "kg of CO2 equivalent for a kWh in a country, by its ISO code. ValueError for one that is not in the table."
    if country not in grids():
        raise ValueError(f"country {country!r}: expected an ISO code of three letters, such as USA, DEU, IND")
    return grids()[country]


# ---------- chapters/08_carbon.py · From hours to speed

def tokens_per_second(gpu_hours: float, tokens: float) -> float:
    "Tokens that a GPU saw in a second, by the hours of all GPUs (section 2.2.1). ValueError unless those are above 0."
    if gpu_hours <= 0:
        raise ValueError(f"{gpu_hours} hours: expected more than 0")
    return tokens / gpu_hours / 3600


def mfu(gpu_hours: float, tokens: float, flops_per_token: float, peak: float = A100.peak_flops) -> float:
    """Share of a GPU's peak FLOP/s (A100, bfloat16) that tokens of so many FLOP, forward and backward, have used.

    The model FLOPs utilisation of PaLM (Chowdhery et al. 2022, appendix B). ValueError as of `tokens_per_second`.
    """
    return tokens_per_second(gpu_hours, tokens) * flops_per_token / peak


# ---------- chapters/08_carbon.py · A meter

@dataclass(frozen=True)
class Energy:
    "What a stage took, as a meter of one machine saw it."

    seconds: float
    cpu_kwh: float
    gpu_kwh: float
    ram_kwh: float
    kg_per_kwh: float  # of the grid

    @property
    def kwh(self) -> float:
        "All three together."
        return self.cpu_kwh + self.gpu_kwh + self.ram_kwh

    @property
    def grams(self) -> float:
        "CO2 equivalent of the electricity."
        return 1000 * self.kwh * self.kg_per_kwh

    def __str__(self) -> str:
        parts = {"processor": self.cpu_kwh, "GPUs": self.gpu_kwh, "memory": self.ram_kwh}
        shares = ", ".join(f"{name} {1000 * part:.3g} Wh" for name, part in parts.items() if part)
        total = f"{1000 * self.kwh:.3g} Wh ({shares or 'nothing'})"
        return f"{self.seconds:,.0f} s, {total}, {self.grams:.3g} g of CO2 equivalent"


class Meter:
    """Measures a stage on this machine: `with Meter() as meter: …`, then `meter.energy`; or `start` and `stop`.

    country: ISO code of the grid; its default is the mean that the paper used. Under torchrun the first process of a
    node measures, and others find 0. ImportError, in one line, without codecarbon; ValueError as of `grid`.
    """

    def __init__(self, country: str | None = None):
        self.kg_per_kwh = KG_PER_KWH if country is None else grid(country)
        self.energy: Energy | None = None
        self._tracker = None

    def start(self) -> "Meter":
        "Begin to measure."
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError:
            raise ImportError("codecarbon is not installed: pip install -e '.[carbon]'") from None
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it says a line before it reads `log_level`
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self._tracker = OfflineEmissionsTracker(
                country_iso_code="USA", output_methods=[], log_level="critical", allow_multiple_runs=True
            )
            self._tracker.start()
        return self

    def stop(self) -> Energy:
        "End, and what was measured. ValueError for a meter that was not started."
        if self._tracker is None and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            raise ValueError("the meter was not started")
        found = (0.0,) * 4
        if self._tracker is not None:
            self._tracker.stop()
            data = self._tracker.final_emissions_data
            found = data.duration, data.cpu_energy, data.gpu_energy, data.ram_energy
            self._tracker = None
        self.energy = Energy(*found, self.kg_per_kwh)
        return self.energy

    def __enter__(self) -> "Meter":
        return self.start()

    def __exit__(self, *error):
        self.stop()

@dataclass(frozen=True)
class CarbonConfig:
    "Carbon of GPU hours (section 2.2.1)."

    gpu_hours: float  # of all GPUs together
    watts: float = 400.0  # of a GPU, its cap
    pue: float = PUE  # of the data centre
    country: str | None = None  # ISO code of the grid; none: the paper's 0.385 kg/kWh


@one_line_errors()
def cli(prog: str = "python -m llama2lib.carbon"):
    "python -m llama2lib.carbon --gpu-hours N: tonnes of CO2 equivalent."
    import tyro

    config = tyro.cli(CarbonConfig, prog=prog)
    factor = KG_PER_KWH if config.country is None else grid(config.country)
    print(f"{emissions(config.gpu_hours, config.watts, config.pue, factor):,.3f} t of CO2 equivalent")


if __name__ == "__main__":
    cli()
