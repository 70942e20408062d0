"""The page in a real browser: pictures emerge, votes count, errors are told, nobody is shut out. Needs Chromium."""

import base64
import re
import shutil
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import monitor
import train
from builtin import run_report
from tests.test_sample import NAMES, make_model
from tests.test_server import gauges, get, pixels, serving, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.skipif(sys.platform == "win32", reason="the server needs Linux or macOS"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("page") / "m", num_class_embeds=4, class_names=NAMES)


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder, tokens=()) as running:
        yield running


@contextmanager
def opened(browser, running, path="/", **options):
    """The page in a fresh context. At the end it has run into no error and has broken no policy."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("console", lambda line: problems.append(line.text) if line.type in ("error", "warning") else None)
    page.goto(f"http://127.0.0.1:{running.port}{path}")
    yield page
    context.close()
    assert not [text for text in problems if "Failed to load resource" not in text]  # a status of 400 and above


def says(page, text: str) -> None:
    page.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)


def draw(page, **values) -> None:
    for name, value in values.items():
        field = page.locator(f"[name={name}]")
        field.select_option(value) if name in ("class", "sampler") else field.fill(str(value))
    page.get_by_role("button", name="Draw").click()


def violations(page) -> list:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


def test_pictures_are_drawn_voted_on_repeated_and_kept(browser, served):
    before = gauges(served)
    with opened(browser, served) as page:
        says(page, "press Draw")
        page.evaluate("""() => {
            window.seen = [];
            const note = () => seen.push([document.getElementById("status").textContent, progress.value]);
            const progress = document.getElementById("progress");
            new MutationObserver(note).observe(document.body, {subtree: true, childList: true, attributes: true});
        }""")
        draw(page, n_images=2, steps=40, seed=7, **{"class": "bee"})
        says(page, "All 2 pictures are finished")
        seen = page.evaluate("seen")
        assert any("In the queue; about" in text for text, _ in seen)
        assert len({value for _, value in seen if 0 < value < 80}) > 5  # of 80 steps
        sources = page.locator("#pictures img").evaluate_all("images => images.map(image => image.src)")
        for k, source in enumerate(sources):
            drawn = pixels(base64.b64decode(source.partition(",")[2])).astype(int)
            expected = pixels(get(served, n_images=1, steps=40, seed=7 + k, **{"class": "bee"})[2])[2:-2, 2:-2]
            assert np.abs(drawn - expected).max() <= 1
        assert page.locator("#seed").inner_text() == "Seed 7."
        page.get_by_role("button", name="Good picture, seed 7").click()
        says(page, "your vote is counted")
        page.get_by_role("button", name="Bad picture, seed 8").click()
        page.wait_for_selector("button[aria-label='Bad picture, seed 8'][aria-pressed=true]")
        assert page.get_by_role("button", name="Bad picture, seed 7").get_attribute("aria-disabled") == "true"
        page.get_by_role("button", name="Bad picture, seed 7").click(force=True)  # changes nothing
        votes = {key: value for key, value in gauges(served).items() if "feedback_total" in key}
        assert sorted(votes.values()) == [1, 1] and {re.search('vote="(.*?)"', key)[1] for key in votes} == {
            "up",
            "down",
        }
        with page.expect_download() as download:
            page.get_by_role("button", name="Download", exact=True).click()
        assert download.value.suggested_filename == "papilio-7.png"
        assert pixels(Path(download.value.path()).read_bytes()).shape[:2] == (20, 38)  # two of 16 px in a grid
        page.get_by_role("link", name="Link to these pictures").click()
        says(page, "press Draw")
        for name, value in {"n_images": "2", "steps": "40", "seed": "7", "class": "bee"}.items():
            assert page.locator(f"[name={name}]").input_value() == value
        draw(page, steps=2)
        says(page, "All 2 pictures are finished")
        draw(page, seed=100, n_images=1)
        says(page, "The picture is finished")
        assert page.locator("#visits img").count() == 2 and "seed=7" in page.locator("#visits a").get_attribute("href")
    assert gauges(served)["papilio_images_total"] > before.get("papilio_images_total", 0)


def test_without_a_seed_the_page_shows_the_one_that_was_chosen(browser, served):
    with opened(browser, served) as page:
        says(page, "press Draw")
        draw(page, steps=1)
        says(page, "The picture is finished")
        assert re.fullmatch(r"Seed \d+\.", page.locator("#seed").inner_text())
        assert re.search(r"[?&]seed=\d+", page.locator("#repeat").get_attribute("href"))


def test_hostile_values_are_only_text(browser, served):
    values = (
        "<img src=x onerror=alert(1)>",
        "javascript:alert(1)",
        "1e999",
        "-1",
        "0x10",
        "'\"><script>alert(1)</script>",
    )
    for value in values:
        path = "/?" + "&".join(f"{name}={value}" for name in ("n_images", "steps", "seed", "class", "sampler", "x"))
        with opened(browser, served, path.replace("#", "%23")) as page:
            says(page, "press Draw")
            assert page.locator("script").count() == 1 and page.locator("img").count() == 0
            page.get_by_role("button", name="Draw").click()
            page.wait_for_timeout(100)
            assert page.locator("script").count() == 1


def test_class_names_of_a_hostile_model_are_only_text(browser, tmp_path):
    names = ("<img src=x onerror=alert(1)>", "&amp;", "</select><h1>")
    folder = make_model(tmp_path / "m", num_class_embeds=4, class_names=names)
    with serving(folder) as running, opened(browser, running) as page:
        says(page, "press Draw")
        assert page.locator("[name=class] option").all_inner_texts() == ["default", *names]
        assert page.locator("h1").count() == 1 and page.locator("img").count() == 0


def test_errors_are_shown_at_their_field(browser, served):
    with opened(browser, served) as page:
        says(page, "press Draw")
        page.evaluate("document.getElementById('settings').noValidate = true")
        draw(page, steps=5000)
        page.wait_for_selector("#error:visible")
        assert "steps must be a whole number from 1 to 1000" in page.locator("#error").inner_text()
        assert page.evaluate("document.activeElement.name") == "steps"
        draw(page, steps=1000, n_images=64)
        page.wait_for_function("() => document.activeElement.name === 'n_images'")
        assert "guidance counts twice" in page.locator("#error").inner_text()
        page.route("**/generate_stream/**", lambda route: route.abort())
        draw(page, steps=1, n_images=1)
        page.wait_for_function("() => document.getElementById('error').textContent.includes('cannot be reached')")
        assert violations(page) == []
        page.unroute("**/generate_stream/**")
        draw(page)
        says(page, "The picture is finished")
        assert not page.locator("#error").is_visible()


def test_a_full_queue_and_a_late_picture_are_told(browser, folder):
    with serving(folder, work=False, seconds=8.0) as running, opened(browser, running) as page:
        says(page, "press Draw")
        running.engine.max_jobs = 1
        draw(page, steps=1)
        says(page, "In the queue")
        with opened(browser, running) as other:
            says(other, "press Draw")
            draw(other, steps=1)
            other.wait_for_selector("#error:visible")
            assert re.search(
                r"the queue is full; retry later \(in about \d+ seconds?\)", other.locator("#error").inner_text()
            )
        page.wait_for_selector("#error:visible")
        assert "not finished in time" in page.locator("#error").inner_text()


def test_stop_leaves_the_queue(browser, folder):
    with serving(folder, work=False) as running, opened(browser, running) as page:
        says(page, "press Draw")
        draw(page, steps=900)
        wait_until(lambda: len(running.engine.jobs) == 1)
        page.get_by_role("button", name="Stop").click()
        says(page, "Stopped")
        running.engine.thread.start()
        wait_until(lambda: not running.engine.jobs)


def test_a_token_is_asked_for_and_kept_in_memory(browser, folder):
    with serving(folder, tokens=(b"correct-horse",)) as running, opened(browser, running) as page:
        says(page, "asks for a token")
        assert page.evaluate("document.activeElement.id") == "token" and violations(page) == []
        for wrong in ("wrong-horse", "häst"):
            page.locator("#token").fill(wrong)
            page.keyboard.press("Enter")
            page.wait_for_selector("#error:visible")
            assert "not accepted" in page.locator("#error").inner_text()
            page.evaluate("fail('')")
        page.locator("#token").fill("correct-horse")
        page.keyboard.press("Enter")
        says(page, "press Draw")
        draw(page, steps=1, seed=3)
        says(page, "The picture is finished")
        page.get_by_role("button", name="Good picture, seed 3").click()
        says(page, "your vote is counted")
        running.tokens = (b"battery-staple",)  # in the middle of a visit: what was chosen stays
        draw(page, steps=2)
        says(page, "asks for a token")
        page.locator("#token").fill("battery-staple")
        page.keyboard.press("Enter")
        says(page, "press Draw")
        assert page.locator("[name=seed]").input_value() == "3"
        draw(page)
        says(page, "The picture is finished")
        stored = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
        assert not re.search("horse|staple", stored + page.content())


def test_the_keyboard_alone_is_enough(browser, served):
    """Tab reaches every control in the order of the page, shows where it is, and Enter draws."""
    with opened(browser, served) as page:
        says(page, "press Draw")
        reached = []
        for _ in range(10):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.name || document.activeElement.id || 'more'"))
            if reached[-1] == "more":
                page.keyboard.press("Enter")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert reached == [
            "n_images",
            "seed",
            "class",
            "guidance",
            "sampler",
            "steps",
            "more",
            "spacing",
            "eta",
            "draw",
        ]
        page.locator("[name=steps]").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("2")
        page.keyboard.press("Enter")
        says(page, "The picture is finished")
        assert page.evaluate("document.activeElement.name") == "steps"
        for name in ("Draw", "Good picture"):  # what is pressed keeps the focus
            page.get_by_role("button", name=name).focus()
            page.keyboard.press("Enter")
            says(page, "finished" if name == "Draw" else "your vote is counted")
            assert page.evaluate("document.activeElement.textContent") in ("Draw", "👍")


def test_an_invalid_value_in_closed_settings_is_shown(browser, served):
    with opened(browser, served, "/?eta=5") as page:
        says(page, "press Draw")
        draw(page)
        page.wait_for_function("() => document.activeElement.name === 'eta'")
        assert page.locator("[name=eta]").is_visible()


def test_the_page_waits_while_the_model_is_loaded(browser, folder):
    with serving(folder) as running:
        model, running.engine.model = running.engine.model, None
        with opened(browser, running) as page:
            page.wait_for_selector("#error:visible")
            assert "still being loaded" in page.locator("#error").inner_text()
            running.engine.model = model
            says(page, "press Draw")
            assert not page.locator("#error").is_visible()


def test_seeds_of_63_bits_are_shown_as_they_are(browser, served):
    with opened(browser, served) as page:
        says(page, "press Draw")
        draw(page, seed=2**63 - 1, n_images=2, steps=1)
        says(page, "All 2 pictures are finished")
        assert page.locator("#pictures a").all_inner_texts() == ["Seed 9223372036854775807", "Seed 0"]
        changes = page.evaluate("document.querySelectorAll('#pictures img')[1].alt")
        assert changes == "Picture 2, seed 0"


def test_a_stream_that_breaks_off_is_told(browser, folder):
    with serving(folder, work=False) as running, opened(browser, running) as page:
        says(page, "press Draw")
        draw(page, steps=5)
        says(page, "In the queue")
        connection = running.engine.jobs[0].connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.shutdown(socket.SHUT_RDWR)
        says(page, "were not finished")
        assert "The connection ended" in page.locator("#error").inner_text()
        running.engine.thread.start()
        wait_until(lambda: not running.engine.jobs)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_and_nothing_sticks_out(browser, served, scheme, width):
    with opened(browser, served, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        says(page, "press Draw")
        assert violations(page) == []
        draw(page, n_images=3, steps=2, seed=1)
        says(page, "All 3 pictures are finished")
        draw(page, n_images=2)
        says(page, "All 2 pictures are finished")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ---- reports ---------------------------------------------------------------------------------------------------------

HOSTILE = '</script><img src=x onerror="alert(1)">{{document}}'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with everything that one can hold, and text that tries to be markup."""
    red = data.encode_png(data.grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), padding=0))
    picture = f"data:image/png;base64,{base64.b64encode(red).decode()}"
    document = {
        "title": f"Report {HOSTILE}",
        "verdict": f"Drift: {HOSTILE}",
        "alarm": True,
        "facts": {"model": "f" * 64, HOSTILE: HOSTILE},
        "tables": [
            {"title": "Tests", "columns": ["", "p"], "rows": [[HOSTILE, "0.01"], ["statistics", 0.5]]},
            {"title": "Empty", "columns": ["a", "b"], "rows": []},
        ],
        "series": [
            {"title": "Loss", "lines": {"train": [[i, 1 + 1 / (1 + i)] for i in range(300)], "held out": [[10, 1.5]]}},
            {
                "title": "p",
                "log": True,
                "time": True,
                "lines": {"p": [[1.8e9, 0.5], [1.8e9 + 86400, 1e-4], [1.8e9, None]]},
            },
            {"title": "Nothing yet", "lines": {"p": []}},
        ],
        "histograms": [{"title": HOSTILE, "lines": {"golden": [0.1, 0.2, 0.2, 0.4], "current": [0.5] * 9}}],
        "pictures": [{"title": "Unusual", "items": [{"caption": HOSTILE, "source": picture}] * 8}],
        "film": {"title": HOSTILE, "items": [{"caption": f"{HOSTILE} {i}", "source": picture} for i in range(3)]},
    }
    page = tmp_path_factory.mktemp("report") / "report.html"
    monitor.write_report(page, document)
    return page


