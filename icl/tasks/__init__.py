"""What the model is asked: task vectors, prompts, and prompts unlike those it was trained on."""
