"""Chat templates: rendering, loss masks, tool calls.

loss_mask.py: tokens and loss masks of examples
named_templates.py: chat templates by name for base models
next_turn.py: the tokens between two turns of a conversation that a model continues
rejections.py: remedies for rows that a chat template rejects
template.py: chat templates
template_check.py: the check that a template shows all of a turn
template_settings.py: how a run renders them
tool_calls.py: tool calls in the text of a completion
turns.py: the assistant turns in a rendered text
"""
