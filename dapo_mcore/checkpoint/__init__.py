from dapo_mcore.platform import adapt_megatron

adapt_megatron()
