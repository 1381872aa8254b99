"""lm-evaluation-harness against the server: its log-likelihoods have to be `Engine.score`'s.

It asks as it always does for models behind a server: `--model local-completions`, with echo and
logprobs, and the sub-network in the model's name.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe import Engine, SamplingParams
from tests.interop.checks import Tally, line_of
from tests.interop.lm_eval_task import MOST_NEW_TOKENS, STOP, write_tasks
from tests.interop.references import logprobs_of, of_tokens
from tests.interop.served import KEYS, MODEL, served

WINDOW = 256  # so that the longer texts have several
TOLERANCE = 1e-4
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One way to run the harness.

    Attributes:
        how: its model arguments, beside those that all have.
        batch_size: prompts in a request.
        tasks: names from `lm_eval_task.TASKS`.
        as_text: whether prompts go over the wire as text. Then the server puts BOS before them, of
            which the harness knows nothing: it counts the last token of the context as well.
    """

    what: str
    subnet: str
    how: str
    tasks: Sequence[str] = ("choice", "rolling", "generate")
    as_text: bool = False
    batch_size: int = 1


LOCAL = "tokenizer={folder},tokenizer_backend=huggingface"
# 0 is BOS; of a remote tokenizer the harness would take the end token for it, 0 being no id to it.
REMOTE = "tokenizer_backend=remote,auth_token={key},custom_prefix_token_id=0"
SETTINGS = (
    Setting("ids, 4 requests at once", "L24-k2", f"{LOCAL},num_concurrent=4"),
    Setting("ids, 4 prompts a request", "L36-k2-w6-t0.7", LOCAL, batch_size=4),
    Setting("text", "L24-k2", f"{LOCAL},tokenized_requests=False", ("choice", "generate"), True),
    Setting("ids of the server's tokenizer", "full", f"{REMOTE},num_concurrent=4"),
)


def check_lm_eval(python: Path, work: Path) -> Iterator[Line]:
    """A line for every setting and task."""
    tasks, server_folder = work / "tasks", work / "server"
    tasks.mkdir()
    server_folder.mkdir()
    with Engine.from_pretrained(MODEL) as engine:
        write_tasks(engine, tasks)
        with served(server_folder) as server:
            for number, setting in enumerate(SETTINGS):
                out, begun = work / f"out-{number}", time.perf_counter()
                run_harness(python, engine.folder, server.url, setting, tasks, out)
                seconds = time.perf_counter() - begun
                for task in setting.tasks:
                    yield judge(engine, setting, task, samples(out, task), seconds)
        yield server.verdict()


def run_harness(
    python: Path, tokenizer: Path, url: str, setting: Setting, tasks: Path, out: Path
) -> None:
    """Run it. Raises: SystemExit: it failed."""
    how = setting.how.format(folder=tokenizer, key=KEYS[0])
    model = f"model={MODEL}@{setting.subnet},base_url={url}/v1/completions,max_retries=1"
    command: list[str | Path] = [python.with_name("lm_eval"), "run", "--model", "local-completions"]
    command += ["--model_args", f"{model},max_length={WINDOW},{how}", "--include_path", tasks]
    command += ["--tasks", ",".join(f"elastic_{task}" for task in setting.tasks)]
    command += ["--batch_size", str(setting.batch_size), "--log_samples", "--output_path", out]
    environment = {
        **os.environ,
        **dict.fromkeys(OFFLINE, "1"),
        "HF_HOME": str(out.with_name("hf")),
        "OPENAI_API_KEY": KEYS[0],
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lm_eval failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    """What the harness wrote down of every document."""
    (path,) = out.glob(f"*/samples_elastic_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge(
    engine: Engine, setting: Setting, task: str, found: list[dict[str, Any]], seconds: float
) -> Line:
    """Compare all that one task gave."""
    tally, errors, greedy = Tally(), [0.0], 0
    for sample in found:
        asked = list(sample["arguments"].values())
        for arguments, reported in zip(asked, sample["resps"], strict=True):
            (got,) = reported
            if task == "generate":
                wanted = generated(engine, setting, arguments["arg_0"])
                tally.equal(got, wanted, f"text after {arguments['arg_0']!r}")
                continue
            if task == "rolling":
                value, likely, got = rolled(engine, setting, arguments["arg_0"]), None, [got]
            else:
                value, likely = chosen(engine, setting, arguments["arg_0"], arguments["arg_1"])
                tally.equal(got[1], str(likely), f"is greedy: {arguments}")
                greedy += likely
            errors.append(abs(float(got[0]) - value))
            tally.close(float(got[0]), value, f"log-likelihood of {arguments}", TOLERANCE)
    if task == "choice" and not setting.as_text:  # the likely choices were made without BOS
        tally.true(greedy, "some choice is what the model would write")
    what = f"{task}, {setting.what}: as Engine.score's {setting.subnet}"
    line = line_of(what.replace("score", "generate") if task == "generate" else what, tally, 0.0)
    line |= {"seconds": round(seconds, 3), "documents": len(found), "subnet": setting.subnet}
    return line if task == "generate" else {**line, "max_error_nats": max(errors)}


def plain_ids(engine: Engine, text: str) -> list[int]:
    """As the harness reads a text: without BOS."""
    return engine.tokenizer.encode(text, add_special_tokens=False)


def chosen(engine: Engine, setting: Setting, context: str, choice: str) -> tuple[float, bool]:
    """Log-likelihood of a choice, and whether all of its tokens are the likeliest."""
    first = len(plain_ids(engine, context))
    encode: Callable[[str], list[int]]
    encode = engine.encode if setting.as_text else lambda text: plain_ids(engine, text)
    ids = encode(context + choice)
    rows = logprobs_of(engine, ids, setting.subnet)[first - 1 :]
    scored = ids[first:]
    return sum(of_tokens(rows, scored)), rows.argmax(dim=-1).tolist() == scored


def rolled(engine: Engine, setting: Setting, text: str) -> float:
    """Log-likelihood of a text, each token once, in windows of WINDOW - 2 tokens."""
    size, total = WINDOW - 2, 0.0
    ids = [engine.tokenizer.bos_id or 0, *plain_ids(engine, text)]
    done = 1
    while done < len(ids):
        end = min(done + size, len(ids))
        window = ids[max(0, end - size - 1) : end]
        new = end - done
        rows = logprobs_of(engine, window, setting.subnet)[-new:]
        total += sum(of_tokens(rows, window[-new:]))
        done = end
    return total


def generated(engine: Engine, setting: Setting, context: str) -> str:
    """What the model writes."""
    prompt = engine.encode(context) if setting.as_text else plain_ids(engine, context)
    params = SamplingParams(max_tokens=MOST_NEW_TOKENS, stop=[STOP])
    return engine.generate(prompt, setting.subnet, params).text
