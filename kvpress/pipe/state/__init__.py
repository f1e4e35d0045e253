"""What a layer of a cache holds, and what its layers share."""
