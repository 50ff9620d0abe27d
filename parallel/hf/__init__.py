"""What this library knows of transformers and peft: adapters, model building, Hugging Face checkpoints."""
