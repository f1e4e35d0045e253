"""Tables and pictures of the README and of docs/, from `bench/results` and from the sources."""
