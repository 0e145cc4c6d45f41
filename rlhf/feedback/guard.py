"""What stands before a page's server: it passes on what the page itself sends, and answers everything else in one line.

Other web pages in the same browser can send requests to this machine too. Browsers say where a request comes from, in
`Host`, `Origin` and `Sec-Fetch-Site`. Sources: the Fetch standard, sections 3.2 (Origin) and "Fetch Metadata Request
Headers" (W3C); OWASP, "Cross-Site Request Forgery Prevention".
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, NoReturn
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]  # of ASGI
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LONGEST_BODY = 256 * 1024  # bytes
LONGEST_WAIT = 10.0  # seconds for a body
MOST_TABS = 10_000  # tabs whose session is remembered
API = "/gradio_api"
# what Gradio's page asks for; its uploads, files, proxies and monitoring are not needed
READ = (
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/assets/", "/static/", f"{API}/info",
    f"{API}/heartbeat/", f"{API}/queue/data", f"{API}/startup-events",
)  # fmt: skip
WRITE = (f"{API}/component_server", f"{API}/queue/join", f"{API}/cancel", f"{API}/reset")
HEADERS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
# Gradio compiles templates, which needs unsafe-eval; its inline scripts are named by their hashes
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{hashes}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that isn't passed on."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """Middleware around a page. A request that it passes on has `session` in its state, made by this server.

    Args:
        app: the ASGI application behind it.
        server_name: the address that the page is served at.
        port: names the cookie, because cookies of one host reach all its ports.
        inputs: how many values each event of the page sends, by Gradio's number of the event.
    """

    def __init__(self, app: App, server_name: str, port: int, inputs: Mapping[int, int]) -> None:
        self.inputs = inputs
        self.app, self.server_name, self.cookie = app, server_name.strip("[]").lower(), f"rlhf-session-{port}"
        self._key = secrets.token_bytes(32)
        self._sessions: dict[str, str] = {}  # by Gradio's random name of a tab

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            await self._http(scope, receive, send)
        except Refused as refused:
            await _answer(send, refused.status, str(refused))

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        self._check_source(scope, headers)
        session, cookie = self._session(headers), None
        if scope["method"] == "POST":
            if session is None:
                session = self._sign(secrets.token_urlsafe(16))
                cookie = f"{self.cookie}={session}; Path=/; HttpOnly; SameSite=Strict"
            body = await _body(headers, receive)
            content = json.loads(body)
            if scope["path"].rstrip("/") == f"{API}/queue/join":
                self._check_event(content.get("fn_index"), content.get("data"))
            self._claim_tab(content.get("session_hash"), session)
            receive = _replay(body, receive)
        else:
            name = scope["path"].removeprefix(f"{API}/heartbeat/") if "/heartbeat/" in scope["path"] else None
            query = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [name])
            if self._sessions.get(query[0] or "", session) != session:
                raise Refused(403, "This tab belongs to another session.")
        kept = [(n, v) for n, v in scope["headers"] if not n.startswith(b"x-forwarded-")]
        if scope["path"] == "/":  # uncompressed, so that its scripts can be read
            kept = [(name, value) for name, value in kept if name != b"accept-encoding"]
        scope = {**scope, "headers": kept, "state": {**scope.get("state", {}), "session": session or ""}}
        await self._pass_on(scope, receive, _Answer(send, cookie, whole=scope["path"] == "/"))

    async def _pass_on(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            await self.app(scope, receive, answer)
        except Exception as error:  # the page sends nothing that raises, so this is no request of the page
            if not answer.begun:
                raise Refused(400, f"This request can't be answered ({type(error).__name__}).") from error
        if answer.failed:
            raise Refused(400, "This request can't be answered.")

    def _check_source(self, scope: Scope, headers: dict[str, list[str]]) -> None:
        """Refuse what the page itself doesn't send."""
        path, method = scope["path"], scope["method"]
        if any(len(headers.get(name, [])) > 1 for name in ("host", "origin", "content-length", "content-type")):
            raise Refused(400, "A header is given twice.")
        host, origin, site, mode, destination = (
            headers.get(name, [""])[0]
            for name in ("host", "origin", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")
        )
        if not self._is_own_host(host):
            raise Refused(403, "The Host of this request is not this page's address.")
        if "origin" in headers and origin.lower() != f"http://{host}".lower():
            raise Refused(403, "This request comes from another page.")
        opened = (method, path, mode, destination) == ("GET", "/", "navigate", "document")  # a link to the page
        if site not in ("", "same-origin", "none") and not opened:
            raise Refused(403, "This request comes from another page.")
        if destination in ("iframe", "frame", "embed", "object"):
            raise Refused(403, "This page can't be framed.")
        writes = path.rstrip("/") in WRITE
        if not writes and not any(path == known or (known[1:] and known[-1] == "/" and path.startswith(known))
                                         for known in READ):  # fmt: skip
            raise Refused(404, "There is nothing at this address.")
        if method not in (("POST",) if writes else ("GET", "HEAD")):
            raise Refused(405, "This address takes no such request.")

    def _is_own_host(self, host: str) -> bool:
        """Whether a Host header names this page. Its port may differ: ssh -L forwards from any.

        A name of another's could lead here (DNS rebinding); an address can't.
        """
        found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", host.lower())
        if not found:
            return False
        name = found[1] or found[2]
        names = {"localhost", self.server_name}
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in names | ({socket.gethostname().lower()} if self._serves_all() else set())
        return name in names or address.is_loopback or self._serves_all()

    def _serves_all(self) -> bool:
        return self.server_name in ("0.0.0.0", "::")

    def _sign(self, token: str) -> str:
        return f"{token}.{hmac.new(self._key, token.encode(), hashlib.sha256).hexdigest()[:32]}"

    def _session(self, headers: dict[str, list[str]]) -> str | None:
        """The session of the request's cookie, if this server made it."""
        with contextlib.suppress(CookieError):
            found = SimpleCookie("; ".join(headers.get("cookie", []))).get(self.cookie)
            if found and hmac.compare_digest(self._sign(found.value.partition(".")[0]).encode(), found.value.encode()):
                return found.value
        return None

    def _check_event(self, event: object, data: object) -> None:
        """Refuse an event that Gradio would run and fail with a traceback."""
        if type(event) is not int or not isinstance(data, list) or len(data) != self.inputs.get(event):
            raise Refused(400, "This page has no such event.")

    def _claim_tab(self, tab: object, session: str) -> None:
        if not isinstance(tab, str) or not 0 < len(tab) <= 64:
            raise Refused(400, "This request lacks its session_hash.")
        if self._sessions.setdefault(tab, session) != session:
            raise Refused(403, "This tab belongs to another session.")
        if len(self._sessions) > MOST_TABS:
            del self._sessions[next(iter(self._sessions))]


class _Answer:
    """Sends an answer with the guard's headers. An error of the application behind is kept back (`failed`).

    Args:
        whole: the answer is a page of HTML: its inline scripts are allowed by their hashes.
    """

    def __init__(self, send: Send, cookie: str | None, whole: bool) -> None:
        self.send, self.cookie, self.whole = send, cookie, whole
        self.begun = self.failed = False
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.failed = message["status"] >= 500
            self._start = message
            if not self.failed and not self.whole:
                await self._begin("")
        elif message["type"] == "http.response.body" and self.whole and not self.begun and not self.failed:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._begin(_script_hashes(self._body))
                await self.send({**message, "body": self._body})
        elif self.begun:
            await self.send(message)

    async def _begin(self, hashes: str) -> None:
        self.begun = True
        drop = (b"access-control-", b"server", *(name.encode() for name in HEADERS))
        kept = [(n, v) for n, v in self._start.get("headers", []) if not n.lower().startswith(drop)]
        added = {**HEADERS, "content-security-policy": POLICY.format(hashes=hashes)}
        if self.cookie:
            added["set-cookie"] = self.cookie
        await self.send({**self._start, "headers": [*kept, *((n.encode(), v.encode()) for n, v in added.items())]})


def _script_hashes(page: bytes) -> str:
    scripts = re.findall(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", page, re.DOTALL)
    return "".join(f" 'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)


def _headers(scope: Scope) -> dict[str, list[str]]:
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return headers


async def _body(headers: dict[str, list[str]], receive: Receive) -> bytes:
    """The body of a request: a JSON object.

    Raises:
        Refused: if it is something else, too large or too slow.
    """
    if headers.get("content-type", [""])[0].partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "A request must be application/json.")
    length = headers.get("content-length", ["0"])[0]
    if not length.isdecimal() or int(length[:20]) > 64 * LONGEST_BODY:
        raise Refused(413, f"A request has at most {LONGEST_BODY} bytes.")
    try:
        body = await asyncio.wait_for(_receive_all(receive), LONGEST_WAIT)
    except asyncio.TimeoutError:
        raise Refused(408, f"The request took more than {LONGEST_WAIT:.0f} seconds.") from None
    try:
        if not isinstance(json.loads(body.decode(), parse_constant=_no_number), dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise Refused(400, "The body of a request must be a JSON object.") from None
    return body


async def _receive_all(receive: Receive) -> bytes:
    body, length, more = b"", 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "The request ended early.")
        length += len(message.get("body", b""))
        # a body that is too large is read to its end, without keeping it: a client that still sends hears no answer
        body = body + message.get("body", b"") if length <= LONGEST_BODY else b""
        more = message.get("more_body", False)
    if length > LONGEST_BODY:
        raise Refused(413, f"A request has at most {LONGEST_BODY} bytes.")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def _answer(send: Send, status: int, reason: str) -> None:
    body = f"{reason}\n".encode()
    headers = {**HEADERS, "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
               "content-type": "text/plain; charset=utf-8", "content-length": str(len(body)),
               "connection": "close"}  # fmt: skip
    start = {"type": "http.response.start", "status": status,
             "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}  # fmt: skip
    await send(start)
    await send({"type": "http.response.body", "body": body})
