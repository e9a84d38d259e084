"""mell-ray: serve large language models on as few GPUs as possible."""
