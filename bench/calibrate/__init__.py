"""Finding what sparse prompt attention needs to know of a model."""
