"""The policies: one file each, loaded by name. See CONTRIBUTING.md for the recipe."""
