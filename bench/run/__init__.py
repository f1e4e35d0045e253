"""The main job: prompts through policies, what `kvpress run` does."""
