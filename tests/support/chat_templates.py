"""Chat templates like those of well-known models, and the text that each renders for an assistant turn.

The text is built here a second time, from the parts of a turn and without Jinja, so that tests share nothing
with the code that searches for turns in a rendered text.
"""

from functools import cache

from family_templates import FAMILIES
from hypothesis import strategies as st
from stock_turns import HIDDEN, Rejected, Stock, Turn, as_json, text_alone

from jaxft.data.row_settings import TemplateSettings

# ---- ChatML and SmolLM2: no tool calls


CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
) + CHATML


# ---- Llama 3.0 and 3.1


LLAMA30 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- if tools %}
    {%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, respond with JSON.\n\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- m.content | tojson }}{{- '<|eot_id|>' }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at once') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}
        {{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""


def llama31(turns, index):
    if any(len(turn.calls) > 1 for turn in turns):
        raise Rejected
    turn = turns[index]
    if (turn.thought and turn.key) or (turn.calls and turn.content):
        return HIDDEN
    if turn.calls:
        ((name, arguments),) = turn.calls
        return f'{{"name": "{name}", "parameters": {as_json(arguments)}}}<|eot_id|>'
    return turn.content.strip() + "<|eot_id|>"


# ---- Mistral: no generation prompt, tools before the last question


MISTRAL = """{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have length 9') }}{%- endif %}
            {{- call.function | tojson }}{{- ', ' if not loop.last else '' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' }}{{- m.content | tojson }}{{- '[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('only user, assistant and tool roles') }}{%- endif %}
{%- endfor %}"""


def mistral(turns, index):
    if turns[0].role == "system":
        raise Rejected
    turn = turns[index]
    if (turn.thought and turn.key) or (turn.calls and turn.content):
        return HIDDEN
    if turn.calls:
        calls = ", ".join(as_json({"name": name, "arguments": a}) for name, a in turn.calls)
        return f"[TOOL_CALLS] [{calls}]</s>"
    return turn.content + "</s>"


# ---- Gemma and Phi 3


GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
    {{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
PHI3 = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def gemma(turns, index):
    if any((turn.role == "user") != (i % 2 == 0) for i, turn in enumerate(turns)):
        raise Rejected
    return text_alone("<end_of_turn>", strip=True)(turns, index)


# ---- Qwen 2.5 and 3: tool calls, and thoughts of the last answer alone


_QWEN_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}"""
_QWEN_CALLS = """{%- for call in m.tool_calls or [] %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}"""
_QWEN_REST = """
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
QWEN25 = f"""{_QWEN_TOOLS}
{{%- for m in messages %}}
    {{%- set content = m.content or '' %}}
    {{%- if m.role == 'user' %}}{{{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}}}
    {{%- elif m.role == 'assistant' %}}
        {{{{- '<|im_start|>assistant\n' + content }}}}
        {_QWEN_CALLS}{_QWEN_REST}"""
QWEN3 = f"""{_QWEN_TOOLS}
{{%- set ns = namespace(query=0) %}}
{{%- for m in messages %}}
    {{%- if m.role == 'user' %}}{{%- set ns.query = loop.index0 %}}{{%- endif %}}
{{%- endfor %}}
{{%- for m in messages %}}
    {{%- set content = m.content or '' %}}
    {{%- if m.role == 'user' %}}{{{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}}}
    {{%- elif m.role == 'assistant' %}}
        {{%- set thought = m.reasoning_content or '' %}}
        {{%- if '</think>' in content %}}
            {{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}}
            {{%- set content = content.split('</think>')[-1].lstrip('\n') %}}
        {{%- endif %}}
        {{{{- '<|im_start|>assistant\n' }}}}
        {{%- if loop.index0 > ns.query and (loop.last or thought) %}}
            {{{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}}}
        {{%- else %}}{{{{- content }}}}{{%- endif %}}
        {_QWEN_CALLS}{_QWEN_REST}
{{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}}
    {{{{- '<think>\n\n</think>\n\n' }}}}
{{%- endif %}}"""


def _qwen_calls(text, calls):
    parts = [f'<tool_call>\n{{"name": "{n}", "arguments": {as_json(a)}}}\n</tool_call>' for n, a in calls]
    return "\n".join([text, *parts] if text else parts) if parts else text


def qwen25(turns, index):
    turn = turns[index]
    if turn.thought and turn.key:
        return HIDDEN
    return _qwen_calls(turn.content or "", turn.calls) + "<|im_end|>"


def qwen3(turns, index):
    turn, query = turns[index], max(i for i, t in enumerate(turns) if t.role == "user")
    if turn.thought and index < query:
        return HIDDEN
    answer = _qwen_calls(turn.text or "", turn.calls) + "<|im_end|>"
    last = index == len(turns) - 1
    return f"<think>\n{turn.thought}\n</think>\n\n{answer}" if turn.thought or last else answer


def qwen3_without_thinking(turns, index):
    """The generation prompt has the empty thinking block of the last turn."""
    shown = qwen3(turns, index)
    return shown if shown is HIDDEN else shown.removeprefix("<think>\n\n</think>\n\n")


# ---- DeepSeek: thinking blocks are cut, tool outputs follow the end of the turn


def _deepseek(opening, arguments, calls_if):
    return f"""{{{{- bos_token }}}}
{{%- set ns = namespace(tool=false, call='') %}}
{{%- for m in messages %}}
    {{%- if m.role == 'system' %}}{{{{- m.content }}}}
    {{%- elif m.role == 'user' %}}{{%- set ns.tool = false %}}{{{{- '<｜User｜>' + m.content }}}}
    {{%- elif m.role == 'tool' %}}
        {{{{- '' if ns.tool else '<｜tool▁outputs▁begin｜>' }}}}{{%- set ns.tool = true %}}
        {{{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}}}
    {{%- else %}}
        {{{{- '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>' }}}}{{%- set ns.tool = false %}}
        {{%- if {calls_if} %}}
            {{{{- m.content or '' }}}}{{{{- '<｜tool▁calls▁begin｜>' }}}}
            {{%- for call in m.tool_calls %}}
                {{{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n```json\n' }}}}
                {{{{- {arguments} }}}}{{{{- '\n```<｜tool▁call▁end｜>' }}}}
            {{%- endfor %}}
            {{{{- '<｜tool▁calls▁end｜>' + eos_token }}}}
        {{%- else %}}{{{{- m.content.split('</think>')[-1] + eos_token }}}}{{%- endif %}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if ns.tool %}}{{{{- '<｜tool▁outputs▁end｜>' }}}}
{{%- elif add_generation_prompt %}}{{{{- '{opening}' }}}}{{%- endif %}}"""


_EOS = "<｜end▁of▁sentence｜>"
DEEPSEEK_V3 = _deepseek("<｜Assistant｜>", "call.function.arguments | tojson", "m.tool_calls")
DEEPSEEK_R1 = _deepseek(
    "<｜Assistant｜><think>\\n", "call.function.arguments + ''", "m.tool_calls and m.content is none"
)


def deepseek_v3(turns, index):
    turn = turns[index]
    if turn.thought and (turn.key or not turn.calls):
        return HIDDEN
    calls = "".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{as_json(a)}\n```<｜tool▁call▁end｜>"
        for n, a in turn.calls
    )
    calls = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""
    return f"{turn.content or ''}{calls}{_EOS}"


def deepseek_r1(turns, index):
    turn = turns[index]
    if turn.calls and turn.content is None:
        return deepseek_v3(turns, index)
    return HIDDEN if turn.thought or turn.calls else f"{turn.content}{_EOS}"


# ---- with markers: Qwen 2.5's, as TRL marks it


MARKED = QWEN25.replace(
    "{{- '<|im_start|>assistant\n' + content }}",
    "{{- '<|im_start|>assistant\n' }}{% generation %}{{- content }}",
).replace(
    "        {{- '<|im_end|>\n' }}\n    {%- elif",
    "        {{- '<|im_end|>\n' }}{% endgeneration %}\n    {%- elif",
)


_IM = ("<|im_start|>", "<|im_end|>")
_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_DEEPSEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_MISTRAL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
TEMPLATES = {
    "chatml": Stock(CHATML, text_alone("<|im_end|>"), "<|im_end|>", special=_IM),
    "smollm2": Stock(SMOLLM2, text_alone("<|im_end|>"), "<|im_end|>", special=_IM),
    "llama3.0": Stock(
        LLAMA30, text_alone("<|eot_id|>", strip=True), "<|end_of_text|>", special=_LLAMA
    ),
    "llama3.1": Stock(LLAMA31, llama31, "<|eot_id|>", special=_LLAMA),
    "mistral": Stock(MISTRAL, mistral, "</s>", special=_MISTRAL),
    "gemma": Stock(GEMMA, gemma, "<eos>", special=("<start_of_turn>", "<end_of_turn>")),
    "phi3": Stock(PHI3, text_alone("<|end|>"), "<|endoftext|>", special=_PHI),
    "qwen2.5": Stock(QWEN25, qwen25, "<|im_end|>", special=_IM),
    "qwen3": Stock(QWEN3, qwen3, "<|im_end|>", special=_IM),
    "deepseek-v3": Stock(DEEPSEEK_V3, deepseek_v3, _EOS, special=_DEEPSEEK),
    "deepseek-r1": Stock(DEEPSEEK_R1, deepseek_r1, _EOS, special=_DEEPSEEK),
    "qwen3-no-thinking": Stock(
        QWEN3, qwen3_without_thinking, "<|im_end|>", special=_IM,
        settings=TemplateSettings(chat_template_kwargs=("enable_thinking=false",)),
    ),
    "marked": Stock(MARKED, qwen25, "<|im_end|>", special=_IM),
    **FAMILIES,
}  # fmt: skip


@cache
def stock_tokenizer(name):
    tokenizer = TEMPLATES[name].tokenizer()
    tokenizer.name_or_path = f"stock/{name}"
    return tokenizer


# ---- random conversations


WORDS = st.text(
    st.sampled_from("abcin the rank? 12\n\té ü漢字🙂👩‍🔬<|>[]{}\"'\\&"), min_size=1, max_size=20
).map(str.strip)
WORD = WORDS.filter(bool)
NAMES = st.text(st.sampled_from("inkmodel_"), min_size=1, max_size=8)
SCALARS = st.one_of(WORD, st.integers(-99, 99), st.booleans(), st.none(), st.sampled_from([0.5, 1e-7]))
ARGUMENTS = st.dictionaries(NAMES, st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=2)


@st.composite
def conversations(draw):
    """Turns of user, assistant and tools, with thoughts and tool calls; the last is an assistant turn."""

    def answer(calls):
        thought = draw(WORD) if draw(st.integers(0, 3)) == 0 else ""
        text = draw(st.one_of(st.none(), st.just(""), WORD)) if calls else draw(WORD)
        return Turn("assistant", text, thought, draw(st.booleans()), calls)

    turns = [Turn("system", draw(WORD))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(WORD)))
        if draw(st.booleans()):
            calls = tuple(draw(st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=2)))
            turns.append(answer(calls))
            turns += [Turn("tool", draw(WORD)) for _ in calls]
        turns.append(answer(()))
    calls = tuple(draw(st.lists(st.tuples(NAMES, ARGUMENTS), max_size=2)))
    return (*turns[:-1], answer(calls)) if draw(st.booleans()) else tuple(turns)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rank",
            "description": "The rank of a matrix",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
        },
    }
]
