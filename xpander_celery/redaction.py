"""Which key names look secret, and masking of secrets in text. Layer 1: pure; `rendering` applies it to values.

Names are judged by their words (`apiKey`, `api_key`, `API-KEY` are one name), verdicts are cached, and text is searched
only where a cheap substring check says that it could hold a secret. Patterns are possessive or bounded: text of any
shape costs linear time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

MASK = "[redacted]"
LOGIN_OPTIONS = frozenset({"-u", "--user", "--proxy-user"})
"""Options of a command line (curl, wget, http) whose value is `user:password`."""

_SECRET_WORDS = frozenset(
    {
        "apikey", "auth", "authorization", "bearer", "cookie", "cookies", "credential", "credentials", "creds", "csrf",
        "csrftoken", "cvc", "cvv", "dsn", "jwt", "mfa", "otp", "pass", "passcode", "passphrase", "passwd", "password",
        "passwords", "pin", "pwd", "secret", "secrets", "sessionid", "ssn", "token", "xsrf",
    }
)  # fmt: skip
_SECRET_PAIRS = frozenset(
    {
        ("access", "key"),
        ("account", "key"),
        ("api", "key"),
        ("api", "keys"),
        ("card", "number"),
        ("client", "key"),
        ("connection", "string"),
        ("encryption", "key"),
        ("master", "key"),
        ("private", "key"),
        ("secret", "key"),
        ("service", "key"),
        ("session", "id"),
        ("signing", "key"),
        ("ssh", "key"),
    }
)
# written without a word boundary: `userpassword`, `authtoken`, `awssecretkey`
_SECRET_PARTS = ("password", "passwd", "passphrase", "secret", "apikey", "accesskey", "privatekey", "credential")
_SECRET_ENDINGS = ("token", "pwd")
# what a word after `token` or `auth` turns into something that is counted or named, not kept secret
_HARMLESS_ENDINGS = frozenset(
    {"budget", "count", "counts", "expires", "expiry", "id", "limit", "limits", "method", "mode", "type", "url"}
)
_NAME_CHARACTERS = 128  # that are looked at, and kept in the cache
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_ABBREVIATED = 1024  # characters that Celery shows at most (celery/app/amqp.py, `argsrepr_maxsize`)
_TRIGGERS = (
    "pass", "pin", "pwd", "secret", "token", "key", "auth", "bearer", "cookie", "cred", "session", "csrf",
    "xsrf", "jwt", "dsn", "otp", "mfa", "ssn", "cvv", "cvc", "connection", "card",
)  # fmt: skip

# `key = value`, `"key": "value"`, `of["key"] = "value"`, also inside JSON that is itself quoted
_GAP = r"""\\{0,4}["']?\]?\s{0,4}(?::=|=>|={1,3}|:)\s{0,4}(?:(?:bearer|basic|token)\ +)?"""
_ASSIGNMENT = re.compile(rf"(?:{'|'.join(_TRIGGERS)})[\w-]{{0,32}}+(?P<gap>{_GAP})", re.IGNORECASE | re.VERBOSE)
# `('key', 'value')`, as headers are listed
_PAIR = re.compile(r"""(?:(?<=\(["'])|(?<=\(b["']))[A-Za-z][\w-]{0,63}+(?P<gap>["'],\ ?)(?=b?["'])""", re.VERBOSE)
# `--key value` of a command line, also as a list: `['--key', 'value']`
_OPTION = re.compile(r"""--[A-Za-z][\w-]{0,63}+(?P<gap>\\{0,4}["']?(?:,\ ?|\ ){1,4}+)(?!\\{0,4}["']?-)""", re.VERBOSE)
_VALUE = re.compile(
    r"""(?P<open>\\{1,4}["'])(?:[^"'\\]|\\(?!["'\\]))*+(?P<close>\\{1,4}["'])?
      |(?:[bBfFrRuU]{1,2}(?=["']))?+(?P<quoted>"{3}(?:(?!"{3})[\s\S])*+(?:"{3})?|'{3}(?:(?!'{3})[\s\S])*+(?:'{3})?
        |"(?:[^"\\]|\\.)*+"?|'(?:[^'\\]|\\.)*+'?)
      |(?P<composite>[\[({][^\[\](){}]*+[\])}]?)
      |[^\s,;&"'(){}\[\]]++""",
    re.VERBOSE | re.DOTALL,
)
# `a=1; b=2` of cookies, `Digest a="1", b="2"` of other credentials in a header
_PARAMETERS = re.compile(
    r"""(?:(?:digest|aws4[\w-]{0,32})\ +)?+[\w.!#$%&*+^`|~-]{1,64}+=(?:"[^"\n]*+"|[^\s;,"']*+)
      (?:[;,]\ {0,2}[\w.!#$%&*+^`|~-]{1,64}+(?:=(?:"[^"\n]*+"|[^\s;,"']*+))?+)*+""",
    re.VERBOSE | re.IGNORECASE,
)
_IN_HEADERS = ("cookie", "authorization")
_BRACKET = re.compile(r"[\[({\])}]")
_CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
# what Celery says of a job that may not be retried again (celery/app/task.py, `Task.retry`): all of its arguments
_GIVEN_UP = re.compile(r"(?P<job>Can't retry [^\s\[\]]{1,256}\[[^\s\]]{1,256}\] )args:.*")
# pydantic names a value's place in the line above (`ValidationError.__str__`)
_INVALID = re.compile(
    r"^(?P<place>[^\n]{1,256})\n(?P<said>[^\n]{0,2048}?\[type=\w{1,64}, input_value=)[^\n]*(?=, input_type=)",
    re.MULTILINE,
)
_LOGIN = re.compile(r"""(?!\d+:\d+$)(?P<user>[^\s:"'/\\]{1,64}:)(?!/).+""", re.DOTALL)
_FREE_STANDING = re.compile(
    r"""(?P<scheme>\b(?:[Bb]earer|[Bb]asic)\ +)[A-Za-z0-9._~+/=-]{8,}+
      |(?P<url>://[^\s:/@?#]{0,64}:)[^\s/?#]{1,256}(?=@)
      |(?P<query>[?&](?:key|(?:X-(?:Amz|Goog)-)?[Ss]ig(?:nature)?)=)[^\s&\#"'<>\\]{16,1024}+
      |(?P<login>(?<![\w-])(?:-u|--(?:proxy-)?user)(?:=|\ {1,4}|\\{0,4}["'],\ ?)\\{0,4}["']?
        (?!\d+:\d+\b)[^\s:"'/\\]{1,64}:)(?!/)[^\s"'\\]{1,256}
      |-----BEGIN\ [A-Z ]{0,32}PRIVATE\ KEY-----(?:(?!-----END)[\s\S])*+(?:-----END\ [A-Z ]{0,32}-----)?
      |\bsk-[A-Za-z0-9_-]{16,}+
      |\bgh[opsur]_[A-Za-z0-9]{20,}+
      |\bAKIA[0-9A-Z]{16}\b
      |\bxox[abeprs]-[A-Za-z0-9-]{10,}+
      |\beyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{4,}+\.[A-Za-z0-9_-]*+""",
    re.VERBOSE,
)


def spellings(names: Iterable[str]) -> frozenset[str]:
    """Each of `names` as code, variables and headers write it (`shoeSize`, `shoe_size`, `Shoe-Size`), in lower case."""
    found: set[str] = set()
    for name in names:
        found.add(name.lower())
        if name.isascii():  # of another script, words are not told apart
            words = [word.lower() for word in _WORD.findall(name)]
            found.update(joint.join(words) for joint in ("_", "-", ""))
    return frozenset(found - {""})


def looks_secret(name: str, more: frozenset[str] = frozenset()) -> bool:
    """Whether values under this key are masked. `more` holds further names, in all their `spellings`."""
    return _is_secret(name if len(name) <= _NAME_CHARACTERS else name[-_NAME_CHARACTERS:], more)


@lru_cache(maxsize=4096)
def _is_secret(name: str, more: frozenset[str]) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    if name.lower() in more or "_".join(words) in more:
        return True
    if not words:
        return False
    if words[-1] in _HARMLESS_ENDINGS and not _SECRET_PAIRS.intersection(pairwise(words)):
        return any(part in words for part in ("password", "secret"))
    if _SECRET_WORDS.intersection(words) or _SECRET_PAIRS.intersection(pairwise(words)):
        return True
    return any(part in word for word in words for part in _SECRET_PARTS) or words[-1].endswith(_SECRET_ENDINGS)


def could_hold_a_secret(text: str) -> bool:
    """Whether `redact_text` has to look closer: a cheap check, which is true of many texts without a secret too."""
    return "=" in text or ":" in text or "--" in text or "', " in text or _could_hold_a_key(text)


def redact_text(text: str, more: frozenset[str] = frozenset()) -> str:
    """`text` with the values of secret-looking assignments, and strings in the form of well-known keys, masked."""
    if "=" in text or ":" in text:
        lowered = text.lower()
        if any(trigger in lowered for trigger in _TRIGGERS):
            text = _mask_values(_ASSIGNMENT, text, more)
        for name in more:
            if name in lowered:
                text = _mask_values(_assignment_of(name), text, more)
    if ", input_value=" in text:
        text = _INVALID.sub(lambda match: _mask_invalid(match, more), text)
    if "Can't retry " in text:
        text = _GIVEN_UP.sub(lambda match: match["job"] + MASK, text)
    if "--" in text:
        text = _mask_values(_OPTION, text, more)
    if "', " in text:
        text = _mask_values(_PAIR, text, more)
    if _could_hold_a_key(text):
        text = _FREE_STANDING.sub(_mask_free_standing, text)
    return text


def without_password(login: str) -> str:
    """The value of one of the `LOGIN_OPTIONS`, masked behind its user; ids of a user and a group are none."""
    found = _LOGIN.fullmatch(login)
    return found["user"] + MASK if found else login


def mask_shown(text: str, secret: Any) -> str:
    """`text`, made from values of which `secret` was one, with every piece of that masked, also where it was
    abbreviated (`hunt...`). For text that says no names; raises what the value's own `repr` raises.
    """
    pieces = {written for leaf in _leaves(secret) for written in (leaf, leaf.replace("'", "\\'"), repr(leaf)[1:-1])}
    *cut, _ = text.split("...")
    pieces |= {beginning for chunk in cut for piece in pieces if (beginning := _end_that_begins(piece, chunk))}
    shown = sorted((piece for piece in pieces if piece and piece in text), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, shown)), MASK, text) if shown else text


