"""The picture is XML that a screen reader can use, whatever the models are called and scored."""

import math
import xml.etree.ElementTree as ET

import pytest

from poise.reports.picture import HEIGHT, MARGIN, WIDTH, Point, quality_against_size

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*points, quality="perplexity", caption="a text"):
    text = quality_against_size(list(points), quality, caption)
    assert "nan" not in text.replace("finance", "")
    return ET.fromstring(text)


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def marks(root):
    """Centres of the reference's square and the others' circles."""
    squares = [element for element in root.iter(f"{SVG}rect") if element.get("class") != "paper"]
    centres = [(float(s.get("x")) + 6, float(s.get("y")) + 6) for s in squares]
    return centres + [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]


def test_it_has_a_title_and_a_description_that_it_points_to():
    root = drawn(Point("original", 270.0, 20.0), Point("small", 90.0, 21.5))
    ids = {element.get("id"): element for element in root.iter() if element.get("id")}
    assert root.get("role") == "img"
    assert [ids[name].tag for name in root.get("aria-labelledby").split()] == [f"{SVG}title", f"{SVG}desc"]
    assert ids["title"].text
    assert (
        "original: 270.0 MB, perplexity 20.000. small: 90.0 MB, perplexity 21.500." in ids["description"].text
    )
    assert "a text" in ids["description"].text
    assert {"original", "small"} <= set(texts(root))


def test_smaller_is_left_and_lower_is_below_and_all_is_inside():
    (x0, y0), (x1, y1) = marks(drawn(Point("original", 270.0, 20.0), Point("small", 90.0, 21.5)))
    assert x1 < x0
    assert y1 < y0, "larger figures are higher; SVG counts downwards"
    for x, y in ((x0, y0), (x1, y1)):
        assert MARGIN <= x <= WIDTH - MARGIN
        assert MARGIN <= y <= HEIGHT - MARGIN
    assert (x1 - MARGIN) / (x0 - MARGIN) == pytest.approx(1 / 3, abs=0.01), "sizes start at zero"


@pytest.mark.parametrize("value", [20.0, 0.0, -1.0, 1e-12])
def test_equal_qualities_have_a_place(value):
    points = marks(drawn(Point("a", 2.0, value), Point("b", 1.0, value)))
    assert len(points) == 2
    assert points[0][1] == points[1][1]
    assert MARGIN <= points[0][1] <= HEIGHT - MARGIN


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_a_figure_is_described_and_not_drawn(value):
    root = drawn(Point("original", 2.0, 20.0), Point("broken", 1.0, value))
    assert len(marks(root)) == 1
    assert "broken: 1.0 MB" in root.find(f"{SVG}desc").text
    assert not marks(drawn(Point("a", 2.0, value), Point("b", 1.0, value)))


def test_models_of_no_size_have_a_place():
    assert len(marks(drawn(Point("a", 0.0, 20.0), Point("b", 0.0, 21.0)))) == 2


def test_what_means_something_in_xml_is_escaped():
    odd = """<script>&"'</script>"""
    root = drawn(Point(odd, 2.0, 20.0), Point("b", 1.0, 21.0), quality="<q>", caption="<c> & more")
    assert odd in texts(root)
    assert "<q>" in texts(root)
    assert "<c> & more" in texts(root)
    assert odd in root.find(f"{SVG}desc").text
    assert not list(root.iter(f"{SVG}script"))
