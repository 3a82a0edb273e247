"""Text generation.

served_model.py: prompts by the name of a model
text_stream.py: text while tokens arrive, up to a stop string
api_request.py: OpenAI's API: bodies checked
api_response.py: responses and chunks of OpenAI's API
tool_calls.py: tool calls in the text of a completion
constraint.py: which tokens may come next for JSON, a schema, a regular expression or a call
decisions.py: `/v1/decisions`: questions of a request, and the probabilities of their choices
generation.py: the choices of a request as pieces of text
server.py: the ASGI application (its page is `chat_page.html`)
chat.py: a conversation in the terminal and its commands
"""
