"""Commands, snippets and figures of the documentation: each runs, or is that of a result file."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.model.families import FAMILIES
from experiments.science.report import read_summary, science_table, science_words
from experiments.science.summary import BETTER_AT, COST_ALLOWED
from tests.docs.pages import RESULTS, ROOT, Page, pages, read
from tests.interop.llama_cpp.compare import CASES

PAGES = pages()
BLOCKS = [(page.name, block) for page in PAGES for block in page.blocks]
# Each command once, wherever it stands.
COMMANDS = list(dict.fromkeys(c for _, b in BLOCKS if b.kind == "sh" for c in b.commands))
SERVE = "elastic-moe serve"  # until it is stopped
PYTHON = [block.text for _, block in BLOCKS if block.kind == "python"]
SNIPPETS = [text for text in PYTHON if "def test_" not in text]
TEST_FILES = [text for text in PYTHON if "def test_" in text]
SCRIPTS = [block.text for _, block in BLOCKS if block.kind == "bash"]
SCIENCE, PERFORMANCE = read("docs/science.md"), read("docs/performance.md")


SWEEP: dict[str, Any] = json.loads(
    (RESULTS / "sweep-elastic-mini.json").read_text(encoding="utf-8")
)


def environment() -> dict[str, str]:
    """The commands of this environment first on the path, as after its activation."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def test_the_pages_have_their_snippets() -> None:
    found = sorted(name for name, block in BLOCKS if block.kind == "python")
    assert found == ["README.md", "docs/engine.md", "docs/routing.md", "docs/server.md"]
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_wrap_at_100_columns(page: Page) -> None:
    """Tables, pictures and code aside."""
    lines = [line for line in page.prose.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not c.startswith("make ") and c != SERVE]
)
def test_commands_run_as_written(command: str, tmp_path: Path) -> None:
    done = run(["bash", "-c", command], tmp_path)
    assert done.stdout.strip()


@pytest.mark.slow
def test_make_sweep_prints_the_frontier_and_writes_its_files(tmp_path: Path) -> None:
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("no .venv made by make: `make sweep` would build one; run `make test`")
    done = run(["make", "sweep", f"ARGS=--quick --out {tmp_path}"], ROOT)
    assert "Frontier of elastic-mini on python-language-reference" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.json", "frontier.png", "report.html"}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run_as_written(snippet: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if "http:" in snippet:  # what it talks to; another program may have its port
            assert SERVE in COMMANDS
            command = [*SERVE.split(), "--port", "0"]
            server = stack.enter_context(
                subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
            )
            stack.callback(server.terminate)
            assert server.stderr is not None
            url = server.stderr.readline().split(" on ")[1].strip()
            assert "http://127.0.0.1:8000/v1" in snippet
            snippet = snippet.replace("http://127.0.0.1:8000/v1", url)
        done = run([sys.executable, "-c", snippet], tmp_path)
    assert "L24-k2" in done.stdout


def test_the_test_file_has_ten_lines_and_passes(tmp_path: Path) -> None:
    (text,) = TEST_FILES
    assert len([line for line in text.splitlines() if line]) <= 10
    assert set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)) == {
        "elastic_moe",
        "openai",
    }
    (tmp_path / "test_ask.py").write_text(text, encoding="utf-8")
    done = run([sys.executable, "-m", "pytest", "--strict-config"], tmp_path)
    assert " 2 passed" in done.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_script_for_other_languages_runs_as_written(tmp_path: Path) -> None:
    """It meets the fault that it asked for, and reads so in the record."""
    (text,) = SCRIPTS
    done = run(["bash", "-ec", text], tmp_path)
    _, refused, record = done.stdout.replace("}{", "}\n{").splitlines()
    assert json.loads(refused)["error"]["code"] == "injected"
    (one,) = json.loads(record)["requests"]
    assert (one["path"], one["status"]) == ("/v1/models", 429)


