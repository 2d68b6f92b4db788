"""The jobs of each library: ordinary code around a model, as a user writes it. Runs in the environment of that library.

Every function takes a prompt and returns what the library returns, which the job may also add explicitly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Job = Callable[[str], Any]
MODEL = "gpt-4.1-mini"
CLAUDE = "claude-sandbox"


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def population(city: str) -> str:
    """The population of a city."""
    return f"{len(city)} people"


def _schema(function: Callable[..., str]) -> dict[str, Any]:
    return {
        "name": function.__name__,
        "description": function.__doc__,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }


def openai_jobs(url: str) -> dict[str, Job]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    tools: Any = [{"type": "function", "function": _schema(function)} for function in (weather, population)]

    def chat(prompt: str) -> Any:
        return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": prompt}])

    def stream(prompt: str) -> Any:
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": prompt}],
            stream=True,
            stream_options={"include_usage": True},
        )
        return list(chunks)[-1]

    def with_tools(prompt: str) -> Any:
        return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": prompt}], tools=tools)

    def responses(prompt: str) -> Any:
        return client.responses.create(model=MODEL, input=prompt)

    def threads(prompt: str) -> Any:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(chat, [prompt, prompt, f"{prompt} again"]))

    def gathered(prompt: str) -> Any:
        async def ask() -> Any:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as ask_async:
                one: Any = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
                return await asyncio.gather(*(ask_async.chat.completions.create(**one) for _ in range(3)))

        return asyncio.run(ask())

    return {
        "chat": chat,
        "stream": stream,
        "tools": with_tools,
        "responses": responses,
        "threads": threads,
        "gather": gathered,
    }


def anthropic_jobs(url: str) -> dict[str, Job]:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key="none")

    def messages(prompt: str) -> Any:
        return client.messages.create(model=CLAUDE, max_tokens=500, messages=[{"role": "user", "content": prompt}])

    def stream(prompt: str) -> Any:
        with client.messages.stream(
            model=CLAUDE, max_tokens=500, messages=[{"role": "user", "content": prompt}]
        ) as events:
            return events.get_final_message()

    def two(prompt: str) -> Any:
        return [messages(prompt), messages(f"{prompt} again")]

    return {"messages": messages, "stream": stream, "two": two}


def agno_jobs(url: str) -> dict[str, Job]:
    from agno.agent import Agent
    from agno.db.in_memory import InMemoryDb
    from agno.models.anthropic import Claude
    from agno.models.openai import OpenAIChat
    from agno.team import Team
    from agno.tools import tool

    def model() -> Any:
        return OpenAIChat(id=MODEL, base_url=f"{url}/v1", api_key="none")

    def agent(name: str = "Assistant", **how: Any) -> Any:
        return Agent(name=name, model=model(), tools=[weather, population], telemetry=False, **how)

    def run(prompt: str) -> Any:
        return agent().run(prompt)

    def one_by_one(prompt: str) -> Any:
        return agent().run(f"{prompt} [one by one]")

    def stream(prompt: str) -> Any:
        return list(agent().run(prompt, stream=True, stream_events=True))[-1]

    def arun(prompt: str) -> Any:
        return asyncio.run(agent().arun(prompt))

    def team(prompt: str) -> Any:
        members = [agent("Member")]
        return Team(name="Team", members=members, model=model(), telemetry=False).run(prompt)

    def claude(prompt: str) -> Any:
        spoken = Claude(id=CLAUDE, api_key="none", client_params={"base_url": url})
        return Agent(name="Claude", model=spoken, tools=[weather], telemetry=False).run(prompt)

    def gathered(prompt: str) -> Any:
        async def ask() -> Any:
            return await asyncio.gather(*(agent(name).arun(f"{prompt} {name}") for name in ("one", "another")))

        return asyncio.run(ask())

    def continued(prompt: str) -> Any:
        careful = tool(requires_confirmation=True)(weather)
        return _continued(Agent(model=model(), tools=[careful], db=InMemoryDb(), telemetry=False), prompt)

    return {
        "run": run,
        "one by one": one_by_one,
        "stream": stream,
        "arun": arun,
        "team": team,
        "claude": claude,
        "gather": gathered,
        "continued": continued,
    }


def _continued(agent: Any, prompt: str) -> Any:
    """A run of Agno that waits for a person's word before it uses a tool, and what it says once it has that."""
    paused = agent.run(prompt)
    for use in paused.tools:
        use.confirmed = True
    at_last = agent.continue_run(run_id=paused.run_id, updated_tools=paused.tools, session_id=paused.session_id)
    return [paused, at_last]


