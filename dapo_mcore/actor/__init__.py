"""The policy under Megatron-Core: process groups, model, packing, schedule, loss head, optimizer."""

from dapo_mcore.platform import adapt_megatron

adapt_megatron()  # before any module of this package imports megatron
