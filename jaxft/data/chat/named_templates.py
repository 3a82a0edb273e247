"""Chat templates by name, for base models that come without one, and the tokens that they need."""

from pathlib import Path
from typing import NamedTuple

BOS = "{{ bos_token }}"  # at the start of a template


class NamedTemplate(NamedTuple):
    """A chat template of a model family, for base models that come without one.

    source: the Jinja template. tokens: the special tokens that it writes in addition to BOS and EOS, or () if
    they are not known.
    """

    source: str
    tokens: tuple[str, ...]


_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QWEN = (
    "{% if tools %}"
    "{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}'
    "{% elif messages[0]['role'] == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% if call['function'] is defined %}{% set call = call['function'] %}{% endif %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}"
    "{% if call['arguments'] is string %}{{ call['arguments'] }}"
    "{% else %}{{ call['arguments'] | tojson }}{% endif %}"
    "{{ '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    BOS + "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The system message begins the first user turn, as in Gemma 3 and, in Mistral's models, up to v3.
_GEMMA = (
    BOS + "{% set first = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set first.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<start_of_turn>model\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% else %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' + first.system + message['content'] | trim "
    "+ '<end_of_turn>\\n' }}"
    "{% set first.system = '' %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MISTRAL = (
    BOS + "{% set first = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set first.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + first.system + message['content'] + '[/INST]' }}"
    "{% set first.system = '' %}"
    "{% else %}{{ raise_exception('this template has no role ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)
_PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_PHI4 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "qwen": NamedTemplate(_QWEN, ("<|im_start|>", "<|im_end|>")),
    "llama3": NamedTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": NamedTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "mistral": NamedTemplate(_MISTRAL, ("[INST]", "[/INST]")),
    "phi3": NamedTemplate(_PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": NamedTemplate(_PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "zephyr": NamedTemplate(_ZEPHYR, ()),
}


def find_template(name: str) -> NamedTemplate:
    """Return a chat template by name, or from a .jinja file, whose special tokens are not known. Raises
    ValueError or FileNotFoundError.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path, names = Path(name), ", ".join(TEMPLATES)
    if not path.suffix and not path.is_file():
        raise ValueError(f"no chat template is named {name!r}; use one of {names}, or a .jinja file")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file; use {names}, or a .jinja file")
    try:
        return NamedTemplate(path.read_text(encoding="utf-8"), ())
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} is not UTF-8; save the template as UTF-8") from error
