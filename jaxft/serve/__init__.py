"""The OpenAI-compatible server and the chat in the terminal.

openai_api.py: OpenAI's API: requests checked, responses and chunks
constraint.py: which tokens may come next for JSON, a schema, a regular expression or a call
decisions_api.py: `/v1/decisions`: questions of a request, and the probabilities of their choices
generation.py: the choices of a request as pieces of text
served_models.py: a base with any number of adapters; prompts as token ids; limits of prompts and
    completions
server.py: the ASGI application (its page is `chat_page.html`)
terminal_chat.py: a conversation in the terminal and its commands, for scripts/chat.py, which has the options
    of `jaxft chat`; episodes that a person plays
"""
