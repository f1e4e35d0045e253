"""What all measurements share: models, texts, candidates, clocks, files."""
