"""Attacks on the voting page: foreign web pages in a real Chromium, forged and malformed requests, a full disk."""

import asyncio
import contextlib
import http.client
import http.server
import json
import resource
import socket
import threading

import pytest
from playwright.sync_api import sync_playwright
from test_pages import FLAGS, Server, answered, launch

from rlhf.comparisons import make_task
from rlhf.feedback.guard import Guard
from rlhf.feedback.sampling import write_tasks

API = "/gradio_api/component_server/"


class Visited(Server):
    """The voting page, and what it says about its 40 tasks."""

    def __init__(self, folder, **settings):
        write_tasks(str(folder), [make_task("train", f"p{n}", [f"r{n}a", f"r{n}b"], ["m", "m"]) for n in range(40)])
        super().__init__(folder, **settings)
        self.component = next(
            part["id"] for part in json.loads(self.get("/config")[1])["components"] if part["type"] == "html"
        )

    def get(self, path, **headers):
        return self.send("GET", path, None, headers)

    def send(self, method, path, body, headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        self.cookie = (answer.headers.get("set-cookie") or "").partition(";")[0]
        self.cookie_flags = answer.headers.get("set-cookie") or ""
        return answer.status, answer.read().decode()

    def body(self, function, data, tab="tab"):
        return json.dumps(
            {"data": data, "component_id": self.component, "fn_name": function, "session_hash": tab}
        ).encode()

    def ask(self, function, data, cookie="", tab="tab", **headers):
        headers = {"Content-Type": "application/json", **({"Cookie": cookie} if cookie else {}), **headers}
        status, text = self.send("POST", API, self.body(function, data, tab), headers)
        return json.loads(text) if status == 200 else (status, text)

    def answers(self):
        file = self.folder / "votes.jsonl"
        return self.votes() if file.exists() else []


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Visited(tmp_path_factory.mktemp("attacked"), overlap=0.0)
    yield server
    server.kill()
    assert "Traceback" not in server.process.stderr.read()


def answer_to(shown, **changes):
    return {"task": shown["id"], "turn": shown["turn"], "ranks": [1, 2], "ratings": [None, None], "skipped": False,
            **changes}  # fmt: skip


ATTACK = """
async ([url, body]) => {
  const tried = {};
  const attempt = async (name, act) => {
    try { tried[name] = await act(); } catch (error) { tried[name] = 'refused by the browser'; }
  };
  const api = url + 'gradio_api/component_server/';
  for (const type of ['application/json', 'text/plain', 'application/x-www-form-urlencoded']) {
    for (const mode of ['cors', 'no-cors']) {
      await attempt(`fetch ${type} ${mode}`, async () => {
        const answer = await fetch(api, { method: 'POST', mode, credentials: 'include', body,
                                          headers: { 'Content-Type': type } });
        return await answer.text();
      });
    }
  }
  await attempt('beacon', async () => String(navigator.sendBeacon(api, new Blob([body], { type: 'text/plain' }))));
  await attempt('read', async () => (await fetch(url + 'config', { credentials: 'include' })).text());
  await attempt('image', () => new Promise((done) => {
    const image = new Image();
    image.onload = () => done('loaded');
    image.onerror = () => done('failed');
    image.src = url + 'favicon.ico';
  }));
  await attempt('socket', () => new Promise((done) => {
    const socket = new WebSocket(url.replace('http', 'ws') + 'gradio_api/queue/join');
    socket.onopen = () => done('open');
    socket.onerror = () => done('failed');
  }));
  const form = (target) => {
    const made = document.createElement('form');
    const field = document.createElement('input');
    [made.action, made.method, made.enctype, made.target] = [api, 'POST', 'text/plain', target];
    [field.name, field.value] = [body.slice(0, -1) + ', "x": "', '"}'];
    made.append(field);
    document.body.append(made);
    made.submit();
  };
  // a frame that the browser blocks may stay silent
  const loaded = (frame) => new Promise((done) => { frame.onload = done; setTimeout(done, 500); });
  for (const sandbox of [null, 'allow-scripts allow-forms']) {
    const frame = document.createElement('iframe');
    if (sandbox) frame.setAttribute('sandbox', sandbox);
    frame.name = `frame ${sandbox}`;
    frame.src = url;
    document.body.append(frame);
    await loaded(frame);
    form(frame.name);
    await loaded(frame);
  }
  const lonely = document.createElement('iframe'); // its origin is "null"
  lonely.sandbox = 'allow-scripts';
  lonely.srcdoc = `<script>fetch(${JSON.stringify(api)}, { method: 'POST', mode: 'no-cors', credentials: 'include',
    body: ${JSON.stringify(body)} }).finally(() => parent.postMessage('tried', '*'));</` + 'script>';
  const said = new Promise((done) => { window.onmessage = done; });
  document.body.append(lonely);
  await said;
  return tried;
}
"""


@pytest.fixture
def foreign_page():
    """The address of another page's server on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b"<!doctype html><title>foreign</title><body>foreign</body>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    foreign = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=foreign.serve_forever, daemon=True).start()
    yield foreign.server_address[1]
    foreign.shutdown()


def test_other_pages_in_the_same_browser_neither_vote_nor_read_nor_frame(server, foreign_page):
    rules = "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP evil.localhost 127.0.0.1"
    FLAGS.append(rules)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        FLAGS.remove(rules)
        context = browser.new_context()
        own = context.new_page()
        own.goto(server.url)
        own.locator("[data-part=name]").fill("ada")
        own.get_by_text("Start", exact=True).click()
        own.wait_for_selector("[data-part=work]:not([hidden])")
        asked = []
        own.on("request", lambda request: asked.append(request.post_data))
        own.keyboard.press("a")
        answered(own, 1)
        before = server.answers()
        undo = server.body("undo", "ada", json.loads(asked[0])["session_hash"]).decode()
        for host in ("127.0.0.1", "localhost", "evil.example", "evil.localhost"):
            page = context.new_page()
            page.goto(f"http://{host}:{foreign_page}/")
            for url in (server.url, f"http://localhost:{server.port}/"):
                tried = page.evaluate(ATTACK, [url, undo])
                assert not any("labeler" in said or "data-part" in said for said in tried.values()), tried
                assert (tried["image"], tried["socket"]) == ("failed", "failed")
                assert not any(frame.locator("input").count() for frame in page.frames[1:])
            page.close()
        rebound = context.new_page()  # its name leads to this machine now
        assert "not this page's address" in rebound.goto(f"http://evil.example:{server.port}/").text()
        again = "([path, body]) => fetch(path, {method: 'POST', body}).then((answer) => answer.status).catch(() => 0)"
        assert rebound.evaluate(again, [API, undo]) in (0, 403)
        linked = context.new_page()
        linked.goto(f"http://evil.example:{foreign_page}/")
        linked.evaluate("url => { location = url; }", f"{server.url}?labeler=eve")
        linked.wait_for_selector("[data-part=name-form]:not([hidden])")
        assert linked.locator("[data-part=name]").input_value() == "eve"
        assert server.answers() == before
        own.keyboard.press("u")  # the session lives on, through all of that
        answered(own, 0)
        assert len(server.answers()) == len(before) + 1
        browser.close()


def test_a_vote_counts_once_and_only_from_the_session_that_was_asked(server):
    before = len(server.answers())
    asked = server.ask("open_task", "ben")
    cookie, task = server.cookie, asked["task"]
    assert all(flag in server.cookie_flags for flag in ("HttpOnly", "SameSite=Strict", "Path=/"))
    sent = {"labeler": "ben", "answer": answer_to(task)}
    made_up = cookie.partition("=")[0] + "=made-up.0123"
    for tab, other in enumerate(("", made_up, cookie[:-1] + ("0" if cookie[-1] != "0" else "1"))):
        assert "not asked here" in server.ask("vote", sent, other, f"another tab {tab}")["message"]
    assert server.ask("vote", sent, made_up)[0] == 403  # in the other's tab
    for changes, reason in (
        ({"turn": 1}, "not asked here"), ({"task": "0" * 16}, "no longer exists"), ({"turn": True}, "no valid answer"),
        ({"turn": 2}, "no valid answer"), ({"ranks": [True, True]}, "doesn't fit"),
        ({"ranks": [5, 900]}, "doesn't fit"),
        ({"ranks": [1]}, "doesn't fit"), ({"ranks": [1.0, 2.0]}, "doesn't fit"), ({"ranks": [1e999, 1]}, ""),
        ({"ranks": "12"}, "no valid answer"), ({"ratings": [9, 1]}, None), ({"skipped": 0}, "no valid answer"),
        ({"task": {"a": 1}}, "no valid answer"), ({"ranks": [[1], [2]]}, "doesn't fit"),
    ):  # fmt: skip
        if reason is not None:
            said = server.ask("vote", {"labeler": "ben", "answer": answer_to(task, **changes)}, cookie)
            assert reason in str(said) and len(server.answers()) == before, (changes, said)
    no_answers: tuple[object, ...] = (None, 3, "vote", [], {"labeler": "ben"}, {"labeler": ["ben"], "answer": {}})
    for wrong in no_answers:
        assert "error" in server.ask("vote", wrong, cookie)
    assert server.ask("vote", sent, cookie)["message"].startswith("Saved")
    for _ in range(2):
        assert "answered already" in server.ask("vote", sent, cookie)["message"]
    assert "nothing to undo" in server.ask("undo", "ben", "", "one more tab")["error"]
    assert len(server.answers()) == before + 1
    assert "Taken back" in server.ask("undo", "ben", cookie)["message"]


def test_made_up_names_starve_nobody(server):
    for number in range(40):
        server.ask("open_task", f"nobody {number}", tab=f"tab {number}")
    assert server.ask("open_task", "cleo", tab="cleo's")["task"]


def raw(server, content):
    """What the server answers to bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(content)
        said = b""
        while part := connection.recv(65536):
            said += part
    return said


def post(headers, body=b""):
    lines = [f"POST {API} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


JSON = "Content-Type: application/json"


def whole(body, *headers):
    """A request as the page sends it, but for its body and further headers."""
    return post([JSON, f"Content-Length: {len(body)}", *headers], body)


def get(path="/", *headers):
    return "\r\n".join([f"GET {path} HTTP/1.1", "Connection: close", *headers, "", ""]).encode()


HOST = "Host: localhost"
NAVIGATED = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate")
MALFORMED = {
    "no length": post([JSON]), "no JSON": whole(b"{bad}"), "a list": whole(b"[]"), "no number": whole(b'{"a": NaN}'),
    "a huge length": post([JSON, "Content-Length: 99999999999"]), "below 0": post([JSON, "Content-Length: -3"]),
    "no length at all": post([JSON, "Content-Length: x"]),
    "two": post([JSON, "Content-Length: 2", "Content-Length: 3"], b"{} "), "deep": whole(b"[" * 200_001),
    "no UTF-8": whole(b'{"\xff": 1}'),
    "nonsense in chunks": post([JSON, "Transfer-Encoding: chunked"], b"zz\r\n{}\r\n0\r\n\r\n"),
    "large chunks": post([JSON, "Transfer-Encoding: chunked"], b"fffff\r\n" + b"x" * 0xFFFFF + b"\r\n0\r\n\r\n"),
    "wrong types": whole(b'{"session_hash": [1, 2]}'), "keys missing": whole(b'{"session_hash": "a"}'),
    "no such part": whole(b'{"session_hash": "a", "component_id": 999, "fn_name": "vote", "data": 1}'),
    "no such function": whole(b'{"session_hash": "a", "component_id": 1, "fn_name": "__class__", "data": 1}'),
    "a part like no part": whole(b'{"session_hash": "a", "component_id": [], "fn_name": {}, "data": 1}'),
    "form data": post(["Content-Type: multipart/form-data; boundary=x", "Content-Length: 5"], b"--x--"),
    "origin null": whole(b"{}", "Origin: null"), "two hosts": whole(b"{}", "Host: evil.example"),
    "same site": whole(b"{}", "Sec-Fetch-Site: same-site"), "no host": b"GET / HTTP/1.0\r\n\r\n", "no host 1.1": get(),
    "foreign host": get("/", "Host: evil.example"), "host in front": get("/", "Host: 127.0.0.1.evil.example"),
    "host behind": get("/", "Host: 127.0.0.1@evil.example"),
    "frame": get("/", HOST, *NAVIGATED, "Sec-Fetch-Dest: iframe"),
    "part of the page": get("/config", HOST, *NAVIGATED, "Sec-Fetch-Dest: document"),
    "file": get("/gradio_api/file=/etc/passwd", HOST), "parents": get("/assets/../../../../etc/passwd", HOST),
    "hidden parents": get("/assets/..%2f..%2f..%2f..%2fetc/passwd", HOST), "a vote by GET": get(API, HOST),
    "delete": get("/", HOST).replace(b"GET", b"DELETE"), "options": get("/", HOST).replace(b"GET", b"OPTIONS"),
    "upload": whole(b"{}").replace(b"component_server", b"upload"), "no HTTP": b"\x16\x03\x01\x00nonsense\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED)
def test_what_the_page_never_sends_is_answered_in_one_line(server, request_bytes):
    head, _, body = raw(server, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4"), head
    assert len(body) < 200 and b"Traceback" not in body and b"root:" not in body


def test_addresses_of_this_machine_are_served_and_cannot_be_framed(server):
    for host in (f"127.0.0.1:{server.port}", "localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:9", "127.1.2.3"):
        said = raw(server, f"GET /config HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert said.startswith(b"HTTP/1.1 200"), host
        head = said.partition(b"\r\n\r\n")[0].lower()
        assert b"x-frame-options: deny" in head and b"frame-ancestors 'none'" in head
        assert b"unsafe-inline'; img" in head and b"access-control" not in head


@pytest.mark.parametrize(
    ("server_name", "own", "foreign"),
    [("127.0.0.1", ["127.0.0.1:7860", "localhost", "[::1]:1"], ["192.168.1.5:7860", "box.lan", "127.0.0.1.x.io", ":1"]),
     ("::1", ["[::1]:7860", "localhost:7860"], ["[fe80::1]:7860", "[::1", "[localhost]"]),
     ("[::1]", ["[::1]:7860"], ["[::2]:7860"]),
     ("192.168.1.5", ["192.168.1.5:7860", "localhost"], ["192.168.1.6:7860", "192.168.1.5.evil.example"]),
     ("Box.lan", ["box.lan:7860", "BOX.LAN", "127.0.0.1"], ["evil.lan", "box.lan.evil", "xbox.lan", "box.lan:7860:1"]),
     ("0.0.0.0", ["192.168.1.5:7860", "[2001:db8::1]", socket.gethostname()], ["evil.example", "0.0.0.0.x"])],
)  # fmt: skip
def test_the_chosen_address_is_served_and_no_other_name(server_name, own, foreign):
    async def page(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    guard = Guard(page, server_name, 7860, {})

    def status(host, origin=None):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.disconnect"}

        headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
        asyncio.run(guard(scope, receive, send))
        return sent[0]["status"]

    assert [status(host) for host in own] == [status(host, f"http://{host}") for host in own] == [200] * len(own)
    assert [status(host) for host in foreign] == [403] * len(foreign)
    assert {status(own[0], origin) for origin in ("null", f"https://{own[0]}", f"http://{own[0]}1", "http://x")} == {
        403
    }


def test_slow_clients_hold_up_nobody(server):
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    for number, connection in enumerate(slow):
        connection.sendall(post([JSON, "Content-Length: 9"], b"{")[: 20 + number * 3])
    with socket.create_connection(("127.0.0.1", server.port)) as endless, contextlib.suppress(OSError):
        endless.sendall(get("/", "X: " + "x" * 2_000_000))  # the server closes it before its end
    assert server.ask("open_task", "dora", tab="dora's")["labeler"] == "dora"
    for connection in slow:
        connection.close()


def test_a_full_disk_refuses_votes_and_the_server_goes_on(tmp_path):
    server = Visited(tmp_path, overlap=0.0)
    try:
        asked = server.ask("open_task", "ada")
        cookie = server.cookie
        sent = {"labeler": "ada", "answer": answer_to(asked["task"])}
        asked = server.ask("vote", sent, cookie)
        size = (tmp_path / "votes.jsonl").stat().st_size
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size + 25, resource.RLIM_INFINITY))
        sent = {"labeler": "ada", "answer": answer_to(asked["task"])}
        for _ in range(2):
            assert "not saved, can't be written" in server.ask("vote", sent, cookie)["error"]
            assert "not saved, can't be written" in server.ask("undo", "ada", cookie)["error"]
        assert server.ask("open_task", "ada", cookie)["progress"]["mine"] == 1
        assert (tmp_path / "votes.jsonl").stat().st_size == size
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert server.ask("vote", sent, cookie)["message"].startswith("Saved")
        assert len(server.votes()) == 2
    finally:
        server.kill()
