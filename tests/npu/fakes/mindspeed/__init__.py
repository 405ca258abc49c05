"""Stands for MindSpeed core_r0.16.0 over the CPU: the layout, the order of things and its traps, as errors."""

__version__ = "0.12.1"