@contextmanager
def opened_report(browser, report, width=1280, scheme="light"):
    """A report read from the disk. At the end it has run into no error and asked for nothing from elsewhere."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("console", lambda line: problems.append(line.text))
    page.on("request", lambda request: problems.append(request.url) if request.url[:4] == "http" else None)
    page.goto(report.as_uri())
    yield page
    context.close()
    assert not problems


def test_a_report_shows_all_that_its_document_holds(browser, report):
    with opened_report(browser, report) as page:
        assert page.locator("h1").inner_text() == f"Report {HOSTILE}"
        assert page.locator("#verdict.alarm").inner_text() == f"Drift: {HOSTILE}"
        assert page.locator("td", has_text="onerror").count() == 2 and page.locator("figcaption").count() == 8
        assert (
            page.get_by_text("nothing yet", exact=True).count() == 1
            and page.get_by_text("no values yet", exact=True).count() == 1
        )
        assert page.evaluate("[...document.images].every(image => image.naturalWidth === 8)")
        assert page.locator("svg").count() == 4
        facts = page.locator("#facts").inner_text()
        assert "f" * 64 in facts and f"torch {torch.__version__}" in facts


def test_plots_tell_values_smooth_and_change_their_axis(browser, report):
    with opened_report(browser, report) as page:
        loss = page.locator(".plots section").first
        svg, key = loss.locator("svg"), loss.locator(".legend")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        left, right = (box["x"] + box["width"] * pixel / 480 for pixel in (52, 470))
        page.mouse.move(left + (right - left) * 100 / 299, box["y"] + 40)
        assert "train: 1.01 at 100" in key.inner_text() and "held out: 1.5 at 10" in key.inner_text()
        page.mouse.move(0, 0)
        assert "at" not in key.inner_text().split()
        path = "() => document.querySelector('.plots section path').getAttribute('d')"
        plain = page.evaluate(path)
        loss.get_by_label("log axis").check()
        logarithmic = page.evaluate(path)
        assert logarithmic != plain
        loss.get_by_label("smoothing").fill("90")
        assert page.evaluate(path) not in (plain, logarithmic)
        assert "1e-4" in page.locator(".plots section").nth(1).inner_text().replace("1.0e-4", "1e-4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_in_a_report_and_nothing_sticks_out(browser, report, scheme, width):
    with opened_report(browser, report, width, scheme) as page:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_report_of_a_run_goes_along_with_it(browser, tmp_path, monkeypatch, fit):
    """Opened at the first preview, it reloads itself, shows the new grid, keeps a chosen one, and stops at the end."""
    monkeypatch.setattr(run_report, "RELOAD_SECONDS", 0.3)
    run, report = tmp_path / "run", train.report_run
    chosen = "document.querySelector('.film p').textContent"

    def look(folder, step, state, error):
        report(folder, step, state, error)
        if state == "running" and not opened:
            context = browser.new_context(viewport={"width": 390, "height": 900})
            opened.append(context.new_page())
            opened[0].on("pageerror", lambda error: problems.append(str(error)))
            opened[0].goto((folder / "report.html").as_uri())
            seen.append(opened[0].evaluate(chosen))

    opened, problems, seen = [], [], []
    monkeypatch.setattr(train, "report_run", look)
    assert fit(run, "--preview-every", "4") == 0
    (page,) = opened
    page.locator("#verdict", has_text="Finished: step 12 of 12").wait_for()
    seen.append(page.evaluate(chosen))
    assert seen == ["step 4", "step 12"] and page.locator("img").evaluate("image => image.naturalWidth") > 100
    page.locator(".film input").fill("1")
    assert page.evaluate(chosen) == "step 8"
    page.reload()
    assert page.evaluate(chosen) == "step 8"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and violations(page) == []
    run_report.report_run(run, 12, "running")
    page.goto((run / "report.html").as_uri())
    run_report.report_run(run, 12, "finished")
    page.locator("#verdict", has_text="Finished").wait_for()
    page.evaluate("window.mark = 1")
    page.wait_for_timeout(700)
    assert page.evaluate("window.mark") == 1 and not problems  # it no longer reloads
    page.context.close()


def test_a_film_shows_the_picture_of_its_slider(browser, report):
    with opened_report(browser, report) as page:
        slider, caption = page.locator(".film input"), page.locator(".film p")
        assert caption.inner_text() == f"{HOSTILE} 2"
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert caption.inner_text() == f"{HOSTILE} 1" == slider.get_attribute("aria-valuetext")
        assert page.locator(".film img").get_attribute("alt") == f"{HOSTILE} 1"
