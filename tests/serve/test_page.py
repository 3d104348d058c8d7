"""The live page, in a real browser before a real server."""

import io
import json
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from urllib.error import URLError
from urllib.parse import quote, urlsplit

import neuroflow
import numpy as np
import pytest
import uvicorn
from models import exact, tiny
from neuroflow.serve.app import create_app
from neuroflow.serve.service import Service
from neuroflow.video.preprocess import Preprocessor
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "window-size=1280,900"]
ODD = "Gate.2_b:north-1"  # every kind of character that a name may have
PATIENCE = 30  # seconds


def ask(url, method="GET", body=None, **headers):
    """What a server answers: bytes."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return response.read()


def until(condition, of="condition"):
    """What `condition()` returns once that is true; it may fail to connect until then."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except URLError:
            pass
        time.sleep(0.05)
    raise TimeoutError(f"{of} did not come true in {PATIENCE} seconds")


class Browser:
    """A Chromium that WebDriver drives."""

    def __init__(self, port, directory):
        self._url = f"http://127.0.0.1:{port}"
        until(lambda: self._call("GET", "/status")["ready"], "chromedriver")
        options = {"binary": CHROMIUM, "args": [f"--{flag}" for flag in [*FLAGS, f"user-data-dir={directory}"]]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{session['sessionId']}"

    def _call(self, method, path, body=None):
        body = None if body is None else json.dumps(body).encode()
        return json.loads(ask(self._url + path, method, body, Content_Type="application/json"))["value"]

    def open(self, url):
        self._call("POST", "/url", {"url": url})
        self.run("sessionStorage.clear()")
        self._call("POST", "/url", {"url": "about:blank"})
        self.problems()
        self._call("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def text(self, selector):
        """The words of those elements that are seen."""
        return self.run(
            """return [...document.querySelectorAll(arguments[0])]
                .filter((each) => each.checkVisibility()).map((each) => each.innerText ?? each.textContent)""",
            selector,
        )

    def shows(self, selector, *words):
        """Wait until the elements are those, each with the words that it has."""
        until(lambda: self.text(selector) == list(words), f"{selector} {words}")

    def problems(self):
        return [entry for entry in self._call("POST", "/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def requested(self):
        """The addresses that were asked for since this was called last."""
        events = [json.loads(each["message"]) for each in self._call("POST", "/se/log", {"type": "performance"})]
        sent = [each["message"] for each in events if each["message"]["method"] == "Network.requestWillBeSent"]
        return {each["params"]["request"]["url"] for each in sent}

    def quit(self):
        self._call("DELETE", "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    with listening() as place:
        port = place.getsockname()[1]
    driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        browser = Browser(port, tmp_path_factory.mktemp("chromium"))
        yield browser
        browser.quit()
    finally:
        driver.terminate()
        driver.wait()


def listening(port=0):
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", port))
    return place


@pytest.fixture
def serve():
    """serve(port=0, token=None) -> the address of a new server, and what stops it."""
    stops = []

    def start(port=0, token=None):
        streams = neuroflow.StreamCache(max_streams=4, idle_seconds=60)
        tower = neuroflow.enable_cache(tiny("siglip"), exact(threshold=0.01), streams=streams)
        app = create_app(Service(tower, Preprocessor(48, 48), streams), token=token)
        server, place = uvicorn.Server(uvicorn.Config(app, log_level="error")), listening(port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()

        def stop():
            server.should_exit = True
            thread.join()
            place.close()

        stops.append(stop)
        until(lambda: server.started, "the server's start")
        return f"http://127.0.0.1:{place.getsockname()[1]}", stop

    yield start
    for stop in stops:
        stop()


def images(seed=0):
    """A light texture in which another patch changes in every frame, as JPEG."""
    random = np.random.default_rng(seed)
    image = random.integers(170, 256, (6, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    while True:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        yield file.getvalue()
        row, column = random.integers(0, 6, 2) * 8
        image[row : row + 8, column : column + 8] = random.integers(170, 256, (8, 8, 3))


def send(url, stream, image, **headers):
    return json.loads(ask(f"{url}/v1/streams/{stream}/frames", "POST", image, Content_Type="image/jpeg", **headers))


def percent(share):
    return f"{100 * share:.1f} %"


def patches(browser):
    """Of the middles of the patches that are drawn, red, green and blue: [6, 6, 3]."""
    drawn = browser.run("""
        const canvas = document.getElementById("picture"), context = canvas.getContext("2d");
        const at = (index, side) => Math.floor(((index % 6) + 0.5) * side / 6);
        return Array.from({ length: 36 }, (_, index) => [...context.getImageData(
            at(index, canvas.width), at(Math.floor(index / 6), canvas.height), 1, 1).data].slice(0, 3));
    """)
    return np.array(drawn).reshape(6, 6, 3)


def test_what_the_page_shows_is_what_the_service_says(browser, serve):
    url, _ = serve()
    cameras = {"door": images(), ODD: images(1)}
    for name, count in (("door", 6), (ODD, 4)):
        for _ in range(count):
            send(url, name, next(cameras[name]))
    browser.open(url)
    browser.requested()
    browser.shows("tbody button", ODD, "door")
    browser.shows("#name", ODD)
    until(lambda: browser.text("#without"), "a word that no picture is kept yet")
    send(url, ODD, next(cameras[ODD]))
    browser.shows("#without")

    listed = json.loads(ask(f"{url}/v1/streams"))["streams"]
    assert [each["stream"] for each in listed] == [ODD, "door"]
    cells = [
        word
        for each in listed
        for word in (percent(each["skipped"]), f"{each['frames']}", f"{each['state_bytes'] / 1024:.0f} KiB")
    ]
    browser.shows("td:is(:nth-child(2), :nth-child(3), :nth-child(4))", *cells)
    detail = json.loads(ask(f"{url}/v1/streams/{quote(ODD)}"))
    active, surprise = np.array(detail["active"], bool), np.array(detail["surprise"], float)
    browser.shows("#frame", "4")
    browser.shows("#encoded", f"{active.sum()} of 36")
    browser.shows("#key-frames", "1 of 5")
    browser.shows("#skipped", percent(detail["skipped"]))
    browser.shows("#reasons em", "first")
    browser.shows("#charts .reason", "first")
    browser.shows("#total-cameras", "2")

    assert 0 < active.sum() < 36
    np.testing.assert_array_equal(patches(browser).min(-1) > 120, active)  # the others are dimmed
    browser.run("document.querySelector('[value=surprise]').click()")
    coloured = np.ptp(patches(browser), axis=-1) > 20  # over a picture in grey
    np.testing.assert_array_equal(coloured, surprise >= 0.01)

    browser.run("document.getElementById('charts').focus()")
    for _ in range(4):
        browser.run("""document.getElementById('charts').dispatchEvent(
            new KeyboardEvent('keydown', { key: 'ArrowLeft', bubbles: true }))""")
    (told,) = browser.text("#readout")
    assert told.startswith("frame 0 ") and told.endswith("key frame, first: the first of its stream")

    browser.run("[...document.querySelectorAll('tbody button')][1].click()")
    browser.shows("#name", "door")
    browser.shows("#key-frames", "1 of 6")
    send(url, "door", next(cameras["door"]))
    browser.shows("#key-frames", "1 of 7")
    browser.shows("#without")
    assert browser.run("return location.hash") == "#door"

    assert browser.problems() == []
    hosts = {urlsplit(each)[:2] for each in browser.requested()}
    assert hosts == {("http", url.removeprefix("http://"))}

    browser.run(
        """const real = fetch;
        window.fetch = async (path, ...rest) => {
            const answer = await real(path, ...rest);
            if (path !== "v1/streams") return answer;
            const list = await answer.json();
            list.streams[0].stream = arguments[0];
            return Response.json(list);
        };""",
        "<b>no route lets in</b>",
    )
    browser.shows("tbody button", "<b>no route lets in</b>", "door")
    browser.run("document.head.append(Object.assign(document.createElement('script'), { text: 'name = 1' }))")
    assert browser.run("return name") == "" and "Content Security Policy" in browser.problems()[0]["message"]


def test_a_token_is_asked_for_and_kept_for_the_tab_alone(browser, serve):
    url, _ = serve(token="secret")
    frames = images()
    send(url, "door", next(frames), Authorization="Bearer secret")
    browser.open(url)
    enter = "const field = document.getElementById('token'); field.value = arguments[0]; field.form.requestSubmit()"
    until(lambda: browser.text("#locked"), "the question for a token")
    assert browser.text("#refused") == []
    browser.run(enter, "wrong")
    browser.shows("#refused", "The server refused that token.")
    assert browser.text("main") == []
    browser.run(enter, "secret")
    browser.shows("#name", "door")
    send(url, "door", next(frames), Authorization="Bearer secret")
    browser.shows("#without")
    assert browser.run("return [localStorage.length, document.cookie, sessionStorage.token]") == [0, "", "secret"]
    assert "secret" not in browser.run("return document.documentElement.outerHTML + location.href")
    assert not any("secret" in each for each in browser.requested())


def test_it_follows_a_server_and_cameras_that_come_and_go(browser, serve):
    url, stop = serve()
    browser.open(url)
    until(lambda: browser.text("#empty"), "the page without cameras")
    *_, address = shlex.split(browser.text("#command")[0])
    assert address == f"{url}/v1/streams/cam-1/frames"
    ask(address, "POST", next(images()), Content_Type="image/jpeg")
    browser.shows("#name", "cam-1")
    browser.shows("#frame", "0")
    assert browser.problems() == []

    ask(f"{url}/v1/streams/cam-1", "DELETE")
    until(lambda: browser.text("#notice"), "the notice")
    assert browser.text("#notice")[0].startswith("Closed")
    assert browser.text("#frame") == ["0"] and browser.text("tbody button") == []

    stop()
    until(lambda: browser.text("#connection")[0].startswith("no answer"), "a word that the server is gone")
    serve(port=urlsplit(url).port)
    browser.shows("#connection", "live")
    send(url, "cam-1", next(images()))
    browser.shows("tbody button", "cam-1")
    browser.shows("#notice")

    hide = """Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
        document.dispatchEvent(new Event("visibilitychange"))"""
    browser.run(hide, True)
    browser.shows("#connection", "paused while hidden")
    browser.run(hide, False)
    browser.shows("#connection", "live")
