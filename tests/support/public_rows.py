"""Rows in the published shape of public datasets, with texts of our own."""

import json

TEXTS = [
    ("Name a prime above ten.", "Thirteen is a prime above ten.", "Twelve."),
    ("What melts at zero degrees Celsius?", "Ice melts at zero degrees Celsius.", "Steel, I think."),
    ("Translate 'good morning' to French.", "Bonjour.", "Gute Nacht."),
    ("How many legs has a spider?", "A spider has eight legs.", "Six legs."),
    ("Give a synonym of quick.", "Fast is a synonym of quick.", "Slow."),
    ("Which planet is red?", "Mars looks red.", "Venus is red."),
]
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def call(i):
    return {"name": "get_weather", "arguments": {"town": f"T{i}"}}


def openai_call(i):
    function = {"name": "get_weather", "arguments": json.dumps({"town": f"T{i}"})}
    return {"role": "assistant", "tool_calls": [{"id": f"c{i}", "type": "function", "function": function}]}


def critique(i, text):
    notes = {"helpfulness": {"Rating": str(5 - i), "Rationale": "r"}}
    return {
        "annotations": notes, "model": f"m{i}", "principle": "honesty", "response": f"{text} ({i})",
        "critique": "fine", "overall_score": 8.0 - i, "fine-grained_score": 5 - i,
    }  # fmt: skip


def glaive(i):
    system = "SYSTEM: You are a helpful assistant with access to the following functions. Use them -"
    called = f'{{"name": "get_weather", "arguments": \'{{"town": "T{i}"}}\'}}'
    chat = (
        f"USER: Weather in town {i}?\n\n\nASSISTANT: <functioncall> {called} <|endoftext|>\n\n\n"
        f'FUNCTION RESPONSE: {{"t": {20 + i}}}\n\n\nASSISTANT: It is {20 + i} degrees. <|endoftext|>\n\n\n'
    )
    return {"system": f"{system}\n{json.dumps(WEATHER, indent=4)}", "chat": chat}