def test_the_numbers_of_its_table_are_those_of_the_committed_sweep() -> None:
    points = {point["name"]: point for point in SWEEP["points"]}
    text = read("docs/sweep.md").text
    rows = re.findall(r"^\| `(\S+)` \| (\d+%.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 5
    for name, cells in rows:
        p = points[name]
        assert cells.split(" | ") == [
            f"{p['flops_per_token'] / points['full']['flops_per_token']:.0%}",
            f"{p['bits_per_byte']:.3f}",
            f"{p['delta_nats']:+.3f} ± {p['standard_error']:.3f}",
            f"{p['top1_agreement']:.0%}",
        ]


def test_the_speeds_it_shows_are_those_of_the_committed_rounds() -> None:
    """Medians over the rounds: tokens per second, and ours as a share of the limit."""
    path = RESULTS / "peers.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    records = {record["case"]: record for record in map(json.loads, lines)}
    for case, title, tokens in (
        ("prefill512", "prefill, 512 tokens", 512),
        ("decode1", "decode, 1 sequence", 1),
        ("decode16", "decode, 16 sequences", 16),
    ):
        rounds = records[case]["rounds"]
        transformers = [name for name in rounds[0]["seconds"] if name.startswith("transformers")]
        cells = []
        for names in (["ours"], transformers, ["llama.cpp bf16"]):
            rates = (tokens / min(r["seconds"][name] for name in names) for r in rounds)
            cells.append(f"{statistics.median(rates):,.0f}")
        work, limit = (
            ("flops", "matmul_flops_per_second")
            if case == "prefill512"
            else ("touched_bytes", "read_bytes_per_second")
        )
        share = statistics.median(r[work] / r["seconds"]["ours"] / r[limit] for r in rounds)
        row = " | ".join([title, *cells, f"{share:.0%}"])
        assert f"| {row} |" in PERFORMANCE.flat, row
    savings = [bar["median"] for bar in records["saving"]["bars"]]
    assert f"save {min(savings):.0%} to {max(savings):.0%} of" in PERFORMANCE.flat
    mini = records["mini"]["rounds"]
    assert (
        f"takes {statistics.median(r['seconds']['ours'] for r in mini) * 1e6:.0f} µs"
        in PERFORMANCE.flat
    )
    times = statistics.median(
        min(s for name, s in r["seconds"].items() if name != "ours") / r["seconds"]["ours"]
        for r in mini
    )
    assert f"{times:.0f} times less than the fastest" in PERFORMANCE.flat
    assert f"of {len(mini)} alternating rounds" in PERFORMANCE.flat


def test_the_engines_figures_are_those_of_the_committed_rounds() -> None:
    """Medians over the rounds."""
    path = RESULTS / "peers.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    records = {record["case"]: record for record in map(json.loads, lines)}

    def median(name: str) -> float:
        return float(statistics.median(r["other"][name] for r in records["load"]["rounds"]))

    for count in (1, 4, 16, 64):
        first, further = (median(f"{count} {t}_seconds") * 1e3 for t in ("ttft", "tpot"))
        rate = median(f"{count} tokens_per_second")
        assert f"| {count} | {rate:.0f} | {first:,.0f} ms | {further:.0f} ms |" in PERFORMANCE.flat
    mixed = [records[f"mix {axis}"]["bars"][0]["median"] for axis in ("k", "width", "depth")]
    assert f"take {min(mixed):.0%} to {max(mixed):.0%} of the time per byte" in PERFORMANCE.flat
    whole, half = (bar["median"] for bar in records["prefix"]["bars"])
    assert f"brings the first token {whole:.0f} times" in PERFORMANCE.flat
    assert f"and {half:.0f} times for half the depth" in PERFORMANCE.flat


def test_the_servers_figures_are_those_of_the_committed_results() -> None:
    """Medians over the rounds, of every run that is committed last."""
    results = RESULTS

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (results / name).read_text("utf-8").splitlines()]

    cases = {record["case"]: record for record in read("serving.jsonl")}
    flat = PERFORMANCE.flat
    share = cases["throughput-16"]["bars"][0]["median"]
    rate = cases["throughput-16"]["http_tokens_per_second"]["median"]
    assert f"HTTP gives {share:.0%} of the engine's own throughput" in flat
    assert f"{rate:.0f} tokens a second" in flat
    cpu = {n: v["median"] * 1e6 for n, v in cases["cpu-per-token"]["seconds_per_token"].items()}
    assert f"is {cpu['16']:.0f} us at 16 streams and {cpu['64']:.0f} us at 64" in flat
    assert f"but {cpu['1']:.0f} us when there is one stream alone" in flat
    assert f"comes {cases['first-token']['seconds']['median']:.1f} s after the command" in flat
    soak = cases["soak-200-clients"]
    assert soak["idle"]["unfinished"] == soak["idle"]["used_blocks"] == 0
    assert f"{soak['clients']} clients at once, of which {soak['left'] / 1000:.0%} leave" in flat
    checks = read("interop.jsonl")
    passed = sum(not check["failed"] for check in checks)
    assert f"pass {passed} of {len(checks)} checks" in flat


