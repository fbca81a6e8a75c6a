"""What calibration sees: running statistics, histograms, search windows."""
