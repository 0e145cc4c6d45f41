"""The voting page, in a real headless Chromium, served by a process of its own."""

import asyncio
import json
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ENVIRONMENT, ROOT
from playwright.async_api import async_playwright
from playwright.sync_api import sync_playwright
from recipe_process import Forked

from rlhf.comparisons import make_task
from rlhf.errors import InputError
from rlhf.feedback.sampling import write_tasks
from rlhf.feedback.serving import need_free_port

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SERVER = """
import sys
from rlhf.feedback.assignment import Assignment
from rlhf.feedback.sampling import read_tasks
from rlhf.feedback.serving import serve, wait
from rlhf.feedback.vote_page import VotePage
from rlhf.feedback.votes import VoteFile
folder, port, ratings, overlap = sys.argv[1:]
assignment = Assignment(read_tasks(folder), VoteFile(folder + "/votes.jsonl"), overlap=float(overlap), repeats=0.0)
print(serve(VotePage(assignment, ratings == "True").blocks(), "127.0.0.1", int(port)), flush=True)
wait(lambda: False)
"""
NASTY = "<img src=x onerror=\"document.title='owned'\"> <|im_end|> {{value}} ${value}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(playwright):
    """The system's Chromium or Chrome, or else the one that playwright installed."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


class Server:
    """The page over the tasks and votes of a folder."""

    def __init__(self, folder, ratings=False, overlap=1.0, port=None):
        self.folder, self.port = folder, port or free_port()
        command = ["-c", SERVER, str(folder), str(self.port), str(ratings), str(overlap)]
        self.process = Forked(command, ENVIRONMENT, ROOT)
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1"), self.url

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def votes(self):
        lines = (self.folder / "votes.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(replies=2, count=4, **settings):
        tasks = [
            make_task("train", [{"role": "user", "content": f"Prompt {n} {NASTY}"}],
                      [f"Reply {n} {letter} {NASTY}" for letter in "wxyz"[:replies]], ["secret-model"] * replies)
            for n in range(count)
        ]  # fmt: skip
        write_tasks(str(tmp_path), tasks)
        servers.append(Server(tmp_path, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def open_page(browser, server, labeler="ada", **context):
    page = browser.new_context(**context).new_page()
    page.problems, page.asked = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(f"{server.url}?labeler={labeler}")
    page.get_by_text("Start", exact=True).click()
    page.wait_for_selector("[data-part=work]:not([hidden]), [data-part=done]:not([hidden])")
    return page


def answered(page, count):
    page.wait_for_function(
        f"document.querySelector('[data-part=count]')?.textContent.includes(': {count} answered')", timeout=10_000
    )


def shown_replies(page):
    return page.locator("[data-part=replies] .text").all_inner_texts()


def test_a_session_by_keyboard(browser, serve):
    server = serve(replies=4, count=3)
    page = open_page(browser, server)
    order = [text.split()[2] for text in shown_replies(page)]
    for key in ("c", "a", "t", "b", "Enter"):  # c best, then a and b tied, d last
        page.keyboard.press(key)
    answered(page, 1)
    (vote,) = server.votes()
    expected = {order[2]: 1, order[0]: 2, order[1]: 2, order[3]: 3}
    assert vote["ranks"] == [expected[letter] for letter in "wxyz"]
    page.keyboard.press("u")
    answered(page, 0)
    assert [text.split()[2] for text in shown_replies(page)] == order
    page.keyboard.press("s")
    answered(page, 1)
    page.keyboard.press("t")
    answered(page, 2)
    page.keyboard.press("a")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-part=done]:not([hidden])")
    kinds = [("undo" in line, line.get("skipped"), sorted(line.get("ranks", []))) for line in server.votes()]
    assert kinds == [
        (False, False, [1, 2, 2, 3]), (True, None, []), (False, True, []), (False, False, [1, 1, 1, 1]),
        (False, False, [1, 2, 2, 2]),
    ]  # fmt: skip
    assert page.problems == []


def test_a_session_by_mouse_with_ratings_on_a_phone(browser, serve):
    server = serve(replies=2, count=1, ratings=True)
    page = open_page(browser, server, viewport={"width": 390, "height": 800}, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first = shown_replies(page)[0].split()[2]
    page.locator(".reply").nth(0).locator(".rating").nth(5).click()
    page.locator(".reply").nth(1).locator(".rating").nth(1).click()
    page.locator(".choose").nth(0).click()
    page.locator("[data-part=save]").click()
    page.wait_for_selector("[data-part=done]:not([hidden])")
    (vote,) = server.votes()
    better = "wx".index(first)
    assert (vote["ranks"][better], vote["ratings"][better], vote["ratings"][1 - better]) == (1, 6, 2)


def test_what_people_wrote_stays_text_and_models_stay_anonymous(browser, serve):
    server = serve()
    page = open_page(browser, server, labeler="%3Cb%3Eada%3C%2Fb%3E")
    assert NASTY in page.locator(".message .text").inner_text()
    assert all(NASTY in text for text in shown_replies(page))
    assert "<b>ada</b>" in page.locator("[data-part=count]").inner_text()
    assert page.title() == "Compare replies"
    assert page.locator("[data-part=work] img").count() == 0
    assert "secret-model" not in page.content()
    assert all(url.startswith(server.url) or url.startswith("data:") for url in page.asked)
    assert page.problems == []


def test_reload_and_a_killed_server_lose_nothing(browser, serve, tmp_path):
    server = serve(count=3)
    page = open_page(browser, server)
    page.keyboard.press("a")
    answered(page, 1)
    before = shown_replies(page)
    page.reload()
    answered(page, 1)
    assert shown_replies(page) == before
    server.kill()
    page.keyboard.press("b")
    page.wait_for_function("document.querySelector('[data-part=status]').dataset.kind === 'error'")
    assert len(server.votes()) == 1
    again = Server(tmp_path, port=server.port)
    try:
        # the same page goes on with the new server; Gradio may reload it meanwhile, and with it lose a key
        for _ in range(20):
            page.keyboard.press("b")
            page.wait_for_timeout(1500)
            if len(again.votes()) > 1:
                break
        votes = again.votes()
        assert len(votes) > 1
        assert len({vote["task"] for vote in votes}) == len(votes)
        answered(page, len(votes))
    finally:
        again.kill()


def test_eight_labelers_at_once(serve):
    server = serve(count=12, overlap=0.5)

    async def work(browser, number):
        page = await browser.new_page()
        await page.goto(f"{server.url}?labeler=labeler{number}")
        await page.get_by_text("Start", exact=True).click()
        await page.wait_for_selector("[data-part=work]:not([hidden]), [data-part=done]:not([hidden])")
        for count in range(1, 13):
            if await page.locator("[data-part=done]:not([hidden])").count():
                break
            await page.keyboard.press("ab"[count % 2])
            await page.wait_for_function(
                f"document.querySelector('[data-part=count]')?.textContent.includes(': {count} answered')",
                timeout=60_000,
            )

    async def all_at_once():
        async with async_playwright() as playwright, await launch(playwright) as browser:
            await asyncio.gather(*(work(browser, number) for number in range(8)))

    with ThreadPoolExecutor(1) as pool:  # this thread has the loop of the other tests' browser
        pool.submit(lambda: asyncio.run(all_at_once())).result()
    votes = server.votes()
    keys = [(vote["labeler"], vote["task"]) for vote in votes]
    assert len(keys) == len(set(keys)) == 6 * 8 + 6  # the shared half by everybody, each of the others once
    assert len({task for _, task in keys}) == 12


def test_an_address_that_is_not_free_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--server_port {port}: in use. Give another one"):
            need_free_port("127.0.0.1", port)
    need_free_port("127.0.0.1", port)
    for name in ("no.such.host.invalid", "", "a" * 300, "a..b", "http://127.0.0.1", "127.0.0.1.", "999.1.1.1"):
        with pytest.raises(InputError, match=f"--server_name {name}: no such address"):
            need_free_port(name, port)
    with pytest.raises(InputError, match=r"--server_name 8\.8\.8\.8: no address of this machine"):
        need_free_port("8.8.8.8", port)
    with pytest.raises(InputError, match="--server_port 99999: must be from 0 to 65535"):
        need_free_port("127.0.0.1", 99999)
