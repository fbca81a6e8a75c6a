"""An OpenAI-compatible server of any checkpoint on a CPU."""
