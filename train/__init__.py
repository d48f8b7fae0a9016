"""Fine-tuning of real pretrained transformers: `python -m train`."""
