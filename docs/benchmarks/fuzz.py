"""Mutated files against the loaders and the plan parser: nothing but one-line refusals may come out.

    python docs/benchmarks/fuzz.py --cases 100000 --write docs/benchmarks/fuzz.md
    python docs/benchmarks/fuzz.py --coverage-guided 300      # atheris, seconds; pip install atheris

Five kinds of valid files are mutated: a pickled module, a state dict (both as archives of `torch.save`, and
the state dict in the format from before 1.6), a student in safetensors, an exported program, and a plan in JSON. Half
of the mutations are of bytes, anywhere. The other half get past the header: opcodes and strings inside of the pickle,
with the archive put together again; fields of the JSON in a student's header, in a program's graph or in a plan, with
the lengths put right.

Every case runs in a process whose memory is limited; one that dies is counted, and the case is kept.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from fuzz_mutations import around, core_of, mutate
from torch import nn

from convsurgeon import storage
from convsurgeon.errors import ConvSurgeonError
from convsurgeon.record import update_record
from convsurgeon.storage import _pickles, _program_archive, _students
from convsurgeon.surgery import Plan, plan, rewrite

KINDS = ("module", "state dict", "old state dict", "student", "program", "plan")
MEMORY = 2_000  # MB a process may take beyond what it has
PREFACE = """\
Valid files are changed and given to what reads them: `storage.load` for a pickled module, for a student in
safetensors and for an exported program (`.pt2`), `storage.load(..., weights=...)` for a state dict, in today's format
of `torch.save` and in the one from before 1.6, and `Plan.from_json` for a plan. Half of the changes are of bytes. The
other half keep the file whole: opcodes and values inside of the pickle with the archive put together again, values in
the JSON of a student's header, record and layout, of a program's graph, or of a plan. A case passes if the file loads
or is refused in one printable line by an error of convsurgeon's own. A traceback, a warning, more than 30 seconds and
more than 2 GB beyond what the imports take all count as tracebacks. *Past the header* are the files whose
pickle, record, graph or JSON was read at all. *Peak* is of the whole process, most of it torch itself."""
GUIDED = "## Coverage-guided"  # from here on the page stays as it is
SLOW = 30  # seconds for one file, on a machine that does other things too


def make_seeds(folder: Path) -> dict[str, bytes]:
    """Return one valid file of each kind, as bytes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2)
    )
    model(torch.zeros(2, 3, 8, 8))
    model[3].to(memory_format=torch.channels_last)
    update_record(model, source={"file": "net.pt"}, input_shape=[1, 3, 8, 8], classes=["a", "b"])
    seeds = {}
    for name, value, new in (
        ("module", model, True),
        ("state dict", model.state_dict(), True),
        ("old state dict", model.state_dict(), False),
    ):
        torch.save(value, folder / "seed.pt", _use_new_zipfile_serialization=new)
        seeds[name] = (folder / "seed.pt").read_bytes()
    donor = storage.load("torchvision:squeezenet1_1", model_args={"num_classes": 2})
    donor.half()
    the_plan = plan(donor, "group", options={"groups": 2}, only=["features.3.*", "features.4.*"])
    path = storage.save(rewrite(donor, the_plan), folder / "seed.safetensors")
    seeds["student"] = path.read_bytes()
    model.to(memory_format=torch.contiguous_format)
    path = storage.save(model.eval(), folder / "seed.pt2", example_inputs=torch.zeros(1, 3, 8, 8))
    seeds["program"] = path.read_bytes()
    seeds["plan"] = the_plan.to_json().encode()
    return seeds


@contextlib.contextmanager
def noticing(stages: collections.Counter[str]) -> Iterator[None]:
    """Count how many files got past their header: the functions behind it are entered."""
    watched: list[tuple[Any, str]] = [
        (_pickles, "proofread_archive"),
        (_pickles, "proofread_legacy"),
        (_students, "_parse"),
        (_program_archive, "clean_program"),
    ]
    originals = [getattr(module, name) for module, name in watched]

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            stages["past the header"] += 1
            return original(*args, **options)

        return call

    for (module, name), original in zip(watched, originals, strict=True):
        setattr(module, name, counting(original))
    try:
        yield
    finally:
        for (module, name), original in zip(watched, originals, strict=True):
            setattr(module, name, original)


def consume(kind: str, data: bytes, path: Path, stages: collections.Counter[str]) -> None:
    """Give a file to what reads its kind.

    Raises:
        Exception: for anything but success or a one-line refusal.
    """
    so_far = stages["past the header"]
    if kind == "plan":
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(data)
            stages["past the header"] += 1
    else:
        path.write_bytes(data)
    try:
        if kind == "plan":
            read = Plan.from_json(data.decode("utf-8", "replace"))
            assert Plan.from_json(read.to_json()) == read
            read.to_json().encode()
        elif kind in ("module", "student", "program"):
            storage.load(path)
        else:
            storage._weights.read_weights(path, trust=False, trust_modules=())
        stages["loaded"] += 1
    except ConvSurgeonError as error:
        message = str(error)
        assert message.isprintable(), f"not one line: {message!r}"
        assert len(message) < 1500, f"too long: {message}"
        stages[type(error).__name__] += 1
    finally:
        # a program holds a pickle, too
        stages["past the header"] = min(stages["past the header"], so_far + 1)


Result = tuple[str, str, dict[str, int], list[tuple[int, str]]]


