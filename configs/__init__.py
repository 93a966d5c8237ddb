"""Experiment files, shipped as package data."""
