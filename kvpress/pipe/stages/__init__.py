"""A file for each stage, which asks one method of a policy. No stage imports another one."""
