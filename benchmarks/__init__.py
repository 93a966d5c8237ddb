"""Speed and calibration scripts, run by hand."""
