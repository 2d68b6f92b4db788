"""A scripted language model behind the HTTP APIs of OpenAI and Anthropic, so that agents run offline with real clients.

It calls each offered tool once and then answers. What it does and what it counts follow from the request alone (and
from a seed), so a test can ask what was served and compare. Orders in the user's text:

    [error 500]     answer this HTTP status (429 with `retry-after: 1`)
    [slow 2.5]      wait so many seconds first
    [one by one]    call one tool a turn in place of all in the first
    [no tools]      answer without calling any
"""
