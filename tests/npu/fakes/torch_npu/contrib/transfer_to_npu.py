"""Importing it lets torch.cuda answer for the NPU; here for nothing, as Megatron-Core gets its own torch on a CPU."""

import warnings

warnings.filterwarnings("once")