def run_cases(seeds: dict[str, bytes], kind: str, numbers: range, memory: int = MEMORY) -> Result:
    """Run numbered cases in a process of their own; return how many got how far, and the failures by number."""
    torch.set_num_threads(1)
    _limit_memory(memory)
    with tempfile.TemporaryDirectory() as folder:
        return run_in_process(seeds, kind, numbers, Path(folder))


def run_in_process(seeds: dict[str, bytes], kind: str, numbers: range, folder: Path) -> Result:
    """Run numbered cases here."""
    stages: collections.Counter[str] = collections.Counter()
    failures: list[tuple[int, str]] = []
    with noticing(stages):
        for number in numbers:
            how, data = mutate(kind, seeds[kind], random.Random(f"{kind} {number}"))
            stages[how] += 1
            start = time.monotonic()
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    consume(kind, data, folder / "case.pt", stages)
                assert not said, f"a warning: {said[0].message}"
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                failures.append((number, "".join(traceback.format_exception(error)[-4:])))
            if time.monotonic() - start > SLOW:
                failures.append((number, f"took {time.monotonic() - start:.0f} s"))
    stages["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    return kind, f"{numbers.start}-{numbers.stop}", dict(stages), failures


def _limit_memory(megabytes: int) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + megabytes * 10**6, most))


def run_all(cases: int, workers: int, chunk: int = 500) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Run all cases, the kinds in turn, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder))
    share = cases // len(KINDS)
    jobs = [(seeds, kind, range(at, min(at + chunk, share))) for at in range(0, share, chunk) for kind in KINDS]
    totals: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    failures: list[str] = []
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=4) as pool:
        for job, pending in [(job, pool.apply_async(run_cases, job)) for job in jobs]:
            try:
                kind, _, stages, failed = pending.get(timeout=3600)
            except multiprocessing.TimeoutError:
                failures.append(f"{job[1]} {job[2]}: a case hung, or its process died")
                continue
            peak = max(totals[kind]["peak MB"], stages.pop("peak MB"))
            totals[kind].update(stages)
            totals[kind]["peak MB"] = peak
            failures += [f"{kind} {number}: {text}" for number, text in failed]
            done = sum(total["bytes"] + total["structure"] for total in totals.values())
            print(f"{done} of {cases}, {len(failures)} failures", file=sys.stderr, flush=True)
    return totals, failures


def run_guided(seconds: int) -> None:
    """Let atheris look for inputs; what it needs to know of the code it learns by instrumenting it."""
    import atheris

    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder))
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, kind in enumerate(KINDS):
            (corpus / str(number)).write_bytes(bytes([number]) + core_of(kind, seeds[kind]))
        stages: collections.Counter[str] = collections.Counter()

        def test(data: bytes) -> None:
            if not data:
                return
            kind = KINDS[data[0] % len(KINDS)]
            stages["runs"] += 1
            if stages["runs"] % 1000 == 0:  # libFuzzer ends the process when the time is over
                print(dict(stages), flush=True)
            consume(kind, around(kind, data[1:], seeds[kind]), Path(folder) / "case.pt", stages)

        for function in _functions_under("convsurgeon.storage", "convsurgeon.surgery", "torch._weights_only_unpickler"):
            atheris.instrument_func(function)
        atheris.Setup(
            [sys.argv[0], f"-max_total_time={seconds}", "-max_len=8192", "-rss_limit_mb=4000", str(corpus)], test
        )
        with noticing(stages):
            atheris.Fuzz()


def _functions_under(*prefixes: str) -> Iterator[FunctionType]:
    """Yield the functions and methods of all modules that are loaded from there."""
    for name, module in list(sys.modules.items()):
        if name.startswith(prefixes):
            for value in list(vars(module).values()):
                for member in [value, *(vars(value).values() if isinstance(value, type) else ())]:
                    if isinstance(member, FunctionType) and member.__module__ == name:
                        yield member


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--coverage-guided", type=int, metavar="SECONDS")
    parser.add_argument("--write", type=Path, help="write the result as Markdown")
    options = parser.parse_args()
    if options.coverage_guided:
        run_guided(options.coverage_guided)
        return
    start = time.monotonic()
    totals, failures = run_all(options.cases, options.workers)
    text = report(totals, failures, options.cases, time.monotonic() - start)
    print(text)
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.write:
        before = options.write.read_text() if options.write.exists() else ""
        _, found, guided = before.partition(GUIDED)
        options.write.write_text(text + "\n" + found + guided if found else text)
    sys.exit(bool(failures))


def report(totals: dict[str, collections.Counter[str]], failures: list[str], cases: int, seconds: float) -> str:
    """Return the result as Markdown."""
    rows = [
        f"| {kind} | {total['bytes']} | {total['structure']} | {total['past the header']} | {total['loaded']} "
        f"| {sum(failure.startswith(kind + ' ') for failure in failures)} | {total['peak MB']} |"
        for kind, total in totals.items()
    ]
    command = " ".join(["python docs/benchmarks/fuzz.py", *sys.argv[1:]])
    return "\n".join(
        [
            "# Fuzzing",
            "",
            PREFACE,
            "",
            f"`{command}`: **{cases:,} files, {len(failures)} tracebacks**, "
            f"{seconds / 60:.0f} minutes ({platform.machine()}, Python {platform.python_version()}, "
            f"torch {torch.__version__.partition('+')[0]}). Case n of a kind of file has the seed `KIND n`.",
            "",
            "| file | bytes changed | structure changed | past the header | loaded | tracebacks | peak MB |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
