"""The platform's routes, asked over HTTP semantics in this process."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import httpx
import pytest

from xpander_celery.sandbox.app import build_app
from xpander_celery.sandbox.store import Store

KEY = "the-key"
REPORT: dict[str, Any] = {
    "id": "job-1",
    "input": "how many?",
    "llm_response": {"celery": {"task": "shop.count"}},
    "tokens": {
        "completion_tokens": 3,
        "prompt_tokens": 4,
        "cache_read_tokens": 1,
        "cache_write_tokens": 0,
        "total_tokens": 7,
    },
    "is_success": True,
    "result": "forty-two",
    "duration": 1.5,
    "used_tools": ["count"],
}


@asynccontextmanager
async def sandbox(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
    with closing(Store(":memory:")) as store:
        transport = httpx.ASGITransport(build_app(store, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as client:
            yield client


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with sandbox(api_keys=frozenset([KEY])) as client:
        client.headers["x-api-key"] = KEY
        yield client


async def report(client: httpx.AsyncClient, agent_id: str = "agent-1", **changes: Any) -> dict[str, Any]:
    response = await client.post(f"/agent-execution/{agent_id}/report_task", json={**REPORT, **changes})
    assert response.status_code == 200, response.text
    task: dict[str, Any] = response.json()
    return task


async def test_a_report_becomes_a_task_with_all_that_was_reported(client: httpx.AsyncClient) -> None:
    task = await report(client)
    assert task == (await client.get("/agent-execution/job-1/status")).json()
    assert {name: task[name] for name in REPORT if name != "input"} == {
        name: value for name, value in REPORT.items() if name != "input"
    }
    assert task["input"] == {"text": "how many?"}
    assert (task["agent_id"], task["status"], task["organization_id"]) == ("agent-1", "completed", "sandbox")
    assert task["created_at"].endswith("+00:00")


async def test_a_failed_job_has_the_status_error(client: httpx.AsyncClient) -> None:
    assert (await report(client, is_success=False))["status"] == "error"


async def test_reporting_an_id_again_updates_its_record(client: httpx.AsyncClient) -> None:
    first = await report(client, is_success=False, result="lost")
    second = await report(client, result="found")
    history = (await client.get("/agent-execution/executions/history/agent-1")).json()
    assert [(task["id"], task["result"], task["reports"]) for task in history] == [("job-1", "found", 2)]
    assert second["created_at"] == first["created_at"]


async def test_a_report_without_an_id_gets_one_of_its_own(client: httpx.AsyncClient) -> None:
    ids = {(await report(client, id=None))["id"] for _ in range(3)}
    assert len(ids) == 3
    assert None not in ids


async def test_ids_and_agents_may_hold_slashes_and_question_marks(client: httpx.AsyncClient) -> None:
    await report(client, agent_id="team%2Fagent%3F1", id="a/b?c")
    assert (await client.get("/agent-execution/a%2Fb%3Fc/status")).json()["agent_id"] == "team/agent?1"
    assert len((await client.get("/agent-execution/executions/history/team%2Fagent%3F1")).json()) == 1


async def test_text_of_any_script_comes_back_as_it_went(client: httpx.AsyncClient) -> None:
    text = 'naïve 日本 🎉 \u2028 <b>"\\ \x00'
    assert (await report(client, result=text))["result"] == text


@pytest.mark.parametrize("key", [None, "", "wrong"])
async def test_a_bad_key_is_refused(client: httpx.AsyncClient, key: str | None) -> None:
    headers = {} if key is None else {"x-api-key": key}
    client.headers.pop("x-api-key")
    for method, path in (("POST", "/agent-execution/a/report_task"), ("GET", "/agents/a")):
        assert (await client.request(method, path, headers=headers)).status_code == 403


async def test_without_given_keys_any_key_is_let_in() -> None:
    async with sandbox() as client:
        assert (await client.get("/agents/a", headers={"x-api-key": "whatever"})).status_code == 200
        assert (await client.get("/agents/a")).status_code == 403


async def test_a_body_that_is_not_the_contracts_is_answered_with_422(client: httpx.AsyncClient) -> None:
    response = await client.post("/agent-execution/a/report_task", json={**REPORT, "duration": "long"})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "duration"]
    assert (await client.get("/agent-execution/executions/history/a")).json() == []


async def test_an_organization_in_the_path_is_kept(client: httpx.AsyncClient) -> None:
    response = await client.post("/agent-controller/org-9/agent-execution/a/report_task", json=REPORT)
    assert response.json()["organization_id"] == "org-9"


async def test_the_history_is_newest_first_and_can_be_narrowed(client: httpx.AsyncClient) -> None:
    for number in range(5):
        await report(client, id=f"job-{number}", is_success=number != 3)
    await report(client, agent_id="another", id="job-9")
    path = "/agent-execution/executions/history/agent-1"

    async def ids(**query: Any) -> list[str]:
        return [task["id"] for task in (await client.get(path, params=query)).json()]

    assert await ids() == ["job-4", "job-3", "job-2", "job-1", "job-0"]
    assert await ids(limit=2) == ["job-4", "job-3"]
    assert await ids(status="error") == ["job-3"]


async def test_an_invoked_task_runs_and_ends(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("xpander_celery.sandbox.store.time.time", lambda: now)
    body = {"id": None, "input": {"text": "hello", "files": [], "user": {"id": "u-1"}}, "source": "sdk", "title": None}
    task = (await client.post("/agent-execution/agent-1", json=body)).json()
    statuses = [task["status"]]
    for now in (1000.2, 1000.4):  # noqa: B007 - the patched clock reads it
        statuses.append((await client.get(f"/agent-execution/{task['id']}/status")).json()["status"])
    assert statuses == ["pending", "executing", "completed"]
    [listed] = (await client.get("/agent-execution/executions/history/user/u-1")).json()
    assert listed["result"] == "The sandbox heard: hello"
    assert listed["input"]["user"] == {"id": "u-1"}


async def test_an_invoked_task_that_is_asked_to_fail_ends_in_error(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("xpander_celery.sandbox.store.time.time", lambda: now)
    task = (await client.post("/agent-execution/agent-1", json={"input": {"text": "please fail"}})).json()
    now = 1001.0
    assert (await client.get(f"/agent-execution/{task['id']}/status")).json()["status"] == "error"


async def test_a_locally_run_task_is_left_to_its_caller(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = (await client.post("/agent-execution/agent-1", json={"input": {"text": "x"}, "run_locally": True})).json()
    monkeypatch.setattr("xpander_celery.sandbox.store.time.time", lambda: 2.0**33)
    assert (await client.get(f"/agent-execution/{task['id']}/status")).json()["status"] == "pending"


async def test_an_update_keeps_what_it_does_not_name(client: httpx.AsyncClient) -> None:
    await report(client)
    updated = (await client.patch("/agent-execution/job-1/update", json={"status": "paused", "note": "mine"})).json()
    assert (updated["status"], updated["result"], updated["note"]) == ("paused", "forty-two", "mine")
    assert (await client.delete("/agent-execution/job-1")).json()["status"] == "stopped"


async def test_an_update_replaces_input_and_title_and_forgets_the_clients_configuration(
    client: httpx.AsyncClient,
) -> None:
    await report(client)
    body = {"title": "new", "input": {"text": "how few?", "files": ["f"]}, "configuration": {"api_key": KEY}}
    await client.patch("/agent-execution/job-1/update", json=body)
    task = (await client.get("/agent-execution/job-1/status")).json()
    assert (task["title"], task["input"]["text"], task["input"]["files"]) == ("new", "how few?", ["f"])
    assert KEY not in json.dumps(task)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/agent-execution/none/status"),
        ("PATCH", "/agent-execution/none/update"),
        ("DELETE", "/agent-execution/none"),
        ("GET", "/activity/a/none"),
        ("GET", "/agents/a/db"),
    ],
)
async def test_what_is_not_there_is_404(client: httpx.AsyncClient, method: str, path: str) -> None:
    assert (await client.request(method, path, json={})).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [
        ("POST", "/agents-metrics/a/execution", {}),
        ("POST", "/agent-execution/t/events/push", {}),
        ("GET", "/metadata/default_llm_extra_headers", {}),
        ("POST", "/tools/a/channel-presence", {}),
    ],
)
async def test_the_small_routes_answer(client: httpx.AsyncClient, method: str, path: str, answer: object) -> None:
    response = await client.request(method, path, json={})
    assert (response.status_code, response.json()) == (200, answer)


async def test_every_agent_exists_and_is_an_agno_agent(client: httpx.AsyncClient) -> None:
    agent = (await client.get("/agents/agent-7")).json()
    assert (agent["id"], agent["framework"], agent["agno_settings"]) == ("agent-7", "agno", {"session_storage": False})


async def test_the_activity_log_of_a_task_is_empty(client: httpx.AsyncClient) -> None:
    task = await report(client)
    activity = (await client.get("/activity/agent-1/job-1")).json()
    assert activity == {"id": "job-1", "created_at": task["created_at"], "messages": []}


async def test_every_request_is_written_down_without_its_key(client: httpx.AsyncClient) -> None:
    await report(client)
    await client.get("/agents/a?x=1", headers={"authorization": "Bearer secret"})
    posted, asked = (await client.get("/_sandbox/requests")).json()
    assert (posted["method"], posted["path"], posted["status"]) == ("POST", "/agent-execution/agent-1/report_task", 200)
    assert json.loads(posted["body"]) == REPORT
    assert (asked["path"], asked["query"]) == ("/agents/a", "x=1")
    assert not {"x-api-key", "authorization"} & (posted["headers"].keys() | asked["headers"].keys())
    await client.delete("/_sandbox/requests")
    assert (await client.get("/_sandbox/requests")).json() == []


async def test_reports_are_counted_by_id_even_when_refused(client: httpx.AsyncClient) -> None:
    await client.put("/_sandbox/faults", json=[{"status": 503, "count": 2}])
    for _ in range(3):
        await client.post("/agent-execution/a/report_task", json=REPORT)
    assert (await client.get("/_sandbox/posts")).json() == {"job-1": 3}


async def test_a_fault_applies_to_what_it_fits_and_as_often_as_it_says(client: httpx.AsyncClient) -> None:
    rule = {"id": "job-1", "path": "*/report_task", "skip": 1, "count": 2, "status": 429}
    await client.put("/_sandbox/faults", json=[{**rule, "headers": {"retry-after": "7"}, "body": "slow down"}])

    async def statuses(job_id: str) -> list[int]:
        posts = [await client.post("/agent-execution/a/report_task", json={**REPORT, "id": job_id}) for _ in range(4)]
        assert {post.text for post in posts if post.status_code == 429} <= {"slow down"}
        assert {post.headers.get("retry-after") for post in posts if post.status_code == 429} <= {"7"}
        return [post.status_code for post in posts]

    assert await statuses("job-2") == [200] * 4
    assert await statuses("job-1") == [200, 429, 429, 200]
    [fault] = (await client.get("/_sandbox/faults")).json()
    assert (fault["seen"], fault["applied"]) == (4, 2)


async def test_a_fault_may_answer_any_status_with_any_json(client: httpx.AsyncClient) -> None:
    await client.put("/_sandbox/faults", json=[{"method": "GET", "status": 200, "body": ["not", "a", "task"]}])
    assert (await client.get("/agent-execution/x/status")).json() == ["not", "a", "task"]


@pytest.mark.parametrize("rules", [{}, [{"stauts": 500}], [{"drop": "everything"}], [{"status": 1000}]])
async def test_a_misspelt_fault_is_refused(client: httpx.AsyncClient, rules: object) -> None:
    assert (await client.put("/_sandbox/faults", json=rules)).status_code == 422
    assert (await client.get("/_sandbox/faults")).json() == []


async def test_only_so_many_requests_are_remembered() -> None:
    async with sandbox(keep_requests=2) as client:
        for number in range(4):
            await client.get(f"/agents/{number}")
        paths = [request["path"] for request in (await client.get("/_sandbox/requests")).json()]
    assert paths == ["/agents/2", "/agents/3"]


async def test_a_page_is_not_sent_again_to_who_has_it(client: httpx.AsyncClient) -> None:
    await report(client)
    first = await client.get("/")
    assert (await client.get("/", headers={"if-none-match": first.headers["etag"]})).status_code == 304
    await report(client, result="changed")
    assert (await client.get("/", headers={"if-none-match": first.headers["etag"]})).status_code == 200


async def test_pages_load_nothing_from_elsewhere_and_are_no_part_of_what_arrived(client: httpx.AsyncClient) -> None:
    await report(client)
    for path in ("/", "/tasks/job-1", "/tasks/none"):
        response = await client.get(path)
        assert response.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in response.headers["content-security-policy"]
    assert len((await client.get("/_sandbox/requests")).json()) == 1


@pytest.mark.parametrize("query", ["before=x", "after=-1", "before=99999999999999999999", "status=no&agent=&q="])
async def test_an_odd_query_still_gives_a_page(client: httpx.AsyncClient, query: str) -> None:
    assert (await client.get(f"/?{query}")).status_code == 200
    assert (await client.get("/tasks/none")).status_code == 404
