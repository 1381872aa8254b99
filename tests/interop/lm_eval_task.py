"""A task for lm-evaluation-harness that needs no network: made from Python's language reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elastic_moe import Engine, SamplingParams
from elastic_moe.lab.sweeps.text import language_reference

DOCUMENTS, CONTEXT_WORDS, CHOICE_WORDS = 16, 12, 5
ROLLING_CHARACTERS = (90, 700, 3000)
MOST_NEW_TOKENS, STOP = 24, "\n\n"
# Choices that hold letters of several bytes, a marker of chats, and what is not in any text.
ODD = (" über naïve — ☃", " <|im_end|>", " zxqj zxqj")
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "choice": """task: elastic_choice
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
    "rolling": """task: elastic_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
""",
    "generate": """task: elastic_generate
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  {{until: ["\\n\\n"], max_gen_toks: 24, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
}


def write_tasks(engine: Engine, folder: Path) -> None:
    """Write the tasks' files: a YAML file and the documents of each."""
    text = language_reference().text
    words = text.split(" ")
    step = CONTEXT_WORDS + CHOICE_WORDS
    asked = []
    for number in range(DOCUMENTS):
        at = (number + 1) * len(words) // (DOCUMENTS + 2)
        context = " ".join(words[at : at + CONTEXT_WORDS]).strip()
        true = " " + " ".join(words[at + CONTEXT_WORDS : at + step]).strip()
        ids = engine.encode(context)[1:]
        likely = engine.generate(ids, None, SamplingParams(max_tokens=2)).text.rstrip()
        choices = [true, ODD[number % len(ODD)], *([likely] if likely else [])]
        asked.append({"context": context, "choices": choices, "answer": 0})
    rolled = [{"text": text[5000 : 5000 + size]} for size in ROLLING_CHARACTERS]
    documents: dict[str, list[dict[str, Any]]] = {
        "choice": asked,
        "rolling": rolled,
        "generate": asked,
    }
    for name, template in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents[name]))
        (folder / f"{name}.yaml").write_text((template + COMMON).format(data=data))
