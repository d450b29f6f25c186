"""What images without labels can do for a student: least squares, batch-norm statistics, polish."""

from convsurgeon.calibration._calibrate import CalibrationResult, SiteFit, Stage, calibrate, calibrate_and_report
from convsurgeon.calibration._polish import Polish

__all__ = ["CalibrationResult", "Polish", "SiteFit", "Stage", "calibrate", "calibrate_and_report"]
