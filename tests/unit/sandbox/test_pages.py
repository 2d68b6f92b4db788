from typing import Any

import pytest

from xpander_celery.sandbox.contract import ReportBody
from xpander_celery.sandbox.pages import words
from xpander_celery.sandbox.pages.history import query_of
from xpander_celery.sandbox.pages.html import document, element, together
from xpander_celery.sandbox.store import Filter, Record, Store


def test_text_is_escaped_in_content_and_attributes() -> None:
    made = element("td", "<b>&\"'", element("i"), class_='" onload="x', data_key="1&2", hidden=True, lang=None)
    assert made.text == (
        '<td class="&quot; onload=&quot;x" data-key="1&amp;2" hidden>&lt;b&gt;&amp;&quot;&#x27;<i></i></td>'
    )


def test_an_element_without_an_end_has_none() -> None:
    assert element("input", name="q").text == '<input name="q">'
    assert together(None, "<", None).text == "&lt;"


def test_a_title_is_escaped_and_our_own_style_is_not() -> None:
    page = document("</title>", together(), style="a > b {}", script="1 < 2")
    assert "<title>&lt;/title&gt;</title>" in page
    assert "<style>a > b {}</style>" in page


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "—"),
        (0, "0 ms"),
        (0.0042, "4 ms"),
        (1, "1.0 s"),
        (59.94, "59.9 s"),
        (75.2, "1 min 15 s"),
        (3599.9, "1 h 0 min"),
        (4000, "1 h 6 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float | None, said: str) -> None:
    assert words.duration(seconds) == said


def test_counts_have_their_thousands_apart() -> None:
    assert words.tokens({"total_tokens": 1234567}) == "1,234,567"
    assert words.tokens(None) == words.tokens({"total_tokens": 0}) == "—"


def test_an_excerpt_is_one_short_line() -> None:
    assert words.excerpt("a\n\n  b\tc") == "a b c"
    assert words.excerpt(None) == ""
    assert len(words.excerpt("word " * 10_000)) == 161


def test_names_of_facts_have_their_units() -> None:
    assert [words.fact("queue_wait_s"), words.fact("trace_id")] == ["queue wait (seconds)", "trace id"]


def record(**changes: Any) -> Record:
    body: dict[str, Any] = {
        "id": "job-1",
        "input": None,
        "llm_response": None,
        "tokens": None,
        "is_success": True,
        "result": None,
        "duration": 0.0,
        "used_tools": [],
    }
    store = Store(":memory:")
    try:
        return store.report("agent-1", "sandbox", ReportBody(**{**body, **changes}))
    finally:
        store.close()


@pytest.mark.parametrize(
    ("changes", "outcome", "tone"),
    [
        ({}, "completed", "good"),
        ({"is_success": False}, "error", "bad"),
        ({"is_success": False, "llm_response": {"celery": {"outcome": "timed_out"}}}, "timed out", "bad"),
        ({"llm_response": {"celery": {"outcome": 7}}}, "completed", "good"),
        ({"llm_response": {"celery": "odd"}}, "completed", "good"),
        ({"llm_response": ["odd"]}, "completed", "good"),
    ],
)
def test_an_outcome_is_the_jobs_own_where_it_is_known(changes: dict[str, Any], outcome: str, tone: str) -> None:
    assert (words.outcome(record(**changes)), words.tone(record(**changes))) == (outcome, tone)


def test_a_record_without_a_task_is_called_by_what_was_asked() -> None:
    assert words.name(record(input="how many?")) == "how many?"
    assert words.name(record()) == "job-1"
    assert words.name(record(llm_response={"celery": {"task": "shop.pay"}}, input="x")) == "shop.pay"


def test_a_filter_is_written_as_its_query() -> None:
    wanted = Filter(agent_id="a&b", statuses=("error",), text="x y")
    assert query_of(wanted, before=7) == "agent=a%26b&status=error&q=x+y&before=7"
    assert query_of(Filter()) == ""
