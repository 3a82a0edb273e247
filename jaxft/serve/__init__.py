"""The OpenAI-compatible server and the chat in the terminal.

openai_api.py: OpenAI's API: checked requests, responses, chunks of streams
constraint.py: constrained sampling: JSON, JSON schemas, regular expressions, tool calls
decisions_api.py: `/v1/decisions`: questions and the probabilities of their choices; `/v1/rerank`
generation.py: the choices of a request as pieces of text (stop strings: engine/text_stream.py)
served_models.py: a base with any number of adapters; prompts as token ids; limits of prompts and
    completions
server.py: the ASGI application: routes, limits of requests, clients that leave, HTTP status of each error
    (its page is `chat_page.html`)
terminal_chat.py: a conversation in the terminal and its commands, for scripts/chat.py, which has the options
    of `jaxft chat`; episodes that a person plays
"""
