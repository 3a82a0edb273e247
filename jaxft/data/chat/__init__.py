"""Chat templates: rendering, loss masks, tool calls.

loss_mask.py: tokens and loss masks of examples
next_turn.py: the tokens between two turns of a conversation that a model continues
template.py: chat templates, remedies for rows that they reject
tool_calls.py: tool calls in the text of a completion
turns.py: the assistant turns in a rendered text, the check that it shows all of them
"""
