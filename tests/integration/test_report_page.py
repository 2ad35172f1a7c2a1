"""The report in a real headless browser: no error, no request, light and dark, a phone's width, a hover."""

import re

import pytest
from browser import PHONE_WIDTH, find_reason, open_browser
from conftest import REPOSITORY, experiment_dict, run_verb, write_experiment
from made_up_runs import RUNS, end_growth, finish_run, make_layers, write_attention

from inheritune.config.experiment import load_experiment
from inheritune.paper.report import report
from inheritune.paper.report_evidence import build_evidence_page
from inheritune.paper.report_page import write_page

pytestmark = pytest.mark.skipif(bool(find_reason()), reason=f"{find_reason()}")
LONG = "a label that is as long as those that people write into their experiments, <i>or</i> even longer"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(tmp_path):
    """The report of made-up runs that has every kind of chart, written by the verb."""
    rows = [{"run": run, "label": LONG if run == "random" else run} for run in RUNS]
    path = write_experiment(tmp_path / "recipes", experiment_dict(paper=rows, runs=RUNS))
    experiment = load_experiment(path)
    write_attention(finish_run(experiment, "reference", 3.0), make_layers(24, n_heads=12))
    for stage, gap in ((1, 0.04), (2, -0.02)):
        folder = finish_run(experiment, "grown", 3.0 + gap, stage=stage, gap=gap)
        write_attention(folder, make_layers(1 + stage))
    end_growth(experiment, "grown", stage=2, layers=3, parity=True, gap=-0.02)
    finish_run(experiment, "random", 3.1, gap=0.1)
    written = run_verb("report", path).stdout.strip()
    assert written.endswith("/seed0/report.html")
    return report(path)


@pytest.fixture
def evidence(tmp_path):
    return write_page(build_evidence_page(REPOSITORY / "recipes" / "evidence" / "cpu"), tmp_path / "e.html")


@pytest.mark.parametrize("name", ["page", "evidence"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, PHONE_WIDTH])
def test_a_page_opens_without_an_error_or_a_request(name, dark, width, browser, request):
    path = request.getfixturevalue(name)
    browser.open(path, width, dark)
    assert browser.console() == []
    assert browser.requests() == [path.resolve().as_uri()]
    charts = browser.find(".chart")
    assert len(charts) > 5
    assert all(browser.run("return !!arguments[0].querySelector('.main-svg')", chart) for chart in charts)
    wide, shown = browser.run(
        "return ['scrollWidth', 'clientWidth'].map((key) => document.documentElement[key])"
    )
    assert wide <= shown <= width
    assert is_dark(browser, "document.body") == dark
    # no text of a chart is as dark as the page behind it
    assert not dark or not is_dark_fill(browser, ".chart .xtick text")


def read_light(browser, expression: str) -> float:
    """The mean of the three parts of a colour, 0 to 255."""
    found = browser.run(f"return {expression}")
    parts = [float(part) for part in re.findall(r"[\d.]+", found)[:3]]
    return sum(parts) / 3


def is_dark(browser, element: str) -> bool:
    return read_light(browser, f"getComputedStyle({element}).backgroundColor") < 100


def is_dark_fill(browser, selector: str) -> bool:
    return read_light(browser, f"getComputedStyle(document.querySelector('{selector}')).fill") < 128


def test_hovering_shows_values(page, browser):
    browser.open(page)
    charts = {browser.run("return arguments[0].ariaLabel", one): one for one in browser.find(".chart")}
    browser.hover(charts["Validation loss"])
    shown = browser.run("return document.querySelector('.hoverlayer').textContent")
    assert "grown, stage 2" in shown and re.search(r"3\.\d{4}", shown)
    browser.hover(charts["Mean rank of each head"], 20, 0)
    texts = [one.get_attribute("textContent") for one in browser.find(".hoverlayer")]
    assert any(re.search(r"layer \d+, head \d+: rank \d+\.\d\d", text) for text in texts)


def test_a_name_in_the_legend_hides_its_line_and_a_drag_zooms(page, browser):
    from selenium.webdriver.common.action_chains import ActionChains

    browser.open(page)
    chart = browser.find(".chart")[0]
    lines = "return arguments[0].querySelectorAll('.scatterlayer .trace').length"
    before = browser.run(lines, chart)
    button = browser.find("figure .legend button")[2]
    assert LONG in browser.find("figure .legend")[0].text  # the tags of a label are words
    button.click()
    assert browser.run(lines, chart) == before - 1
    browser.find("figure .legend button")[2].click()
    assert browser.run(lines, chart) == before
    span = "return arguments[0].layout.xaxis.range"
    first = browser.run(span, chart)
    browser.hover(chart, -100, -50)
    ActionChains(browser.driver).click_and_hold().move_by_offset(150, 80).release().perform()
    zoomed = browser.run(span, chart)
    assert zoomed[1] - zoomed[0] < 0.5 * (first[1] - first[0])


def test_the_page_follows_a_change_to_dark(page, browser):
    browser.open(page)
    color = "return getComputedStyle(document.querySelector('.chart .xtick text')).fill"
    light = browser.run(color)
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser.driver, 30).until(lambda _: browser.run(color) != light)
    assert browser.console() == []


def test_a_wide_table_scrolls_under_the_names_of_its_rows(evidence, browser):
    browser.open(evidence, PHONE_WIDTH)
    place = "return document.querySelector('.table tbody th').getBoundingClientRect().left"
    before = browser.run(place)
    browser.run("document.querySelector('.table').scrollLeft = 250")
    assert browser.run("return document.querySelector('.table').scrollLeft") == 250
    assert browser.run(place) == before