def _end_that_begins(piece: str, chunk: str) -> str | None:
    """The longest end of `chunk` that `piece` begins with, as it stands abbreviated."""
    for length in range(min(len(piece), len(chunk), _ABBREVIATED), 0, -1):
        if chunk.endswith(piece[:length]):
            return f"{piece[:length]}..."
    return None


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    elif value is not None and type(value) is not bool:
        yield value if isinstance(value, str) else repr(value)


def _could_hold_a_key(text: str) -> bool:
    """A guard for `_FREE_STANDING`, spelled out since it runs for every string."""
    return (
        "://" in text
        or "sk-" in text
        or "AKIA" in text
        or "eyJ" in text
        or "xox" in text
        or "gh" in text
        or "-u" in text
        or "earer " in text
        or "asic " in text
        or "-----BEGIN" in text
    )


def _mask_values(assignment: re.Pattern[str], text: str, more: frozenset[str]) -> str:
    """`text` without the values that follow secret names. A value is read only once its name is known to be secret."""
    kept: list[str] = []
    done = 0
    closings: dict[int, int] | None = None
    match = assignment.search(text)
    while match:
        position = match.end()
        name = _whole_name(match)
        if looks_secret(name, more) and (value := _value_of(name, text, position)):
            end, masked = value.end(), _masked(value)
            bracket = _bracket_of(value)
            if bracket is not None:
                closings = _closings(text) if closings is None else closings
                if bracket in closings:
                    end = closings[bracket]
                    masked = f"{text[bracket]}{MASK}{text[end - 1]}" if bracket == position else MASK
                else:  # the text was cut
                    end = max(end, _line_end(text, bracket))
                    masked = f"{text[bracket]}{MASK}" if bracket == position else MASK
            kept += (text[done:position], masked)
            position = done = end
        match = assignment.search(text, position)
    return "".join(kept) + text[done:]


