"""Does the server work with the clients that people use?

    python -m tests.interop.run [--peers openai-2,openai-3,lm-eval,schemathesis] [--out FILE]

Makes an environment for each peer, starts servers, lets the peer ask them, and compares what comes
back with what the engine itself says. Prints and writes one JSON line per check; exits with 1 if
one failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elastic_moe.files import write_text
from elastic_moe.lab.provenance import describe_provenance, describe_versions
from tests.interop.environments import environment, version
from tests.interop.fuzz_peer import check_fuzz
from tests.interop.lm_eval_peer import check_lm_eval
from tests.interop.openai_checks.peer import check_openai

Check = Callable[[Path, Path], Iterator[dict[str, Any]]]
# Environment -> the package that it is about, and its checks.
PEERS: dict[str, tuple[str, Check]] = {
    "openai-2": ("openai", check_openai),
    "openai-3": ("openai", check_openai),
    "lm-eval": ("lm_eval", check_lm_eval),
    "schemathesis": ("schemathesis", check_fuzz),
}


def run_peer(peer: str, work: Path) -> Iterator[dict[str, Any]]:
    """Every line of one peer."""
    package, check = PEERS[peer]
    python = environment(peer)
    about = {
        **describe_provenance(),
        "versions": {**describe_versions(), package: version(python, package)},
    }
    folder = work / peer
    folder.mkdir()
    for line in check(python, folder):
        yield {"benchmark": "interop", "peer": peer, **line, **about}


def kept(out: Path | None, peers: list[str]) -> list[str]:
    """Lines of the peers that are not asked this time."""
    if out is None or not out.exists():
        return []
    lines = out.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["peer"] not in peers]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the results to this .jsonl file")
    args = parser.parse_args()
    peers = args.peers.split(",")
    for unknown in sorted(set(peers) - PEERS.keys()):
        parser.error(f"there is no peer {unknown}; there are {', '.join(PEERS)}")
    lines, failed = kept(args.out, peers), 0
    work = Path(tempfile.mkdtemp(prefix="elastic-moe-interop-"))
    for peer in peers:
        for line in run_peer(peer, work):
            lines.append(json.dumps(line))
            failed += bool(line["failures"])
            state = "FAILED" if line["failures"] else "passed"
            print(f"{state} {peer}: {line['check']} ({line['passed']} of {line['cases']})")
            for failure in line["failures"]:
                print(f"    {failure}")
            sys.stdout.flush()
    if args.out is not None:
        write_text(args.out, "\n".join(lines) + "\n")
    if failed:
        print(f"{failed} checks failed; what servers and peers wrote is in {work}")
        return 1
    shutil.rmtree(work)
    print(f"all {len(lines)} checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
