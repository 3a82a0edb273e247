"""Chat templates like those of Gemma, Mistral, Phi-4, SmolLM3, OLMo, Granite and DeepSeek's distilled models,
and the text that each renders for an assistant turn; see chat_templates.py.
"""

from stock_turns import HIDDEN, Rejected, Stock, as_json, text_alone

from jaxft.data.row_settings import TemplateSettings

MERGE = TemplateSettings(system="merge")


def without_system(turns):
    return turns[1:] if turns[0].role == "system" else turns


def alternate(turns):
    """Whether users and the assistant take turns, which a user begins."""
    return all((turn.role == "user") == (i % 2 == 0) for i, turn in enumerate(turns))


# ---- Gemma 2, which has no system role, and Gemma 3, which puts it into the first user turn


GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if messages[0].role == 'system' else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
    {{- first if loop.first else '' }}
    {%- if m.content is string %}{{- m.content | trim }}
    {%- else %}{{- raise_exception('Invalid content type') }}{%- endif %}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""


def gemma3(turns, index):
    rest = without_system(turns)
    if not alternate(rest):
        raise Rejected
    return text_alone("<end_of_turn>", strip=True)(turns, index)


def gemma2_merged(turns, index):
    if not alternate(without_system(turns)):
        raise Rejected
    return text_alone("<end_of_turn>", strip=True)(turns, index)


# ---- Mistral: ids of 9 characters, tools before the last question, the system message in the last turn alone
# (v0.3, Nemo) or in a turn of its own (Small)


_MISTRAL = """{{{{- bos_token }}}}
{{%- set system = messages[0].content if messages[0].role == 'system' else none %}}
{{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}}
{before}
{{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}}
{{%- set ns = namespace(index=0) %}}
{{%- for m in rest %}}
    {{%- if m.role != 'tool' and not m.tool_calls %}}
        {{%- if (m.role == 'user') != (ns.index % 2 == 0) %}}
            {{{{- raise_exception('After the optional system message, conversation roles must alternate') }}}}
        {{%- endif %}}
        {{%- set ns.index = ns.index + 1 %}}
    {{%- endif %}}
{{%- endfor %}}
{{%- for m in rest %}}
    {{%- if m.role == 'user' %}}
        {{%- if tools and m == users[-1] %}}
            {{{{- '[AVAILABLE_TOOLS]{space}' }}}}{{{{- tools | tojson }}}}{{{{- '[/AVAILABLE_TOOLS]' }}}}
        {{%- endif %}}
        {{{{- '[INST]{inst}' + ({system} if loop.last and system else '') + m.content + '[/INST]' }}}}
    {{%- elif m.tool_calls is defined and m.tool_calls is not none %}}
        {{{{- '[TOOL_CALLS]{space}[' }}}}
        {{%- for call in m.tool_calls %}}
            {{%- set out = call.function | tojson %}}
            {{%- if call.id is not defined or call.id | length {wrong} %}}
                {{{{- raise_exception('Tool call IDs should be alphanumeric with length 9!') }}}}
            {{%- endif %}}
            {{{{- out[:-1] + ', "id": "' + call.id[-9:] + '"}}' }}}}
            {{{{- ']' + eos_token if loop.last else ', ' }}}}
        {{%- endfor %}}
    {{%- elif m.role == 'assistant' %}}{{{{- {answer} + eos_token }}}}
    {{%- elif m.role == 'tool' %}}
        {{%- if m.tool_call_id is not defined or m.tool_call_id | length {wrong} %}}
            {{{{- raise_exception('Tool call IDs should be alphanumeric with length 9!') }}}}
        {{%- endif %}}
        {{{{- '[TOOL_RESULTS]{space}{{"content": ' + m.content | string }}}}
        {{{{- ', "call_id": "' + m.tool_call_id[-9:] + '"}}[/TOOL_RESULTS]' }}}}
    {{%- else %}}{{{{- raise_exception('Only user and assistant roles are supported') }}}}{{%- endif %}}
{{%- endfor %}}"""
_IN_LAST_TURN = "system + '\\n\\n'"
MISTRAL_7B = _MISTRAL.format(
    before="", space=" ", inst=" ", system=_IN_LAST_TURN, wrong="!= 9", answer="' ' + m.content | trim"
)
MISTRAL_NEMO = _MISTRAL.format(
    before="", space="", inst="", system=_IN_LAST_TURN, wrong="!= 9", answer="m.content"
)
MISTRAL_SMALL = _MISTRAL.format(
    before="{{- '[SYSTEM_PROMPT]' }}{%- if tools %}{{- 'You can call tools.\\n\\n' }}{%- endif %}"
    "{{- system or 'You are Mistral Small 3. The current date is ' + strftime_now('%Y-%m-%d') + '.' }}"
    "{{- '[/SYSTEM_PROMPT]' }}",
    space=" ", inst="", system="''", wrong="< 9", answer="m.content",
)  # fmt: skip


