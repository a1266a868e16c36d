"""The check of chat templates finds what is scored wrongly."""

import sys

import chat_templates
import pytest

KEEPS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|user|><|system|><|tool|> #}"
)


def test_each_case_of_a_template_has_a_cell_and_what_it_refuses_a_reason(tmp_path, monkeypatch, capsys):
    (tmp_path / "keeps.jinja").write_text(KEEPS)
    monkeypatch.setattr(sys, "argv", ["chat_templates.py", str(tmp_path)])
    assert chat_templates.main() == 0
    shown = capsys.readouterr().out
    assert "| keeps | exact | exact | exact | exact | refused [1] |" in shown
    assert "[1] " in shown
    assert "5 checks: 4 exact, 1 refused" in shown


@pytest.mark.parametrize(
    ("first", "last", "fault"),
    [
        (0, None, None),
        (-1, None, "prompt"),
        (1, None, "after the prompt that is served"),
        (0, -1, "end-of-turn"),
    ],
)
def test_a_shifted_answer_is_found(first, last, fault):
    tokenizer, case = chat_templates.build_tokenizer(KEEPS), chat_templates.CASES["one turn"]
    prompt = chat_templates.serve(tokenizer, case["messages"][:1], case)
    answer = tokenizer(case["messages"][1]["content"] + "<|end|>")["input_ids"]
    tokens = [*prompt, *answer][:last]
    targets = [token if n >= len(prompt) + first else -100 for n, token in enumerate(tokens)][1:]
    found = chat_templates.find_fault(tokenizer, case, 1, [(tokens[:-1], targets)])
    assert found is None if fault is None else fault in found
