"""An HTTP server in the form that OpenAI's clients speak, over one batcher."""
