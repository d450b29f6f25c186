"""Fashion-MNIST: what each op and each method make of a ResNet-20, after a few epochs.

    python docs/benchmarks/fashion_mnist.py

trains the teacher (once; it is kept), then every row of the grid that is not in the results yet, and
appends one JSON line a row, so it can be stopped and started again at any time. Hours on two cores.
The table comes from `--table`, which trains nothing.

The test set is looked at once a network, at the end; students are chosen on validation data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import convsurgeon as cs
from convsurgeon.data import DataSplits, load_data
from convsurgeon.distillation import Augmentation
from convsurgeon.surgery import count_macs, count_params

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))
from resnet import resnet20

TEACHER_EPOCHS, STUDENT_EPOCHS = 14, 2
IMAGE = torch.zeros(1, 1, 28, 28)
HERE = Path(__file__).parent


def grid() -> Iterator[dict[str, Any]]:
    """The rows: two ops with three seeds, the other two with one, both methods in turn; the paper's method once."""
    for seed in (0, 1, 2):
        for op in ("depthwise", "shift") if seed else ("depthwise", "shift", "group", "bsconv"):
            for method in ("joint", "frozen"):
                yield {"op": op, "method": method, "seed": seed}
        if seed == 0:
            yield {"op": "depthwise", "method": "ensemble", "seed": 0}
    yield {"op": "group", "method": "joint", "seed": 1}  # a second look at the row that came out odd


def train_teacher(data: DataSplits, folder: Path) -> torch.nn.Module:
    """Return the dense ResNet-20, trained from labels; from its file where there is one."""
    torch.manual_seed(0)
    net = resnet20(in_channels=1)
    file = folder / "teacher.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "teacher"
    result = cs.distill(
        None,
        net,
        data.train,
        data.val,
        method="supervised",
        epochs=TEACHER_EPOCHS,
        augmentation=Augmentation.usual((28, 28), flip=True),
        run_dir=run,
        resume=(run / "config.json").exists(),
    )
    torch.save(result.student.state_dict(), file)
    return result.student


def measure(row: dict[str, Any], teacher: torch.nn.Module, data: DataSplits, *, folder: Path) -> dict[str, Any]:
    """Convert, distil and test once."""
    student = cs.rewrite(teacher, row["op"])
    run = folder / f"{row['op']}.{row['method']}.{row['seed']}"
    result = cs.distill(
        teacher,
        student,
        data.train,
        data.val,
        method=row["method"],
        epochs=STUDENT_EPOCHS,
        seed=row["seed"],
        run_dir=run,
        resume=(run / "config.json").exists(),
        augmentation=Augmentation.usual((28, 28), flip=True),
    )
    score = cs.evaluate(result.student, data.test, teacher=teacher)
    ended = cs.evaluate(result.teacher, data.test).accuracy if result.teacher is not None else None
    return {
        **row,
        "epochs": STUDENT_EPOCHS,
        "closed_form": cs.evaluate(student, data.test).accuracy,
        "student": score.accuracy,
        "agreement": score.agreement,
        "teacher_given": cs.evaluate(teacher, data.test).accuracy,
        "teacher_ended": ended,
        "chosen": result.metrics["chosen"],
        "params": count_params(student),
        "macs": count_macs(student, IMAGE).true,
        "precision": result.metrics["precision"],
        "threads": torch.get_num_threads(),
        "minutes": round(result.metrics["seconds"] / 60, 1),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the means over seeds as a Markdown table; accuracies in %, with lowest and highest."""
    print("| op | method | seeds | closed form | student | teacher as given | teacher as it ended | params | MACs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for op, method in dict.fromkeys((row["op"], row["method"]) for row in rows):
        some = [row for row in rows if (row["op"], row["method"]) == (op, method)]
        ended = spread([row["teacher_ended"] for row in some if row["teacher_ended"] is not None])
        print(
            f"| {op} | {method} | {len(some)} | {100 * some[0]['closed_form']:.1f} "
            f"| {spread([row['student'] for row in some])} | {100 * some[0]['teacher_given']:.2f} | {ended} "
            f"| {some[0]['params']:,} | {some[0]['macs'] / 1e6:.2f} M |"
        )


def spread(values: list[float]) -> str:
    """Mean in %, and lowest to highest where there are several."""
    if not values:
        return "–"
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.2f}–{100 * max(values):.2f})"


def main() -> None:
    """Fill the results file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"), help="where the teacher is kept")
    parser.add_argument("--results", type=Path, default=HERE / "fashion_mnist.jsonl")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--part", default="1/1", help="which share of the rows, as 1/2 and 2/2 for two processes")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of this process")
    parser.add_argument("--table", action="store_true", help="print the table of the results; train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        data = load_data("fashion-mnist", root=args.data_root)
        teacher = train_teacher(data, args.runs)
        part, parts = map(int, args.part.split("/"))
        for row in list(grid())[part - 1 :: parts]:
            done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
            if any(all(there[key] == value for key, value in row.items()) for there in done):
                continue
            result = measure(row, teacher, data, folder=args.runs)
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    print_table([json.loads(line) for line in args.results.read_text().splitlines()])


if __name__ == "__main__":
    main()