# name -> a row from its number, a question, a good answer and a bad one
PUBLIC = {
    "alpaca": lambda i, q, a, b: {
        "instruction": q, "input": "", "output": a, "text": f"Below is an instruction.\n\n{q}\n\n{a}",
    },
    "alpaca_cleaned": lambda i, q, a, b: {"output": a, "input": "briefly" if i % 2 else "", "instruction": q},
    "dolly": lambda i, q, a, b: {"instruction": q, "context": "", "response": a, "category": "open_qa"},
    "oasst_text": lambda i, q, a, b: {"text": f"### Human: {q}### Assistant: {a}"},
    "ultrachat": lambda i, q, a, b: {"prompt": q, "prompt_id": f"{i:x}", "messages": [user(q), said(a)]},
    "sharegpt": lambda i, q, a, b: {"id": f"x{i}", "conversations": [human(q), gpt(a)]},
    "hh_rlhf": lambda i, q, a, b: {
        "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}",
    },
    "ultrafeedback_binarized": lambda i, q, a, b: {
        "prompt": q, "prompt_id": f"{i:x}", "chosen": [user(q), said(a)], "rejected": [user(q), said(b)],
        "messages": [user(q), said(a)], "score_chosen": 8.5, "score_rejected": 3.0 + i / 4,
    },
    "ultrafeedback": lambda i, q, a, b: {
        "source": "evol_instruct", "instruction": q, "models": ["m0", "m1", "m2", "m3"],
        "completions": [critique(k, a if k < 2 else b) for k in range(4)],
        "correct_answers": ["None"], "incorrect_answers": ["None"],
    },
    "helpsteer": lambda i, q, a, b: {
        "prompt": q, "response": a if i % 2 else b, "helpfulness": 4 - i % 3, "correctness": 4,
        "coherence": 4, "complexity": 1, "verbosity": 1,
    },
    "helpsteer3": lambda i, q, a, b: {
        "domain": "general", "language": "english", "context": [user(q)], "response1": a, "response2": b,
        "overall_preference": -2, "individual_preference": [{"score": -2, "reasoning": "r"}],
    },
    "nectar": lambda i, q, a, b: {
        "prompt": f"\n\nHuman: {q}\n\nAssistant: ",
        "answers": [{"answer": f"{a if k < 3 else b} {k}", "model": "m", "rank": k + 1.0} for k in range(7)],
        "turns": 1, "num_responses": 7, "source": ["lmsys"], "good_natured": True,
    },
    "nemo_rankings": lambda i, q, a, b: {
        "context": [user(q)],
        "completions": [{"rank": k, "completion": [said(x)]} for k, x in enumerate((a, b))],
    },
    "orca_dpo": lambda i, q, a, b: {"system": "Be helpful.", "question": q, "chosen": a, "rejected": b},
    "pku_saferlhf": lambda i, q, a, b: {
        "prompt": q, "response_0": b, "response_1": a, "is_response_0_safe": True, "is_response_1_safe": True,
        "better_response_id": 1, "safer_response_id": 1,
    },
    "shp": lambda i, q, a, b: {
        "post_id": "a", "domain": "x", "history": q, "human_ref_A": a, "human_ref_B": b, "labels": 1,
        "score_A": 12, "score_B": 3,
    },
    "lf_dpo_demo": lambda i, q, a, b: {"conversations": [human(q)], "chosen": gpt(a), "rejected": gpt(b)},
    "lf_kto_demo": lambda i, q, a, b: {"messages": [user(q), said(a if i % 2 else b)], "label": bool(i % 2)},
    "lf_glaive_demo": lambda i, q, a, b: {
        "conversations": [
            human(f"Weather in town {i}?"), {"from": "function_call", "value": json.dumps(call(i))},
            {"from": "observation", "value": json.dumps({"t": 20 + i})}, gpt(f"It is {20 + i} degrees."),
        ],
        "tools": json.dumps([WEATHER]),
    },
    "lf_identity": lambda i, q, a, b: {"instruction": "hi", "input": "", "output": f"I am {{{{x}}}}, {i}."},
    "lf_c4_demo": lambda i, q, a, b: {"text": f"{a} {q} " * 4, "timestamp": "2019-04-25", "url": "x.y"},
    "glaive_v2": lambda i, q, a, b: glaive(i),
    "openai_chat": lambda i, q, a, b: {
        "messages": [
            {"role": "system", "content": "Be brief."}, user(q), {**said(b), "weight": 0}, user("Sure?"),
            {**said(a), "weight": 1},
        ],
    },
    "openai_tools": lambda i, q, a, b: {
        "messages": [user(f"Weather in town {i}?"), openai_call(i)], "parallel_tool_calls": False,
        "tools": [{"type": "function", "function": WEATHER}],
    },
    "openai_dpo": lambda i, q, a, b: {
        "input": {"messages": [user(q)], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [said(a)], "non_preferred_output": [said(b)],
    },
    "openai_rft": lambda i, q, a, b: {"messages": [user(q)], "reference_answer": a},
    "gsm8k": lambda i, q, a, b: {"question": q, "answer": f"{a}\n#### 4"},
    "math_shepherd": lambda i, q, a, b: {
        "prompt": q, "completions": ["Step one.", "Step two."], "labels": [True, bool(i % 2)],
    },
    "imdb": lambda i, q, a, b: {"text": f"{a} A {'great' if i % 2 else 'dull'} film.", "label": i % 2},
    "sst2": lambda i, q, a, b: {"idx": i, "sentence": a if i % 2 else b, "label": i % 2},
    "mnli": lambda i, q, a, b: {"premise": a, "hypothesis": b, "label": i % 3, "idx": i},
    "boolq": lambda i, q, a, b: {"question": q, "answer": bool(i % 2), "passage": a},
    "arc": lambda i, q, a, b: {
        "id": f"M{i}", "question": q, "choices": {"text": [b, a, "None"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "mmlu_pro": lambda i, q, a, b: {
        "question_id": i, "question": q, "options": [a, b, "None", "All"], "answer": "A", "answer_index": 0,
        "cot_content": "", "category": "misc",
    },
    "hellaswag": lambda i, q, a, b: {
        "ind": i, "activity_label": "x", "ctx_a": q, "ctx_b": "", "ctx": q, "endings": [b, "No.", a, "Yes."],
        "source_id": "s", "label": "2",
    },
    "winogrande": lambda i, q, a, b: {"sentence": f"{q} _", "option1": a, "option2": b, "answer": "1"},
    "race": lambda i, q, a, b: {
        "example_id": f"r{i}", "article": a, "question": q, "options": [b, a], "answer": "B",
    },
    "mmlu": lambda i, q, a, b: {
        "question": q, "subject": "misc", "choices": [a, b, "None of these", "Cannot say"], "answer": 0,
    },
}  # fmt: skip


def public_rows(name):
    """Six rows of a dataset."""
    return [PUBLIC[name](i, *texts) for i, texts in enumerate(TEXTS)]
