"""The two pages: the list of records, and one record. Pure: records in, HTML out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from urllib.parse import quote, urlencode

from xpander_celery.sandbox.pages import words
from xpander_celery.sandbox.pages.html import Markup, document, element, joined, together
from xpander_celery.sandbox.store import Filter, Record, Summary

_FILES = files("xpander_celery.sandbox.pages")
STYLE = _FILES.joinpath("page.css").read_text("utf-8")
SCRIPT = _FILES.joinpath("page.js").read_text("utf-8")
_COUNTS = (
    ("prompt_tokens", "Prompt tokens"),
    ("completion_tokens", "Completion tokens"),
    ("cache_read_tokens", "Read from cache"),
    ("cache_write_tokens", "Written to cache"),
)
STATUSES = ("completed", "error", "stopped", "pending", "executing")


@dataclass(frozen=True, slots=True)
class Listing:
    """One screen of the history. `newer` and `older` are query strings of the neighbours, None where there is none."""

    records: Sequence[Record]
    summary: Summary
    wanted: Filter
    agents: Sequence[str]
    newer: str | None
    older: str | None


def list_page(listing: Listing) -> str:
    """The page with the list."""
    body = together(
        _header(),
        element("main", _filters(listing), element("div", _listed(listing), id="live")),
    )
    return document("Task history · sandbox", body, style=STYLE, script=SCRIPT)


def task_page(record: Record) -> str:
    """The page of one record."""
    heading = element("h1", _badge(record), " ", words.name(record))
    shown = element("div", heading, _facts(record), _texts(record), id="live")
    back = element("p", element("a", "← Task history", href="/"), class_="back")
    return document(
        f"{words.name(record)} · sandbox",
        together(_header(), element("main", back, shown)),
        style=STYLE,
        script=SCRIPT,
    )


def missing_page(record_id: str) -> str:
    """The page for a record that is not there."""
    main = element(
        "main",
        element("h1", "No such task"),
        element("p", "The history has no record ", element("code", record_id), "."),
        element("p", element("a", "← Task history", href="/")),
    )
    return document("No such task · sandbox", together(_header(), main), style=STYLE, script=SCRIPT)


def query_of(wanted: Filter, **more: int) -> str:
    """The query string of a filter, with `more` at its end."""
    given = {"agent": wanted.agent_id, "status": (*wanted.statuses, None)[0], "q": wanted.text, **more}
    return urlencode({name: value for name, value in given.items() if value is not None})


def _header() -> Markup:
    return element(
        "header",
        element("a", element("strong", "Task history"), href="/"),
        element("span", "sandbox", class_="place"),
        element("span", id="fresh", role="status"),
    )


def _filters(listing: Listing) -> Markup:
    wanted = listing.wanted
    chosen = (*wanted.statuses, None)[0]
    return element(
        "form",
        _choice("agent", "Agent", "All agents", listing.agents, wanted.agent_id),
        _choice("status", "Status", "Any status", STATUSES, chosen),
        element(
            "label",
            element("span", "Text"),
            element("input", type="search", name="q", value=wanted.text or "", placeholder="Task, id, input, result"),
        ),
        element("button", "Filter", type="submit"),
        element("a", "Clear", href="/", class_="clear") if query_of(wanted) else None,
        method="get",
        action="/",
        role="search",
    )


def _choice(name: str, label: str, every: str, values: Sequence[str], chosen: str | None) -> Markup:
    given = values if chosen is None or chosen in values else [*values, chosen]
    options = [element("option", value, value=value, selected=value == chosen) for value in given]
    select = element("select", element("option", every, value=""), *options, name=name)
    return element("label", element("span", label), select)


def _listed(listing: Listing) -> Markup:
    if not listing.records:
        hint = "Nothing fits this filter." if query_of(listing.wanted) else "No job has been reported yet."
        return together(_summary(listing.summary), element("p", hint, class_="empty"))
    heads = ("Outcome", "Task", "Duration", "Tokens", "Tools", "Time")
    return together(
        _summary(listing.summary),
        element(
            "table",
            element("thead", element("tr", *(element("th", head, scope="col") for head in heads))),
            element("tbody", *(_row(record) for record in listing.records)),
        ),
        _neighbours(listing),
    )


def _summary(summary: Summary) -> Markup:
    jobs = f"{words.count(summary.records)} {'record' if summary.records == 1 else 'records'}"
    failed = element("span", f"{words.count(summary.failed)} failed", class_="bad" if summary.failed else None)
    return element("p", f"{jobs} · ", failed, f" · {words.count(summary.tokens)} tokens", class_="summary")


def _row(record: Record) -> Markup:
    said = record.result if record.result else record.input
    return element(
        "tr",
        element("td", _badge(record), class_="outcome"),
        element(
            "td",
            element("a", words.name(record), href=_address(record)),
            element("span", words.excerpt(said), class_="excerpt"),
            element("span", record.agent_id, class_="agent"),
            class_="task",
        ),
        element("td", words.duration(record.duration), class_="number", data_label="Duration"),
        element("td", words.tokens(record.tokens), class_="number", data_label="Tokens"),
        element("td", _tools(record), class_="tools", data_label="Tools"),
        element("td", _time(record.created_at), class_="when"),
        data_key=str(record.seq),
        data_version=f"{record.updated_at}/{record.status}",
    )


def _badge(record: Record) -> Markup:
    return element("span", words.outcome(record), class_=f"badge {words.tone(record)}")


def _tools(record: Record) -> Markup:
    if not record.used_tools:
        return element("span", "—", class_="none")
    return joined(element("code", tool) for tool in record.used_tools)


def _time(seconds: float) -> Markup:
    return element(
        "time", words.instant(seconds), datetime=words.instant(seconds).replace(" UTC", "Z").replace(" ", "T")
    )


def _neighbours(listing: Listing) -> Markup | None:
    if listing.newer is None and listing.older is None:
        return None
    newer = element("a", "← Newer", href=f"/?{listing.newer}", rel="prev") if listing.newer is not None else None
    older = element("a", "Older →", href=f"/?{listing.older}", rel="next") if listing.older is not None else None
    return element("nav", element("span", newer), element("span", older), aria_label="Pages")


def _facts(record: Record) -> Markup:
    counts = record.tokens or {}
    facts: list[tuple[str, Markup | str]] = [
        ("Agent", record.agent_id),
        ("Duration", words.duration(record.duration)),
        ("Tokens", words.tokens(record.tokens)),
        *((label, words.count(counts[key])) for key, label in _COUNTS if key in counts),
        ("Tools", _tools(record)),
        ("Recorded", _time(record.created_at)),
        ("Updated", _time(record.updated_at)),
        ("Reports", words.count(record.reports)),
        ("Status", record.status),
        ("Organization", record.organization_id),
        ("Id", element("code", record.id)),
    ]
    pairs = [together(element("dt", label), element("dd", value)) for label, value in facts]
    return element("dl", *(element("div", pair) for pair in pairs))


def _texts(record: Record) -> Markup:
    facts = words.celery_facts(record)
    rows = [
        element("tr", element("th", words.fact(label), scope="row"), element("td", _plain(value)))
        for label, value in facts.items()
        if value is not None
    ]
    return together(
        _text("Input", record.input),
        _text("Result", record.result),
        element("section", element("h2", "Celery"), element("table", *rows, class_="facts")) if rows else None,
        element(
            "details",
            element("summary", "Model response as it was reported"),
            element("pre", json.dumps(record.llm_response, indent=2, ensure_ascii=False), tabindex="0"),
        )
        if record.llm_response is not None
        else None,
    )


def _text(label: str, text: str | None) -> Markup:
    shown = element("pre", text, tabindex="0") if text else element("p", "none", class_="none")
    return element("section", element("h2", label), shown)


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(round(value, 3) if isinstance(value, float) else value, ensure_ascii=False)


def _address(record: Record) -> str:
    return f"/tasks/{quote(record.id, safe='')}"