def test_what_it_says_of_elasticity_is_what_the_committed_results_say() -> None:
    results = RESULTS
    summary = read_summary(results / "science.jsonl")
    assert summary is not None
    for row in science_table(summary, "python-language-reference").splitlines():
        assert f"{row}\n" in SCIENCE.text
    flat = SCIENCE.flat
    words = [w for w in science_words(summary) if not w.startswith("Undecided")]
    for family in ("Elasticity", "Frugal elasticity"):
        assert sum(word.startswith(f"{family} costs the full network") for word in words) == 2
    for word in words:
        assert word in flat
    at = [text["points"] for text in summary["texts"].values()]
    sds = [p[point]["elastic_gain"]["in_seed_sds"] for p in at for point in BETTER_AT]
    assert f"better by {math.floor(min(sds))} to {math.ceil(max(sds))} seed standard devia" in flat
    sds = [p[point]["frugal_gain"]["in_seed_sds"] for p in at for point in BETTER_AT]
    assert f"frugal by {math.floor(min(sds))} to {math.ceil(max(sds))} (bar" in flat
    nats = {
        name: [p[name]["elastic"]["mean"] - p[name]["frugal"]["mean"] for p in at]
        for name in ("full", *BETTER_AT)
    }
    saved = {f"{more:.2f}" for more in nats["full"]}
    assert len(saved) == 1
    assert f"saves the full one {saved.pop()} nats on either text" in flat
    dearer = [-more for point in BETTER_AT for more in nats[point]]
    assert f"pools and widths {min(dearer):.2f} to {max(dearer):.2f}." in flat
    assert all(abs(p["k2"]["elastic_gain"]["in_seed_sds"]) < 1 for p in at)  # equally good
    assert all(p["k1"]["elastic_gain"]["in_seed_sds"] > 2 for p in at)
    gaps = [p[point]["specialist_gain"]["mean"] for p in at for point in ("L9", "p8")]
    assert f"elastic network, by {min(gaps):.1f} to {max(gaps):.1f} nats" in flat
    for family in ("elastic", "frugal"):
        costs = {
            name: -text["points"]["full"][f"{family}_gain"]["mean"]
            for name, text in summary["texts"].items()
        }
        assert costs["python-language-reference"] > COST_ALLOWED >= costs["held-out-authors"]
    assert f"misses its bar of {COST_ALLOWED} nats on the language reference and meets it" in flat
    full = [
        json.loads(line)["texts"]["python-language-reference"]["points"]["full"]["nats_per_token"]
        for line in (results / "science.jsonl").read_text("utf-8").splitlines()
        if json.loads(line).get("family") == "inelastic"
    ]
    assert f"of the inelastic networks by {max(full) - min(full):.2f} nats" in flat
    *_, line = map(json.loads, (results / "coherence.jsonl").read_text("utf-8").splitlines())
    position, writing = line["positions"]["python-language-reference"], line["writing"]
    for name in ("L36", "L24"):
        within, beyond = (position[name][k] - position["full"][k] for k in ("within", "beyond"))
        assert re.search(rf"`{name}` {within:.2f} (nats within )?and {beyond:.2f}\b", flat)
    assert f"the full one by {position['full']['long_context']['nats']:.2f} nats" in flat
    assert min(p["long_context"]["nats"] for p in position.values()) > 0
    within, beyond = (position["k1"][k] - position["full"][k] for k in ("within", "beyond"))
    assert f"`k1` {within:.2f} and {beyond:.2f})" in flat
    first = {
        name: f"{writing[name]['divergence']['first_difference']:.1f}"
        for name in ("k2", "L36", "L12")
    }
    assert f"answers of `k2` first differ after {first['k2']} tokens in the mean" in flat
    assert f"of `L36` after {first['L36']}, of `L12` after {first['L12']}." in flat


