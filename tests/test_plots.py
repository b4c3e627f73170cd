"Figures: the same bytes every time, whole files only, nothing at the smoke scale."

from itertools import pairwise

import matplotlib
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from llama2lib import plots, recipes
from llama2lib.paper import SIZES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.setenv("LLAMA2_SCALE", "laptop")
    return tmp_path / "figures"


def draw():
    with plt.rc_context(plots.STYLE):
        figure, ax = plt.subplots()
        ax.plot([1, 2, 3], [1, 4, 9], color=plots.COLORS["7B"], clip_on=True)
        ax.plot([1, 2, 3], [2, 3, 8], **plots.RINGS, label="paper")
        ax.legend()
    plt.close(figure)
    return figure


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_is_the_same_file(folder, kind, monkeypatch):
    "Also on another day, and whatever style is in force while saving."
    plots.save(draw(), f"a.{kind}")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    with plt.rc_context({"svg.hashsalt": "other", "svg.fonttype": "path"}):
        plots.save(draw(), f"b.{kind}")
    a, b = ((folder / f"{name}.{kind}").read_bytes() for name in "ab")
    assert a == b
    assert b"atplotlib v" not in a and b"1970" not in a and matplotlib.__version__.encode() not in a


def test_smoke_writes_nothing(folder, monkeypatch):
    monkeypatch.setenv("LLAMA2_SCALE", "smoke")
    plots.save(draw(), "a.png")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a", "a.pdf", "sub/a.png", "../a.png", "/tmp/a.png"])
def test_names(folder, name):
    with pytest.raises(ValueError, match="plain name"):
        plots.save(draw(), name)


def test_a_failed_write_leaves_the_old_figure(folder, monkeypatch):
    plots.save(draw(), "a.png")
    before = (folder / "a.png").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    monkeypatch.setattr("os.rename", fail)
    with plt.rc_context(plots.STYLE):
        other, _ = plt.subplots()
    plt.close(other)
    with pytest.raises(OSError, match="disk full"):
        plots.save(other, "a.png")
    assert (folder / "a.png").read_bytes() == before


def test_every_size_has_its_own_colour():
    assert set(SIZES) < set(plots.COLORS) and len(set(plots.COLORS.values())) == len(plots.COLORS)
    others = [*plots.OUTCOMES.values(), *plots.ATTENTION.values()]
    assert len({*others, *plots.COLORS.values()}) == len(others) + len(plots.COLORS)


def test_texts_stand_below_one_another_with_all_their_words(folder):
    said = {"prompt": "Why?", "answer": "because " * 40, "empty": ""}
    plots.texts("a.png", "Two answers", [*said.items()])
    ax = plt.gcf().axes[0]
    shown = [(text.get_text(), text.get_position()[1]) for text in ax.texts]
    plt.close()
    assert [" ".join(text.split()) for text, _ in shown] == [x.strip() for pair in said.items() for x in pair]
    places = [place for _, place in shown[::2]]
    assert [above - below for above, below in pairwise(places)] == pytest.approx([1.4, 4.4])
    assert min(len(line) for line in shown[3][0].splitlines()[:-1]) > 80 and (folder / "a.png").exists()
