"""The history page in a real browser: what is shown, on what screen, and that its refresh keeps the reader's place."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.chromium import Page, open_page
from tests.support.sandbox import Sandbox, start_sandbox

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def running_sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def running_page() -> Iterator[Page]:
    with open_page() as page:
        yield page


@pytest.fixture
def sandbox(running_sandbox: Sandbox) -> Sandbox:
    running_sandbox.clear_records()
    return running_sandbox


@pytest.fixture
def page(running_page: Page) -> Iterator[Page]:
    running_page.problems.clear()
    yield running_page
    assert running_page.problems == []


def report(sandbox: Sandbox, job_id: str, **changes: Any) -> None:
    body: dict[str, Any] = {
        "id": job_id,
        "input": "how many?",
        "llm_response": {"celery": {"task": f"shop.{job_id}", "outcome": "succeeded", "queue_wait_s": 0.25}},
        "tokens": {
            "completion_tokens": 380,
            "prompt_tokens": 2140,
            "cache_read_tokens": 12,
            "cache_write_tokens": 0,
            "total_tokens": 2520,
        },
        "is_success": True,
        "result": "forty-two",
        "duration": 1.5,
        "used_tools": ["count_things"],
    }
    sandbox.client.post("/agent-execution/agent-1/report_task", json={**body, **changes}).raise_for_status()


def fill(sandbox: Sandbox, count: int) -> None:
    for number in range(count):
        report(sandbox, f"job-{number}")


def tasks_shown(page: Page) -> list[str]:
    shown: list[str] = page.evaluate("[...document.querySelectorAll('td.task a')].map(each => each.textContent)")
    return shown


def test_a_record_is_shown_with_all_that_matters(sandbox: Sandbox, page: Page) -> None:
    lost = {"celery": {"task": "shop.pay", "outcome": "timed_out"}}
    report(sandbox, "job-1")
    report(sandbox, "job-2", is_success=False, llm_response=lost, result="TimeLimitExceeded(30)", tokens=None)
    page.open(f"{sandbox.url}/")
    failed, succeeded = page.evaluate("[...document.querySelectorAll('#live tbody tr')].map(row => row.innerText)")
    for word in ("succeeded", "shop.job-1", "1.5 s", "2,520", "count_things", "agent-1", "forty-two"):
        assert word in succeeded
    for word in ("timed out", "shop.pay", "TimeLimitExceeded(30)"):
        assert word in failed
    colours = page.evaluate("[...document.querySelectorAll('.badge')].map(each => getComputedStyle(each).color)")
    assert len(set(colours)) == 2
    assert "2 records · 1 failed · 2,520 tokens" in page.evaluate("document.body.innerText")


def test_one_record_has_a_page_of_its_own(sandbox: Sandbox, page: Page) -> None:
    report(sandbox, "job/1?x")
    page.open(f"{sandbox.url}/")
    page.evaluate("document.querySelector('td.task a').click()")
    page.wait_for("document.readyState === 'complete' && location.pathname.startsWith('/tasks/')")
    text = page.evaluate("document.body.innerText")
    for word in ("job/1?x", "2,140", "380", "how many?", "forty-two", "queue wait (seconds)", "0.25"):
        assert word in text


def test_nothing_that_was_reported_is_taken_for_html(sandbox: Sandbox, page: Page) -> None:
    report(
        sandbox,
        HOSTILE,
        input=HOSTILE,
        result=HOSTILE,
        used_tools=[HOSTILE],
        llm_response={"celery": {"task": HOSTILE, "outcome": HOSTILE, HOSTILE: HOSTILE}},
    )
    page.open(f"{sandbox.url}/")
    assert HOSTILE in page.evaluate("document.body.innerText")
    page.evaluate("document.querySelector('td.task a').click()")
    page.wait_for("document.readyState === 'complete' && location.pathname.startsWith('/tasks/')")
    assert HOSTILE in page.evaluate("document.querySelector('h1').innerText")
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert "owned" not in page.evaluate("document.title").split(" · ")[-1]


def test_new_records_appear_by_themselves(sandbox: Sandbox, page: Page) -> None:
    page.open(f"{sandbox.url}/")
    assert "No job has been reported yet." in page.evaluate("document.body.innerText")
    report(sandbox, "job-1")
    page.wait_for("document.body.innerText.includes('shop.job-1')")
    report(sandbox, "job-1", result="changed since")
    page.wait_for("document.body.innerText.includes('changed since')")
    assert tasks_shown(page) == ["shop.job-1"]


def test_the_refresh_keeps_place_and_focus(sandbox: Sandbox, page: Page) -> None:
    fill(sandbox, 40)
    page.open(f"{sandbox.url}/")
    page.evaluate("window.row = document.querySelectorAll('#live tbody tr')[20]; row.querySelector('a').focus()")
    page.evaluate("window.scrollTo(0, 900)")
    before = page.evaluate("row.getBoundingClientRect().top")
    for number in range(40, 45):
        report(sandbox, f"job-{number}")
    page.wait_for("document.body.innerText.includes('shop.job-44')")
    assert abs(page.evaluate("row.getBoundingClientRect().top") - before) < 2
    assert page.evaluate("row.isConnected && document.activeElement === row.querySelector('a')")
    assert tasks_shown(page)[0] == "shop.job-44"


def test_an_opened_detail_stays_open_over_a_refresh(sandbox: Sandbox, page: Page) -> None:
    report(sandbox, "job-1")
    page.open(f"{sandbox.url}/tasks/job-1")
    page.evaluate("document.querySelector('details').open = true")
    report(sandbox, "job-1", result="changed since")
    page.wait_for("document.body.innerText.includes('changed since')")
    assert page.evaluate("document.querySelector('details').open")


def test_a_sandbox_that_is_gone_is_said(page: Page) -> None:
    with start_sandbox() as sandbox:
        report(sandbox, "job-1")
        page.open(f"{sandbox.url}/")
    page.wait_for("document.body.innerText.includes('the sandbox does not answer')")
    assert tasks_shown(page) == ["shop.job-1"]
    page.problems.clear()  # the browser reports refused connections


def test_many_records_are_paged_and_pages_do_not_shift(sandbox: Sandbox, page: Page) -> None:
    fill(sandbox, 120)
    page.open(f"{sandbox.url}/")
    assert tasks_shown(page) == [f"shop.job-{number}" for number in range(119, 69, -1)]
    page.evaluate("document.querySelector('nav a[rel=next]').click()")
    page.wait_for("document.readyState === 'complete' && location.search.includes('before')")
    second = [f"shop.job-{number}" for number in range(69, 19, -1)]
    assert tasks_shown(page) == second
    report(sandbox, "job-120")
    page.wait_for("document.body.innerText.includes('121 records')")
    assert tasks_shown(page) == second
    page.evaluate("document.querySelector('nav a[rel=next]').click()")
    page.wait_for("document.readyState === 'complete' && document.body.innerText.includes('shop.job-0')")
    page.evaluate("document.querySelector('nav a[rel=prev]').click()")
    page.wait_for("document.readyState === 'complete' && location.search.includes('after')")
    assert tasks_shown(page) == second


def test_the_list_is_narrowed_by_agent_status_and_text(sandbox: Sandbox, page: Page) -> None:
    fill(sandbox, 3)
    report(sandbox, "job-3", is_success=False, result="out of paper")
    page.open(f"{sandbox.url}/")
    page.evaluate("form = document.querySelector('form'); form.elements.status.value = 'error'")
    page.evaluate("form.elements.status.dispatchEvent(new Event('change'))")
    page.wait_for("document.readyState === 'complete' && location.search.includes('status=error')")
    assert tasks_shown(page) == ["shop.job-3"]
    for query, expected in (
        ("q=PAPER", ["shop.job-3"]),
        ("agent=nobody", []),
        ("agent=agent-1&q=job-1", ["shop.job-1"]),
    ):
        page.open(f"{sandbox.url}/?{query}")
        assert tasks_shown(page) == expected
    assert page.evaluate("document.querySelector('input[name=q]').value") == "job-1"


@pytest.mark.parametrize("width", [320, 375, 768, 1440])
@pytest.mark.parametrize("path", ["/", "/tasks/job-1"])
def test_no_screen_needs_sideways_scrolling(sandbox: Sandbox, page: Page, width: int, path: str) -> None:
    report(sandbox, "job-1", result="word " * 80 + "x" * 400, used_tools=["a_rather_long_name_of_a_tool" * 3] * 4)
    page.open(f"{sandbox.url}{path}", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_CUT_OFF) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(sandbox: Sandbox, page: Page, scheme: str) -> None:
    report(sandbox, "job-1")
    report(sandbox, "job-2", is_success=False)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.open(f"{sandbox.url}/")
    contrasts = page.evaluate(_CONTRASTS)
    assert len(contrasts) > 10
    assert [each for each in contrasts if each["ratio"] < 4.5] == []


_CUT_OFF = """
[...document.querySelectorAll("main *:not(thead, thead *)")]
  .filter((each) => each.getBoundingClientRect().right > document.documentElement.clientWidth)
  .map((each) => each.outerHTML.slice(0, 80))
"""
_CONTRASTS = """
(() => {
  const channels = (colour) => {
    const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (channels(colour)[3] === 255) return channels(colour);
    }
  };
  const texts = document.querySelectorAll("a, .badge, td, th, .excerpt, .agent, .summary, label span, .place, code");
  return [...texts].map((node) => {
    const [ink, paper] = [luminance(channels(getComputedStyle(node).color)), luminance(ground(node))];
    return { text: node.textContent, ratio: (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) };
  });
})()
"""