def langchain_jobs(url: str) -> dict[str, Job]:
    from langchain.agents import create_agent
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", stream_usage=True)  # type: ignore[arg-type]

    def invoke(prompt: str) -> Any:
        return llm.invoke(prompt)

    def stream(prompt: str) -> Any:
        whole: Any = None
        for chunk in llm.stream(prompt):
            whole = chunk if whole is None else whole + chunk
        return whole

    def agent(prompt: str) -> Any:
        made = create_agent(llm, tools=[tool(weather), tool(population)])
        answer = made.invoke({"messages": [{"role": "user", "content": prompt}]})
        return [message for message in answer["messages"] if getattr(message, "usage_metadata", None)]

    def batch(prompt: str) -> Any:
        return llm.batch([prompt, prompt, f"{prompt} again"])

    return {"invoke": invoke, "stream": stream, "agent": agent, "batch": batch}


def openai_agents_jobs(url: str) -> dict[str, Job]:
    import openai
    from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool

    def model(kind: Any = OpenAIResponsesModel) -> Any:
        return kind(MODEL, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))

    def agent(**how: Any) -> Any:
        return Agent(name="A", model=model(), tools=[function_tool(weather), function_tool(population)], **how)

    def run(prompt: str) -> Any:
        return Runner.run_sync(agent(), prompt)

    def chat(prompt: str) -> Any:
        speaker = Agent(name="C", model=model(OpenAIChatCompletionsModel), tools=[function_tool(weather)])
        return Runner.run_sync(speaker, prompt)

    def nested(prompt: str) -> Any:
        expert = agent().as_tool(tool_name="ask_expert", tool_description="Ask an expert.")
        return Runner.run_sync(Agent(name="N", model=model(), tools=[expert]), prompt)

    def stream(prompt: str) -> Any:
        async def read() -> Any:
            result = Runner.run_streamed(agent(), prompt)
            async for _ in result.stream_events():
                pass
            return result

        return asyncio.run(read())

    def gathered(prompt: str) -> Any:
        async def ask() -> Any:
            return await asyncio.gather(*(Runner.run(agent(), f"{prompt} {at}") for at in range(2)))

        return asyncio.run(ask())

    return {"run": run, "chat": chat, "nested": nested, "stream": stream, "gather": gathered}


def pydantic_ai_jobs(url: str) -> dict[str, Job]:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent(*tools: Any) -> Any:
        provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
        return Agent(OpenAIChatModel(MODEL, provider=provider), tools=list(tools), name="P")

    def run(prompt: str) -> Any:
        return agent(weather, population).run_sync(prompt)

    def nested(prompt: str) -> Any:
        inner = agent(weather)

        async def ask_expert(question: str) -> str:
            """Ask an expert."""
            return str((await inner.run(question)).output)

        return agent(ask_expert).run_sync(prompt)

    def gathered(prompt: str) -> Any:
        async def ask() -> Any:
            agents = [agent(weather, population) for _ in range(2)]
            return await asyncio.gather(*(each.run(f"{prompt} {at}") for at, each in enumerate(agents)))

        return asyncio.run(ask())

    return {"run": run, "nested": nested, "gather": gathered}


def strands_jobs(url: str) -> dict[str, Job]:
    from strands import Agent, tool
    from strands.models.openai import OpenAIModel

    def run(prompt: str) -> Any:
        model = OpenAIModel(client_args={"base_url": f"{url}/v1", "api_key": "none"}, model_id=MODEL)
        return Agent(model=model, tools=[tool(weather), tool(population)], callback_handler=None)(prompt)

    def threads(prompt: str) -> Any:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, [prompt, f"{prompt} again"]))

    return {"run": run, "threads": threads}


def litellm_jobs(url: str) -> dict[str, Job]:
    import litellm

    how: Any = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"}

    def completion(prompt: str) -> Any:
        return litellm.completion(messages=[{"role": "user", "content": prompt}], **how)

    def two(prompt: str) -> Any:
        return [completion(prompt), completion(f"{prompt} again")]

    def stream(prompt: str) -> Any:
        messages = [{"role": "user", "content": prompt}]
        chunks = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **how)
        return list(chunks)[-1]

    return {"completion": completion, "two": two, "stream": stream}


JOBS: dict[str, Callable[[str], dict[str, Job]]] = {
    "openai": openai_jobs,
    "anthropic": anthropic_jobs,
    "agno": agno_jobs,
    "langchain": langchain_jobs,
    "openai-agents": openai_agents_jobs,
    "pydantic-ai": pydantic_ai_jobs,
    "strands": strands_jobs,
    "litellm": litellm_jobs,
    "logfire": openai_jobs,
}
# What is added explicitly can be compared only where the job's value tells all of its calls.
TELLS_NOT_ALL = {("pydantic-ai", "nested")}
