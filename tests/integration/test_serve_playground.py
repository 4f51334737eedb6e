"""The playground in a real browser without a window: Debian's chromium, driven by playwright.

Set MLMAMBA_SCREENSHOTS to a folder to keep images of the page at the sizes of a desk and of a phone.
"""

import base64
import os
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from mlmamba.images import as_image
from tests.helpers.images import encoded
from tests.helpers.processes import wait_for
from tests.helpers.serving import load_tiny, raw, running, serve
from workflows.registry.register import Example
from workflows.serve import http as playground
from workflows.serve.auth import Access
from workflows.serve.options import Limits
from workflows.serve.service import Served

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here; Debian's package `chromium` has it")
LIMITS = Limits(max_batch=4, default_tokens=40, max_tokens=100_000)
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("playground") / "tiny")


@pytest.fixture(scope="module")
def service(loaded):
    service = serve(loaded, LIMITS)
    yield service
    service.served.engine.close()


@pytest.fixture(scope="module")
def url(service):
    with running(service) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # as root it has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page at the size of a desk, ready. Fails in the end if it wrote to the console or asked another host."""
    yield from opened(browser, url, DESK)


@pytest.fixture
def phone(browser, url):
    yield from opened(browser, url, PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)


def opened(browser, url, size, **options):
    context = browser.new_context(viewport=size, **options)
    page = context.new_page()
    page.complaints, page.hosts, page.bodies = [], set(), []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))

    def note(request):
        page.hosts.add(urlsplit(request.url).netloc)
        if request.method == "POST":
            page.bodies.append(request.post_data_json)

    page.on("request", note)
    page.goto(url)
    page.wait_for_selector(".version.ready")
    yield page
    assert page.complaints == []
    assert page.hosts - {""} == {urlsplit(url).netloc}
    context.close()


def ask(page, text):
    """Ask with the keyboard, and wait for the answer's end."""
    before = page.locator("#log li").count()
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#log li:nth-child({before + 2}):not(.waiting)")
    return page.locator(f"#log li:nth-child({before + 2}) .bubble").inner_text()


def keep(page, name):
    if folder := os.environ.get("MLMAMBA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "blocks.png").write_bytes(encoded(3, size=(320, 240)))
    return str(tmp_path / "blocks.png")


def test_the_page_is_small_and_needs_nothing_from_elsewhere(url):
    with urllib.request.urlopen(url) as reply:
        text, policy = reply.read(), reply.headers["Content-Security-Policy"]
        assert (reply.headers["x-model-version"], reply.headers.get_content_type()) == ("shapes/3", "text/html")
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert len(text) < 30_000
    assert not re.search(rb"https?://|@import|//[a-z]", text.replace(b"http://www.w3.org", b""))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2


def test_the_page_can_be_left_out(loaded):
    service = serve(loaded, LIMITS, Access(playground=False))
    with running(service) as url, pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url)
    service.served.engine.close()


@in_browser
def test_an_image_and_two_questions(page, file):
    page.get_by_label("Choose images").set_input_files(file)
    page.get_by_role("button", name="Take out blocks.png").wait_for()
    keep(page, "desk-chosen")
    answer = ask(page, "what is shown?")
    numbers = page.locator(".numbers").inner_text()
    assert answer.strip()
    assert re.fullmatch(r"shapes/3 · \d+ tokens · [\d.]+ tokens/s · first after [\d.]+\ss", numbers)
    assert page.locator("#version").inner_text() == "shapes/3"
    ask(page, "and what else?")
    keep(page, "desk-answered")
    first, second = page.bodies
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    assert first["stream"] is True
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0]  # the image is still there
    assert [part["type"] for part in second["messages"][2]["content"]] == ["text"]
    page.get_by_role("button", name="New conversation").click()
    ask(page, "hello")
    assert len(page.bodies[2]["messages"]) == 1


@in_browser
def test_words_appear_while_they_come_and_stop_frees_the_slot(page, service, loaded, monkeypatch):
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", 10**6)
    service.limits = service.limits.model_copy(update={"default_tokens": 50_000})
    try:
        page.get_by_label("Your question").fill("a long story")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector(".theirs .numbers")
        lengths = set()
        wait_for(lambda: lengths.add(len(page.locator(".theirs .bubble").inner_text())) or len(lengths) > 3)
        assert service.served.engine.load == (0, 1)
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Ask").wait_for()
        wait_for(lambda: service.served.engine.load == (0, 0), 10)
        assert page.locator(".numbers").inner_text() == "stopped"
    finally:
        service.limits = LIMITS


@in_browser
def test_the_versions_own_example_is_offered_and_asked(page, service, tmp_path):
    assert page.get_by_role("button", name="Ask the example").count() == 0  # hidden: there is none
    Example(encoded(3), "<image>\nwhat is shown?", "a shape", 20).save(tmp_path / "example")
    before = service.served
    service.served = Served(before.engine, replace(before.source, example=tmp_path / "example"))
    try:
        page.reload()
        page.get_by_role("button", name="Ask the example").click()
        page.wait_for_selector("#log li:nth-child(2):not(.waiting)")
        keep(page, "desk-example")
        image, text = page.bodies[0]["messages"][0]["content"]
        assert text["text"] == "what is shown?"
        assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == encoded(3)
        assert page.locator(".theirs .bubble").inner_text()
    finally:
        service.served = before


