"""Quality of compressed caches: tasks over long contexts, with intervals and real bytes."""
