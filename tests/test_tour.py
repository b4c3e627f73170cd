"""The tour on a text of one's own, and what it says when that text is no good. (Its notebook is tested by nbval.)"""

import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

TOUR = Path(__file__).resolve().parent.parent / "chapters" / "00_tour.py"


def tour(text: Path, cache: Path):
    environment = os.environ | {"LLAMA2_SCALE": "smoke", "LLAMA2_TEXT": str(text), "LLAMA2_CACHE": str(cache)}
    return subprocess.run([sys.executable, str(TOUR)], capture_output=True, text=True, timeout=200, env=environment)


def test_it_runs_on_a_text_of_ones_own(tmp_path):
    (tmp_path / "my text.txt").write_text("\n\n".join(topics.values())[:100_000], "utf-8")
    ran = tour(tmp_path / "my text.txt", tmp_path / "cache")
    assert ran.returncode == 0, ran.stderr
    assert "my text.txt" in ran.stdout and "'config.json'" in ran.stdout
    assert list((tmp_path / "cache" / "tour" / "smoke").glob("my text.txt-*/base/model.safetensors"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 " * 99, "byte 3 is not UTF-8 text"),
        (b"", "no text in 1 file"),
        (b"one verse", "9 characters are too few"),
    ],
)
def test_a_text_that_will_not_do_stops_it_with_the_reason(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    ran = tour(tmp_path / "bad.txt", tmp_path / "cache")
    assert ran.returncode == 1 and message in ran.stderr.splitlines()[-1]