def mistral(space, strip=False):
    def shown(turns, index):
        turn = turns[index]
        if (turn.thought and turn.key) or (turn.calls and turn.content):
            return HIDDEN
        if not turn.calls:
            return (turn.content.strip() if strip else turn.content) + "</s>"
        calls = ", ".join(
            as_json({"name": name, "arguments": a, "id": f"{index:04}{i:05}"})
            for i, (name, a) in enumerate(turn.calls)
        )
        return f"[TOOL_CALLS]{space}[{calls}]</s>"

    return shown


# ---- Phi-4 and Phi-4-mini


PHI4 = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI4_FIRST = (  # the first version on the hub: the question ends with the header of the answer
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<|im_start|>system<|im_sep|>' + m['content'] + '<|im_end|>' }}{% elif m['role'] == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + m['content'] + '<|im_end|><|im_start|>assistant<|im_sep|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
PHI4_MINI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
    "{{ '<|tool|>' + m['tools'] + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


# ---- SmolLM3: its markers enclose the header of a turn


SMOLLM3 = """{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
    {%- if '/no_think' in system %}{%- set mode = '/no_think' %}
    {%- elif '/think' in system %}{%- set mode = '/think' %}{%- endif %}
    {%- set custom = system.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' ~ strftime_now('%d %B %Y') }}
{{- '\nReasoning Mode: ' + mode + '\n\n## Custom Instructions\n\n' + (custom or 'You are SmolLM.') + '\n\n' }}
{%- if tools %}
    {{- '### Tools\n\n<tools>\n' }}{%- for tool in tools %}{{- tool | string + '\n' }}{%- endfor %}
    {{- '</tools>\n\n' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\n' + ('' if mode == '/think' else '<think>\n\n</think>\n') }}
        {{- content.lstrip('\n') + '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- elif m.role == 'tool' %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('' if mode == '/think' else '<think>\n\n</think>\n') }}
{%- endif %}"""


def smollm3(turns, index):
    turn = turns[index]
    return HIDDEN if turn.calls or (turn.thought and turn.key) else turn.content + "<|im_end|>"


# ---- OLMo 2, whose BOS is its EOS, and OLMo 3, whose last turn ends otherwise than those before


OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] in ('system', 'user') %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
OLMO3 = """{%- if not messages | selectattr('role', 'equalto', 'system') | list %}
    {{- '<|im_start|>system\nYou are a helpful function-calling AI assistant. ' }}
    {%- if tools %}{{- '<functions>' + tools | tojson + '</functions>' }}
    {%- else %}{{- 'You do not currently have access to any functions. <functions></functions>' }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m['role'] == 'system' %}
        {{- '<|im_start|>system\n' + m['content'] }}
        {%- if tools is not none %}{{- '<functions>' + tools | tojson + '</functions>' }}{%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif m['role'] == 'user' %}{{- '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}
    {%- elif m['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if m.get('content', none) is not none %}{{- m['content'] }}{%- endif %}
        {%- if m.get('tool_calls', none) is not none %}
            {{- '<function_calls>' }}
            {%- for call in m['tool_calls'] %}
                {%- set ns = namespace(arguments=[]) %}
                {%- for key, value in call['function']['arguments'].items() %}
                    {%- set ns.arguments = ns.arguments + [key ~ '=' ~ (value | tojson)] %}
                {%- endfor %}
                {{- call['function']['name'] + '(' + ns.arguments | join(', ') + ')' }}
                {{- '' if loop.last else '\n' }}
            {%- endfor %}
            {{- '</function_calls>' }}
        {%- endif %}
        {{- eos_token if loop.last else '<|im_end|>\n' }}
    {%- elif m['role'] in ('environment', 'tool') %}
        {{- '<|im_start|>environment\n' + m['content'] + '<|im_end|>\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
{%- endfor %}"""


def olmo3(turns, index):
    turn = turns[index]
    if turn.thought and turn.key:
        return HIDDEN
    calls = "\n".join(f"{n}({', '.join(f'{k}={as_json(v)}' for k, v in a.items())})" for n, a in turn.calls)
    calls = f"<function_calls>{calls}</function_calls>" if turn.calls else ""
    return f"{turn.content or ''}{calls}{'<|endoftext|>' if index == len(turns) - 1 else '<|im_end|>'}"


# ---- Granite 3.3


