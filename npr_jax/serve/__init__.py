"""An OpenAI-compatible server over the engine: `npr-jax serve` (docs/serving.md).

    protocol    what clients send, as pydantic models; what they are answered, as typed dicts
    asking      a body becomes token ids and SamplingParams, or an error that names the field
    order       pieces of branches that grow at the same time, in the order of the text
    answering   events become choices, log-probs and usage
    forms       which become the objects of completions and chats, at once or in pieces
    responses   and of responses
    http        bodies, errors, keys, event streams, clients that leave
    metrics     what Prometheus reads
    app         the routes; openapi describes them, page is the one at /
    server      the process: socket, warm-up, signals

The engine belongs to a thread of its own (decode/async_engine.py); all else is one event loop.
"""