def _value_of(name: str, text: str, position: int) -> re.Match[str] | None:
    is_in_header = name.lower().endswith(_IN_HEADERS)
    return (_PARAMETERS.match(text, position) if is_in_header else None) or _VALUE.match(text, position)


def _bracket_of(value: re.Match[str]) -> int | None:
    """Where the bracket opens that a value is, or that follows it, as in `Token(value="x")`."""
    if value.re is not _VALUE or value["open"] or value["quoted"]:
        return None
    if value["composite"]:
        return value.start()
    return value.end() if value.string.startswith(("(", "[", "{"), value.end()) else None


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return end if end >= 0 else len(text)


def _closings(text: str) -> dict[int, int]:
    """Where each bracket that is closed ends, by its place; brackets are paired by their kind, whatever is quoted."""
    found: dict[int, int] = {}
    opened: list[tuple[int, str]] = []
    awaited = Counter[str]()
    for match in _BRACKET.finditer(text):
        bracket = match[0]
        if bracket in _CLOSED_BY:
            opened.append((match.start(), _CLOSED_BY[bracket]))
            awaited[_CLOSED_BY[bracket]] += 1
            continue
        while awaited[bracket]:
            place, closing = opened.pop()
            awaited[closing] -= 1
            if closing == bracket:
                found[place] = match.end()
                break
    return found


def _whole_name(match: re.Match[str]) -> str:
    """The name that the match ends, from its beginning (the pattern starts at the telling part, to stay linear)."""
    text, begin = match.string, match.start()
    while begin > 0 and match.start() - begin < 64 and (text[begin - 1].isalnum() or text[begin - 1] in "_-"):
        begin -= 1
    return text[begin : match.start("gap")]


def _masked(value: re.Match[str]) -> str:
    """The mask inside the value's own quotes, so that JSON stays JSON."""
    if value.re is not _VALUE:
        return MASK
    if value["open"]:
        return value["open"] + MASK + (value["close"] or "")
    if composite := value["composite"]:
        return composite[0] + MASK + (composite[-1] if composite[-1] in ")]}" else "")
    if quoted := value["quoted"]:
        return quoted[0] + MASK + (quoted[0] if len(quoted) > 1 and quoted[-1] == quoted[0] else "")
    return MASK


def _mask_free_standing(match: re.Match[str]) -> str:
    return (match["scheme"] or match["url"] or match["query"] or match["login"] or "") + MASK


def _mask_invalid(match: re.Match[str], more: frozenset[str]) -> str:
    is_secret = any(looks_secret(name, more) for name in match["place"].split("."))
    return f"{match['place']}\n{match['said']}{MASK}" if is_secret else match[0]


@lru_cache(maxsize=256)
def _assignment_of(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?P<gap>{_GAP})", re.IGNORECASE | re.VERBOSE)
