"""The attributes that instrumentations write on their spans, as data. It must not know what is done with them.

Per count the first key that is present wins; aliases are never added together.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache


class Kind(IntEnum):
    """What a span is, as far as tokens and tools are concerned."""

    PLAIN = 0  # only its place in the tree matters
    CONTAINER = 1  # has usage, and is no call to a model: an agent, a chain, a task
    LLM = 2  # one call to a model
    TOOL = 3  # one call of a tool; may hold usage that a library wrote onto the current span
    EXCLUDED = 4  # embeddings, reranking, retrieval, counting of tokens: no tokens of the job


JOB_SCOPE = "xpander_celery"

PROMPT = (
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.prompt_tokens",
    "llm.token_count.prompt",
    "llm.usage.prompt_tokens",
    "ai.usage.inputTokens",
    "ai.usage.promptTokens",
    "gen_ai.aggregated_usage.input_tokens",
)
COMPLETION = (
    "gen_ai.usage.output_tokens",
    "gen_ai.usage.completion_tokens",
    "llm.token_count.completion",
    "llm.usage.completion_tokens",
    "ai.usage.outputTokens",
    "ai.usage.completionTokens",
    "gen_ai.aggregated_usage.output_tokens",
)
CACHE_READ = (
    "gen_ai.usage.cache_read.input_tokens",
    "gen_ai.usage.cache_read_input_tokens",
    "llm.token_count.prompt_details.cache_read",
    "llm.token_count.prompt_details.cache_input",
    "gen_ai.usage.prompt_tokens_details.cached_tokens",
    "ai.usage.cachedInputTokens",
    "gen_ai.aggregated_usage.cache_read.input_tokens",
)
CACHE_WRITE = (
    "gen_ai.usage.cache_write.input_tokens",
    "gen_ai.usage.cache_creation.input_tokens",
    "gen_ai.usage.cache_creation_input_tokens",
    "gen_ai.usage.cache_write_input_tokens",  # Strands
    "llm.token_count.prompt_details.cache_write",
    "gen_ai.aggregated_usage.cache_write.input_tokens",
    "gen_ai.aggregated_usage.cache_creation.input_tokens",
)
CACHE = (*CACHE_READ, *CACHE_WRITE)
TOTAL = (
    "gen_ai.usage.total_tokens",
    "llm.token_count.total",
    "llm.usage.total_tokens",
    "ai.usage.totalTokens",
)
LANGFUSE_USAGE = "langfuse.observation.usage_details"  # JSON text
LITELLM_USAGE = "metadata.usage_object"  # the repr of a dictionary, with the cache that its counts leave out
LOGFIRE_USAGE = "gen_ai.usage.raw"  # the same, as JSON text
LITELLM_RAW_SPAN = "raw_gen_ai_request"  # holds `llm.<provider>.usage`, the repr of a dict

MODEL = (
    "gen_ai.response.model",
    "gen_ai.request.model",
    "llm.model_name",
    "langfuse.observation.model.name",
    "ai.model.id",
)
RESPONSE_ID = ("gen_ai.response.id", "llm.response.id", "ai.response.id")
PROVIDER = ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system", "ai.model.provider")
TOOL_NAME = ("gen_ai.tool.name", "tool.name", "ai.toolCall.name")
REQUESTED_TOOL = tuple(
    f"llm.output_messages.0.message.tool_calls.{index}.tool_call.function.name" for index in range(16)
)
PENDING_KEY, PENDING_VALUE = "logfire.span_type", "pending_span"  # stands for a span that is still open

# The kind that a framework's own attribute gives. Values are compared in lower case; a value that is not listed says
# that the span is no call to a model.
FRAMEWORK_KIND = (
    (
        "openinference.span.kind",
        {
            "llm": Kind.LLM,
            "tool": Kind.TOOL,
            "embedding": Kind.EXCLUDED,
            "reranker": Kind.EXCLUDED,
            "retriever": Kind.EXCLUDED,
        },
    ),
    ("traceloop.span.kind", {"tool": Kind.TOOL}),
    (
        "langfuse.observation.type",
        {
            "generation": Kind.LLM,
            "tool": Kind.TOOL,
            "embedding": Kind.EXCLUDED,
            "retriever": Kind.EXCLUDED,
        },
    ),
    (
        "langsmith.span.kind",
        {
            "llm": Kind.LLM,
            "tool": Kind.TOOL,
            "embedding": Kind.EXCLUDED,
            "retriever": Kind.EXCLUDED,
        },
    ),
)
# The kind that the operation gives, where no framework names one.
OPERATION = ("gen_ai.operation.name", "llm.request.type", "ai.operationId")
OPERATION_KIND = {
    "chat": Kind.LLM,
    "completion": Kind.LLM,
    "text_completion": Kind.LLM,
    "generate_content": Kind.LLM,
    "ai.generateText.doGenerate": Kind.LLM,
    "ai.streamText.doStream": Kind.LLM,
    "ai.generateObject.doGenerate": Kind.LLM,
    "ai.streamObject.doStream": Kind.LLM,
    "execute_tool": Kind.TOOL,
    "ai.toolCall": Kind.TOOL,
    "embeddings": Kind.EXCLUDED,
    "embedding": Kind.EXCLUDED,
    "rerank": Kind.EXCLUDED,
    "retrieval": Kind.EXCLUDED,
    "count_tokens": Kind.EXCLUDED,
    "ai.embed.doEmbed": Kind.EXCLUDED,
    "ai.embedMany.doEmbed": Kind.EXCLUDED,
}
TOOL_SPAN_PREFIXES = ("execute_tool ", "anthropic.custom_tool_use ")  # the rest of the span's name is the tool
NO_TOOLS = frozenset({"(merged tools)"})  # a span that Google ADK adds for parallel calls

# Prompts written without the cache: agno passes on what Anthropic and Bedrock count, and so does botocore's layer.
BESIDE_SCOPES = frozenset({"opentelemetry.instrumentation.botocore.bedrock-runtime"})
AGNO_SCOPE = "openinference.instrumentation.agno"
AGNO_PROVIDERS_BESIDE = frozenset({"anthropic", "awsbedrock", "azurefoundry"})
AGNO_VERTEX = "vertexai"  # only where the model is Claude: its span is named after agno's class
AGNO_VERTEX_SPAN = "Claude."

# Calls whose own provider counts cache beside the prompt, however the instrumentation wrote them.
BESIDE_PROVIDERS = frozenset(
    {"anthropic", "aws.bedrock", "aws_bedrock", "awsbedrock", "amazon_bedrock", "bedrock", "azurefoundry"}
)
BESIDE_PROVIDER_SCOPES = frozenset(
    {
        "com.anthropic.sdk.python",
        "openinference.instrumentation.anthropic",
        "openinference.instrumentation.bedrock",
        "opentelemetry.instrumentation.anthropic",
        "opentelemetry.instrumentation.bedrock",
        "opentelemetry.instrumentation.botocore.bedrock-runtime",
        "opentelemetry.instrumentation.genai.anthropic",
    }
)

# How near to the provider a layer sits, where two at one depth saw the same call.
_NEARNESS = ("com.anthropic.sdk", "opentelemetry.instrumentation.genai", "openinference.")


@cache
def nearness(scope: str) -> int:
    """0 for a provider's own SDK, more for layers further away."""
    for rank, prefix in enumerate(_NEARNESS):
        if scope.startswith(prefix):
            return rank
    return len(_NEARNESS)


RELEVANT = frozenset(
    {
        *PROMPT,
        *COMPLETION,
        *CACHE_READ,
        *CACHE_WRITE,
        LANGFUSE_USAGE,
        *TOOL_NAME,
        *(key for key, _ in FRAMEWORK_KIND),
        *OPERATION,
    }
)
