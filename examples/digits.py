"""The pipeline in Python, top to bottom: train, convert, distil, evaluate, export.

    python examples/digits.py

Trains a small CNN on scikit-learn's digits (1,797 images of 8x8 pixels, inside the package), makes a
depthwise student of it, and writes student.onnx into the working directory. About a minute on one core;
the last lines print test accuracy of both and the parity of the ONNX file.
"""

import os

import torch
from torch import nn

import convsurgeon as cs
from convsurgeon.data import load_data
from convsurgeon.distillation import Augmentation

EPOCHS = 1 if os.environ.get("CONVSURGEON_EXAMPLE_FAST") else 20


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def main() -> None:
    """Run all steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_data("digits")
    image = data.train[0][0][None]
    net = nn.Sequential(
        conv(1, 32), conv(32, 32), conv(32, 64, stride=2), conv(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    settings = {"epochs": EPOCHS, "batch_size": 64, "augmentation": Augmentation(shift=1)}

    # a teacher, from labels alone
    teacher = cs.distill(None, net, data.train, data.val, method="supervised", **settings).student

    # what is there, and what would be done
    for decision in cs.plan(teacher, "depthwise", example_inputs=image).decisions:
        print(f"{decision.fqn:5} {decision.spec}: {decision.op or 'kept'} ({decision.reason})")

    # a student that starts from the dense weights, trained beside its teacher
    student = cs.rewrite(teacher, "depthwise", example_inputs=image)
    result = cs.distill(teacher, student, data.train, data.val, method="joint", **settings)

    before, after = cs.evaluate(teacher, data.test), cs.evaluate(result.student, data.test, teacher=teacher)
    print(f"test accuracy: teacher {100 * before.accuracy:.2f} %, student {100 * after.accuracy:.2f} %")
    delivery = cs.export(result.student, "student.onnx", example_inputs=image, force=True)
    print(f"{delivery.path}: {delivery.bytes / 1e3:.0f} kB, parity {delivery.parity.max_rel:.1e}")


if __name__ == "__main__":
    main()
