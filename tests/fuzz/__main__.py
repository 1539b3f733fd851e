"""Coverage-guided fuzzing, for faults that random inputs miss. Requires the group ``fuzz``.

    python tests/fuzz codec --seconds 300      one target
    python tests/fuzz --seconds 300            all of them, one after the other
    python tests/fuzz codec --input FILE       run one input again

A failure does not end a run. Each kind is printed once, with the file that holds its input. The
exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def main() -> int:
    """Read the command line, and run each target in a separate process."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=300, help="for each target")
    parser.add_argument("--found", type=Path, default=Path("fuzz-findings"), help="for inputs")
    parser.add_argument("--input", type=Path, help="run this input and no other")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.input is not None:
        run_input(options.targets[0], options.input)
        return 0
    if options.child:
        fuzz(options.targets[0], options.seconds, options.found)
    from fuzz_targets import TARGETS

    broken = 0
    for name in options.targets or TARGETS:
        command = [sys.executable, str(HERE), name, "--child", "--seconds", str(options.seconds)]
        run = subprocess.run(
            [*command, "--found", str(options.found)], stderr=subprocess.PIPE, text=True
        )
        done = re.search(r"Done (\d+) runs in (\d+) second", run.stderr)
        found = len(re.findall(r"^FINDING ", run.stderr, re.MULTILINE))
        covered = re.findall(r"cov: (\d+)", run.stderr)
        if done is None or found:
            print(re.sub("^(INFO|#).*\n", "", run.stderr, flags=re.MULTILINE), file=sys.stderr)
        counts = f"{done[1]} runs in {done[2]} s" if done else f"ended with {run.returncode}"
        print(f"{name}: {counts}, coverage {(covered or ['?'])[-1]}, {found} findings", flush=True)
        broken += found or done is None
    return 1 if broken else 0


def run_input(name: str, path: Path) -> None:
    """Run one input without catching anything."""
    from fuzz_targets import TARGETS

    with TARGETS[name].open() as run:
        run(path.read_bytes())


def fuzz(name: str, seconds: int, found: Path) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["cloudinary_analyze"]):
        from fuzz_targets import TARGETS

    target = TARGETS[name]
    known: set[tuple[str, ...]] = set()
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = work / "corpus"
    corpus.mkdir()
    found.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    words = work / "words"
    words.write_text(
        "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words)
    )
    with target.open() as run:

        def run_one(data: bytes) -> None:
            try:
                run(data)
            except BaseException as error:  # report each kind once and continue
                frames = traceback.extract_tb(error.__traceback__)
                place = tuple(f"{frame.filename}:{frame.lineno}" for frame in frames[-4:])
                if (type(error).__name__, *place) in known:
                    return
                known.add((type(error).__name__, *place))
                path = found / f"{name}-{len(known)}"
                path.write_bytes(data)
                print(f"FINDING {path}", file=sys.stderr)
                traceback.print_exc(limit=-8)

        options = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=3000"]
        options += [f"-artifact_prefix={found}/{name}-", "-max_len=8192"]
        options += [f"-dict={words}"] if target.words else []
        atheris.Setup([sys.argv[0], *options, str(corpus)], run_one)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
