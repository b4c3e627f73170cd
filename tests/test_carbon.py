"""Carbon: Table 2 by hand, grids without a network, speed from hours, and a meter that counts once."""

import subprocess
import sys

import pytest
from conftest import torchrun

from llama2lib.carbon import KG_PER_KWH, Energy, Meter, emissions, grid, mfu, tokens_per_second
from llama2lib.model import LLAMA2
from llama2lib.paper import PAPER, SIZES


def test_table_2_comes_out():
    "To the last digit, as the printed cells are cut off; 1,000 hours at 1 kW are a MWh."
    for size in SIZES:
        row = PAPER["Table 2"][size]
        assert int(100 * emissions(row["gpu_hours"], row["watts"])) / 100 == row["tco2eq"]
    assert emissions(1000, 1000, pue=1.0, kg_per_kwh=0.5) == 0.5
    assert emissions(1000, 1000, pue=1.2, kg_per_kwh=0.5) == pytest.approx(0.6)


@pytest.mark.parametrize("wrong", [{"gpu_hours": -1}, {"watts": -1}, {"pue": 0.9}, {"kg_per_kwh": -0.1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected nothing negative, and a PUE of at least 1"):
        emissions(**({"gpu_hours": 1.0, "watts": 1.0} | wrong))


def test_grids_need_no_network():
    pytest.importorskip("codecarbon")
    assert grid("NOR") < grid("FRA") < grid("USA") < grid("IND") < 1.5
    with pytest.raises(ValueError, match="country 'Utopia': expected an ISO code"):
        grid("Utopia")


def test_hours_are_a_speed():
    assert tokens_per_second(2.0, 7200.0) == 1.0
    for hours in (0, -1.0):
        with pytest.raises(ValueError, match=f"{hours} hours: expected more than 0"):
            tokens_per_second(hours, 7200.0)
        with pytest.raises(ValueError, match="expected more than 0"):
            mfu(hours, 7200.0, 1e9)
    assert mfu(1.0, 3600.0, 312e12) == 1.0  # a token a second, of a second's FLOP
    used = {
        size: mfu(PAPER["Table 2"][size]["gpu_hours"], 2e12, 3 * LLAMA2[size].forward_flops_per_token(4096))
        for size in SIZES
    }
    assert min(used, key=used.get) == "34B" and all(0.3 < share < 0.5 for share in used.values())


def test_energy_adds_up():
    energy = Energy(10.0, 0.001, 0.002, 0.0, 0.4)
    assert energy.kwh == 0.003 and energy.grams == pytest.approx(1.2)
    assert str(energy) == "10 s, 3 Wh (processor 1 Wh, GPUs 2 Wh), 1.2 g of CO2 equivalent"


def test_a_meter_measures(monkeypatch):
    pytest.importorskip("codecarbon")
    with Meter("FRA") as meter:
        sum(n * n for n in range(2_000_000))
    assert meter.energy.seconds > 0 and meter.energy.kwh > 0 and meter.energy.kg_per_kwh == grid("FRA")
    assert Meter().kg_per_kwh == KG_PER_KWH
    with pytest.raises(ValueError, match="was not started"):
        Meter().stop()
    with pytest.raises(RuntimeError, match="within"), Meter() as meter:
        raise RuntimeError("within")
    assert meter.energy is not None  # a stage that fails has cost something too
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Meter() as meter:
        pass
    assert meter.energy.kwh == 0


def test_two_processes_are_counted_once(tmp_path):
    pytest.importorskip("codecarbon")
    script = tmp_path / "metered.py"
    script.write_text(
        "import os\nfrom llama2lib.carbon import Meter\nwith Meter() as meter:\n    sum(range(3_000_000))\n"
        "print('rank', os.environ['LOCAL_RANK'], meter.energy.kwh > 0)\n", "utf-8",
    )  # fmt: skip
    lines = torchrun("--nproc-per-node=2", script).splitlines()
    assert sorted(line for line in lines if line.startswith("rank")) == ["rank 0 True", "rank 1 False"]


def test_the_command():
    command = [sys.executable, "-m", "llama2lib.carbon", "--gpu-hours", "184320"]
    assert "31.224 t" in subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    ran = subprocess.run([*command, "--pue", "0.5"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "a PUE of at least 1" in ran.stderr and "Traceback" not in ran.stderr