def test_the_memory_of_loading_is_that_of_the_committed_runs() -> None:
    lines = (RESULTS / "load-memory.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    (size,) = {f"{r['checkpoint_bytes'] / 1e9:.1f} GB" for r in records}
    peaks = [r["peak_bytes"] / 1e9 for r in records]
    flat = read("docs/checkpoints.md").flat
    assert f"{size} take {min(peaks):.1f} to {max(peaks):.1f} GB" in flat


def test_the_divergence_from_llama_cpp_is_that_of_the_committed_runs() -> None:
    lines = (RESULTS / "interop-llama-cpp.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    flat = read("docs/checkpoints.md").flat
    (bound,) = re.findall(r"mean KL is below ([\d.]+) nats", flat)
    assert 0.9 * float(bound) < max(r["mean_kl"] for r in records) < float(bound)
    assert {name for name, _ in CASES} == {r["model"] for r in records}


def test_the_pages_name_every_architecture() -> None:
    rows = re.findall(r"^\| (.+) \| `(\w+)` \|$", read("docs/checkpoints.md").text, re.MULTILINE)
    titles = {family.title: model_type for model_type, family in FAMILIES.items()}
    assert {title: name for title, name in rows if name in FAMILIES} == titles
    for page in ("README.md", "CHANGELOG.md"):
        missing = [title for title in titles if title not in read(page).flat]
        assert not missing, f"{page} does not name {missing}"


def test_two_figures_for_one_thing_are_both_named() -> None:
    """The page says why they differ."""
    lines = (RESULTS / "peers.jsonl").read_text("utf-8").splitlines()
    (mini,) = [r for r in map(json.loads, lines) if r["case"] == "mini"]
    seconds = statistics.median(r["seconds"]["ours"] for r in mini["rounds"])
    (full,) = [p for p in SWEEP["points"] if p["name"] == "full"]
    flat = PERFORMANCE.flat
    assert f"which is {1 / seconds:,.0f} tokens per second" in flat
    assert f"shows {full['decode_tokens_per_second']:.0f} tokens per second" in flat
    claims, sweep = read("docs/claims.md").flat, read("docs/sweep.md").flat
    assert f"the first {SWEEP['corpus']['scored_tokens']:,} tokens" in sweep
    (scored,) = re.findall(r"figures are over ([\d,]+) scored tokens", claims)
    assert f"[Claims](claims.md) scores {scored} tokens" in sweep


def test_the_table_of_sources_names_machine_and_commit_of_every_result_file() -> None:
    """Dates are those of the commits, where the history has them."""
    rows = re.findall(
        r"^\| \[(\S+)\]\(\S+\) \| .* \| (.*) \| (.*) \|$", PERFORMANCE.text, flags=re.MULTILINE
    )
    figures = {path.name for path in RESULTS.iterdir() if path.suffix in {".json", ".jsonl"}}
    assert {name for name, *_ in rows} == figures - {"elastic-mini-first.jsonl"}
    for name, machine, commit in rows:
        text = (RESULTS / name).read_text("utf-8")
        lines = [text] if name.endswith(".json") else text.splitlines()
        records = [json.loads(line) for line in lines]
        machines = [r["machine"] for r in records if "machine" in r]
        described = [f"{m['cpu']}, {m['cores']} cores, {m['isa']}" for m in machines]
        assert machine == "; ".join(dict.fromkeys(described))
        commits = dict.fromkeys(r["commit"][:7] for r in records if r.get("commit"))
        named = re.findall(r"([0-9a-f]{7}) \((\d{4}-\d{2}-\d{2})\)", commit)
        if commits:
            assert [sha for sha, _ in named] == list(commits)
        else:
            assert commit.startswith("not recorded")
        for sha, date in named:
            done = subprocess.run(
                ["git", "show", "--no-patch", "--format=%cs", sha],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode or done.stdout.strip() == date, sha
