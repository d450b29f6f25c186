"""A student becomes an ONNX file that is proven equal to it, and is timed.

`export` writes a file only after onnxruntime has agreed with PyTorch; `measure_latency` times
files against one another; `session` opens one as both of them do.
"""

from convsurgeon.delivery._comparison import Comparison, Side, compare
from convsurgeon.delivery._export import Delivery, export
from convsurgeon.delivery._freeze import Frozen
from convsurgeon.delivery._latency import Latency, measure_latency, ratio
from convsurgeon.delivery._parity import Parity
from convsurgeon.delivery._session import read_metadata, session

__all__ = [
    "Comparison",
    "Delivery",
    "Frozen",
    "Latency",
    "Parity",
    "Side",
    "compare",
    "export",
    "measure_latency",
    "ratio",
    "read_metadata",
    "session",
]