def test_an_example_needs_a_key_and_one_that_cannot_be_read_is_no_fault(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("MLMAMBA_API_KEYS", "k" * 20)
    service = serve(loaded, LIMITS)
    with running(service) as url:
        assert raw(url, "/example")[0] == 401
        key = {"Authorization": "Bearer " + "k" * 20}
        assert raw(url, "/example", headers=key)[0] == 404
        service.served = Served(service.served.engine, replace(service.served.source, example=tmp_path))
        assert raw(url, "/readyz")[1]["x-model-example"] == "1"
        status, _, body = raw(url, "/example", headers=key)
        assert (status, body["error"]["message"]) == (404, "the version's example cannot be read")
    service.served.engine.close()


@in_browser
def test_dropping_an_image_and_taking_it_out(page):
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), items = new DataTransfer();
            items.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            document.querySelector("main").dispatchEvent(
                new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: items }));
        }""",
        base64.b64encode(encoded(5)).decode(),
    )
    button = page.get_by_role("button", name="Take out dropped.png")
    button.wait_for()
    button.click()
    assert page.locator(".thumb").count() == 0


@in_browser
def test_a_large_image_is_made_smaller_before_it_is_sent(page, tmp_path):
    (tmp_path / "large.png").write_bytes(encoded(3, size=(4000, 1000)))
    page.get_by_label("Choose images").set_input_files(str(tmp_path / "large.png"))
    page.wait_for_selector(".thumb img")
    size = page.evaluate("(({naturalWidth: w, naturalHeight: h}) => [w, h])(document.querySelector('.thumb img'))")
    assert size == [1536, 384]
    assert ask(page, "what?").strip()


@in_browser
def test_what_is_transparent_in_a_large_image_is_sent_as_white(page, tmp_path):
    """As the service shows it to the model: a canvas that is not filled would make it black."""
    Image.new("RGBA", (4000, 1000)).save(tmp_path / "clear.png")
    page.get_by_label("Choose images").set_input_files(str(tmp_path / "clear.png"))
    page.wait_for_selector(".thumb img")
    uri = page.evaluate("document.querySelector('.thumb img').src")
    assert as_image(uri).getextrema() == ((255, 255),) * 3


@in_browser
def test_a_refusal_is_shown_and_the_question_kept(page):
    ask(page, "say <|endoftext|>")
    page.complaints.clear()  # the browser itself notes the status 400
    assert "mark of the prompt format" in page.locator(".bad .bubble").inner_text()
    assert page.get_by_label("Your question").input_value() == "say <|endoftext|>"
    assert ask(page, "hello").strip()


@in_browser
def test_everything_can_be_reached_with_the_keyboard(page, file):
    page.get_by_label("Choose images").set_input_files(file)
    page.wait_for_selector(".thumb")
    ask(page, "what?")
    page.get_by_label("Choose images").set_input_files(file)
    page.wait_for_selector(".thumb")
    page.get_by_label("Your question").focus()
    names = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        names.add(
            page.evaluate(
                "(document.activeElement.getAttribute('aria-label') || document.activeElement.textContent).trim()"
            )
        )
    assert names >= {"Choose images", "Ask", "New conversation", "Take out blocks.png"}


@in_browser
def test_on_a_phone(phone, file):
    phone.get_by_label("Choose images").set_input_files(file)
    phone.wait_for_selector(".thumb")
    ask(phone, "what is shown in this image, and where in it?")
    ask(phone, "sure?")
    keep(phone, "phone-answered")
    width, wide = phone.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert wide <= width == PHONE["width"]
    for name in ("Ask", "New conversation"):
        box = phone.get_by_role("button", name=name).bounding_box()
        assert box["height"] >= 44
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= PHONE["height"]  # no scrolling to reach it
    last = phone.locator("#log li:last-child .bubble").bounding_box()
    assert last["y"] + last["height"] < phone.locator("form").bounding_box()["y"] + 1


@in_browser
def test_with_an_api_key(browser, loaded, monkeypatch):
    monkeypatch.setenv("MLMAMBA_API_KEYS", "sesame")
    service = serve(loaded, LIMITS)
    with running(service) as url:
        for page in opened(browser, url, DESK):
            ask(page, "hello")
            page.complaints.clear()  # the browser itself notes the status 401
            assert "needs an API key" in page.locator(".bad .bubble").inner_text()
            page.get_by_label("This server asks for an API key").fill("sesame")
            assert ask(page, "hello").strip()
    service.served.engine.close()


def test_contrast_of_text_is_that_of_the_guidelines():
    """WCAG 2: 4.5 to 1 for text, 3 to 1 for the marks of controls, in both colour schemes."""
    for block in re.findall(r":root \{(.*?)\}", playground.HTML, re.DOTALL):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        text = [
            ("ink", "page"),
            ("ink", "card"),
            ("ink", "mine"),
            ("soft", "page"),
            ("soft", "card"),
            ("bad", "bad-card"),
        ]
        for front, back in [*text, ("on-accent", "accent"), ("card", "ink")]:
            assert contrast(colours[front], colours[back]) >= 4.5, (front, back)
        for front, back in [("accent", "card"), ("accent", "page"), ("edge", "card")]:
            assert contrast(colours[front], colours[back]) >= 3, (front, back)


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