GRANITE = """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set system = 'Today\\'s Date: ' + strftime_now('%B %d, %Y') + '. You are Granite.' %}
    {%- if thinking %}{%- set system = system + ' Think between <think></think>.' %}{%- endif %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{%- if tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\n' }}
{%- endif %}
{%- for m in rest %}
    {{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""


# ---- DeepSeek-R1-Distill: thinking blocks are cut, except after the results of tools


R1_DISTILL = """{%- set ns = namespace(first=true, tool=false, output=true, system='') %}
{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = m.content %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.tool = false %}{{- '<｜User｜>' + m.content }}{%- endif %}
    {%- if m.role == 'assistant' and m.content is none %}
        {%- set ns.tool = false %}
        {%- for call in m.tool_calls %}
            {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' if ns.first else '\n' }}
            {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n' }}
            {{- call.function.arguments + '\n```<｜tool▁call▁end｜>' }}
            {{- '' if ns.first else '<｜tool▁calls▁end｜>' + eos_token }}{%- set ns.first = false %}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}
        {%- if ns.tool %}{{- '<｜tool▁outputs▁end｜>' + m.content + eos_token }}{%- set ns.tool = false %}
        {%- else %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{%- endif %}
    {%- elif m.role == 'tool' %}
        {%- set ns.tool = true %}
        {{- '<｜tool▁outputs▁begin｜>' if ns.output else '\n' }}{%- set ns.output = false %}
        {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if ns.tool %}{{- '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""
_DEEPSEEK_EOS = "<｜end▁of▁sentence｜>"


def r1_distill(turns, index):
    turn = turns[index]
    if turn.calls and turn.content is None:
        return r1_calls(turns, index)
    cut = turn.thought and (turn.key or turns[index - 1].role != "tool")
    return HIDDEN if cut or turn.calls else turn.content + _DEEPSEEK_EOS


def r1_calls(turns, index):
    """The first call of a conversation opens a turn and doesn't end it; each other one ends it."""
    turn, is_last = turns[index], index == len(turns) - 1
    is_first = not any(t.calls and t.content is None for t in turns[:index])
    if turn.thought or (is_first and len(turn.calls) == 1 and not is_last):
        return HIDDEN
    calls = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{as_json(a)}\n```<｜tool▁call▁end｜>"
        for n, a in turn.calls
    ]
    end = f"<｜tool▁calls▁end｜>{_DEEPSEEK_EOS}"
    ended = [call + ("" if is_first and i == 0 else end) for i, call in enumerate(calls)]
    return ("<｜tool▁calls▁begin｜>" if is_first else "") + "\n".join(ended)


# Of a vision model: it reads contents as lists of parts, and renders nothing of a text.
SMOLVLM = """<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}
{%- if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}
{%- for line in message['content'] %}
    {%- if line['type'] == 'text' %}{{ line['text'] }}
    {%- elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}
{%- endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_TOOLS = ("AVAILABLE_TOOLS", "TOOL_RESULTS", "INST", "SYSTEM_PROMPT")
_MISTRAL_SPECIAL = ("[TOOL_CALLS]", *(f"[{end}{name}]" for name in _TOOLS for end in ("", "/")))
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_IM = ("<|im_start|>", "<|im_end|>")
_DEEPSEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
FAMILIES = {
    "gemma2-merged": Stock(GEMMA2, gemma2_merged, "<eos>", "<bos>", _GEMMA, MERGE),
    "gemma3": Stock(GEMMA3, gemma3, "<eos>", "<bos>", _GEMMA),
    "mistral-7b-v0.3": Stock(MISTRAL_7B, mistral(" ", strip=True), "</s>", special=_MISTRAL_SPECIAL),
    "mistral-7b-merged": Stock(MISTRAL_7B, mistral(" ", strip=True), "</s>", "<s>", _MISTRAL_SPECIAL, MERGE),
    "mistral-nemo": Stock(MISTRAL_NEMO, mistral(""), "</s>", special=_MISTRAL_SPECIAL),
    "mistral-small": Stock(MISTRAL_SMALL, mistral(" "), "</s>", special=_MISTRAL_SPECIAL),
    "phi4": Stock(PHI4, text_alone("<|im_end|>"), "<|im_end|>", special=(*_IM, "<|im_sep|>")),
    "phi4-first": Stock(PHI4_FIRST, text_alone("<|im_end|>"), "<|endoftext|>", special=(*_IM, "<|im_sep|>")),
    "phi4-mini": Stock(
        PHI4_MINI, text_alone("<|end|>"), "<|endoftext|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"),
    ),
    "smolvlm": Stock(
        SMOLVLM, text_alone("<end_of_utterance>"), "<end_of_utterance>",
        special=("<|im_start|>", "<end_of_utterance>", "<image>"),
    ),
    "smollm3": Stock(SMOLLM3, smollm3, "<|im_end|>", special=_IM),
    "smollm3-no-thinking": Stock(
        SMOLLM3, smollm3, "<|im_end|>", special=_IM,
        settings=TemplateSettings(chat_template_kwargs=("enable_thinking=false",)),
    ),
    "olmo2": Stock(OLMO2, text_alone("<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"),
    "olmo3": Stock(
        OLMO3, olmo3, "<|endoftext|>", "<|endoftext|>", (*_IM, "<function_calls>", "</function_calls>")
    ),
    "granite3": Stock(
        GRANITE, text_alone("<|end_of_text|>"), "<|end_of_text|>", "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "deepseek-r1-distill": Stock(
        R1_DISTILL, r1_distill, _DEEPSEEK_EOS, "<｜begin▁of▁sentence｜>", _DEEPSEEK
    ),
}  # fmt: skip
