"""Secrets are masked by the name of their key and by their form; harmless text stays as it is."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import MaxRetriesExceededError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from xpander_celery.redaction import MASK, looks_secret, mask_shown, redact_text, spellings


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "apiKey",
        "API-KEY",
        "x-api-key",
        "Authorization",
        "auth_token",
        "token",
        "accessToken",
        "userpassword",
        "session_id",
        "cookie_jar",
        "AWS_SECRET_ACCESS_KEY",
        "client_secret",
        "csrfmiddlewaretoken",
        "card_number",
        "private_key",
        "passwordHash",
        "refreshtoken",
        "password_url",
        "secret_id",
        "db_pwd",
        "smtp_pass",
        "pin",
        "service_key",
    ],
)
def test_secret_names(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "id",
        "author",
        "authority",
        "key",
        "keyboard",
        "monkey",
        "tokens",
        "max_tokens",
        "prompt_tokens",
        "token_count",
        "auth_method",
        "public_key",
        "card",
        "sessions",
        "key_count",
    ],
)
def test_harmless_names(name: str) -> None:
    assert not looks_secret(name)


def test_long_text_that_is_taken_for_a_name_is_not_kept() -> None:
    text = "lorem ipsum " * 1000 + "token"
    before = sys.getrefcount(text)
    assert looks_secret(text)
    assert sys.getrefcount(text) == before


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("password=hunter2 and more", "password=[redacted] and more"),
        ('{"password": "hun\\"ter2", "x": 1}', '{"password": "[redacted]", "x": 1}'),
        (r'{"a": "{\"api_key\": \"hunter2\", \"b\": 2}"}', r'{"a": "{\"api_key\": \"[redacted]\", \"b\": 2}"}'),
        ("{'secret': 'it\\'s', 'b': 1}", "{'secret': '[redacted]', 'b': 1}"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer [redacted]"),
        ("curl -H 'Bearer abcdefgh123'", "curl -H 'Bearer [redacted]'"),
        ("redis://user:hunter2@host:6379/0", "redis://user:[redacted]@host:6379/0"),
        ("max_tokens=100, token=abc", "max_tokens=100, token=[redacted]"),
        ('keyword: "password=hunter2"', 'keyword: "password=[redacted]"'),
        ("use sk-proj-abcdefghijklmnop1234 now", "use [redacted] now"),
        ("AKIAABCDEFGHIJKLMNOP", MASK),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIx.sig", MASK),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", MASK),
        ('{"password": ["a1", "b2"], "x": 1}', '{"password": [[redacted]], "x": 1}'),
        ("secret=(x y)", "secret=([redacted])"),
        ("token:\nabcdef", "token:\n[redacted]"),
        ("password='''it is''' here", "password='[redacted]' here"),
        ("shipping: fast, pin=1234", "shipping: fast, pin=[redacted]"),
        ('"token": "cut off here', '"token": "[redacted]'),
        ("the key: value pair of a keyboard", "the key: value pair of a keyboard"),
        ("a task-runner and a bright disk-drive", "a task-runner and a bright disk-drive"),
        ("https://example.org/a:b@c", "https://example.org/a:b@c"),
        ("{'password': b'hunter2', 'x': 1}", "{'password': '[redacted]', 'x': 1}"),
        ("os.environ['DB_PASSWORD'] = 'hunter2'", "os.environ['DB_PASSWORD'] = '[redacted]'"),
        ("user[password]=hunter2&x=1", "user[password]=[redacted]&x=1"),
        (
            "GET https://g.example/m?key=AIzaSyA0123456789abcdef&x=1 403",
            "GET https://g.example/m?key=[redacted]&x=1 403",
        ),
        ("https://s3.example/o?X-Amz-Signature=0123456789abcdef0", "https://s3.example/o?X-Amz-Signature=[redacted]"),
        ("https://b.example/o?sv=1&sig=0123456789abcdef%3D", "https://b.example/o?sv=1&sig=[redacted]"),
        ("https://shop.example/?key=blue&signal=strong", "https://shop.example/?key=blue&signal=strong"),
        ("password := 'x' or password == 'y'", "password := '[redacted]' or password == '[redacted]'"),
        ("Login(token=Token(value='x', of=(1, 2)), name='ann')", "Login(token=[redacted], name='ann')"),
        ("password=SecretStr('**') here", "password=[redacted] here"),
        ("{'credentials': {'db': {'value': 'x'}}, 'n': 1}", "{'credentials': {[redacted]}, 'n': 1}"),
        ("secrets=[('a', 'x'), ('b', 'y')] n=1", "secrets=[[redacted]] n=1"),
        ("token=Token(value='x', cut", "token=[redacted]"),
        ("token=Token(value='x', cut\nnext line", "token=[redacted]\nnext line"),
        ("{'credentials': {'db': {'value': 'x', cut", "{'credentials': {[redacted]"),
        ("unexpected token: ( near line 1", "unexpected token: ([redacted]"),
        ("secret={'a': 'p(x'} n={1}", "secret={[redacted]} n={1}"),
        ("Cookie: sid=abc; csrf=def; theme=dark\nHost: h", "Cookie: [redacted]\nHost: h"),
        ("Set-Cookie: sid=abc; Path=/; HttpOnly", "Set-Cookie: [redacted]"),
        ("-H 'cookie: sid=abc; x=1' -v", "-H 'cookie: [redacted]' -v"),
        ('Authorization: Digest username="ann", response="abc", nc=01', "Authorization: [redacted]"),
        (
            "authorization: AWS4-HMAC-SHA256 Credential=AK/x, SignedHeaders=host;range, Signature=fe5f failed",
            "authorization: [redacted] failed",
        ),
        ("[('Authorization', 'hunter2'), ('Host', 'h')]", "[('Authorization', '[redacted]'), ('Host', 'h')]"),
        ("(b'x-api-key', b'hunter2')", "(b'x-api-key', '[redacted]')"),
        ("['password', 'email']", "['password', 'email']"),
        ("amqp://ann:p@ss@host:5672//", "amqp://ann:[redacted]@host:5672//"),
    ],
)
def test_text(text: str, masked: str) -> None:
    assert redact_text(text) == masked


def test_the_arguments_of_a_job_that_is_given_up_do_not_show() -> None:
    app = Celery(set_as_current=False)

    @app.task(bind=True, name="login", max_retries=0)
    def login(self: Any, user: str, password: str) -> None:
        raise self.retry()

    with pytest.raises(MaxRetriesExceededError) as failed:
        login.apply(("ann", "hunter2"), task_id="j1", throw=True)
    assert "hunter2" in str(failed.value)
    text = redact_text(f"MaxRetriesExceededError: {failed.value}\nTraceback")
    assert text == f"MaxRetriesExceededError: Can't retry login[j1] {MASK}\nTraceback"


def test_the_value_of_a_secret_field_that_pydantic_refuses_does_not_show() -> None:
    class Login(BaseModel):
        name: int
        db_password: SecretWord

    with pytest.raises(ValidationError) as failed:
        Login.model_validate({"name": "ann", "db_password": {"words": ["hunter2, input_type=x"]}})
    text = redact_text(str(failed.value))
    assert "hunter2" not in text
    assert "input_value='ann'" in text
    assert f"input_value={MASK}, input_type=" in text


class SecretWord(BaseModel):
    words: list[int]


def test_further_names_are_masked_too() -> None:
    more = frozenset({"shoe_size"})
    assert redact_text("shoe_size=44, size=44", more) == "shoe_size=[redacted], size=44"
    assert looks_secret("shoeSize", more)


@pytest.mark.parametrize(
    "piece",
    [
        '"',
        "\\",
        "key:",
        'key="',
        "key='",
        "key=key",
        "://a:",
        "-----BEGIN PRIVATE KEY-----",
        "eyJ",
        "sk-",
        "bearer ",
        "-u a:",
        "?key=",
        "a\n [type=x, input_value=",
        "Can't retry a[",
        "b'",
        "key=(",
        "key=(\n",
        "key=a(b)",
        "key={[()",
        "cookie: a=1;",
        "('key', '",
        "://a:@@",
        "key']",
        "-u",
        "a",
    ],
)
def test_hostile_text_of_64_kib_takes_no_noticeable_time(piece: str) -> None:
    text = (piece * 65536)[:65536]
    started = time.process_time()
    redact_text(text)
    assert time.process_time() - started < 1.0


@given(st.text(), st.sampled_from(["password", "api_key", "Authorization"]), st.text(alphabet="abcXYZ019", min_size=1))
def test_the_value_of_a_secret_assignment_never_shows(before: str, name: str, value: str) -> None:
    assert f"<{value}>" not in redact_text(f'{before} "{name}": "<{value}>"')


@pytest.mark.parametrize("written", ["shoeSize", "shoe_size", "SHOE_SIZE", "Shoe-Size", "shoe-size"])
def test_a_name_of_the_users_is_one_name_however_it_is_written(written: str) -> None:
    more = spellings([written])
    for name in ("shoeSize", "shoe_size", "SHOE_SIZE", "Shoe-Size", "shoesize"):
        assert looks_secret(name, more)
        assert redact_text(f"{name}=44, color=red", more) == f"{name}={MASK}, color=red"
    assert not looks_secret("shoe", more)


def test_names_of_the_users_may_be_of_any_script() -> None:
    more = spellings(["住所", "Größe", "—", ""])
    assert looks_secret("住所", more)
    assert looks_secret("größe", more)
    assert redact_text("住所: 東京", more) == f"住所: {MASK}"
    assert not looks_secret("gr_e", more)
    assert not looks_secret("", more)


@pytest.mark.parametrize(
    ("secret", "text", "masked"),
    [
        ("hunter2", "('ann', 'hunter2', {1: 'a'})", f"('ann', '{MASK}', {{1: 'a'}})"),
        ("it's", r"('it\'s', 1)", f"('{MASK}', 1)"),
        ("a\\b", "('a\\b', 1)", f"('{MASK}', 1)"),
        ("tab\t", r"('tab\t', 1)", f"('{MASK}', 1)"),
        (1234, "(1234, 5)", f"({MASK}, 5)"),
        ({"user": "ann", "codes": ["c1", "red"]}, "({'user': 'ann', ('c1', 'red')})", None),
        ("hunter2" * 900, f"('ann', '{('hunter2' * 100)[:650]}...', ...)", f"('ann', '{MASK}', ...)"),
        ("hunter2", "('ann', ...)", "('ann', ...)"),
        ([None, True, "", ()], "(None, True, '')", "(None, True, '')"),
    ],
)
def test_a_value_is_masked_wherever_text_shows_it(secret: object, text: str, masked: str | None) -> None:
    expected = masked or f"({{'user': '{MASK}', ('{MASK}', '{MASK}')}})"
    assert mask_shown(text, secret) == expected


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("run --api-key hunter2", f"run --api-key {MASK}"),
        ("mysqldump --password hunter2 shop", f"mysqldump --password {MASK} shop"),
        ("['curl', '--api-key', 'hunter2', '-v']", f"['curl', '--api-key', '{MASK}', '-v']"),
        ('["--auth-token","hunter2"]', f'["--auth-token","{MASK}"]'),
        (r"{\"command\": [\"--secret\", \"hunter2\"]}", rf"{{\"command\": [\"--secret\", \"{MASK}\"]}}"),
        ("--password --user ann", "--password --user ann"),
        ("['--password', '--user', 'ann']", "['--password', '--user', 'ann']"),
        ("--user ann --max-tokens 5 --token-count 6", "--user ann --max-tokens 5 --token-count 6"),
        ("--password", "--password"),
        ("curl -u ann:hunter2 https://example.org", f"curl -u ann:{MASK} https://example.org"),
        ("curl --user=ann:hunter2", f"curl --user=ann:{MASK}"),
        ("['curl', '-u', 'ann:hunter2', '-v']", f"['curl', '-u', 'ann:{MASK}', '-v']"),
        (r"[\"--proxy-user\",\"ann:hunter2\"]", rf"[\"--proxy-user\",\"ann:{MASK}\"]"),
        (
            "rsync -u host:/home . && tool -u https://example.org",
            "rsync -u host:/home . && tool -u https://example.org",
        ),
        ("docker run --user 1000:1000 -u 1000:1000 image", "docker run --user 1000:1000 -u 1000:1000 image"),
        ("git push -u origin main:main, re-u a:b", "git push -u origin main:main, re-u a:b"),
    ],
)
def test_the_value_of_a_command_line_option_is_masked(text: str, masked: str) -> None:
    assert redact_text(text) == masked
