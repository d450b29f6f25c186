"""What images without labels can do for a student: least squares, batch-norm statistics, polish."""

from convsurgeon.calibration._calibrate import calibrate, calibrate_and_report, refuse_calibration
from convsurgeon.calibration._images import refuse_few
from convsurgeon.calibration._polish import Polish
from convsurgeon.calibration._result import CalibrationResult, PolishRun, SiteFit, Stage

__all__ = [
    "CalibrationResult",
    "Polish",
    "PolishRun",
    "SiteFit",
    "Stage",
    "calibrate",
    "calibrate_and_report",
    "refuse_calibration",
    "refuse_few",
]
