"""A headless Chromium for tests of pages, driven through a pipe: nothing to install beside the browser.

With --remote-debugging-pipe it reads commands of the DevTools protocol from file descriptor 3 and writes answers and
events to 4, JSON that ends with a zero byte.
"""

import json
import os
import select
import shutil
import subprocess
from fcntl import F_DUPFD, fcntl
from itertools import count

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-pipe")  # fmt: skip
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
SECONDS = 60  # without a word from the browser
TEXTS = {"Enter": "\r", " ": " ", "+": "+", "-": "-"}  # keys that type something


class Browser:
    """One window with one page at a time; mouse, keys and fingers are real events of the browser."""

    def __init__(self, folder):
        (commands, self.write), (self.read, answers) = os.pipe(), os.pipe()

        def connect():  # in the new process: away from 3 and 4 first, each may be the other's place
            ends = [fcntl(end, F_DUPFD, 10) for end in (commands, answers)]
            os.dup2(ends[0], 3), os.dup2(ends[1], 4)

        self.process = subprocess.Popen([PROGRAM, *FLAGS, f"--user-data-dir={folder}"], preexec_fn=connect,
                                        close_fds=False, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(commands), os.close(answers)
        self.numbers, self.left, self.events, self.session = count(1), b"", [], {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for part in ("Page", "Runtime", "Log", "Network"):
            self(f"{part}.enable")

    def message(self):
        while b"\0" not in self.left:
            if not select.select([self.read], [], [], SECONDS)[0]:
                raise TimeoutError(f"{PROGRAM} has been silent for {SECONDS} s")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise EOFError(f"{PROGRAM} has ended")
            self.left += part
        text, _, self.left = self.left.partition(b"\0")
        return json.loads(text)

    def __call__(self, command, **parameters):
        number = next(self.numbers)
        text = json.dumps({"id": number, "method": command, "params": parameters} | self.session)
        os.write(self.write, text.encode() + b"\0")
        while (answer := self.message()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["result"]

    def js(self, code):
        """Value of an expression, of a promise when it is kept."""
        answer = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def visit(self, url, width=1280, height=900, dark=False):
        """Open a page and wait until it is drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        self.settle()

    def settle(self):
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def complaints(self):
        """What the browser has reported since the page was opened: errors, messages; requests after the page's own."""
        self.js("0")  # all events before this are read
        bad = [event for event in self.events if event["method"] in COMPLAINTS]
        return bad + [event for event in self.events if event["method"] == "Network.requestWillBeSent"][1:]

    def place(self, query, x, y):
        """A place inside an element, in pixels of the window, after scrolling to it."""
        found = f"document.querySelector({json.dumps(query)})"
        left, top = self.js(f"{found}.scrollIntoView({{block: 'center'}}), (({{left, top}}) => [left, top])"
                            f"({found}.getBoundingClientRect())")  # fmt: skip
        return {"x": left + x, "y": top + y}

    def mouse(self, query, *places):
        """Move to the first of the places inside an element; further ones are dragged to."""
        start, *ends = [self.place(query, *place) for place in places]
        self("Input.dispatchMouseEvent", type="mouseMoved", **start)
        if ends:
            self("Input.dispatchMouseEvent", type="mousePressed", button="left", clickCount=1, **start)
            for end in ends:
                self("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, **end)
            self("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **ends[-1])

    def tap(self, query, x, y):
        self("Emulation.setTouchEmulationEnabled", enabled=True)
        self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self.place(query, x, y)])
        self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self("Emulation.setTouchEmulationEnabled", enabled=False)

    def keys(self, *keys):
        for key in keys:
            text = {"text": TEXTS[key]} if key in TEXTS else {}
            self("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self):
        self.session = {}
        try:
            self("Browser.close")
            self.process.wait(10)
        except (EOFError, OSError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.read), os.close(self.write)
