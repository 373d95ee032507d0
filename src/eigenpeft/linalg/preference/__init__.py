"""The mathematics of preferences: objective, joint fit, users, heads, calibration."""
